"""The benchmark's tables, gate and refusals; no test asserts a time."""
import json
import re
import sys
import weakref
from contextlib import nullcontext
from copy import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import DefaultScope
from tiny import load_main

from mmgroupmamba.benchmarking import measure
from mmgroupmamba.benchmarking.contestants import Peer, Spec, plain_loop, with_right_gradient
from mmgroupmamba.ops import resolve_backend, scan_blocked, selective_scan

NANO = ['--arch', 'nano', '--repeats', '1', '--threads', '1', '--backends', 'blocked']

# a stand-in that keeps its weights under the official names and computes with our layer
CHECKOUT = """
import torch
from torch import nn
import a_cuda_module_that_nobody_has
from mmgroupmamba.checkpoint import from_official, to_official
from mmgroupmamba.models.layers import ModulatedGroupMamba

torch.backends.cudnn.deterministic = True
OURS, THEIRS = 'stages.0.blocks.0.mixer.', 'block1.0.attn.'


class GroupMambaLayer(nn.Module):
    def __init__(self, channels, out_channels):
        super().__init__()
        self.plain = [ModulatedGroupMamba(channels)]  # in a list: its weights are not this one's
        self.names = [OURS + name for name, _ in self.plain[0].named_parameters()]
        for name, value in to_official(
                {OURS + k: v for k, v in self.plain[0].state_dict().items()}).items():
            *path, last = name.removeprefix(THEIRS).split('.')
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(value.clone()))

    def forward(self, x, height, width):
        weights = {THEIRS + k: v for k, v in self.named_parameters()}
        weights = {k.removeprefix(OURS): v for k, v in from_official(weights, self.names).items()}
        x = x.unflatten(1, (height, width))
        return torch.func.functional_call(self.plain[0], weights, (x, )).flatten(1, 2) * FACTOR
"""


@pytest.fixture(autouse=True)
def restore():
    """Leave the other tests the scope, flags and random numbers they had."""
    scope, threads = copy(DefaultScope._instance_dict), torch.get_num_threads()
    flags = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = flags
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(scope)


@pytest.fixture(scope='module')
def main():
    return load_main('analysis_tools/benchmark')


@pytest.fixture
def run(main, tmp_path, capsys):
    """Function from arguments to the printed text, the rows of its table and the JSON."""

    def run(*args: str) -> tuple[str, list[dict], dict]:
        assert main([*NANO, *args, '--json', str(tmp_path / 'out.json')]) == 0
        out = capsys.readouterr().out
        lines = [[cell.strip() for cell in line.strip('|').split('|')]
                 for line in out.split('\n\n')[1].splitlines()]
        assert out.count('| subject') == 1  # one table
        rows = [dict(zip(lines[0], line)) for line in lines[2:]]
        return out, rows, json.loads((tmp_path / 'out.json').read_text())

    return run


