"""What several tests share."""
import gzip
import json
from pathlib import Path

import mamba_stand_in
import pytest
import torch

DATA = Path(__file__).parent / 'data'


@pytest.fixture(scope='session')
def golden() -> dict:
    """Outputs and gradients of the official code; see data/README.md."""
    return torch.load(DATA / 'official_pico.pt', weights_only=True)


@pytest.fixture(scope='session')
def official_keys() -> dict[str, dict[str, list[int]]]:
    """Variant to names and shapes of its official state dict."""
    return json.loads(gzip.decompress((DATA / 'official_keys.json.gz').read_bytes()))


@pytest.fixture
def official_file(golden, tmp_path) -> str:
    """A checkpoint file in the official layout, of ``golden['arch']``."""
    path = tmp_path / 'official_pico.pth'
    torch.save({'model': golden['state_dict']}, path)
    return str(path)


@pytest.fixture
def mamba_kernel(monkeypatch) -> list[str]:
    """mamba-ssm's kernel on the CPU; the names of what was launched, in order."""
    return mamba_stand_in.install(monkeypatch)
