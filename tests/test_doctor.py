"""The doctor on sets of versions, fit and unfit."""
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

import mmgroupmamba
from mmgroupmamba import doctor

ONEDL = {
    'torch': '2.11.0+cu130',
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmdetection': '3.5.1',
    'onedl-mmsegmentation': '1.4.2',
    'onedl-mmpretrain': '1.3.6',
}
ORIGINAL = {
    'torch': '2.5.1',
    'mmengine': '0.10.7',
    'mmcv': '2.1.0',
    'mmdet': '3.3.0',
    'mmsegmentation': '1.2.2',
    'mmpretrain': '1.2.0',
}


def without(versions: dict, *names: str) -> dict:
    return {name: version for name, version in versions.items() if name not in names}


@pytest.mark.parametrize('versions, family', [
    (ONEDL, 'onedl'),
    (ORIGINAL, 'original'),
    (without(ORIGINAL, 'mmdet', 'mmsegmentation'), 'original'),
    (without(ONEDL, 'onedl-mmpretrain'), 'onedl'),
])
def test_fit(versions, family):
    assert doctor.family_of(versions) == family
    assert doctor.find_problems(versions) == []


@pytest.mark.parametrize('versions, culprits, remedy', [
    ({**ONEDL, 'mmcv': '2.1.0'}, ('onedl-mmcv 2.3.6', 'mmcv 2.1.0', 'mixed'),
     'pip uninstall -y mmcv onedl-mmcv && MMCV_WITH_OPS=1 pip install --no-build-isolation '
     "--no-cache-dir 'onedl-mmcv>=2.3.0,<2.4.0'"),
    ({**without(ORIGINAL, 'mmengine'), 'onedl-mmengine': '0.10.12'},
     ('onedl-mmengine 0.10.12 (onedl)', 'mixed'),
     'pip uninstall -y onedl-mmengine && MMCV_WITH_OPS=1 pip install --no-build-isolation '
     "--no-cache-dir 'mmengine>=0.10.3,<1.0.0'"),
    ({**ORIGINAL, 'torch': '2.6.0'}, ('torch 2.6.0', 'original family'),
     "pip install 'torch>=2.0,<2.6' torchvision"),
    ({**ONEDL, 'torch': '2.3.1'}, ('torch 2.3.1', 'onedl family'), "'torch>=2.4,<3'"),
    (without(ONEDL, 'torch'), ('torch is not installed', ), 'pip install torch'),
    ({**without(ORIGINAL, 'mmcv'), 'mmcv-lite': '2.1.0'}, ('mmcv-lite', ),
     'pip uninstall -y mmcv-lite mmengine'),
    (without(ONEDL, 'onedl-mmcv'), ('onedl-mmcv not installed', ), "'onedl-mmcv>=2.3.0,<2.4.0'"),
    ({'torch': '2.11.0'}, ('onedl-mmengine', 'onedl-mmdetection', 'not installed'),
     "'onedl-mmengine>="),
    ({**ORIGINAL, 'mmcv': '2.2.0'}, ('mmcv 2.2.0 is not supported', ), "'mmcv>=2.0.0,<2.2.0'"),
    ({**ONEDL, 'onedl-mmdetection': '3.4.9'}, ('onedl-mmdetection 3.4.9', ),
     "'onedl-mmdetection>=3.5.0"),
])
def test_unfit(versions, culprits, remedy):
    problems = doctor.find_problems(versions)
    assert len(problems) == 1 and '\n' not in problems[0]
    assert all(culprit in problems[0] for culprit in culprits)
    assert remedy in problems[0]


def test_mmcv_without_ops():
    problem, = doctor.find_problems(ONEDL, has_ops=False)
    assert 'onedl-mmcv has no compiled ops' in problem and '--force-reinstall' in problem


def test_scope_needs_its_library():
    versions = without(ONEDL, 'onedl-mmdetection')
    assert doctor.find_problems(versions, scope='mmseg') == []
    problem, = doctor.find_problems(versions, scope='mmdet')
    assert problem.startswith('onedl-mmdetection not installed')


def test_numbers():
    assert doctor.numbers('2.11.0+cu130') == (2, 11, 0)
    assert doctor.numbers('2.4') == (2, 4, 0)
    assert doctor.numbers('0.10.8rc1') == (0, 10, 8)
    assert not doctor.within('2.6.0', '2.0', '2.6')


def test_describe_names_every_library():
    lines = doctor.describe({**without(ONEDL, 'onedl-mmdetection'), 'mmcv': '2.1.0'})
    assert [line.split()[0] for line in lines] == [*doctor.LIBRARIES, 'family']
    assert '2.3.6 (onedl-mmcv) and 2.1.0 (mmcv)' in lines[1]
    assert 'not installed; detection needs it' in lines[2]
    assert lines[-1].endswith('mixed')


def fake_metadata(monkeypatch, versions: dict) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]
    monkeypatch.setattr(doctor.metadata, 'version', version)


def test_check_versions(monkeypatch):
    fake_metadata(monkeypatch, {})
    mmgroupmamba.check_versions()
    fake_metadata(monkeypatch, {**ORIGINAL, 'mmcv': '1.7.1', 'mmdet': '2.28.0'})
    with pytest.raises(RuntimeError, match='^mmcv 1.7.1 is not supported: run') as info:
        mmgroupmamba.check_versions()
    assert 'mmdet' not in str(info.value)


def test_exit_code_of_a_mixed_environment(monkeypatch, capsys):
    fake_metadata(monkeypatch, {**ONEDL, 'mmdet': '3.3.0'})
    assert doctor.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith('PROBLEM') for line in lines) == 1
    assert lines[-1].endswith('cannot start')


def test_this_environment():
    result = subprocess.run([sys.executable, '-m', 'mmgroupmamba.doctor'],
                            capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    labels = [line[:16].strip() for line in result.stdout.splitlines()]
    for label in ('Python', 'torch', 'CUDA', *doctor.LIBRARIES, 'family', 'scan reference',
                  'scan blocked', 'scan mamba_ssm', 'auto on cpu', 'training'):
        assert labels.count(label) == 1, label


def test_import_is_light():
    code = ('import sys; before = set(sys.modules); import mmgroupmamba; '
            'print(sorted({name.split(".")[0] for name in set(sys.modules) - before}))')
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.stdout == "['mmgroupmamba']\n" and not result.stderr
