import csv
import importlib.util
import math
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.optim import OptimWrapper
from tiny import ROOT

from mmgroupmamba.launch import build_runner

SPEC = importlib.util.spec_from_file_location(
    'stability_tool', ROOT / 'tools/analysis_tools/stability.py')
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)

DISTILLED = """
_base_ = r'{base}'
custom_imports = dict(imports=['mmgroupmamba.models.classification'], allow_failed_imports=False)
model = dict(type='mmgroupmamba.DistilledImageClassifier', alpha=0.3, teacher=_base_.model,
             head=dict(type='mmgroupmamba.DistilledLinearHead'))
"""


@pytest.fixture
def distilled(configs, tmp_path) -> Path:
    """The tiny classifier, taught by another one of its kind with other weights."""
    path = tmp_path / 'distilled.py'
    path.write_text(DISTILLED.format(base=configs['mmpretrain']))
    return path


@pytest.fixture
def settle(tmp_path):
    """Function from a config and options to the settled config of one run."""

    def settled(config: Path, *options: str):
        options = ('--cfg-options', *options) if options else ()
        args = tool.parse_args([str(config), '--steps', '4', *options])
        tool.check_args(args)
        cfg, = tool.settle(args).values()
        cfg.work_dir = str(tmp_path / 'run')
        return cfg

    return settled


