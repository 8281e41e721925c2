import json
from copy import copy

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope
from tiny import ROOT, load_main

from mmgroupmamba.complexity import Part, build_model, count

DETECTOR = ROOT / 'configs/detection/mask-rcnn_groupmamba-tiny_fpn_1x_coco.py'
SEGMENTOR = ROOT / 'configs/segmentation/groupmamba-tiny_upernet_8xb2-160k_ade20k-512x512.py'


@pytest.fixture(autouse=True)
def restore_scope():
    """Leave the other tests the default scope they had."""
    before = copy(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(before)


@pytest.fixture(scope='module')
def main():
    return load_main('analysis_tools/paper_table')


def test_classification(main, tmp_path, capsys):
    """Table 1: parameters with both heads, and FLOPs; the JSON is what is printed."""
    path = tmp_path / 'table.json'
    assert main(['--tables', '1', '--json', str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('| model') and len(lines) == 5
    records = json.loads(path.read_text())
    exact = dict(tiny=23.36, small=34.78, base=57.15)
    for line, (name, params), record in zip(lines[2:], exact.items(), records):
        assert record['model'] == f'GroupMamba {name}'
        assert record['shape'] == [224, 224]
        assert record['params']['ours'] / 1e6 == pytest.approx(params, rel=0.001)
        flops = record['flops']
        assert flops['ours'] / 1e9 == pytest.approx(flops['paper'], rel=0.05)
        assert flops['difference_percent'] == pytest.approx(
            100 * (flops['ours'] / 1e9 - flops['paper']) / flops['paper'])
        assert sum(record['operators'].values()) == flops['ours']
        assert sum(part['flops'] for part in record['parts'].values()) == flops['ours']
        assert sum(part['params'] for part in record['parts'].values()) == record['params']['ours']
        assert record['operators']['scan'] == record['scan_flops'] > 0
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        assert cells[0] == record['model']
        assert cells[4] == f'{params:.2f}'
        assert float(cells[7]) == pytest.approx(flops['ours'] / 1e9, abs=0.005)


def roi_part(parts: dict[str, Part]) -> int:
    return sum(part.flops for name, part in parts.items() if name.startswith('roi_head'))


def test_mask_rcnn():
    """At 1 / 2.5 of 800 x 1280 in each direction: all but the second stage is 1 / 6.25."""
    model = build_model(Config.fromfile(DETECTOR))
    counted = count(model, (320, 512), 'mmdet')
    assert counted.total.params / 1e6 == pytest.approx(40.62, abs=0.01)  # paper: 40
    # 1000 proposals through two FC layers and the two outputs; 100 through the masks' head
    fc = 256 * 49 * 1024 + 1024 * 1024 + 1024 * (81 + 320)
    assert counted.parts['roi_head.bbox_head'].flops == 1000 * fc
    masks = 4 * 196 * 9 * 256**2 + 196 * 4 * 256**2 + 784 * 256 * 80
    assert counted.parts['roi_head.mask_head'].flops == 100 * masks
    second = roi_part(counted.parts)
    whole = (6.25 * (counted.total.flops - second) + second) / 1e9
    assert whole == pytest.approx(266.05, rel=0.001)  # what the command prints
    assert whole == pytest.approx(279, rel=0.05)  # paper


def test_upernet():
    """At a quarter of 512 x 2048 in each direction: 1 / 16."""
    model = build_model(Config.fromfile(SEGMENTOR))
    counted = count(model, (128, 512), 'mmseg')
    assert counted.total.params / 1e6 == pytest.approx(49.76, abs=0.01)  # paper: 49
    assert 16 * counted.total.flops / 1e9 == pytest.approx(941.26, rel=0.001)
    assert 16 * counted.total.flops / 1e9 == pytest.approx(955, rel=0.05)  # paper


def test_rows_name_configs(main):
    """The paper's figures, and configs that are there."""
    table = main.__globals__['PAPER']
    assert [(row.params, row.flops) for row in table] == [
        (23, 4.5), (34, 7.0), (57, 14), (40, 279), (49, 955)]
    assert [row.table for row in table] == [1, 1, 1, 2, 3]
    for row in table:
        assert (ROOT / 'configs' / row.config).is_file()


@pytest.mark.parametrize('target', ['nowhere/table.json', '.'])
def test_json_that_cannot_be_written(target, main, tmp_path, capsys, monkeypatch):
    """Refused before anything is counted."""
    monkeypatch.setitem(main.__globals__, 'count_config', None)
    assert main(['--json', str(tmp_path / target)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith('error: --json') and captured.err.count('\n') == 1


def test_unknown_table(main, capsys):
    with pytest.raises(SystemExit) as stop:
        main(['--tables', '4'])
    assert stop.value.code == 2
