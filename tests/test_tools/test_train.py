import json
import os
import re
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from mmengine.visualization import Visualizer
from tiny import ROOT, SCOPES, load_main, run_tool

from mmgroupmamba.ops import available_backends


@pytest.fixture
def refused(capfd, tmp_path, monkeypatch):
    """Function that runs train in this process, expects a refusal and returns its line."""
    monkeypatch.chdir(tmp_path)
    main = load_main('train')

    def run(*args: object) -> str:
        # mmengine would take the visualizer of the last run in this process again
        for kind in (Visualizer, *Visualizer.__subclasses__()):
            kind._instance_dict.clear()
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as error:
            code = error.code
        lines = [s for s in capfd.readouterr().err.splitlines() if s.startswith('error: ')]
        assert code == 2 and len(lines) == 1
        assert not (tmp_path / 'work_dirs').exists()
        return lines[0]

    return run


def train_iters(log: str) -> list[int]:
    return [int(n) for n in re.findall(r'Iter\(train\) \[ *(\d+)/', log)]


@pytest.mark.parametrize('scope', SCOPES)
def test_train(scope, trained):
    run = trained(scope)
    assert run.checkpoint.is_file()
    assert train_iters(run.log) == [1, 2, 3, 4]
    assert 'eta:' in run.log and 'Iter(val)' in run.log
    assert ('AMP on CPU' in run.log) == (scope != 'mmdet' and not torch.cuda.is_available())
    assert re.search(r'lr: (2\.5|5\.0)000e-04', run.log)  # batches of 2 and 4 against a base of 8


