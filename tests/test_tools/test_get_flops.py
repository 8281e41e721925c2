import re
from copy import copy
from pathlib import Path

import pytest
from mmengine.registry import DefaultScope
from tiny import ROOT, load_main

SHAPES = ROOT / 'configs/shapes'
CLASSIFIER = SHAPES / 'groupmamba-nano_1xb16_shapes-128px.py'
DETECTOR = SHAPES / 'mask-rcnn_groupmamba-nano_fpn_1xb8-8e_shapes.py'
SEGMENTOR = SHAPES / 'groupmamba-nano_upernet_1xb8-1200_shapes-128x128.py'
HEADS = {
    CLASSIFIER: ['neck', 'head'],
    DETECTOR: ['neck', 'rpn_head', 'roi_head.bbox_head', 'roi_head.mask_head'],
    SEGMENTOR: ['decode_head', 'elsewhere'],
}


@pytest.fixture(autouse=True)
def restore_scope():
    """Leave the other tests the default scope they had."""
    before = copy(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(before)


@pytest.fixture(scope='module')
def main():
    return load_main('analysis_tools/get_flops')


def rows(out: str) -> dict[str, list[float]]:
    """First cell to the other cells of each line of the printed tables."""
    lines = re.findall(r'^\| (\S+) +\|([\d.| ]+)\|$', out, re.M)
    return {name: [float(cell) for cell in cells.split('|')] for name, cells in lines}


@pytest.mark.parametrize('config', HEADS, ids=lambda path: path.stem)
def test_tables(config, main, capsys):
    assert main([str(config), '--shape', '64', '96']) == 0
    captured = capsys.readouterr()
    assert not captured.err
    assert 'image of 64 x 96 (H x W)' in captured.out.splitlines()[0]
    assert re.search(r'not counted: .*\bsilu\b', captured.out)
    table = rows(captured.out)
    names = list(table)
    end = names.index('total')
    assert names[:end] == [f'backbone.stages.{i}' for i in range(4)] + HEADS[config]
    assert names[end + 1] == 'conv' and 'scan' in names[end:]
    params, flops, share, scan = table['total']
    assert share == 100
    parts = [table[name] for name in names[:end]]
    assert sum(part[0] for part in parts) == pytest.approx(params, abs=0.004)
    assert sum(part[1] for part in parts) == pytest.approx(flops, abs=0.004)
    assert sum(table[name][0] for name in names[end + 1:]) == pytest.approx(flops, abs=0.004)
    assert float(re.search(r'^parameters ([\d.]+) M', captured.out, re.M)[1]) == params
    # 10 L C of the four stages, nano's channels; the class block adds one token
    tokens = [6 * 4**(3 - i) for i in range(4)]
    want = sum(10 * n * c for n, c in zip(tokens, (32, 48, 64, 96)))
    assert scan == pytest.approx((want + 960 * (config == CLASSIFIER)) / 1e9, abs=6e-5)


def test_default_shape_and_ignored_options(main, capsys):
    """The paper's shape; neither a backend that this machine lacks nor a missing file matters."""
    assert main([str(CLASSIFIER)]) == 0
    plain = capsys.readouterr().out
    assert 'image of 224 x 224' in plain
    assert main([str(CLASSIFIER), '--cfg-options', 'model.backbone.scan_backend=mamba_ssm',
                 'model.neck.scan_backend=reference', 'model.backbone.init_cfg.type=Pretrained',
                 'model.backbone.init_cfg.checkpoint=nowhere.pth']) == 0
    assert capsys.readouterr().out == plain


def test_options_change_the_model(main, capsys):
    assert main([str(CLASSIFIER), '--shape', '64', '64', '--layers', '--cfg-options',
                 'model.backbone.arch=tiny', 'model.neck.embed_dim=448',
                 'model.head.in_channels=448']) == 0
    table = rows(capsys.readouterr().out)
    assert table['total'][0] == pytest.approx(20.46 + 2.00, abs=0.01)
    layers = list(table)[list(table).index('batch_norm') + 1:]
    assert 'backbone.stages.*.blocks.*.ffn.fc1' in layers
    assert sum(table[name][0] for name in layers) == pytest.approx(table['total'][1], abs=0.003)


def test_detector_pads(main, capsys):
    """33 x 64 becomes 64 x 64, as the data preprocessor says."""
    outs = []
    for height in (33, 64):
        assert main([str(DETECTOR), '--shape', str(height), '64']) == 0
        outs.append(rows(capsys.readouterr().out))
    assert outs[0]['neck'] == outs[1]['neck']
    assert outs[0]['backbone.stages.0'] == outs[1]['backbone.stages.0']


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize('args, words', [
    (['{ours}', '--shape', '31', '64'], 'at least 32 x 32'),
    (['{ours}', '--shape', '64', '-5'], 'at least 32 x 32'),
    (['nowhere.py'], 'nowhere.py does not exist'),
    (['{folder}'], 'does not exist'),
    (['{broken}'], 'cannot be read'),
    (['{scopeless}'], 'default_scope'),
    (['{modelless}'], 'no model'),
    (['{other}'], 'not GroupMamba'),
    (['{ours}', '--cfg-options', 'model.backbone.arch=huge'], "unknown arch 'huge'"),
    (['{ours}', '--cfg-options', 'model.backbone.type=mmgroupmamba.GroupMumba'], 'GroupMumba'),
])
def test_bad_input(args, words, main, tmp_path, capsys):
    paths = dict(
        ours=str(CLASSIFIER),
        folder=str(tmp_path),
        broken=write(tmp_path / 'broken.py', 'model = ('),
        scopeless=write(tmp_path / 'scopeless.py', 'model = dict(type="A")'),
        modelless=write(tmp_path / 'modelless.py', 'default_scope = "mmseg"'),
        other=write(tmp_path / 'other.py', 'default_scope = "mmpretrain"\nmodel = dict('
                    'type="ImageClassifier", backbone=dict(type="LeNet5", num_classes=4))'))
    assert main([arg.format(**paths) for arg in args]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith('error: ') and captured.err.count('\n') == 1
    assert words in captured.err
    assert not captured.out


@pytest.mark.parametrize('shape', [['64'], ['64', '64', '64'], ['64', 'wide'], []])
def test_bad_shape_argument(shape, main, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(CLASSIFIER), '--shape', *shape])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count('\n') == 1
