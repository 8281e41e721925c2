"""One data set, one config and one short training a task, shared by the tests of the tools."""
from pathlib import Path

import pytest
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer
from tiny import ARCH, COMMON, ROOT, TASKS, Trained, make_data, run_tool


@pytest.fixture(autouse=True)
def no_leftovers() -> None:
    """mmengine keeps visualizers, loggers and the scope: those of the last run in this process."""
    kinds = [DefaultScope, MMLogger, Visualizer]
    for kind in kinds:
        kinds += kind.__subclasses__()
        kind._instance_dict.clear()


@pytest.fixture(scope='session')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('data')
    make_data(folder)
    return folder


@pytest.fixture(scope='session')
def configs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Scope -> config file."""
    folder = tmp_path_factory.mktemp('configs')
    paths = {}
    for scope, (base, body) in TASKS.items():
        values = dict(root=ROOT, data=data, base=base, arch=ARCH)
        text = COMMON + body + 'test_dataloader = val_dataloader\ntest_evaluator = val_evaluator\n'
        for name, value in values.items():
            text = text.replace(f'{{{name}}}', str(value))
        paths[scope] = folder / f'{scope}_tiny.py'
        paths[scope].write_text(text)
    return paths


@pytest.fixture(scope='session')
def trained(configs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """Function from a scope to its trained model; each is trained once, from another cwd."""
    cache: dict[str, Trained] = {}

    def train(scope: str) -> Trained:
        if scope not in cache:
            cwd = tmp_path_factory.mktemp(scope)
            amp = () if scope == 'mmdet' else ('--amp', )  # none for mmdet on CPU
            done = run_tool('train', configs[scope], '--auto-scale-lr', *amp, cwd=cwd)
            assert done.returncode == 0, done.stdout + done.stderr
            cache[scope] = Trained(scope, configs[scope],
                                   cwd / 'work_dirs' / configs[scope].stem, done.stdout)
        return cache[scope]

    return train