def test_kill_resume_test(configs, tmp_path):
    """A killed training goes on where its last checkpoint stands."""
    config, work_dir = configs['mmpretrain'], tmp_path / 'run'
    options = ['--work-dir', work_dir, '--no-validate', '--cfg-options',
               'default_hooks.checkpoint.interval=5']
    process = subprocess.Popen(
        [sys.executable, ROOT / 'tools/train.py', config, *options, 'train_cfg.max_iters=2000'],
        env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    deadline = time.time() + 200
    while not (work_dir / 'last_checkpoint').exists() and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    stopped = int(re.search(r'iter_(\d+)', (work_dir / 'last_checkpoint').read_text())[1])

    done = run_tool('train', config, '--resume', *options, f'train_cfg.max_iters={stopped + 5}')
    assert done.returncode == 0, done.stderr
    assert train_iters(done.stdout) == list(range(stopped + 1, stopped + 6))
    checkpoint = work_dir / f'iter_{stopped + 5}.pth'
    assert run_tool('test', config, checkpoint, '--work-dir', work_dir).returncode == 0

    done = run_tool('train', config, '--resume', checkpoint, '--work-dir', tmp_path / 'other',
                    '--cfg-options', f'train_cfg.max_iters={stopped + 7}')
    assert train_iters(done.stdout) == [stopped + 6, stopped + 7]


def test_resuming_goes_on_with_the_same_images(configs, tmp_path):
    """Four iterations in one go, or two and two more, end at the same weights."""
    options = ['--no-validate', '--cfg-options', 'model.decode_head.dropout_ratio=0']
    whole = ['--work-dir', tmp_path / 'whole', *options]
    parts = ['--work-dir', tmp_path / 'parts', *options]
    for args in (whole, [*parts, 'train_cfg.max_iters=2'], ['--resume', *parts]):
        done = run_tool('train', configs['mmseg'], *args)
        assert done.returncode == 0, done.stderr
    assert train_iters(done.stdout) == [3, 4]
    one, other = (torch.load(tmp_path / name / 'iter_4.pth', weights_only=False)['state_dict']
                  for name in ('whole', 'parts'))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_refusal_is_one_line_on_stderr(tmp_path):
    done = run_tool('train', 'configs/nothing.py', cwd=tmp_path)
    assert done.returncode == 2
    assert 'Traceback' not in done.stderr
    assert done.stderr.splitlines()[-1].startswith('error: config file configs/nothing.py')
    assert not list(tmp_path.iterdir())


def test_bad_config(refused, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text('model = dict(\n')
    assert 'config.py cannot be read: SyntaxError' in refused(config)
    config.write_text("_base_ = './nothing.py'\n")
    assert 'nothing.py' in refused(config)
    config.write_text("custom_imports = dict(imports=['nowhere'], allow_failed_imports=False)\n")
    assert 'nowhere' in refused(config)
    config.write_text('model = dict()\n')
    assert 'default_scope None' in refused(config)
    config.write_text("default_scope = 'mmpose'\n")
    assert "'mmpose': set default_scope to one of mmpretrain, mmdet, mmseg" in refused(config)
    config.write_text("default_scope = 'mmdet'\n")
    assert 'has no optim_wrapper' in refused(config)


def test_mixed_family(tmp_path, configs):
    """A second mmcv beside onedl-mmcv is refused before anything is imported."""
    (tmp_path / 'mmcv-2.1.0.dist-info').mkdir()
    (tmp_path / 'mmcv-2.1.0.dist-info/METADATA').write_text('Name: mmcv\nVersion: 2.1.0\n')
    done = subprocess.run(
        [sys.executable, ROOT / 'tools/train.py', configs['mmdet']], cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(tmp_path)}, text=True, capture_output=True)
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith('error: mixed OpenMMLab families')


def test_missing_library(refused, configs, monkeypatch):
    monkeypatch.setattr('mmgroupmamba.launch.check_family', lambda scope: [f'{scope} not there'])
    assert 'mmdet not there' in refused(configs['mmdet'])


@pytest.mark.parametrize('option, words', [
    ('model.backbone', 'no key=value pair'),
    ('model..backbone=1', 'no key=value pair'),
    ('model.test=[1,(2]', 'Imbalanced'),
    ('modl.backbone.arch=tiny', 'did you mean model?'),
    ('backbone.arch=tiny', 'backbone is a variable inside the config file'),
    ('train_dataloader.dataset.pipeline.9.type=X', 'Index 9'),
    ('randomness.seed.deep=1', 'do not fit'),
    ('model.backbone.arch=huge', "unknown arch 'huge'"),
    ('model.backbone.arch.embed_dim=16', 'embed_dim'),
    ('model.backbone.arch.embed_dims=[18,16,16,16]', 'divisible by 4'),
    pytest.param('model.backbone.scan_backend=mamba_ssm', "scan backend 'mamba_ssm' cannot run",
                 marks=pytest.mark.skipif(not available_backends()['mamba_ssm'], reason='it runs')),
    ('model.backbone.scan_backend=nothing', "unknown scan backend 'nothing'"),
    ('model.backbone.archh=tiny', "unexpected keyword argument 'archh'"),
    ('model.backbone.type=Nothing', 'Nothing is not in the'),
    ('train_dataloader.dataset.typo=1', "unexpected keyword argument 'typo'"),
    ('train_cfg.max_iter=4', "unexpected keyword argument 'max_iter'"),
    ('optim_wrapper.type=Other', 'optim_wrapper.type=Other'),
    ('optim_wrapper.optimizer.type=Adamm', 'Adamm is not in the'),
    ('model.backbone.out_indices=3', 'out_indices must be a list'),
    ('model.backbone.drop_path_rate=abc', "drop_path_rate must be in [0, 1), got 'abc'"),
    ('model.backbone.frozen_stages=9', 'frozen_stages must be -1 to 4'),
    ('model.backbone.init_cfg.type=Pretrained', 'needs checkpoint=FILE'),
    ('model.backbone.arch.depths=[True,1,1,1]', 'must be whole numbers'),
    ('model.backbone.arch.mlp_ratios=[2,2,2,x]', 'must be numbers'),
    ('model.head.num_classes=three', 'the config does not build'),
    ('model.head.num_classes=3', 'head has 3 classes, the data set 2'),
])
def test_bad_options(option, words, refused, configs):
    assert words in refused(configs['mmpretrain'], '--amp', '--cfg-options', option)


def test_bad_arguments(refused, configs, tmp_path):
    assert '--nothing' in refused(configs['mmdet'], '--nothing')
    if not torch.cuda.is_available():
        assert 'no bfloat16 on CPU' in refused(configs['mmdet'], '--amp')
        assert 'use torchrun' in refused(configs['mmdet'], '--launcher', 'slurm')
    assert 'that torchrun starts' in refused(configs['mmdet'], '--launcher', 'pytorch')
    (tmp_path / 'taken').write_text('')
    assert 'taken is a file' in refused(configs['mmdet'], '--work-dir', tmp_path / 'taken/run')


@pytest.mark.parametrize('scope, option, path', [
    ('mmpretrain', 'train_dataloader.dataset.data_root', 'nowhere'),
    ('mmpretrain', 'val_dataloader.dataset.data_prefix', 'nowhere'),
    ('mmdet', 'train_dataloader.dataset.ann_file', 'nowhere.json'),
    ('mmdet', 'val_evaluator.ann_file', 'nowhere.json'),
    ('mmseg', 'val_dataloader.dataset.data_prefix.seg_map_path', 'nowhere'),
])
def test_missing_data(scope, option, path, refused, configs):
    line = refused(configs[scope], '--cfg-options', f'{option}={path}')
    assert path in line and f'{option}' in line


def test_missing_data_in_wrappers(refused, configs, tmp_path):
    config = tmp_path / 'wrapped.py'
    config.write_text(f"""
_base_ = r'{configs['mmseg']}'
one = _base_.train_dataloader.dataset
other = dict(one, data_root='nowhere')
train_dataloader = dict(dataset=dict(
    _delete_=True, type='RepeatDataset', times=2,
    dataset=dict(type='ConcatDataset', datasets=[one, other])))
""")
    assert 'train_dataloader.dataset.dataset.datasets.1.data_root=PATH' in refused(config)
    line = refused(config, '--no-validate', '--cfg-options',
                   'val_dataloader.dataset.data_root=unread')
    assert 'unread' not in line


def test_unfit_checkpoint(refused, configs, trained, tmp_path):
    config, other = configs['mmpretrain'], trained('mmseg').checkpoint
    assert 'not found' in refused(config, '--resume', 'nothing.pth')
    cut = tmp_path / 'cut.pth'
    cut.write_bytes(other.read_bytes()[:5000])
    assert 'cut.pth' in refused(config, '--resume', cut)
    line = refused(config, '--resume', other)
    assert 'does not fit' in line and 'decode_head' in line
    assert 'nothing.pth' in refused(config, '--cfg-options', 'load_from=nothing.pth')


def test_resume_from_a_damaged_latest(refused, configs, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/iter_4.pth').write_bytes(b'half')
    (tmp_path / 'run/last_checkpoint').write_text(str(tmp_path / 'run/iter_4.pth'))
    line = refused(configs['mmpretrain'], '--resume', '--work-dir', tmp_path / 'run')
    assert 'iter_4.pth' in line and '--resume CKPT' in line


def test_images_below_32_pixels(refused, configs, tmp_path):
    for name in ('red', 'green'):
        (tmp_path / 'small' / name).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / 'small' / name / '0.png'), np.zeros((16, 16, 3), np.uint8))
    line = refused(configs['mmpretrain'], '--cfg-options',
                   f'train_dataloader.dataset.data_root={tmp_path}',
                   'train_dataloader.dataset.data_prefix=small', 'train_dataloader.batch_size=2')
    assert 'at least 32x32' in line and '16x16' in line


