"""What is installed, whether it fits together, and which scan runs: ``python -m
mmgroupmamba.doctor``.

Two families of OpenMMLab packages share the import names mmengine, mmcv, mmdet, mmseg and
mmpretrain: the maintained onedl-* distributions and the original ones. Packages of the two
overwrite each other's files, so they never mix. The checks are functions of a dict
{distribution: version}; only :func:`main` imports the libraries.
"""
import contextlib
import io
import platform
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Optional

Versions = Mapping[str, str]


class Package(NamedTuple):
    """A distribution and the versions that we support: minimum <= version < below."""
    distribution: str
    minimum: str
    below: str

    @property
    def requirement(self) -> str:
        return f"'{self.distribution}>={self.minimum},<{self.below}'"


# family -> import name -> distribution; the first family is the one that make installs
FAMILIES = {
    'onedl': {
        'mmengine': Package('onedl-mmengine', '0.10.8', '1.0.0'),
        'mmcv': Package('onedl-mmcv', '2.3.0', '2.4.0'),
        'mmdet': Package('onedl-mmdetection', '3.5.0', '4.0.0'),
        'mmseg': Package('onedl-mmsegmentation', '1.4.0', '2.0.0'),
        'mmpretrain': Package('onedl-mmpretrain', '1.3.0', '2.0.0'),
    },
    'original': {
        'mmengine': Package('mmengine', '0.10.3', '1.0.0'),
        'mmcv': Package('mmcv', '2.0.0', '2.2.0'),
        'mmdet': Package('mmdet', '3.3.0', '3.4.0'),
        'mmseg': Package('mmsegmentation', '1.2.2', '1.3.0'),
        'mmpretrain': Package('mmpretrain', '1.2.0', '1.3.0'),
    },
}
LIBRARIES = tuple(FAMILIES['onedl'])
TASKS = {'mmpretrain': 'classification', 'mmdet': 'detection', 'mmseg': 'segmentation'}
# torch that a family runs with: minimum <= version < below
TORCH = {'onedl': ('2.4', '3'), 'original': ('2.0', '2.6')}
# they hold the modules mmcv and mmengine too, but not all of them
PARTIAL = ('mmcv-lite', 'mmengine-lite', 'mmcv-full')
BUILD = 'MMCV_WITH_OPS=1 pip install --no-build-isolation'
NO_CACHE = '--no-cache-dir --no-deps --force-reinstall'


def numbers(version: str) -> tuple[int, ...]:
    """The release of a version, as three or more ints: '2.11.0+cu130' -> (2, 11, 0)."""
    release = [int(n) for n in re.match(r'[\d.]*', version)[0].split('.') if n]
    return tuple(release + [0] * (3 - len(release)))


def within(version: str, minimum: str, below: str) -> bool:
    return numbers(minimum) <= numbers(version) < numbers(below)


def installed_versions() -> dict[str, str]:
    """Versions of the distributions that matter here; one that is not installed is absent."""
    names = [p.distribution for family in FAMILIES.values() for p in family.values()]
    versions = {}
    for name in ('torch', 'torchvision', 'mamba-ssm', *names, *PARTIAL):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def members(versions: Versions, family: str) -> list[Package]:
    """The family's packages that are installed."""
    return [p for p in FAMILIES[family].values() if p.distribution in versions]


def family_of(versions: Versions) -> str:
    """'onedl', 'original', 'mixed' or 'none'."""
    present = [family for family in FAMILIES if members(versions, family)]
    return 'mixed' if len(present) > 1 else present[0] if present else 'none'


def out_of_range(versions: Versions, libraries: Iterable[str] = LIBRARIES) -> list[str]:
    """One line for each installed package whose version is outside the supported range."""
    return [
        f'{p.distribution} {versions[p.distribution]} is not supported: run `{BUILD} '
        f'{p.requirement}`'
        for family in FAMILIES for p in members(versions, family)
        if p in [FAMILIES[family][name] for name in libraries]
        and not within(versions[p.distribution], p.minimum, p.below)
    ]