def refused(main, capsys, *args: str) -> str:
    """The one line on which a command ends; progress stands before it."""
    resolve_backend('auto', 'cpu', torch.float32)  # says once in a process what it takes
    capsys.readouterr()
    assert main([*NANO, *args]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    *progress, line = captured.err.splitlines()
    assert line.startswith('error: ') and not any('error' in text for text in progress)
    return line


def test_scan_and_layer(run):
    out, rows, data = run('--subjects', 'scan', 'layer', '--sizes', '33x47', '--batch', '3',
                          '--stage', '2', '--backends', 'blocked', 'reference')
    assert [(r['subject'], r['pass'], r['what']) for r in rows] == [
        (subject, which, backend) for subject in ('scan', 'layer')
        for which in ('forward', 'forward+backward') for backend in ('blocked', 'reference')]
    assert {r['size'] for r in rows} == {'33x47 b3'}
    assert all(0 < float(r['error']) < 1e-5 for r in rows)
    assert 'gate:' in out and 'GB/s' in out
    results = data['results']
    for result in results:  # of one repeat
        assert result['p10_ms'] == result['median_ms'] == result['p90_ms'] > 0
        assert result['batch'] == 3 and result['peak_bytes'] > 0
    by = {(r['subject'], r['pass'], r['what']): r for r in results}
    # 5 x 6 tokens of stage 2, 48 channels: 10 L C of the scan and the two projections of a group
    tokens, dim = 3 * 5 * 6, 12
    want = 10 * tokens * 4 * dim + 2 * tokens * 4 * (dim * 3 + 1 * dim)
    assert by['scan', 'forward', 'blocked']['flops'] == want
    assert by['scan', 'forward+backward', 'blocked']['flops'] == 3 * want
    # a loop over L dispatches more than one over its root
    assert (by['scan', 'forward', 'reference']['launches']
            > by['scan', 'forward', 'blocked']['launches'] > 10)
    assert data['machine']['torch'] == torch.__version__ and data['machine']['threads'] == 1
    assert re.match(r'\d{4}-\d\d-\d\d', data['date']) and '--stage 2' in data['command']
    assert data['rates']['copy'] > 0


def test_backbone_rows_and_memory(run):
    out, rows, data = run('--subjects', 'backbone', '--sizes', '32x64', '--with-cp',
                          '--channels-last', '--passes', 'forward', 'train-step',
                          '--baseline', 'blocked channels_last')
    assert [(r['pass'], r['what']) for r in rows] == [
        ('forward', 'blocked'), ('forward', 'blocked channels_last'),
        ('train-step', 'blocked'), ('train-step', 'blocked channels_last'),
        ('train-step', 'blocked with_cp')]
    assert [r['ratio'] == '1.00' for r in rows if r['what'].endswith('last')] == [True, True]
    peak = {(r['pass'], r['what']): r['peak_bytes'] for r in data['results']}
    assert peak['train-step', 'blocked with_cp'] < peak['train-step', 'blocked']
    weights = 4 * 336_000
    assert peak['forward', 'blocked'] > weights
    assert peak['train-step', 'blocked'] > 4 * weights  # and gradients and two moments


def test_folded_row_and_profile(run):
    out, rows, data = run('--subjects', 'backbone', '--sizes', '32x64', '--fuse', '--profile')
    assert [(r['pass'], r['what']) for r in rows] == [
        ('forward', 'blocked'), ('forward', 'blocked folded'), ('forward+backward', 'blocked')]
    plain, folded = (r for r in data['results'] if r['pass'] == 'forward')
    assert folded['launches'] < plain['launches']
    norms = [[name for name in r['operators'] if 'batch_norm' in name] for r in (plain, folded)]
    assert norms[0] and not norms[1]
    for result in data['results']:
        assert sum(result['operators'].values()) == pytest.approx(1)
        assert result['operators']['aten::addmm'] > 0.01
    shares = [line.split('|')[1:4] for line in out.split('\n\n')[-1].splitlines()[2:]]
    forward = [float(share) for _, share, subject in shares[:14]]
    assert forward == sorted(forward, reverse=True) and sum(forward) < 100.5


class Graph:
    """Stands for a CUDA graph on CPU: runs again what it captured, and keeps none of it alive."""
    outputs = None

    def replay(self):
        outputs = self.run()()
        if self.outputs is not None:
            with torch.no_grad():
                self.outputs.copy_(outputs)


@pytest.fixture
def graphs(main, monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    graphs = []
    for name, stand_in in dict(
            Stream=lambda: stream, current_stream=lambda: stream, stream=nullcontext,
            graph=lambda graph: nullcontext(graphs.append(graph)), CUDAGraph=Graph).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    row = main.__globals__['Row']
    capture = row._capture

    def captured(self, run, *args):
        replay = capture(self, run, *args)
        graphs[-1].run = weakref.ref(run)
        graphs[-1].outputs = replay(0)
        return replay

    monkeypatch.setattr(row, '_capture', captured)
    monkeypatch.setitem(main.__globals__, 'check', lambda args: None)
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, 'AdamW', lambda *args, capturable, **kwargs: adamw(
        *args, **kwargs))  # capturable on GPUs only


GRAPHS = ['--cuda-graph', '--device', 'cpu', '--subjects', 'layer', '--sizes', '32x64']


def test_rows_of_graphs(run, graphs):
    passes = ['forward', 'forward+backward', 'train-step']
    _, _, data = run(*GRAPHS, '--passes', *passes)
    rows = {(r['pass'], r['what']): r for r in data['results']}
    assert set(rows) == {(name, what) for name in passes for what in ('blocked', 'blocked graph')}
    for (_, what), row in rows.items():
        assert row['median_ms'] > 0 and (row['peak_bytes'] is None) == (what == 'blocked graph')


@pytest.mark.parametrize('which, words', [
    ('forward', 'other outputs'), ('forward+backward', 'other gradients'),
])
def test_wrong_graph_is_refused(which, words, main, graphs, monkeypatch, capsys):
    row = main.__globals__['Row']
    capture = row._capture

    def spoilt(self, *args):
        replay = capture(self, *args)
        weight = self.module.proj.weight.data

        def wrong(i):
            right = weight.clone()
            weight.add_(1)
            outputs = replay(i)
            weight.copy_(right)
            return outputs

        return wrong

    monkeypatch.setattr(row, '_capture', spoilt)
    assert f'graph is wrong: the graph gives {words}' in refused(
        main, capsys, *GRAPHS, '--passes', which)


def test_graph_that_reads_no_input_is_refused(main, graphs, monkeypatch, capsys):
    row = main.__globals__['Row']
    capture = row._capture
    monkeypatch.setattr(row, '_capture', lambda self, run, static, inputs: capture(
        self, run, static, [static]))
    assert 'graph is wrong: the graph gives other outputs' in refused(
        main, capsys, *GRAPHS, '--passes', 'forward')


def test_wrong_graph_of_a_peer_is_left_out(run, graphs, main, monkeypatch, tmp_path):
    row = main.__globals__['Row']
    capture = row._capture

    def spoilt(self, run, static, inputs):
        wrong = self.label.startswith('peer')
        return capture(self, run, static, [static] if wrong else inputs)

    monkeypatch.setattr(row, '_capture', spoilt)
    (tmp_path / 'peer.py').write_text('from torch.nn import Conv2d\nmake = lambda: Conv2d(3, 2, 3)')
    out, rows, _ = run('--cuda-graph', '--device', 'cpu', '--subjects', 'classifier',
                       '--sizes', '32x32', '--passes', 'forward',
                       '--against', f'{tmp_path}/peer.py:make')
    assert [r['what'] for r in rows] == ['blocked', 'blocked graph', 'peer:make']
    assert 'peer:make graph: not timed, LaunchError: peer:make graph is wrong' in out


def test_what_does_not_compile_is_left_out(run, monkeypatch):
    def compiled(module, **options):
        def call(x):
            raise RuntimeError('no compiler')
        return call

    monkeypatch.setattr(torch, 'compile', compiled)
    out, rows, _ = run('--subjects', 'layer', '--sizes', '32x32', '--passes', 'forward',
                       '--compile')
    assert [r['what'] for r in rows] == ['blocked']
    assert 'blocked compiled: not timed, RuntimeError: no compiler' in out


@pytest.mark.parametrize('subject, batch, which, flops', [
    ('classifier', '2', 'forward+backward', 3 * 2 * 5e6),
    ('upernet', '2', 'forward+backward', 3 * 2 * 1e9),
    ('mask-rcnn', '1', 'forward', 1e9),
])
def test_whole_models(subject, batch, which, flops, run):
    _, rows, data = run('--subjects', subject, '--sizes', '32x40', '--batch', batch,
                        '--passes', which)
    assert [(r['pass'], r['what']) for r in rows] == [(which, 'blocked')]
    assert data['results'][0]['flops'] > flops


def test_amp(run):
    _, rows, data = run('--subjects', 'scan', '--sizes', '32x32', '--amp', 'bf16',
                        '--passes', 'forward')
    assert data['amp'] == 'bf16'
    assert 1e-5 < float(rows[0]['error']) < 0.1


def test_peers(run, tmp_path):
    (tmp_path / 'own.py').write_text('\ufefffrom torch import nn\n'
                                     'def net():\n    return nn.Conv2d(3, 5, 7)\n'
                                     'def large():\n    return nn.Conv2d(3, 5, 64)\n')
    out, rows, _ = run('--subjects', 'backbone', '--sizes', '32x32', '--passes', 'forward',
                     '--against', 'swin-tiny', 'resnet18.a1_in1k', f'{tmp_path}/own.py:net',
                     f'{tmp_path}/own.py:large')
    assert [r['what'] for r in rows] == ['blocked', 'swin-tiny', 'resnet18.a1_in1k', 'own:net']
    assert [bool(r['error']) for r in rows] == [True, False, False, False]
    assert rows[3]['aten ops'] == '1'
    assert 'own:large: not timed, RuntimeError' in out


def test_peer_of_a_file_compiles(tmp_path):
    """Dynamo imports the module of what it inlines from another."""
    (tmp_path / 'own.py').write_text(
        'import torch\nSCALE = [2.]\ndef scaled(x):\n    return x * SCALE[0]\n'
        'class Net(torch.nn.Module):\n    def forward(self, x):\n        return scaled(x)\n'
        'make = lambda: torch.nn.Sequential(Net())\n')
    net = Peer(f'{tmp_path}/own.py:make').build(Spec('classifier', 'tiny', 1))
    x = torch.ones(2)
    assert torch.equal(torch.compile(net, backend='eager', fullgraph=True)(x), 2 * x)


def checkout(folder: Path, factor: float = 1.) -> str:
    models = folder / 'checkout/classification/models'
    models.mkdir(parents=True)
    (models / 'groupmamba.py').write_text(f'{CHECKOUT}\n\nFACTOR = {factor}\n')
    return str(folder / 'checkout')


def test_official_side_by_side(run, tmp_path):
    assert not torch.backends.cudnn.deterministic
    out, rows, data = run('--subjects', 'layer', '--sizes', '32x64', '--official',
                          checkout(tmp_path))
    assert [r['what'] for r in rows] == ['official', 'blocked'] * 2
    assert [r['ratio'] == '1.00' for r in rows] == [True, False] * 2
    assert not torch.backends.cudnn.deterministic
    assert 'its import set cudnn deterministic=True; set back' in out
    assert 'left out of its imports: a_cuda_module_that_nobody_has' in out
    assert 'a_cuda_module_that_nobody_has' not in sys.modules
    assert len(data['notes']) == 4


def test_wrong_official_is_refused(main, tmp_path, capsys):
    line = refused(main, capsys, '--subjects', 'layer', '--sizes', '32x64', '--official',
                   checkout(tmp_path, 1.001))
    assert 'official is wrong: output differs from reference in float64 by 1.0e-03' in line


def test_official_that_does_not_import(main, tmp_path, capsys):
    path = checkout(tmp_path)
    (Path(path) / 'classification/models/groupmamba.py').write_text(
        'import nobody_has_it\nnobody_has_it.register(3)\n')
    line = refused(main, capsys, '--subjects', 'layer', '--official', path)
    assert 'calls nobody_has_it.register: install nobody_has_it' in line


class ColumnsWithAWrongGradient(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x):
        return x.transpose(2, 3).flatten(2)[:, None]

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError('to be replaced')


def test_right_gradient():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(with_right_gradient(ColumnsWithAWrongGradient, False).apply, x)


def test_plain_loop():
    u, delta = torch.randn(2, 2, 3, 7, dtype=torch.float64)
    B, C = torch.randn(2, 2, 1, 2, 7, dtype=torch.float64)
    A, D = -torch.rand(3, 2, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    args = u, delta, A, B, C, D, D - 1, True
    torch.testing.assert_close(plain_loop(*args), selective_scan(*args, backend='reference'))


def off_by_a_bit(y):
    return y + 0.01 * y.flip(1)


def with_a_token_unwritten(y):
    out = torch.empty_like(y)
    out[..., 1:] = y[..., 1:]
    return out


def with_a_wrong_gradient(y):
    return 1.01 * y - (0.01 * y).detach()


@pytest.mark.parametrize('subject', ['scan', 'backbone'])
@pytest.mark.parametrize('fault, what', [
    (off_by_a_bit, 'output'), (with_a_token_unwritten, 'output'),
    (with_a_wrong_gradient, 'gradient of'),
])
def test_gate_refuses_a_wrong_backend(fault, what, subject, main, monkeypatch, capsys):
    scan = scan_blocked.scan
    monkeypatch.setattr(scan_blocked, 'scan', lambda *args: fault(scan(*args)))
    line = refused(main, capsys, '--subjects', subject, '--sizes', '32x48')
    assert f'blocked is wrong: {what}' in line
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize('args, words', [
    (['--backends', 'fast'], "unknown scan backend 'fast'"),
    (['--backends', 'mamba_ssm'], 'CUDA tensors only'),
    (['--backends', 'auto'], 'name what'),
    (['--sizes', '31x64'], 'at least 32x32'),
    (['--sizes', '64'], 'write HxW'),
    (['--official', 'nowhere'], 'there is no classification/models/groupmamba.py'),
    (['--subjects', 'backbone', '--against', 'swim-tiny'], 'neither mmpretrain nor timm'),
    (['--subjects', 'backbone', '--against', 'nowhere.py:net'], 'there is no file nowhere.py'),
    (['--subjects', 'backbone', '--against', f'{__file__}:net'], 'no function net'),
    (['--subjects', 'scan', '--against', 'swin-tiny'], 'peers have no'),
    (['--subjects', 'scan', '--baseline', 'official'], 'there is no such row, only blocked'),
    (['--subjects', 'mask-rcnn', '--amp', 'bf16'], 'NMS'),
    (['--subjects', 'upernet'], 'at least two images'),
    (['--json', 'nowhere/out.json'], 'no such folder'),
    (['--cuda-graph', '--device', 'cpu'], 'needs a GPU'),
    (['--fused-ops', '--device', 'cpu'], 'depthwise_conv: backend'),
    (['--fused-ops', 'add_layer_norm', '--device', 'cpu'], 'add_layer_norm: backend'),
])
def test_bad_input(args, words, main, capsys):
    assert words in refused(main, capsys, *args)


@pytest.mark.parametrize('args', [
    ['--repeats', '0'], ['--batch', '-1'], ['--subjects', 'head'], ['--amp', 'int8'], ['--fast'],
])
def test_bad_arguments(args, main, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and err.count('\n') == 1


def test_summary():
    assert measure.summary([3.]) == (3., 3., 3.)
    median, p10, p90 = measure.summary([float(i) for i in range(101)])
    assert (median, p10, p90) == (50, 10, 90)


def test_peak_memory():
    """Of what lives at the same time, not of all that is made; what is older does not count."""
    old = [torch.zeros(10**6)]

    def step(_):
        old.clear()
        for _ in range(3):
            torch.zeros(10**5)
        one, other = torch.zeros(10**5), torch.zeros(10**5)
        return one + other

    assert measure.peak_memory(step, 'cpu') == pytest.approx(3 * 4 * 10**5, rel=1e-3)

    kept = []
    measure.peak_memory(lambda _: kept.append(torch.zeros(10**5)), 'cpu')  # the profiler knows it

    def gives_back(_):
        kept.clear()
        return torch.zeros(10**5)

    assert measure.peak_memory(gives_back, 'cpu') == 4 * 10**5


def test_count_of_aten_ops():
    """What a custom operator does inside counts, what an aten op does inside does not."""
    linear, x = torch.nn.Linear(2, 3), torch.ones(4, 2)
    assert measure.count_launches(lambda _: linear(x).relu(), 'cpu') == 2
    u, B = torch.rand(1, 4, 50), torch.rand(1, 4, 1, 50)
    count = measure.count_launches(
        lambda _: selective_scan(u, u, -torch.ones(4, 1), B, B, backend='blocked'), 'cpu')
    assert 30 < count < 150


def test_relative_error():
    one = torch.ones(4)
    assert measure.relative_error(one * 1.5, one) == pytest.approx(0.5)
    assert measure.relative_error(one * float('nan'), one) == float('inf')
    assert measure.relative_error(None, one) == float('inf')
    assert measure.relative_error(one * 1e-9, one * 0) < 1e-8
