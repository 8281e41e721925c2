"""tools/visualization/scan_order.py: the paths and the response that it draws."""
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cv2
import pytest
import torch
from tiny import ARCH, ROOT

from mmgroupmamba.models import GroupMamba
from mmgroupmamba.models.layers import GROUPS


@pytest.fixture(scope='module')
def tool() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / 'tools/visualization'))
        yield importlib.import_module('scan_order')


@pytest.fixture
def backbone() -> GroupMamba:
    torch.manual_seed(0)
    return GroupMamba(eval(ARCH)).eval()


def test_paths_of_a_small_map(tool: ModuleType) -> None:
    rows = [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    columns = [[0, 0], [1, 0], [0, 1], [1, 1], [0, 2], [1, 2]]
    assert tool.scan_paths(2, 3).tolist() == [rows, columns, rows[::-1], columns[::-1]]


def test_response_shape_and_scan_restored(tool: ModuleType, backbone: GroupMamba) -> None:
    inputs = torch.randn(1, 3, 72, 40)
    response = tool.state_response(backbone, inputs, 2, 1)
    assert response.shape == (GROUPS, 9, 5)
    assert (response >= 0).all() and response.std() > 0
    assert 'scan' not in vars(backbone.stages[1].blocks[0].mixer.ssm)


@pytest.mark.parametrize('group', range(GROUPS))
def test_response_is_the_groups_own_and_without_the_skip(
        tool: ModuleType, backbone: GroupMamba, group: int) -> None:
    ssm = backbone.stages[0].blocks[0].mixer.ssm
    inputs = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        ssm.in_proj.weight.mul_(50)  # fresh weights leave 1e-6 of a response
        before = tool.state_response(backbone, inputs, 1, 1)
        noise = 1e-5 * before.amax((1, 2), keepdim=True)
        ssm.D.mul_(3)
        assert ((tool.state_response(backbone, inputs, 1, 1) - before).abs() < noise).all()
        ssm.x_proj.weight[group, -ssm.d_state:] = 0  # C of one group
        change = (tool.state_response(backbone, inputs, 1, 1) - before).abs()
    assert before.amax((1, 2)).min() > 1e-3
    others = [g for g in range(GROUPS) if g != group]
    assert (change[others] < noise[others]).all()
    assert ((change[group] - before[group]).abs() < noise[group]).all()


def test_response_lies_on_the_map(tool: ModuleType, backbone: GroupMamba) -> None:
    """One token that is not zero answers itself and what its group reads after it."""
    ssm = backbone.stages[0].blocks[0].mixer.ssm
    impulse = torch.zeros(1, 4, 5, GROUPS, ssm.dim)
    row, column = 2, 3
    impulse[0, row, column] = 1
    with torch.no_grad():
        # C is zero where the token is not, so only the impulse's own place can answer
        answered = ssm.scan(impulse.flatten(-2))[0].abs().sum(-1) > 0
    places = torch.zeros(4, 5, GROUPS, dtype=torch.bool)
    places[row, column] = True
    assert torch.equal(answered, places)


def test_picture(tool: ModuleType, configs: dict[str, Path], tmp_path: Path,
                 capsys: pytest.CaptureFixture) -> None:
    image = ROOT / 'docs/images/demo_detection.jpg'
    out = tmp_path / 'new/order.png'
    assert tool.main([str(configs['mmdet']), '--image', str(image), '--size', '64', '96',
                      '--stage', '2', '--out', str(out)]) == 0
    assert cv2.imread(str(out)).shape[0] > 300
    assert 'columns backward' in capsys.readouterr().out


@pytest.mark.parametrize('options, message', [
    (['--stage', '5'], '--stage 5: the backbone has stages 1 to 4'),
    (['--block', '2'], '--block 2: stage 1 has blocks 1 to 1'),
    (['--image', 'missing.png'], 'image missing.png does not exist'),
])
def test_refused(tool: ModuleType, configs: dict[str, Path], data: Path, tmp_path: Path,
                 capsys: pytest.CaptureFixture, options: list[str], message: str) -> None:
    out = tmp_path / 'order.png'
    assert tool.main([str(configs['mmseg']), '--image', str(data / 'images/0.png'),
                      '--out', str(out), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and message in error and len(error.splitlines()) == 1
    assert not out.exists()


def test_checkpoint_missing(tool: ModuleType, configs: dict[str, Path], data: Path,
                            capsys: pytest.CaptureFixture) -> None:
    assert tool.main([str(configs['mmseg']), 'missing.pth', '--image', str(data / 'images/0.png'),
                      '--out', 'order.png']) == 2
    assert 'error: checkpoint not found: missing.pth' in capsys.readouterr().err
