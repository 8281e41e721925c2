"""Both published layouts of CamVid, drawn small, through the converter into the configs' data."""
import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope, init_default_scope
from pycocotools.coco import COCO

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location(
    'camvid_tool', ROOT / 'tools/dataset_converters/camvid.py')
camvid = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(camvid)

SIZE = (96, 72)
NAMES = {'0001TP_006690': 'train', '0016E5_08190': 'train', '0016E5_07959': 'val',
         '0001TP_008550': 'test', 'Seq05VD_f00000': 'test'}
# a class of Cambridge's -> its colour in label_colors.txt, and SegNet's class
COLOURS = {
    'Sky': ((128, 128, 128), 0), 'Archway': ((192, 0, 128), 1), 'TrafficCone': ((0, 0, 64), 2),
    'LaneMkgsDriv': ((128, 0, 192), 3), 'RoadShoulder': ((128, 128, 192), 4),
    'VegetationMisc': ((192, 192, 0), 5), 'Misc_Text': ((128, 128, 64), 6),
    'Fence': ((64, 64, 128), 7), 'SUVPickupTruck': ((64, 128, 192), 8),
    'Child': ((192, 128, 64), 9), 'MotorcycleScooter': ((192, 0, 192), 10), 'Void': ((0, 0, 0), 255)
}


@pytest.fixture(autouse=True)
def restore_scope():
    before = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(before)


