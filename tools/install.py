"""Set up .venv/ in the checkout: the pinned torch, the OpenMMLab family, mmcv's ops, this package.

Runs with the system's Python and its standard library alone. What is done stands in
.venv/installed.json, a key of the pins for each step: a second call does nothing, a call after an
interrupted one goes on with the step that did not end, and changed pins begin anew.
"""
import sys

if sys.version_info < (3, 10):
    sys.exit('error: this is Python {}.{}, and 3.10 or newer is needed: name one, for example '
             'make test PYTHON=python3.11'.format(*sys.version_info))

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn, Optional

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / '.venv'
PYTHON = VENV / 'bin' / 'python'
STATE = VENV / 'installed.json'
LOG = VENV / 'install.log'
PINS = ROOT / 'requirements'
FREE_GB = 9
# family -> files of pins for torch and for the libraries, and mmcv's name in the latter
FAMILIES = {
    'onedl': ('torch', 'onedl', 'onedl-mmcv'),
    'original': ('torch-original', 'original', 'mmcv=='),
}
BUILD = ('-v', '--no-deps', '--no-build-isolation', '--no-cache-dir', '--ignore-installed')
NO_CUDA = {'FORCE_CUDA': '0', 'MMCV_WITH_OPS': '1', 'CUDA_VISIBLE_DEVICES': ''}
CUDA = {'FORCE_CUDA': '1', 'MMCV_WITH_OPS': '1'}


def die(message: str) -> NoReturn:
    sys.exit(f'error: {message}')


def say(message: str) -> None:
    print(message, flush=True)


