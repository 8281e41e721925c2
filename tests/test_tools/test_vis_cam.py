"""tools/visualization/vis_cam.py: mmpretrain's tool on our backbone."""
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from tiny import ROOT, Trained

cam = pytest.importorskip('pytorch_grad_cam')


@pytest.fixture(scope='module')
def tool() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / 'tools/visualization'))
        yield importlib.import_module('vis_cam')


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """An image whose height and width differ: a transposed map would not pass."""
    path = tmp_path / 'wide.png'
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (64, 160, 3), np.uint8))
    return path


def test_map_is_grad_cams_of_the_last_stage(tool: ModuleType, trained, wide: Path, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    run: Trained = trained('mmpretrain')
    seen = []
    library_tool = tool.library_tool

    def watched() -> ModuleType:
        module = library_tool()
        module.show_cam_grad = lambda grayscale, *rest, **kwargs: seen.append(grayscale[0])
        return module

    monkeypatch.setattr(tool, 'library_tool', watched)
    assert tool.main([str(wide), str(run.config), str(run.checkpoint), '--target-category', '1',
                      '--save-path', str(tmp_path / 'cam.png')]) == 0

    cfg = Config.fromfile(run.config)
    init_default_scope('mmpretrain')
    cfg.model.data_preprocessor = cfg.data_preprocessor
    model = MODELS.build(cfg.model).eval()
    tool.load_model(model, str(run.checkpoint))
    image = torch.from_numpy(cv2.imread(str(wide))).permute(2, 0, 1)
    inputs = model.data_preprocessor(dict(inputs=[image]))['inputs']
    features, = model.backbone(inputs)  # (1, C, 2, 5), what leaves the last stage
    features.retain_grad()
    model.head((model.neck(features), )).squeeze()[1].backward()
    want = (features.grad.mean((2, 3), keepdim=True) * features).sum(1)[0].relu().detach()
    assert want.shape == (2, 5)
    want = cv2.resize((want / (want.max() + 1e-7)).numpy(), (160, 64))
    assert seen[0].shape == (64, 160)
    assert np.abs(seen[0] - want).max() < 0.02


@pytest.mark.parametrize('layer', [
    'backbone.stages.2', 'backbone.stages.3.blocks.0.norm', 'backbone.stages.0.embed.convs.3'])
def test_other_layers(tool: ModuleType, trained, wide: Path, tmp_path: Path, layer: str) -> None:
    run: Trained = trained('mmpretrain')
    out = tmp_path / 'cam.png'
    assert tool.main([str(wide), str(run.config), str(run.checkpoint), '--method', 'LayerCAM',
                      '--target-layers', layer, '--save-path', str(out)]) == 0
    assert cv2.imread(str(out)).shape == (64, 160, 3)


@pytest.mark.parametrize('name, channels_last', [
    ('backbone', False), ('backbone.stages.0', True), ('backbone.stages.0.embed', True),
    ('backbone.stages.0.embed.proj', False), ('backbone.stages.0.embed.convs.0', False),
    ('backbone.stages.1.embed.proj', True), ('backbone.stages.3.blocks.0.ffn.conv', True),
    ('neck', False)])
def test_which_layers_are_channels_last(tool: ModuleType, name: str, channels_last: bool) -> None:
    assert tool.is_channels_last(name) == channels_last


@pytest.mark.parametrize('options, message', [
    (['--target-category', '2'], 'the head has classes 0 to 1'),
    (['--target-layers', 'backbone.stages.4'], 'the model has no backbone.stages.4; close: '),
])
def test_refused(tool: ModuleType, trained, wide: Path, capsys: pytest.CaptureFixture,
                 options: list[str], message: str) -> None:
    run: Trained = trained('mmpretrain')
    assert tool.main([str(wide), str(run.config), str(run.checkpoint), '--save-path', 'cam.png',
                      *options]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith('error: ') and message in error


def test_other_task_refused(tool: ModuleType, configs: dict[str, Path], wide: Path,
                            capsys: pytest.CaptureFixture) -> None:
    assert tool.main([str(wide), str(configs['mmdet']), 'x.pth', '--save-path', 'cam.png']) == 2
    assert "maps are for mmpretrain's classifiers" in capsys.readouterr().err


def test_without_grad_cam(tool: ModuleType, monkeypatch: pytest.MonkeyPatch,
                          capsys: pytest.CaptureFixture) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec',
                        lambda name, *rest: None if 'grad_cam' in name else find(name, *rest))
    assert tool.main(['a.png', 'b.py', 'c.pth']) == 2
    assert capsys.readouterr().err == (
        'error: class-activation maps need grad-cam: pip install grad-cam\n')