def read(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_three_tasks_beside_each_other(configs, tmp_path, capfd):
    code = tool.main([*map(str, configs.values()), '--steps', '3', '--seeds', '0', '5',
                      '--labels', 'cls', 'a b/c', 'seg', '--out-dir', str(tmp_path / 'out')])
    out = capfd.readouterr().out
    assert code == 0
    assert (tmp_path / 'out/stability.png').stat().st_size > 10_000
    for label, terms in (('cls', {'loss'}), ('a-b-c', {'loss_rpn_cls', 'loss_mask'}),
                         ('seg', {'decode.loss_ce'})):
        first, other = (read(tmp_path / f'out/{label}_seed{seed}.csv') for seed in (0, 5))
        assert [row['step'] for row in first] == [1, 2, 3]
        assert terms | {'loss', 'grad_norm', 'lr'} <= set(first[0])
        assert all(row['grad_norm'] > 0 and row['lr'] == 1e-3 for row in first)
        assert first[0]['loss'] != other[0]['loss']
    assert not list((tmp_path / 'out').rglob('*.pth'))
    table = [line for line in out.splitlines() if line.startswith('| ')]
    assert [line.split(' | ')[0] for line in table] == ['| config', '| cls', '| a b/c', '| seg']
    assert all(line.endswith('| no |') for line in table[1:])


def test_with_and_without_the_teacher(distilled, tmp_path, capfd):
    assert tool.main([str(distilled), '--steps', '2', '--without-distillation', '--labels', 'a',
                      '--out-dir', str(tmp_path)]) == 0
    taught = read(tmp_path / 'a_seed0.csv')
    alone = read(tmp_path / 'a-without-distillation_seed0.csv')
    for row in taught:
        assert row['loss'] == pytest.approx(row['loss_cls'] + row['loss_distill'], rel=1e-6)
    assert set(alone[0]) == {'step', 'loss', 'grad_norm', 'lr'}
    # the same weights, batch and definition before the first update
    assert taught[0]['loss_labels'] == pytest.approx(alone[0]['loss'], rel=1e-6)
    assert taught[0]['loss'] != pytest.approx(alone[0]['loss'], rel=1e-6)
    assert '| a, without distillation | 1 |' in capfd.readouterr().out


@pytest.mark.parametrize('wrapper', ['OptimWrapper', 'mmgroupmamba.CPUAmpOptimWrapper'])
def test_recording_changes_no_weight(wrapper, distilled, settle):
    cfg = settle(distilled, f'optim_wrapper.type={wrapper}',
                 'optim_wrapper.clip_grad.max_norm=0.1')
    cfg.experiment_name = f'plain {wrapper}'  # mmengine keeps one history a name and second
    plain = build_runner(deepcopy(cfg))
    plain.train()
    cfg.experiment_name = f'recorded {wrapper}'
    rows, runner = tool.record(cfg, 4)
    assert len(rows) == 4
    want = plain.model.state_dict()
    assert runner.model.state_dict().keys() == want.keys()
    assert all(torch.equal(v, want[k]) for k, v in runner.model.state_dict().items())
    # what torch's clipping found before it clipped
    clipped = plain.message_hub.get_scalar('train/grad_norm').data[0]
    assert [row['grad_norm'] for row in rows] == pytest.approx(clipped.tolist(), rel=1e-5)
    assert min(clipped) > 0.1


def test_gradient_norm_by_hand(configs, settle):
    """Plain gradient descent moves the weights by lr times the gradient."""
    weights = []
    for lr in (0., 0.5):
        rows, runner = tool.record(settle(
            configs['mmpretrain'], 'optim_wrapper.optimizer.type=SGD',
            f'optim_wrapper.optimizer.lr={lr}'), 1)
        weights.append([p.detach().double() for p in runner.model.parameters()])
    moved = math.sqrt(sum((a - b).square().sum().item() for a, b in zip(*weights)))
    assert rows[0]['grad_norm'] == pytest.approx(moved / 0.5, rel=1e-4)


def test_gradient_norm_undoes_the_loss_scale():
    weight = torch.nn.Parameter(torch.tensor([1., 2.]))
    unused = torch.nn.Parameter(torch.ones(3))
    wrapper = OptimWrapper(torch.optim.SGD([weight, unused], lr=1.))
    wrapper.loss_scaler = torch.amp.GradScaler('cpu', init_scale=1024.)
    wrapper.loss_scaler.scale((weight * torch.tensor([3., 4.])).sum()).backward()
    assert weight.grad.tolist() == [3072., 4096.]
    assert tool.gradient_norm(wrapper) == pytest.approx(5.)
    assert weight.grad.tolist() == [3072., 4096.]


def test_accumulated_gradients(configs, settle):
    rows, _ = tool.record(settle(configs['mmpretrain'], 'optim_wrapper.accumulative_counts=2'), 4)
    assert [math.isnan(row['grad_norm']) for row in rows] == [True, False, True, False]
    assert all(math.isfinite(row['loss']) for row in rows)


def test_mean_and_variance():
    series = np.array([1., 2., 4., 8., 8.])
    assert tool.windows(series, 2).mean(1).tolist() == [1.5, 3., 6., 8.]
    assert tool.windows(series, 2).var(1).tolist() == [0.25, 1., 4., 0.]
    assert len(tool.windows(series, 6)) == 0

    def rows(values):
        return [dict(step=i, loss=v, grad_norm=10. * v, lr=1.) for i, v in enumerate(values, 1)]

    table = tool.summarise({'x': {0: rows([9., 1., 3.]), 1: rows([9., 2., 6.])}}, 2)
    # means 2 and 4, variances 1 and 4, norms 90, 10, 30, 90, 20, 60
    assert table.splitlines()[-1] == (
        '| x | 2 | 3.0000 (2.0000 to 4.0000) | 2.50e+00 | 45 | 90 | no |')


def test_divergence_is_said(configs, tmp_path, capfd):
    assert tool.main([str(configs['mmpretrain']), '--steps', '4', '--out-dir', str(tmp_path),
                      '--labels', 'wild', '--cfg-options', 'optim_wrapper.optimizer.lr=1e30']) == 0
    rows = read(tmp_path / 'wild_seed0.csv')
    bad = [row['step'] for row in rows if not math.isfinite(row['loss'])]
    assert len(rows) == 4 and bad and bad[0] > 1
    out = capfd.readouterr().out
    assert f'wild, seed 0: 4 steps, loss is NaN or inf from step {bad[0]:.0f}' in out
    assert f'| {len(bad)} steps from step {bad[0]:.0f} (seed 0) |' in out
    assert (tmp_path / 'stability.png').is_file()


def test_a_run_that_breaks_off(configs, settle, monkeypatch):
    """After a NaN a crash is part of the result; before, it is an error."""
    train_iter = tool.Recorder.after_train_iter

    def broken(self, runner, batch_idx, data_batch=None, outputs=None):
        outputs['loss'] = torch.tensor(float('nan') if self.steps == 4 else 1.)
        train_iter(self, runner, batch_idx, data_batch, outputs)
        raise IndexError('no box left')

    monkeypatch.setattr(tool.Recorder, 'after_train_iter', broken)
    rows, _ = tool.record(settle(configs['mmpretrain']), 4)
    assert tool.diverged(rows) == [1]
    with pytest.raises(IndexError):
        tool.record(settle(configs['mmpretrain']), 3)


@pytest.mark.parametrize('options, words', [
    ([], 'the following arguments are required: --steps'),
    (['--steps', '0'], '--steps 0: give 2 or more'),
    (['--steps', 'many'], "invalid int value: 'many'"),
    (['--steps', '5'], 'the config trains 4 steps, --steps asks for 5'),
    (['--steps', '4', '--window', '5'], '--window 5: give 2 to --steps 4'),
    (['--steps', '4', '--seeds', '1', '1'], '--seeds 1 1: give different numbers'),
    (['--steps', '4', '--labels', 'a', 'b'], '--labels has 2 names for 1 configs'),
    (['--steps', '4', '--without-distillation'], 'there is no teacher to take out'),
    (['--steps', '4', '--cfg-options', 'model.backbone.arch=huge'], "unknown arch 'huge'"),
    (['--steps', '4', '--cfg-options', 'optim_wrapper=None'], 'has no optim_wrapper'),
    (['--steps', '4', '--out-dir', 'taken'], 'taken is a file'),
])
def test_bad_input(options, words, configs, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path('taken').write_text('')
    assert words in refusal([configs['mmpretrain'], *options], capfd)
    assert [path.name for path in tmp_path.iterdir()] == ['taken']


def test_bad_configs(configs, capfd):
    config = configs['mmpretrain']
    assert 'arguments are required: config (' in refusal(['--steps', 4], capfd)
    assert 'nothing.py does not exist' in refusal([config, 'nothing.py', '--steps', 4], capfd)
    assert 'not all different' in refusal([config, config, '--steps', 4], capfd)


def refusal(argv: list, capfd) -> str:
    try:
        code = tool.main(list(map(str, argv)))
    except SystemExit as stop:
        code = stop.code
    lines = [s for s in capfd.readouterr().err.splitlines() if s.startswith('error: ')]
    assert code == 2 and len(lines) == 1
    return lines[0]
