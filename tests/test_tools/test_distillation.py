"""Distillation through tools/train.py: AMP, average of weights, accumulation, resuming, DDP."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import ROOT, run_tool

DISTILLED = """
_base_ = r'{base}'
custom_imports = dict(imports=['mmgroupmamba.models.classification'], allow_failed_imports=False)
student = _base_.model
parts = dict(
    backbone=dict(final_norm=False),
    neck=dict(_delete_=True, type='mmgroupmamba.ClassBlockNeck', embed_dim=16, mlp_ratio=2),
    head=dict(type='mmgroupmamba.DistilledLinearHead'))
model = dict(
    type='mmgroupmamba.DistilledImageClassifier',
    teacher=dict(
        type='ImageClassifier', data_preprocessor=_base_.data_preprocessor,
        backbone=dict(student.backbone), neck=dict(student.neck), head=dict(student.head),
        init_cfg=dict(type='Pretrained', checkpoint=r'{teacher}')),
    **parts)
custom_hooks = [dict(type='EMAHook', momentum=0.1, update_buffers=True)]
optim_wrapper = dict(accumulative_counts=2)
"""


@pytest.fixture
def config(configs, trained, tmp_path) -> Path:
    """A distilled student, its teacher the classifier that the other tests train."""
    path = tmp_path / 'distilled.py'
    path.write_text(DISTILLED.format(
        base=configs['mmpretrain'], teacher=trained('mmpretrain').checkpoint))
    return path


def load(path: Path) -> dict:
    return torch.load(path, weights_only=False)


def test_amp_average_accumulation_and_resume(config, tmp_path):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    done = run_tool('train', config, '--amp', '--work-dir', whole)
    assert done.returncode == 0, done.stderr
    losses = [re.search(rf'{name}: (\S+)', done.stdout) for name in ('loss_cls', 'loss_distill')]
    assert all(0 < float(loss[1]) < 5 for loss in losses)

    checkpoint = load(whole / 'iter_4.pth')
    for state in (checkpoint['state_dict'], checkpoint['ema_state_dict']):
        assert 'teacher' not in ' '.join(state) and any('dist_fc' in k for k in state)
    trained = [k for k in checkpoint['state_dict'] if not re.search('running_|num_batches', k)]
    assert len(checkpoint['optimizer']['state']) == len(trained)
    # the average lags behind what it averages
    averaged = checkpoint['state_dict']['head.fc.weight']
    assert not torch.equal(averaged, checkpoint['ema_state_dict']['module.head.fc.weight'])

    # two iterations, then two more by --resume, end at the same weights
    options = ('--amp', '--no-validate', '--work-dir', parts)
    first = run_tool('train', config, *options, '--cfg-options', 'train_cfg.max_iters=2')
    assert first.returncode == 0, first.stderr
    second = run_tool('train', config, '--resume', *options)
    assert second.returncode == 0, second.stderr
    assert re.findall(r'Iter\(train\) \[ *(\d+)/', second.stdout) == ['3', '4']
    again = load(parts / 'iter_4.pth')
    for key in ('state_dict', 'ema_state_dict'):
        for name, tensor in checkpoint[key].items():
            torch.testing.assert_close(again[key][name], tensor, rtol=0, atol=1e-6, msg=name)

    # the average is what is tested, under test-time augmentation too
    tested = run_tool('test', config, whole / 'iter_4.pth', '--tta', '--work-dir', whole)
    assert tested.returncode == 0 and 'accuracy/top1' in tested.stdout, tested.stderr


def test_two_processes(config, tmp_path):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PORT': '29643',
           'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
    done = subprocess.run(
        ['bash', ROOT / 'tools/dist_train.sh', config, '2', '--work-dir', tmp_path / 'two'],
        env=env, text=True, timeout=300, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    state = load(tmp_path / 'two/iter_4.pth')['state_dict']
    assert 'teacher' not in ' '.join(state) and not any(k.startswith('module.') for k in state)


def test_bad_teachers(config, trained, tmp_path):
    """Refused in one line, and nothing is left of the run."""
    other = trained('mmseg').checkpoint
    for option, words in (
            (f'model.teacher.init_cfg.checkpoint={other}', 'does not fit ImageClassifier'),
            ('model.teacher.init_cfg.checkpoint=nothing.pth', 'checkpoint not found: nothing.pth'),
            ('model.alpha=1.5', 'alpha must be in [0, 1], got 1.5')):
        done = run_tool('train', config, '--cfg-options', option, cwd=tmp_path)
        assert done.returncode == 2, done.stdout
        assert words in done.stderr.splitlines()[-1]
        assert not (tmp_path / 'work_dirs').exists()