def _mend_mixture(versions: Versions) -> str:
    """The command that leaves the family of which more is installed (onedl on a draw)."""
    keep = max(FAMILIES, key=lambda family: len(members(versions, family)))
    packages = FAMILIES[keep]
    remove, install = [], []
    for family, table in FAMILIES.items():
        for library, package in table.items():
            if family != keep and package.distribution in versions:
                # uninstalling it takes files from its twin, which has to go and come anew
                remove.append(package.distribution)
                if packages[library].distribution in versions:
                    remove.append(packages[library].distribution)
                install.append(packages[library].requirement)
    return f'pip uninstall -y {" ".join(remove)} && {BUILD} --no-cache-dir {" ".join(install)}'


def find_problems(versions: Versions, has_ops: bool = True,
                  scope: Optional[str] = None) -> list[str]:
    """Say what keeps training from starting.

    Args:
        versions: Distribution to version, as :func:`installed_versions`.
        has_ops: Whether the installed mmcv has its compiled ops.
        scope: 'mmpretrain', 'mmdet' or 'mmseg': this one has to be there; None: any of them.

    Returns:
        One line each, with the culprit and the command that mends it; empty when all is well.
    """
    family = family_of(versions)
    if family == 'mixed':
        found = ', '.join(f'{p.distribution} {versions[p.distribution]} ({name})'
                          for name in FAMILIES for p in members(versions, name))
        return [f'mixed OpenMMLab families: {found}: run `{_mend_mixture(versions)}`']
    problems = []
    if 'torch' not in versions:
        problems.append('torch is not installed: run `pip install torch torchvision`')
    elif family != 'none' and not within(versions['torch'], *TORCH[family]):
        minimum, below = TORCH[family]
        remedy = f"pip install 'torch>={minimum},<{below}' torchvision"
        mmcv = FAMILIES[family]['mmcv']
        if mmcv.distribution in versions:
            remedy += f' && {BUILD} {NO_CACHE} {mmcv.requirement}'
        why = ' (newer ones refuse its checkpoints)' if family == 'original' else ''
        problems.append(f'torch {versions["torch"]} does not fit the {family} family, which needs '
                        f'torch >= {minimum}, < {below}{why}: run `{remedy}`')

    packages = FAMILIES['onedl' if family == 'none' else family]
    partial = [name for name in PARTIAL if name in versions]
    if partial:
        need = ' '.join(packages[n].requirement for n in ('mmengine', 'mmcv'))
        twins = [packages[n].distribution for n in ('mmengine', 'mmcv')
                 if packages[n].distribution in versions]
        problems.append(f'{", ".join(partial)} lacks modules or compiled ops that detection and '
                        f'segmentation need: run `pip uninstall -y {" ".join(partial + twins)} '
                        f'&& {BUILD} --no-cache-dir {need}`')
    else:
        wanted = ['mmengine', 'mmcv', *([scope] if scope else [])]
        if not scope and not any(packages[name].distribution in versions for name in TASKS):
            wanted += TASKS
        missing = [packages[name] for name in wanted if packages[name].distribution not in versions]
        if missing:
            problems.append(f'{", ".join(p.distribution for p in missing)} not installed: run '
                            f'`{BUILD} {" ".join(p.requirement for p in missing)}`')
        if packages['mmcv'].distribution in versions and not has_ops:
            problems.append(f'{packages["mmcv"].distribution} has no compiled ops: run '
                            f'`{BUILD} {NO_CACHE} {packages["mmcv"].requirement}`')
    return problems + out_of_range(versions)


def mmcv_has_ops() -> bool:
    """Whether the folder of the installed mmcv holds compiled ops; imports nothing."""
    spec = find_spec('mmcv')
    return spec is not None and any(
        path for folder in spec.submodule_search_locations or ()
        for path in Path(folder).glob('_ext.*') if path.suffix in ('.so', '.pyd'))


def check_family(scope: Optional[str] = None) -> list[str]:
    """Check this environment without importing a library.

    Args:
        scope: The config's default_scope, whose library has to be installed; None: any will do.

    Returns:
        As :func:`find_problems`.
    """
    return find_problems(installed_versions(), mmcv_has_ops(), scope)


def describe(versions: Versions) -> list[str]:
    """A line for each of the five libraries, and one for the family."""
    lines = []
    for library in LIBRARIES:
        held = [p.distribution for p in (FAMILIES[f][library] for f in FAMILIES)
                if p.distribution in versions]
        held += [name for name in PARTIAL if name in versions and name.startswith(f'{library}-')]
        text = ' and '.join(f'{versions[name]} ({name})' for name in held)
        if not held:
            family = family_of(versions)
            package = FAMILIES[family if family in FAMILIES else 'onedl'][library]
            use = f'; {TASKS[library]} needs it' if library in TASKS else ''
            text = f'not installed{use}: `{BUILD} {package.requirement}`'
        lines.append(_line(library, text))
    return [*lines, _line('family', family_of(versions))]


