import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from pycocotools.coco import COCO

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / 'tools/dataset_converters/make_shapes.py'
SPEC = importlib.util.spec_from_file_location('make_shapes', SCRIPT)
make_shapes = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_shapes)

SMALL = dict(num_train=8, num_val=4, size=64)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    return make_shapes.make_shapes(tmp_path_factory.mktemp('data') / 'shapes', **SMALL)


def run_main(monkeypatch, *argv):
    monkeypatch.setattr(sys, 'argv', ['make_shapes.py', *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        make_shapes.main()
    return str(stop.value)


def test_same_seed_gives_same_bytes(shapes, tmp_path):
    again = make_shapes.make_shapes(tmp_path / 'again', **SMALL)
    other = make_shapes.make_shapes(tmp_path / 'other', **SMALL, seed=1)
    assert contents(again) == contents(shapes)
    name = 'detection/train/000000.png'
    assert contents(other)[name] != contents(shapes)[name]


def test_images_do_not_depend_on_the_number_of_images(shapes, tmp_path):
    more = make_shapes.make_shapes(tmp_path / 'more', num_train=9, num_val=5, size=64)
    pictures = {k: v for k, v in contents(shapes).items() if k.endswith('.png')}
    assert pictures.items() <= contents(more).items()


@pytest.mark.parametrize('split', ['train', 'val'])
def test_instances_and_label_map_are_the_same_pixels(shapes, split):
    coco = COCO(shapes / f'detection/annotations/instances_{split}.json')
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(make_shapes.CLASSES)
    for image_id, image in coco.imgs.items():
        label_map = np.asarray(
            Image.open(shapes / 'segmentation/annotations' / split / image['file_name']))
        seen = np.zeros_like(label_map)
        annotations = coco.imgToAnns[image_id]
        assert 1 <= len(annotations) <= 5
        for ann in annotations:
            mask = coco.annToMask(ann).astype(bool)
            assert not seen[mask].any(), 'visible masks overlap'
            seen[mask] = ann['category_id']
            rows, columns = np.nonzero(mask)
            x, y, width, height = ann['bbox']
            assert (x, y, x + width, y + height) == (
                columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert ann['area'] == mask.sum() > 0 and ann['iscrowd'] == 0
        assert (seen == label_map).all()


def test_shapes_cover_one_another():
    scenes = [make_shapes.draw_scene(np.random.default_rng(i), 64)[1] for i in range(20)]
    hidden = [s.mask.sum() - v.sum() for shapes in scenes
              for s, v in zip(shapes, make_shapes.visible_masks(shapes))]
    assert sum(pixels > 0 for pixels in hidden) >= 5


@pytest.mark.parametrize('config, folder, number', [
    ('groupmamba-nano_1xb16_shapes-128px.py', 'classification', 8),
    ('mask-rcnn_groupmamba-nano_fpn_1xb8-8e_shapes.py', 'detection', 8),
    ('groupmamba-nano_upernet_1xb8-1200_shapes-128x128.py', 'segmentation', 8),
])
def test_the_libraries_read_it(shapes, config, folder, number):
    cfg = Config.fromfile(ROOT / 'configs/shapes' / config)
    init_default_scope(cfg.default_scope)
    cfg.train_dataloader.dataset.data_root = str(shapes / folder)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert len(dataset) == number
    assert tuple(dataset.metainfo['classes'])[-4:] == make_shapes.CLASSES
    item = dataset[0]
    assert item['inputs'].shape[0] == 3
    if folder == 'classification':
        assert [dataset.get_data_info(i)['gt_label'] for i in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    elif folder == 'detection':
        annotations = json.loads((shapes / 'detection/annotations/instances_train.json')
                                 .read_text())['annotations']
        assert len(item['data_samples'].gt_instances) == sum(
            a['image_id'] == 0 for a in annotations)
    else:
        assert item['data_samples'].gt_sem_seg.data.max() <= 4


@pytest.mark.parametrize('option, value', [
    ('--num-train', 0), ('--num-val', -1), ('--size', 16), ('--seed', -1)])
def test_numbers_out_of_range(monkeypatch, tmp_path, option, value):
    message = run_main(monkeypatch, '--out-dir', tmp_path / 'x', option, value)
    assert f'{option} {value}' in message and '\n' not in message
    assert not list(tmp_path.iterdir())


def test_taken_folders_are_left_alone(monkeypatch, tmp_path):
    (tmp_path / 'letters').mkdir()
    (tmp_path / 'letters/dear.txt').write_text('dear')
    before = contents(tmp_path)
    for argv in (['--out-dir', tmp_path / 'letters'],
                 ['--out-dir', tmp_path / 'letters', '--overwrite'],
                 ['--out-dir', tmp_path / 'letters/dear.txt', '--overwrite']):
        message = run_main(monkeypatch, *argv)
        assert 'letters' in message and '--out-dir' in message and '\n' not in message
    assert contents(tmp_path) == before


def test_overwrite_is_all_or_nothing(shapes, tmp_path, monkeypatch):
    target = make_shapes.make_shapes(tmp_path / 'shapes', **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(make_shapes, 'to_rle', lambda mask: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make_shapes.make_shapes(target, **SMALL, seed=1, overwrite=True)
    assert contents(target) == contents(shapes)
    make_shapes.make_shapes(target, **SMALL, seed=1, overwrite=True)
    assert contents(target) != contents(shapes)
    assert [p.name for p in tmp_path.iterdir()] == ['shapes']
