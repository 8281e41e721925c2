"""demo/image_demo.py on the tiny models that the tools' tests train."""
import importlib.util
import json
import pickle
import re
from pathlib import Path
from types import ModuleType
from typing import Callable

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ROOT, SCOPES, load_main


def load_demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location('image_demo', ROOT / 'demo/image_demo.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


image_demo = load_demo()


@pytest.fixture
def demo(tmp_path, monkeypatch, capfd) -> Callable:
    """Run the demo in tmp_path; returns its exit code, its lines on stdout and its errors."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> tuple[int, list[str], list[str]]:
        capfd.readouterr()
        code = image_demo.main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        # the logger that another tool left in this process still writes to stdout
        lines = [s for s in out.splitlines() if ' - mmengine - ' not in s]
        return code, lines, [s for s in err.splitlines() if s.startswith('error: ')]

    return run


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A grey noise image (height, width, 3) with a red and a green rectangle."""
    image = np.random.default_rng(seed).integers(90, 160, (height, width, 3), np.uint8)
    image[height // 8:height // 2, width // 8:width // 2] = (40, 40, 220)
    image[height // 2:-height // 8, width // 2:-width // 8] = (40, 200, 40)
    return image


def read_json(path: Path) -> dict[str, dict]:
    """File name -> record."""
    return {Path(record['input']).name: record
            for record in json.loads(path.read_text())['predictions']}


def same(first: dict, second: dict, atol: float = 1e-5) -> bool:
    """Whether two records hold the same prediction, numbers to a tolerance."""
    if 'label_map' in first:
        maps = [cv2.imread(record['label_map'], cv2.IMREAD_UNCHANGED) for record in (first, second)]
        return (maps[0] != maps[1]).mean() <= atol
    if first.get('labels') != second.get('labels'):
        return False
    keys = [key for key in ('pred_scores', 'scores', 'bboxes') if key in first]
    return bool(keys) and all(np.allclose(first[key], second[key], atol=atol) for key in keys)


@pytest.mark.parametrize('scope', SCOPES)
def test_equals_the_test_tool(scope, trained, data, demo, tmp_path):
    run = trained(scope)
    assert load_main('test')([str(run.config), str(run.checkpoint), '--out', 'pred.pkl']) == 0
    expected = pickle.loads((tmp_path / 'pred.pkl').read_bytes())
    images = [p['img_path'] for p in expected]
    code, lines, _ = demo(*images, run.config, run.checkpoint, '--json', 'sub/pred.json',
                          '--score-thr', '0.1')
    assert code == 0
    written = json.loads((tmp_path / 'sub/pred.json').read_text())
    assert written['classes'] == ['red', 'green']
    assert [record['input'] for record in written['predictions']] == images
    for record, wanted, line in zip(written['predictions'], expected, lines):
        assert line.startswith(f'{record["input"]}: ')
        said = line.split(': ')[1]
        if scope == 'mmpretrain':
            np.testing.assert_allclose(record['pred_scores'], wanted['pred_score'], atol=1e-6)
            best = int(wanted['pred_score'].argmax())
            assert said == f'{("red", "green")[best]} {wanted["pred_score"][best]:.2f}'
            assert record['pred_class'] == ('red', 'green')[best]
        elif scope == 'mmdet':
            found = wanted['pred_instances']
            assert record['labels'] == found['labels'].tolist()
            np.testing.assert_allclose(record['bboxes'], found['bboxes'], atol=1e-4)
            np.testing.assert_allclose(record['scores'], found['scores'], atol=1e-6)
            assert [m['counts'] for m in record['masks']] == [
                m['counts'].decode() for m in found['masks']]
            number = int((found['scores'] > 0.1).sum())
            assert sum(map(int, re.findall(r'(\d+) (?:red|green)', said))) == number
        else:
            labels = cv2.imread(record['label_map'], cv2.IMREAD_UNCHANGED)
            assert (labels == wanted['pred_sem_seg'].numpy()).all()
            share = (wanted['pred_sem_seg'] == 1).double().mean().item()
            assert record['shares'].get('green', 0) == pytest.approx(share, abs=1e-6)
            assert record['shares'].get('red', 0) == pytest.approx(1 - share, abs=1e-6)
        name = Path(record['input']).with_suffix('.png').name
        picture = cv2.imread(f'work_dirs/image_demo/{name}')
        assert picture.shape == (64, 64, 3)
    if scope == 'mmdet':
        assert sum(len(record['labels']) for record in written['predictions']) > 0


@pytest.mark.parametrize('scope', SCOPES)
def test_kinds_of_images(scope, trained, demo, tmp_path):
    """A folder of odd images: each is done or named, and one broken file stops no other."""
    run = trained(scope)
    folder = tmp_path / 'images'
    folder.mkdir()
    image = noise(67, 131)
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    wide = (image.astype(np.uint16) << 8) + 77
    files = {
        'odd.png': image, 'tall.bmp': noise(203, 33), 'alpha.png': np.dstack([image, grey]),
        'grey.png': grey, 'grey3.png': np.dstack([grey] * 3), 'wide.png': wide,
        'small.png': noise(20, 64), 'float.tif': image.astype(np.float32) / 255,
    }
    for name, pixels in files.items():
        cv2.imwrite(str(folder / name), pixels)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    Image.fromarray(image[..., ::-1]).save(folder / 'turned.jpg', exif=exif)
    (folder / 'broken.png').write_bytes((folder / 'odd.png').read_bytes()[:5000])
    (folder / 'cut.jpg').write_bytes((folder / 'turned.jpg').read_bytes()[:1500])
    (folder / 'text.jpeg').write_text('no image')
    (folder / 'notes.txt').write_text('not looked at')

    # the tiny detector enlarges what it gets
    refused = {'float.tif', 'broken.png', 'cut.jpg', 'text.jpeg'}
    refused |= {'small.png'} if scope != 'mmdet' else set()
    code, lines, errors = demo(folder, run.config, run.checkpoint, '--json', 'pred.json')
    assert code == 2 and len(errors) == 1
    assert errors[0].startswith(f'error: {len(refused)} of 12 inputs failed: ')
    assert {name for name in (*files, 'turned.jpg', 'broken.png', 'cut.jpg', 'text.jpeg')
            if name in errors[0]} == refused
    assert 'float.tif holds float32 values' in errors[0]
    assert scope == 'mmdet' or 'small.png GroupMamba needs images of at least 32x32' in errors[0]
    records = read_json(tmp_path / 'pred.json')
    assert set(records) == {*files, 'turned.jpg'} - refused
    assert same(records['alpha.png'], records['odd.png'])
    assert same(records['wide.png'], records['odd.png'])
    assert same(records['grey.png'], records['grey3.png'])
    assert not same(records['grey.png'], records['odd.png'])
    assert any('wide.png: 16-bit values up to' in line for line in lines)
    out = tmp_path / 'work_dirs/image_demo'
    sizes = {path.stem: cv2.imread(str(path)).shape[:2] for path in out.glob('*.png')}
    assert sizes['odd'] == sizes['alpha'] == sizes['grey'] == (67, 131)
    assert sizes['tall'] == (203, 33) and sizes['turned'] == (131, 67)

    code, _, _ = demo(folder, run.config, run.checkpoint, '--json', 'batch.json',
                      '--out-dir', 'batch', '--batch-size', 3)
    batched = read_json(tmp_path / 'batch.json')
    assert code == 2 and set(batched) == set(records)
    assert all(same(batched[name], record, 1e-3) for name, record in records.items())


@pytest.mark.parametrize('scope', SCOPES)
def test_video(scope, trained, demo, tmp_path):
    run = trained(scope)
    # Motion JPEG loses little: a frame's prediction is that of the frame as read back
    writer = cv2.VideoWriter('film.avi', cv2.VideoWriter_fourcc(*'MJPG'), 10, (98, 66))
    for i in range(5):
        writer.write(noise(66, 98, i))
    writer.release()
    reader = cv2.VideoCapture('film.avi')
    cv2.imwrite('frame3.png', [reader.read()[1] for _ in range(5)][3])
    Path('empty.mp4').write_bytes(b'')
    Path('cut.mp4').write_bytes(Path('film.avi').read_bytes()[:150])

    code, lines, errors = demo('film.avi', 'empty.mp4', 'cut.mp4', 'frame3.png', run.config,
                               run.checkpoint, '--json', 'pred.json', '--batch-size', 2,
                               '--out-dir', 'out', '--opacity', 0, '--score-thr', 1)
    assert code == 2
    assert errors == ['error: 2 of 4 inputs failed: empty.mp4 is no video, or one without frames; '
                      'cut.mp4 is no video, or one without frames']
    assert lines[0].startswith('film.avi: 5 frames, on average ')
    records = json.loads((tmp_path / 'pred.json').read_text())['predictions']
    assert [r.get('frame') for r in records] == [0, 1, 2, 3, 4, None]
    assert same(records[3], records[5], 1e-4) and not same(records[2], records[5], 1e-4)
    reader = cv2.VideoCapture('out/film.mp4')
    frames = []
    while (frame := reader.read()[1]) is not None:
        frames.append(frame)
    assert len(frames) == 5 and frames[0].shape == (66, 98, 3)
    assert reader.get(cv2.CAP_PROP_FPS) == 10
    # nothing is drawn over the green rectangle
    assert np.abs(frames[2][40:55, 55:80].mean((0, 1)) - (40, 200, 40)).max() < 15
    assert not Path('out/empty.mp4').exists()


def test_even_sides():
    picture = noise(67, 131)
    padded = image_demo.even(picture)
    assert padded.shape == (68, 132, 3) and (padded[:67, :131] == picture).all()
    assert (padded[67, :131] == picture[66]).all()
    assert image_demo.even(padded).shape == padded.shape


def test_names_of_classes(trained, demo, tmp_path):
    """From the checkpoint, else the config; inputs of one name do not overwrite each other."""
    run = trained('mmpretrain')
    for folder in ('a', 'b'):
        (tmp_path / folder).mkdir()
        cv2.imwrite(f'{folder}/same.png', noise(64, 64))
    checkpoint = torch.load(run.checkpoint, weights_only=False)
    checkpoint['meta']['dataset_meta'] = dict(classes=('un', 'deux'))
    torch.save(checkpoint, 'french.pth')
    code, lines, _ = demo('a', 'b', run.config, 'french.pth', '--out-dir', 'out')
    assert code == 0 and re.match(r'a/same.png: (un|deux) ', lines[0])
    assert sorted(p.name for p in Path('out').iterdir()) == ['same.png', 'same_2.png']
    torch.save(checkpoint['state_dict'], 'bare.pth')
    code, lines, _ = demo('a', run.config, 'bare.pth', '--out-dir', 'out')
    assert code == 0 and re.match(r'a/same.png: (red|green) ', lines[0])


OFFICIAL = """
_base_ = '{base}'
custom_imports = dict(imports=['mmgroupmamba.models.classification'], allow_failed_imports=False)
arch = dict(stem_hidden_dim=8, embed_dims=[16, 32, 32, 48], depths=[1] * 4, mlp_ratios=[2] * 4)
model = dict(
    backbone=dict(arch=arch, final_norm=False),
    neck=dict(_delete_=True, type='mmgroupmamba.ClassBlockNeck', embed_dim=48, mlp_ratio=2),
    head=dict(type='mmgroupmamba.DistilledLinearHead', num_classes=10, in_channels=48))
"""


def test_official_file(configs, official_file, demo, tmp_path):
    """As published; classes beyond the known names are numbered."""
    config = tmp_path / 'official.py'
    config.write_text(OFFICIAL.format(base=configs['mmpretrain']))
    cv2.imwrite('x.png', noise(67, 131))
    code, lines, _ = demo('x.png', config, official_file, '--json', 'pred.json')
    assert code == 0 and re.match(r'x.png: (red|green|class \d) 0\.\d\d$', lines[0])
    written = json.loads(Path('pred.json').read_text())
    assert written['classes'] == ['red', 'green', *(f'class {i}' for i in range(2, 10))]
    assert sum(written['predictions'][0]['pred_scores']) == pytest.approx(1, abs=1e-5)


def test_out_of_memory(trained, demo, monkeypatch):
    run = trained('mmseg')
    cv2.imwrite('large.png', noise(96, 96))
    cv2.imwrite('small.png', noise(64, 64))
    predict = image_demo.Segmentation.predict

    def limited(self: object, images: list[np.ndarray]) -> list:
        if images[0].size > 64 * 64 * 3:
            raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 9 GiB')
        return predict(self, images)

    monkeypatch.setattr(image_demo.Segmentation, 'predict', limited)
    code, lines, errors = demo('large.png', 'small.png', run.config, run.checkpoint,
                               '--device', 'cpu')
    assert code == 2 and lines[0].startswith('small.png: ')
    assert errors == ['error: 1 of 2 inputs failed: large.png does not fit into the memory of cpu']


def test_bad_inputs(trained, data, demo, tmp_path):
    run = trained('mmseg')
    image = data / 'images/0.png'
    (tmp_path / 'empty').mkdir()

    def refused(*args: object) -> str:
        code, _, errors = demo(*args)
        assert code == 2 and len(errors) == 1
        assert not (tmp_path / 'work_dirs').exists()
        return errors[0]

    rest = run.config, run.checkpoint
    assert 'input nothing.png does not exist' in refused('nothing.png', *rest)
    assert 'folder empty holds no image' in refused('empty', *rest)
    (tmp_path / 'one.png').write_text('text')
    assert refused('one.png', *rest).startswith('error: one.png is no image, or damaged')
    assert 'does not fit EncoderDecoder' in refused(
        image, run.config, trained('mmpretrain').checkpoint)
    assert 'not found: none.pth' in refused(image, run.config, 'none.pth')
    assert 'none.py does not exist' in refused(image, 'none.py', run.checkpoint)
    assert 'holds the input 0.png' in refused(image, *rest, '--out-dir', image.parent)
    assert 'torch sees' in refused(image, *rest, '--device', 'cuda:99')
    assert 'give cpu, cuda' in refused(image, *rest, '--device', 'quick')
    assert 'has no test_dataloader' in refused(
        image, *rest, '--cfg-options', 'test_dataloader=None')
    assert 'is a file: name a folder' in refused(image, *rest, '--out-dir', tmp_path / 'one.png')
    for option, value in (('--opacity', 2), ('--batch-size', 0), ('--score-thr', 'x')):
        with pytest.raises(SystemExit) as error:
            demo(image, *rest, option, value)
        assert error.value.code == 2