@pytest.mark.parametrize('change, words', [
    (lambda coco: coco['annotations'][0].update(category_id=9), 'category_id 9'),
    (lambda coco: coco['annotations'][0].update(segmentation=[]), 'has no mask'),
    (lambda coco: coco['categories'].pop(), 'no category green'),
    (lambda coco: [a.update(bbox=[70, 0, 9, 9]) for a in coco['annotations']],
     '8 boxes outside their image'),
])
def test_unfit_instances(change, words, refused, configs, data, tmp_path):
    content = json.loads((data / 'instances.json').read_text())
    change(content)
    (tmp_path / 'bad.json').write_text(json.dumps(content))
    line = refused(configs['mmdet'], '--cfg-options',
                   f'train_dataloader.dataset.ann_file={tmp_path}/bad.json')
    assert words in line and 'bad.json' in line


def test_boxes_outside_the_image_are_left_out(configs, data, tmp_path):
    content = json.loads((data / 'instances.json').read_text())
    content['annotations'][0].update(bbox=[70, 0, 9, 9])
    (tmp_path / 'some.json').write_text(json.dumps(content))
    done = run_tool('train', configs['mmdet'], '--no-validate', '--work-dir', tmp_path / 'run',
                    '--cfg-options', f'train_dataloader.dataset.ann_file={tmp_path}/some.json')
    assert done.returncode == 0, done.stderr
    assert 'some.json: 1 boxes outside their image' in done.stdout
    assert train_iters(done.stdout) == [1, 2, 3, 4]


def test_labels_outside_the_classes(refused, configs, data, tmp_path):
    (tmp_path / 'labels').mkdir()
    for path in (data / 'labels').iterdir():
        label_map = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        label_map[-1, -1] = 7
        cv2.imwrite(str(tmp_path / 'labels' / path.name), label_map)
    line = refused(configs['mmseg'], '--cfg-options',
                   f'train_dataloader.dataset.data_prefix.seg_map_path={tmp_path}/labels')
    assert re.search(r'labels/\d\.png has the label 7 outside the 2 classes 0 to 1', line)

    (tmp_path / 'list.txt').write_text('folders/red/0.png 0\nfolders/green/1.png 2\n')
    line = refused(configs['mmpretrain'], '--cfg-options', 'train_dataloader.batch_size=2',
                   'train_dataloader.dataset.data_prefix=',
                   f'train_dataloader.dataset.ann_file={tmp_path}/list.txt')
    assert 'folders/green/1.png has the label 2 outside the 2 classes' in line


def test_no_images(refused, configs, tmp_path):
    (tmp_path / 'bare').mkdir()
    for option in (f'data_prefix.img_path={tmp_path}/bare', 'img_suffix=.jpg'):
        line = refused(configs['mmseg'], '--cfg-options', f'train_dataloader.dataset.{option}')
        assert 'a data set is empty' in line


def test_unexpected_errors_keep_their_traceback(configs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = load_main('train')

    def broken(*args):
        raise ZeroDivisionError('a bug')

    monkeypatch.setattr('mmgroupmamba.launch.Runner.from_cfg', broken)
    with pytest.raises(ZeroDivisionError):
        main([str(configs['mmpretrain'])])
