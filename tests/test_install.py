"""The installer's bookkeeping, on pins and commands of no weight."""
import importlib.util
import json
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from mmgroupmamba import doctor

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """tools/install.py on an empty checkout, with a list of the pip calls that it would make."""
    spec = importlib.util.spec_from_file_location('install', ROOT / 'tools' / 'install.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    venv = tmp_path / '.venv'
    for name, value in dict(VENV=venv, PYTHON=venv / 'bin' / 'python', LOG=venv / 'install.log',
                            STATE=venv / 'installed.json').items():
        monkeypatch.setattr(module, name, value)
    module.calls = []

    def run(command, env=None):
        module.calls.append((' '.join(map(str, command)), env or {}))
        module.LOG.write_text('the output')
        if 'venv' in command:
            module.PYTHON.parent.mkdir(parents=True)
            module.PYTHON.touch()
        return not module.fails(module.calls[-1])

    module.fails = lambda call: False
    monkeypatch.setattr(module, 'run', run)
    monkeypatch.setattr(module, 'find_nvcc', lambda quiet: None)
    monkeypatch.setattr(module, 'cuda_mismatch', lambda nvcc: None)
    monkeypatch.setattr(module, 'check_machine', lambda: None)
    return module


def test_second_call_does_nothing(install):
    install.Installer().run(retry_gpu=False)
    assert any('onedl-mmcv' in command for command, _ in install.calls)
    install.calls.clear()
    install.Installer().run(retry_gpu=False)
    assert install.calls == []


def test_no_cuda_without_gpu(install):
    install.Installer().run(retry_gpu=False)
    env = next(env for command, env in install.calls if 'onedl-mmcv' in command)
    assert env['FORCE_CUDA'] == '0' and env['CUDA_VISIBLE_DEVICES'] == ''
    assert not any('mamba-ssm' in command for command, _ in install.calls)


def test_failed_step_is_done_again(install, capsys):
    install.fails = lambda call: 'onedl-mmcv' in call[0]
    with pytest.raises(SystemExit, match='MAX_JOBS=1'):
        install.Installer().run(retry_gpu=False)
    assert 'the output' in capsys.readouterr().out
    install.fails = lambda call: False
    install.calls.clear()
    install.Installer().run(retry_gpu=False)
    assert 'onedl-mmcv' in install.calls[0][0]


def test_half_written_package_is_installed_over(install):
    install.fails = lambda call: 'import torch' in call[0] and not any(
        '--ignore-installed' in command and 'torch.txt' in command for command, _ in install.calls)
    install.Installer().run(retry_gpu=False)
    assert sum('-r ' in command and 'torch.txt' in command for command, _ in install.calls) == 2


def test_new_pins_begin_anew(install):
    install.Installer().run(retry_gpu=False)
    state = json.loads(install.STATE.read_text())
    install.STATE.write_text(json.dumps({**state, 'torch': 'other'}))
    installer = install.Installer()
    assert installer.state == {} and not install.VENV.exists()


def test_failing_gpu_parts_leave_the_cpu_path(install, monkeypatch, capsys):
    monkeypatch.setattr(install, 'find_nvcc', lambda quiet: 'nvcc')
    install.fails = lambda call: call[1].get('FORCE_CUDA') == '1' or 'mamba-ssm' in call[0]
    install.Installer().run(retry_gpu=False)
    assert capsys.readouterr().out.count('make gpu') == 2
    state = json.loads(install.STATE.read_text())
    assert (state['ops'], state['mamba']) == ('failed', 'failed') and 'package' in state

    install.calls.clear()
    install.Installer().run(retry_gpu=False)
    assert install.calls == []
    install.fails = lambda call: False
    install.Installer().run(retry_gpu=True)
    state = json.loads(install.STATE.read_text())
    assert state['ops'] == 'cuda' and state['mamba'] != 'failed'


def test_cpu_ops_are_built_anew_for_a_gpu(install, monkeypatch):
    install.Installer().run(retry_gpu=False)
    install.calls.clear()
    monkeypatch.setattr(install, 'find_nvcc', lambda quiet: 'nvcc')
    install.Installer().run(retry_gpu=False)
    assert [env.get('FORCE_CUDA') for command, env in install.calls if 'onedl-mmcv' in command] \
        == ['1']


@pytest.mark.parametrize('family', ['onedl', 'original'])
def test_pins_are_in_the_supported_ranges(install, family):
    pinned = dict(line.split('==') for name in install.FAMILIES[family][:2]
                  for line in install.pins(name) if '==' in line)
    assert doctor.find_problems(pinned) == []


def test_the_original_family_has_its_own_pins(install):
    install.Installer('original').run(retry_gpu=False)
    commands = [command for command, _ in install.calls]
    assert any('mmcv==2.1.0' in command for command in commands)
    assert not any('onedl' in command or 'requirements/torch.txt' in command
                   for command in commands)


def test_old_python_gets_one_line():
    script = str(ROOT / 'tools' / 'install.py')
    code = f'import sys, runpy; sys.version_info = (3, 9); runpy.run_path({script!r})'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.count('\n') == 1 and 'PYTHON=' in result.stderr


def test_nothing_is_required():
    """`pip install -e .` must not move a package of an existing environment."""
    config = ConfigParser()
    config.read(ROOT / 'setup.cfg')
    assert 'install_requires' not in config['options']
    assert not any(line.startswith(('mm', 'onedl', 'torch'))
                   for name, extra in config['options.extras_require'].items() if name != 'all'
                   for line in extra.splitlines())