def pins(name: str) -> list[str]:
    """The requirements in requirements/`name`.txt."""
    lines = (PINS / f'{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


def check_machine() -> None:
    """Stop if something is missing that only the user can install."""
    if not any(map(shutil.which, [os.environ.get('CXX', 'c++').split()[0], 'g++'])):
        die("no C++ compiler for mmcv's ops: run `apt-get install g++` (Debian, Ubuntu), or the "
            'like of your system')
    if not Path(sysconfig.get_path('include'), 'Python.h').exists():
        die(f'the C headers of {sys.executable} are missing: run `apt-get install python3-dev` '
            '(Debian, Ubuntu), or the like of your system')
    if find_spec('ensurepip') is None:
        die(f'{sys.executable} lacks venv: run `apt-get install python3-venv` (Debian, Ubuntu), '
            'or the like of your system')
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < FREE_GB:
        die(f'{free:.1f} GB free at {ROOT}, {FREE_GB} GB are needed: make room')


def jobs() -> int:
    """Compiler processes: one a core, as far as memory allows 2 GB for each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30
    return max(1, min(cores or 1, int(memory // 2)))


def find_nvcc(quiet: bool) -> Optional[str]:
    """The CUDA compiler, if there is an NVIDIA GPU to compile for as well."""
    try:
        gpus = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if gpus.returncode or 'GPU' not in gpus.stdout:
        return None
    home = os.environ.get('CUDA_HOME', '/usr/local/cuda')
    nvcc = shutil.which('nvcc') or shutil.which(f'{home}/bin/nvcc')
    if nvcc is None and not quiet:
        say('An NVIDIA GPU but no nvcc: installing for CPU only. For the GPU parts, install the '
            'CUDA toolkit and run `make gpu`.')
    return nvcc


def cuda_mismatch(nvcc: str) -> Optional[str]:
    """One line if nvcc is of another major version than torch's CUDA."""
    found = re.search(r'release (\d+)', subprocess.run(
        [nvcc, '--version'], capture_output=True, text=True).stdout)
    wanted = subprocess.run([PYTHON, '-c', 'import torch; print(torch.version.cuda)'],
                            capture_output=True, text=True).stdout.strip()
    if found and found[1] != wanted.split('.')[0]:
        return f'nvcc is of CUDA {found[1]}, torch of CUDA {wanted}: install that CUDA toolkit'
    return None


def clock(start: float) -> str:
    minutes, seconds = divmod(int(time.monotonic() - start), 60)
    return f'{minutes}:{seconds:02d}'


def last_lines(count: int) -> str:
    lines = [line for line in LOG.read_text(errors='replace').splitlines() if line.strip()]
    return '\n'.join(lines[-count:])


def progress() -> str:
    """The compiler's count of files, or else the log's last line, shortened."""
    counts = re.findall(r'\[\d+/\d+\]', last_lines(200))
    return f'{counts[-1]} files' if counts else last_lines(1).strip()[:70]


def run(command: list, env: Optional[dict] = None) -> bool:
    """Run a command with its output in the log and signs of life on the screen."""
    start = shown = time.monotonic()
    pause = 5 if sys.stdout.isatty() else 60
    with LOG.open('ab') as log:
        log.write(f'$ {" ".join(map(str, command))}\n'.encode())
        log.flush()
        process = subprocess.Popen(
            [str(part) for part in command], stdout=log, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, cwd=ROOT, start_new_session=True,
            env={'MAX_JOBS': str(jobs()), **os.environ, 'PIP_USER': '0', **(env or {})})
        try:
            while True:
                try:
                    return process.wait(timeout=1) == 0
                except subprocess.TimeoutExpired:
                    if time.monotonic() - shown >= pause:
                        shown = time.monotonic()
                        say(f'      {clock(start)}  {progress()}')
        finally:
            if process.poll() is None:
                # the compilers too, or they would go on beside the next attempt
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()


def pip(*arguments: str, env: Optional[dict] = None) -> bool:
    return run([PYTHON, '-m', 'pip', '--disable-pip-version-check', '--no-input', 'install',
                '--progress-bar', 'off', *arguments], env)


def imports(modules: str) -> bool:
    """Whether the environment's Python can import the modules."""
    return run([PYTHON, '-c', f'import {modules}'])


def give_up(remedy: str) -> NoReturn:
    say(last_lines(30))
    die(f'{remedy}; then the same command goes on from here (all of the output: {LOG})')


def use_folder(name: str) -> None:
    """Work on the environment ROOT/`name`."""
    global VENV, PYTHON, STATE, LOG
    VENV = ROOT / name
    PYTHON, STATE, LOG = VENV / 'bin' / 'python', VENV / 'installed.json', VENV / 'install.log'


class Installer:
    """The steps in their order, and what of them is done.

    Args:
        family: One of FAMILIES.
    """

    def __init__(self, family: str = 'onedl') -> None:
        self.torch_pins, self.library_pins, self.mmcv_name = FAMILIES[family]
        self.state: dict[str, str] = {}
        if PYTHON.exists() and STATE.exists():
            self.state = json.loads(STATE.read_text())
        # each key covers the steps before it
        parts, self.keys = [], {}
        for step, name in (('build', 'build'), ('torch', self.torch_pins),
                           ('libraries', self.library_pins)):
            parts += pins(name)
            self.keys[step] = hashlib.sha256('\n'.join(parts).encode()).hexdigest()
        self.keys['mmcv'] = self.keys['libraries']
        metadata = [(ROOT / name).read_text() for name in ('setup.cfg', 'pyproject.toml')]
        self.keys['package'] = hashlib.sha256(
            '\n'.join([*parts, *metadata, str(ROOT)]).encode()).hexdigest()
        self.keys['mamba'] = hashlib.sha256('\n'.join([*parts, *pins('gpu')]).encode()).hexdigest()
        if any(self.state.get(name, self.keys[name]) != self.keys[name]
               for name in ('build', 'torch', 'libraries', 'mmcv')):
            say(f'The pinned versions have changed: making {VENV.name} anew.')
            self.state = {}
            shutil.rmtree(VENV)

    def done(self, step: str) -> bool:
        return self.state.get(step) == self.keys[step]

    def note(self, **entries: str) -> None:
        """Write down what is done, in one go so that no half of it can be read."""
        self.state.update(entries)
        new = STATE.with_suffix('.new')
        new.write_text(json.dumps(self.state, indent=1))
        new.replace(STATE)

    def install(self, step: str, what: str, modules: str, remedy: str, *arguments: str) -> None:
        """Install by pip unless done; mend what an interruption left half-written."""
        if self.done(step):
            return
        say(what)
        start = time.monotonic()
        for again in ((), ('--ignore-installed', )):
            if pip(*arguments, *again) and imports(modules):
                break
        else:
            give_up(remedy)
        self.note(**{step: self.keys[step]})
        say(f'      done in {clock(start)}')

    def environment(self) -> None:
        if self.done('build'):
            return
        check_machine()
        say(f'[1/5] {VENV.name} with pip and build tools: seconds')
        if not (PYTHON.exists() and run([PYTHON, '-m', 'pip', '--version'])):
            shutil.rmtree(VENV, ignore_errors=True)
            VENV.mkdir()
            if not run([sys.executable, '-m', 'venv', VENV]):
                give_up('venv failed: mend what it says above')
        if not pip('--upgrade', *pins('build')):
            give_up('the build tools cannot be installed: check the network connection and space')
        self.note(build=self.keys['build'])

    def mmcv(self, nvcc: Optional[str]) -> None:
        """Build the ops, for CUDA where possible, else for CPU."""
        if self.done('mmcv') and (nvcc is None or self.state['ops'] != 'cpu'):
            return
        pin = next(line for line in pins(self.library_pins) if line.startswith(self.mmcv_name))
        count = os.environ.get('MAX_JOBS', str(jobs()))
        say(f"[4/5] building mmcv's ops{' with CUDA' if nvcc else ''}: 10-12 minutes on 2 cores"
            f'{", several times that with CUDA" if nvcc else ""} ({count} at a time)')
        start = time.monotonic()
        ops = 'cpu'
        if nvcc:
            mismatch = cuda_mismatch(nvcc)
            if not mismatch and pip(*BUILD, pin, env=CUDA) and imports('mmcv.ops'):
                ops = 'cuda'
            else:
                ops = 'failed'
                say(mismatch or last_lines(30))
                say(f"mmcv's CUDA ops failed to build (all of the output: {LOG}). Building for "
                    'CPU; after mending the cause run `make gpu`.')
        if ops != 'cuda' and not (pip(*BUILD, pin, env=NO_CUDA) and imports('mmcv.ops')):
            give_up("mmcv's ops failed to build: mend what the compiler names above (if it was "
                    'killed, memory ran out: set MAX_JOBS=1)')
        self.note(mmcv=self.keys['mmcv'], ops=ops)
        say(f'      done in {clock(start)}')

    def mamba(self, nvcc: Optional[str]) -> None:
        """Install mamba-ssm's kernel; without it the scan runs on PyTorch."""
        if nvcc is None or self.state.get('mamba') in (self.keys['mamba'], 'failed'):
            return
        say("[gpu] mamba-ssm's CUDA scan: a minute where a prebuilt wheel fits, else it is "
            'compiled, which takes tens of minutes')
        mismatch = cuda_mismatch(nvcc)
        if not mismatch and pip(*BUILD, *pins('gpu')) and imports('torch, selective_scan_cuda'):
            self.note(mamba=self.keys['mamba'])
            return
        self.note(mamba='failed')
        say(mismatch or last_lines(30))
        say(f"mamba-ssm's kernel failed to install (all of the output: {LOG}). The scan runs on "
            'PyTorch instead; after mending the cause run `make gpu`.')

    def run(self, retry_gpu: bool) -> None:
        if retry_gpu and self.state:
            self.state.pop('mamba', None)
            if self.state.get('ops') == 'failed':
                self.state['ops'] = 'cpu'
        network = ('pip failed: check the network connection, space, and that this Python is one '
                   'that torch has wheels for (3.10 to 3.14)')
        self.environment()
        self.install(
            'torch', '[2/5] torch and torchvision: a download of 2-5 GB, 1-10 minutes (the CUDA '
            'build, which runs on CPU as well)', 'torch, torchvision', network,
            '-r', str(PINS / f'{self.torch_pins}.txt'))
        self.install(
            'libraries', '[3/5] mmengine, mmdet, mmseg, mmpretrain: about a minute',
            'mmengine.runner, cv2', network + '; if it says libGL, run `apt-get install libgl1`',
            '--no-build-isolation', '-c', str(PINS / f'{self.torch_pins}.txt'),
            *[line for line in pins(self.library_pins) if not line.startswith(self.mmcv_name)])
        nvcc = find_nvcc(quiet=self.done('package') and not retry_gpu)
        self.mmcv(nvcc)
        self.mamba(nvcc)
        self.install(
            'package', '[5/5] mmgroupmamba, editable, with its extras: seconds',
            'mmgroupmamba, mmpretrain, mmdet, mmseg, pytest', network,
            '--no-build-isolation', '-c', str(PINS / f'{self.torch_pins}.txt'),
            '-c', str(PINS / f'{self.library_pins}.txt'),
            '-e', f'{ROOT}[all]')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--retry-gpu', action='store_true',
                        help='try the CUDA parts again that failed before')
    parser.add_argument('--family', choices=list(FAMILIES), default='onedl',
                        help='original: into .venv-original, for `make test-original`')
    args = parser.parse_args()
    if args.family == 'original':
        use_folder('.venv-original')
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        Installer(args.family).run(args.retry_gpu)
    except KeyboardInterrupt:
        die('interrupted: the same command goes on from here')


if __name__ == '__main__':
    main()
