"""Two CPU processes over gloo against one."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import ROOT, SCOPES, run_script, run_tool, run_two

SCRIPT = Path(__file__).with_name('ddp_gradients.py')
ENV = {**os.environ, 'OMP_NUM_THREADS': '1',
       'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}


def run(*command: object, PORT: int) -> str:
    done = subprocess.run([str(part) for part in command], env={**ENV, 'PORT': str(PORT)},
                          text=True, timeout=300, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize('case', ['classifier', 'upernet'])
def test_gradients_are_those_of_the_double_batch(case, tmp_path):
    done = run_script(SCRIPT, case, tmp_path / 'one.pth')
    assert done.returncode == 0, done.stderr
    port = {'classifier': 29651, 'upernet': 29652}[case]
    run_two(SCRIPT, case, tmp_path / 'two.pth', port=port)
    one, two = (torch.load(tmp_path / f'{name}.pth') for name in ('one', 'two'))
    assert one.keys() == two.keys() and not any(g is None for g in one.values())
    largest = max(g.abs().max() for g in one.values())
    for name, want in one.items():
        # a layer's norm takes the scale of its input away: skip_scale's gradient is noise
        floor = largest * (1 if name.endswith('skip_scale') else 1e-6)
        error = (two[name] - want).abs().max() / want.abs().max().clamp(min=floor)
        assert error < 1e-4, (name, error)


@pytest.mark.parametrize('scope', SCOPES)
def test_train_and_test(scope, configs, tmp_path):
    """One task through the shell scripts, one tested folded; metrics are exactly those of one
    process."""
    options, port = ['--work-dir', tmp_path], 29617 + SCOPES.index(scope)
    checkpoint = tmp_path / 'iter_4.pth'
    if scope == 'mmseg':
        options += ['--cfg-options', 'model.decode_head.norm_cfg.type=SyncBN']
        log = run('bash', ROOT / 'tools/dist_train.sh', configs[scope], 2, *options, PORT=port)
        double = run('bash', ROOT / 'tools/dist_test.sh', configs[scope], checkpoint, 2, *options,
                     PORT=port)
    else:
        options += ['--launcher', 'pytorch']
        log, _ = run_two(ROOT / 'tools/train.py', configs[scope], *options, port=port)
        options += ['--fuse'] if scope == 'mmpretrain' else []
        double, _ = run_two(ROOT / 'tools/test.py', configs[scope], checkpoint, *options,
                            port=port)
        options = [option for option in options if option not in ('--launcher', 'pytorch')]
    assert ('gloo' in log) != torch.cuda.is_available()
    single = run_tool('test', configs[scope], checkpoint, *options).stdout
    metrics = r'Iter\(test\) \[\d+/\d+\] +(\S.*?) +data_time'
    assert re.findall(metrics, double)[-1] == re.findall(metrics, single)[-1]
