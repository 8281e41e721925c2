"""The converters as commands, and what tools/test.py says to a converted file."""
import subprocess

import torch
from tiny import run_tool


def convert(name: str, *args: object) -> subprocess.CompletedProcess:
    return run_tool(f'model_converters/{name}', *args)


def test_there_and_back(golden, official_file, tmp_path):
    ours, back = tmp_path / 'ours.pth', tmp_path / 'back.pth'
    done = convert('official_to_mm', official_file, ours)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f'{ours}: ') and 'of a classifier, variant custom' in done.stdout
    done = convert('mm_to_official', ours, back)
    assert done.returncode == 0, done.stderr
    got = torch.load(back, weights_only=True)['model']
    assert got.keys() == golden['state_dict'].keys()
    assert all(torch.equal(got[k], v) for k, v in golden['state_dict'].items())


def test_refusals_are_one_line(official_file, tmp_path):
    done = convert('official_to_mm', tmp_path / 'nothing.pth', tmp_path / 'out.pth')
    assert done.returncode == 2 and 'checkpoint not found' in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = convert('official_to_mm', official_file, tmp_path / 'no/out.pth')
    assert done.returncode == 2 and f'there is no folder {tmp_path}/no' in done.stderr
    done = convert('mm_to_official', official_file, tmp_path / 'out.pth')
    assert done.returncode == 2 and 'official layout already' in done.stderr