def _line(label: str, text: str) -> str:
    return f'{label:<16} {text}'


def _import_error(module: str) -> Optional[str]:
    """Import a module quietly; the error's class and first line if that fails."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), \
                contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter('ignore')
            import_module(module)
    except Exception as error:  # a broken library may raise anything at import
        return f'{type(error).__name__}: {(str(error).splitlines() or [""])[0]}'
    return None


def _remedy(module: str, error: str, versions: Versions) -> str:
    """What mends a library that is installed, of the right version, and fails to import."""
    if 'libGL' in error or 'libgthread' in error:
        return 'OpenCV lacks a system library: run `apt-get install libgl1 libglib2.0-0`'
    if module == 'mmcv.ops':
        mmcv = FAMILIES[family_of(versions)]['mmcv']
        return ('its ops were compiled for another torch: run '
                f'`{BUILD} {NO_CACHE} {mmcv.requirement}`')
    if module == 'mmpretrain.apis' and 'transformers' in error:
        return 'run `pip uninstall -y transformers`, nothing here needs it'
    return 'run `pip check`, and mend what it names'


def _torch_lines() -> list[str]:
    import torch
    built = torch.version.cuda
    if built is None:
        text = 'torch is built without CUDA'
    elif torch.cuda.is_available():
        text = f'{built}, {torch.cuda.device_count()} x {torch.cuda.get_device_name()}'
    else:
        text = f'{built} (torch is built with it), no GPU that it can use'
    return [_line('CUDA', text)]


def _scan_lines() -> list[str]:
    import torch

    from mmgroupmamba.ops import available_backends, resolve_backend
    lines = [_line(f'scan {name}', f'not available: {reason}' if reason else 'available')
             for name, reason in available_backends().items()]
    devices = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        chosen = {device: resolve_backend('auto', device) for device in devices}
    return lines + [_line(f'auto on {device}', name) for device, name in chosen.items()]


def _ops_note() -> Optional[str]:
    """A line if there is a GPU and mmcv's ops were compiled without CUDA."""
    import torch
    from mmcv.ops import get_compiling_cuda_version
    if torch.cuda.is_available() and get_compiling_cuda_version() == 'not available':
        return _line('note', "mmcv's ops are compiled for CPU only, detection on the GPU needs "
                             'them for CUDA: install nvcc and run `make gpu`')
    return None


def main() -> int:
    """Print the report; 1 when training could not start, else 0."""
    versions = installed_versions()
    problems = check_family()
    print(_line('Python', platform.python_version()))
    print(_line('torch', versions.get('torch', 'not installed')))
    torch_error = _import_error('torch') if 'torch' in versions else None
    if torch_error:
        problems.append(f'torch does not import ({torch_error}): reinstall it')
    has_torch = 'torch' in versions and not torch_error
    print('\n'.join(_torch_lines() if has_torch else [_line('CUDA', 'unknown without torch')]))
    print('\n'.join(describe(versions)))

    if not problems:
        tasks = [name for name in TASKS
                 if FAMILIES[family_of(versions)][name].distribution in versions]
        for module in ('mmengine.runner', 'mmcv.ops', *(f'{name}.apis' for name in tasks)):
            error = _import_error(module)
            if error:
                problems.append(f'{module} does not import ({error}): '
                                f'{_remedy(module, error, versions)}')
                break
    if has_torch:
        # a backend's module may need mmengine's logger
        error = _import_error('mmgroupmamba.ops')
        if not error:
            print('\n'.join(_scan_lines()))
        elif not problems:
            problems.append(f'mmgroupmamba.ops does not import ({error}): reinstall mmgroupmamba '
                            'with `pip install -e .` in its checkout')
    note = None if problems else _ops_note()
    if note:
        print(note)
    for problem in problems:
        print(_line('PROBLEM', problem))
    print(_line('training', 'cannot start' if problems else 'can start'))
    return int(bool(problems))


if __name__ == '__main__':
    sys.exit(main())