def scene() -> np.ndarray:
    """Class index into COLOURS (H, W): bands of all classes, then road with road users on it."""
    index = np.full(SIZE[::-1], 3)
    for i in range(len(COLOURS)):
        index[2:8, 8 * i:8 * i + 8] = i  # 48 pixels: too small for an instance
    index[20:36, 10:40] = 8
    index[36:50, 38:60] = 8  # touches the first one: one region
    index[20:28, 60:68] = 9  # 64 pixels
    index[40:47, 70:79] = 9  # 63
    index[60:70, 80:90] = 10
    return index


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def make_cambridge(folder: Path, scale: int = 1) -> Path:
    index = scene().repeat(scale, 0).repeat(scale, 1)
    colours = np.array([colour for colour, _ in COLOURS.values()], np.uint8)[index]
    for name in NAMES:
        write(folder / f'701_StillsRaw_full/{name}.png', colours[..., ::-1] // 2)
        write(folder / f'LabeledApproved_full/{name}_L.png', colours[..., ::-1])
    return folder


def make_segnet(folder: Path) -> Path:
    index = scene()
    for name, split in NAMES.items():
        write(folder / f'{split}/{name}.png', np.zeros((*index.shape, 3), np.uint8))
        write(folder / f'{split}annot/{name}.png', index.astype(np.uint8))
    return folder


def expected() -> np.ndarray:
    return np.array([label for _, label in COLOURS.values()], np.uint8)[scene()]


def read_labels(root: Path, split: str, name: str) -> np.ndarray:
    return cv2.imread(str(root / f'labels/{split}/{name}.png'), cv2.IMREAD_UNCHANGED)


@pytest.mark.parametrize('make', [make_cambridge, make_segnet])
def test_labels_and_split(make, tmp_path, capsys):
    source, out = make(tmp_path / 'source'), tmp_path / 'out'
    assert camvid.main([str(source), '--out-dir', str(out), '--size', *map(str, SIZE)]) == 0
    assert capsys.readouterr().out == f'2 train, 1 val, 2 test frames in {out}\n'
    for name, split in NAMES.items():
        np.testing.assert_array_equal(read_labels(out, split, name), expected())
        assert (out / f'images/{split}/{name}.jpg').is_file()
    assert len(list(out.rglob('*.png'))) == len(NAMES)


def test_both_layouts_give_the_same_instances(tmp_path):
    for make in (make_cambridge, make_segnet):
        camvid.convert(make(tmp_path / make.__name__), tmp_path / f'{make.__name__}_out', SIZE)
    first, second = ((tmp_path / f'{make.__name__}_out/instances/val.json').read_text()
                     for make in (make_cambridge, make_segnet))
    assert first == second
    coco = COCO(str(tmp_path / 'make_segnet_out/instances/val.json'))
    names = {i: category['name'] for i, category in coco.cats.items()}
    found = {names[a['category_id']]: a for a in coco.anns.values()}
    assert len(coco.anns) == 3 and set(found) == {'car', 'pedestrian', 'bicyclist'}
    assert found['car']['bbox'] == [10, 20, 50, 30]
    assert found['car']['area'] == 16 * 30 + 14 * 22
    assert found['pedestrian']['bbox'] == [60, 20, 8, 8] and found['pedestrian']['area'] == 64
    for name, label in (('car', 8), ('pedestrian', 9), ('bicyclist', 10)):
        mask = coco.annToMask(found[name]).astype(bool)
        assert (expected()[mask] == label).all() and mask.sum() == found[name]['area']


def test_resized_labels_keep_their_classes(tmp_path):
    camvid.convert(make_cambridge(tmp_path / 'source', scale=2), tmp_path / 'out', SIZE)
    np.testing.assert_array_equal(read_labels(tmp_path / 'out', 'val', '0016E5_07959'),
                                  expected())


@pytest.mark.parametrize('config', [
    'groupmamba-tiny_upernet_1xb8-4k_camvid-360x480.py',
    'mask-rcnn_groupmamba-nano_fpn_1xb4-12e_camvid.py',
])
def test_configs_read_it(config, tmp_path):
    camvid.convert(make_segnet(tmp_path / 'source'), tmp_path / 'out')
    cfg = Config.fromfile(ROOT / 'configs/camvid' / config)
    init_default_scope(cfg.default_scope)
    np.random.seed(0)  # of crops, some of which hold few classes
    for split, count in (('train', 2), ('val', 1)):
        dataset = DATASETS.build({**cfg[f'{split}_dataloader'].dataset,
                                  'data_root': str(tmp_path / 'out')})
        assert len(dataset) == count
        sample = dataset[0]['data_samples']
        if cfg.default_scope == 'mmdet':
            assert set(sample.gt_instances.labels.tolist()) == {0, 1, 2}
        else:
            assert set(sample.gt_sem_seg.data.unique().tolist()) <= {*range(11), 255}
            assert sample.gt_sem_seg.data.unique().numel() > 5


def test_every_class_of_cambridge_is_there_once():
    colours = [colour for colours in camvid.CLASSES.values() for colour in colours]
    assert len(set(colours)) == len(colours) == 31 and camvid.VOID_COLOUR not in colours
    assert list(camvid.CLASSES) == list(Config.fromfile(
        ROOT / 'configs/_base_/datasets/camvid.py').metainfo.classes)


def refused(capsys, source: Path, out: Path, *args: str) -> str:
    assert camvid.main([str(source), '--out-dir', str(out), *args]) == 2
    said = capsys.readouterr()
    assert not said.out and len(said.err.splitlines()) == 1 and said.err.startswith('error: ')
    return said.err


def test_refusals_name_the_culprit_and_write_nothing(tmp_path, capsys):
    out = tmp_path / 'out'
    assert 'holds no CamVid' in refused(capsys, tmp_path, out)

    source = make_segnet(tmp_path / 'segnet')
    bad = source / 'valannot/0016E5_07959.png'
    write(bad, np.full(SIZE[::-1], 12, np.uint8))
    assert f'{bad} holds the label 12' in refused(capsys, source, out)
    write(bad, np.zeros((10, 10), np.uint8))
    assert f'{bad} is 10x10, its image 96x72' in refused(capsys, source, out)
    bad.write_bytes(b'no picture')
    assert f'{bad} cannot be read' in refused(capsys, source, out)
    bad.unlink()
    assert f'labels not found: {bad}' in refused(capsys, source, out)

    source = make_cambridge(tmp_path / 'cambridge')
    bad = source / 'LabeledApproved_full/0016E5_07959_L.png'
    image = cv2.imread(str(bad))
    image[:20] = (3, 2, 1)
    write(bad, image)
    message = refused(capsys, source, out)
    assert str(bad) in message and '28% of the pixels' in message and '(1, 2, 3)' in message
    write(source / '701_StillsRaw_full/holiday.png', image)
    assert 'holiday is no frame of CamVid' in refused(capsys, source, out)
    assert 'too small' in refused(capsys, source, out, '--size', '8', '8')

    assert not out.exists() and not list(tmp_path.glob('.camvid-*'))
    out.mkdir()
    (out / 'mine').write_text('')
    assert 'is there already' in refused(capsys, source, out)
    assert [path.name for path in out.iterdir()] == ['mine']


def test_a_stray_colour_is_void(tmp_path):
    source = make_cambridge(tmp_path / 'source')
    path = source / 'LabeledApproved_full/0016E5_07959_L.png'
    image = cv2.imread(str(path))
    image[70, 5] = (3, 2, 1)
    write(path, image)
    camvid.convert(source, tmp_path / 'out', SIZE)
    labels = read_labels(tmp_path / 'out', 'val', '0016E5_07959')
    assert labels[70, 5] == 255 and (labels != expected()).sum() == 1
