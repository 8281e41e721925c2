"""tools/visualization/effective_receptive_field.py: fields whose extent is known."""
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cv2
import pytest
import torch
from tiny import ARCH, ROOT, Trained
from torch import Tensor, nn

from mmgroupmamba.models import GroupMamba


class Nothing(nn.Module):
    """In the place of a mixer: the block has its feed-forward only."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@pytest.fixture(scope='module')
def tool() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / 'tools/visualization'))
        yield importlib.import_module('effective_receptive_field')


def make_backbone(mixers: bool) -> GroupMamba:
    torch.manual_seed(0)
    backbone = GroupMamba(eval(ARCH)).eval().requires_grad_(False)
    if not mixers:
        for stage in backbone.stages:
            for block in stage.blocks:
                block.mixer = Nothing()
    return backbone


def extent(field: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last row, first and last column that are not zero."""
    return tuple(
        (int(index.min()), int(index.max()))
        for index in (field.sum(1).nonzero(), field.sum(0).nonzero()))


# convolutions on the way, (kernel, stride): the stem's four, then a block's; downsampling, a block
STEM = [(7, 2), (3, 1), (3, 1), (3, 2), (3, 1)]
NEXT = [(3, 2), (3, 1)]


@pytest.mark.parametrize('stage', [1, 2])
def test_convolutions_alone_have_their_own_field(tool: ModuleType, stage: int) -> None:
    radius, stride = 0, 1
    for kernel, step in STEM + (stage - 1) * NEXT:
        radius += kernel // 2 * stride
        stride *= step
    images = [torch.randn(1, 3, 96, 128) for _ in range(3)]
    field = tool.effective_receptive_field(make_backbone(False), images, stage)
    assert field.shape == (96, 128)
    rows, columns = (stride * (side // stride // 2) for side in (96, 128))
    assert extent(field) == ((rows - radius, rows + radius), (columns - radius, columns + radius))
    assert tool.mass_radius(field, 1.) <= radius * 2**0.5 + stride


def test_the_scans_reach_everywhere(tool: ModuleType) -> None:
    field = tool.effective_receptive_field(make_backbone(True), [torch.randn(1, 3, 96, 128)], 1)
    assert extent(field) == ((0, 95), (0, 127))


def test_average_over_images(tool: ModuleType) -> None:
    backbone = make_backbone(True)
    images = [torch.randn(1, 3, 32, 32) for _ in range(2)]
    single = [tool.effective_receptive_field(backbone, [image], 1) for image in images]
    both = tool.effective_receptive_field(backbone, images, 1)
    assert torch.allclose(both, (single[0] + single[1]) / 2)
    assert not torch.allclose(*single)


def test_mass_radius(tool: ModuleType) -> None:
    point = torch.zeros(9, 15)
    point[2, 11] = 5
    assert tool.centre_of_mass(point) == (2, 11)
    assert tool.mass_radius(point, 0.9) == 0
    ring = torch.zeros(21, 21)
    ring[10, 10] = 6
    for row, column in ((5, 10), (15, 10), (10, 5), (10, 15)):
        ring[row, column] = 1
    assert tool.mass_radius(ring, 0.5) == 0
    assert tool.mass_radius(ring, 0.9) == 5
    disc = (torch.hypot(*torch.meshgrid(*[torch.arange(201.) - 100] * 2, indexing='ij')) <= 80)
    assert tool.mass_radius(disc.float(), 0.5) == pytest.approx(80 * 0.5**0.5, abs=0.5)


def test_pairs(tool: ModuleType) -> None:
    assert tool.pair(['a.py', 'b.py', 'b.pth', 'c.py']) == [
        ('a.py', None), ('b.py', 'b.pth'), ('c.py', None)]
    with pytest.raises(tool.LaunchError, match='neither a config'):
        tool.pair(['a.py', 'a.pth', 'b.pth'])


def test_picture_of_an_untrained_and_a_trained_model(
        tool: ModuleType, trained, data: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture) -> None:
    run: Trained = trained('mmpretrain')
    out = tmp_path / 'field.png'
    assert tool.main([str(run.config), str(run.config), str(run.checkpoint), '--images',
                      str(data / 'folders'), '--num-images', '2', '--size', '64', '64',
                      '--stage', '2', '--out', str(out)]) == 0
    printed = capsys.readouterr().out
    assert 'stage 2, 2 images of 64x64' in printed and printed.count('50% ') == 2
    assert cv2.imread(str(out)).shape[1] > 600


@pytest.mark.parametrize('options, message', [
    (['--stage', '0'], '--stage 0: the backbone of'),
    (['--images', 'missing'], '--images missing is no folder'),
    (['--num-images', '0'], 'no image'),
])
def test_refused(tool: ModuleType, configs: dict[str, Path], data: Path, tmp_path: Path,
                 capsys: pytest.CaptureFixture, options: list[str], message: str) -> None:
    assert tool.main([str(configs['mmseg']), '--images', str(data / 'images'),
                      '--size', '64', '64', '--out', str(tmp_path / 'f.png'), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and message in error and len(error.splitlines()) == 1
