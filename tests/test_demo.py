import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'demo'))
import shapes_demo  # noqa: E402


def test_progress_lines():
    epoch = ('11/21 05:30:43 - mmengine - INFO - Epoch(train)  [5][13/13]  lr: 9e-04  '
             'eta: 0:14:41  time: 0.30  grad_norm: 1.36  loss: 1.3814  loss_rpn_cls: 0.3')
    assert shapes_demo.progress_of(epoch) == 'epoch 5, iteration 13/13, loss 1.3814, eta 0:14:41'
    iteration = 'INFO - Iter(train) [  50/1000]  lr: 1e-03  eta: 0:03:00  time: 0.2  loss: 0.9'
    assert shapes_demo.progress_of(iteration) == 'iteration 50/1000, loss 0.9, eta 0:03:00'
    test = 'INFO - Epoch(test)  [ 50/100]    eta: 0:00:02  time: 0.05  data_time: 0.01'
    assert shapes_demo.progress_of(test) == 'iteration 50/100, eta 0:00:02'
    assert shapes_demo.progress_of('INFO - Saving checkpoint at 2 epochs') == ''


def test_a_failing_part_is_named(tmp_path):
    with pytest.raises(shapes_demo.DemoError) as error:
        shapes_demo.run(['-c', 'print("error: no data"); raise SystemExit(3)'],
                        tmp_path / 'train.log', '[1/4] shapes  draw')
    assert str(error.value) == (f'[1/4] shapes  draw ended with exit code 3: no data '
                                f'(log: {tmp_path / "train.log"})')


def test_quick_demo(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / 'demo/shapes_demo.py', '--quick', '--work-dir', tmp_path / 'work',
         '--data-dir', tmp_path / 'shapes'],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / 'work/summary.json').read_text())
    for key in ('classification/top1', 'detection/bbox_mAP_50', 'detection/segm_mAP_50',
                'segmentation/mIoU'):
        assert 0 <= summary[key] <= 1
    for task in ('classification', 'detection', 'segmentation'):
        assert summary[f'seconds/{task}/train'] > 0
        with Image.open(tmp_path / f'work/{task}.png') as picture:
            assert min(picture.size) > 500
    assert 'segm_mAP_50' in done.stdout
