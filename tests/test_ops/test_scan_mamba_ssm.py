"""The adapter, on a stand-in for the CUDA kernel that checks the kernel's own terms."""
import sys
from types import SimpleNamespace

import pytest
import torch
from test_selective_scan import NAMES, make_inputs, relative

from mmgroupmamba.ops import scan_mamba_ssm, scan_reference

HALF = (torch.float16, torch.bfloat16, torch.float32)


def check_terms(u, delta, A, B, C, D, delta_bias):
    assert u.dtype in HALF and {delta.dtype, B.dtype, C.dtype} == {u.dtype}
    for tensor in (u, delta, B, C):
        assert tensor.stride(-1) == 1
    for tensor in (A, D, delta_bias):
        assert tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous())
    batch, channels, length = u.shape
    groups, states = B.shape[1:3]
    assert channels % groups == 0 and A.shape == (channels, states)
    assert B.shape == C.shape == (batch, groups, states, length)


def fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    assert z is None
    check_terms(u, delta, A, B, C, D, delta_bias)
    states = torch.zeros(*u.shape[:2], -(-u.shape[2] // 2048), 2 * A.shape[1])
    return [scan_reference.scan(u, delta, A, B, C, D, delta_bias, delta_softplus), states]


def bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z):
    assert z is None and out is None and dz is None and recompute_out_z is False
    assert dout.dtype == u.dtype and dout.stride(-1) == 1
    assert x.shape == (*u.shape[:2], 1, 2 * A.shape[1])
    leaves = [t if t is None else t.detach().requires_grad_()
              for t in (u, delta, A, B, C, D, delta_bias)]
    with torch.enable_grad():
        y = scan_reference.scan(*leaves, delta_softplus)
    grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dout))
    return [None if t is None else next(grads) for t in leaves]


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setitem(sys.modules, 'selective_scan_cuda', SimpleNamespace(fwd=fwd, bwd=bwd))


@pytest.mark.parametrize('absent', [(), ('D', ), ('D', 'delta_bias')])
@pytest.mark.parametrize('channels_last', [False, True])
def test_adapter(kernel, absent, channels_last):
    inputs = make_inputs(length=9, states=2)
    inputs = {k: v.cpu() for k, v in inputs.items()}
    if channels_last:
        for k in ('u', 'delta', 'B', 'C'):
            inputs[k] = inputs[k].detach().movedim(-1, 1).contiguous().movedim(1, -1)
            inputs[k].requires_grad_()
    inputs.update(dict.fromkeys(absent))
    args = [inputs[name] for name in NAMES]
    present = [t for t in args if t is not None]
    results = []
    for scan in (scan_mamba_ssm.scan, scan_reference.scan):
        y = scan(*args, True)
        results.append((y, *torch.autograd.grad(y.sin().sum(), present)))
    for got, want in zip(*results):
        assert got.dtype == want.dtype and relative(got.detach(), want.detach()) < 1e-6


def test_mixed_dtypes_are_made_one(kernel):
    inputs = {k: v.detach().cpu() for k, v in make_inputs(length=9).items()}
    inputs['u'] = inputs['u'].bfloat16()
    y = scan_mamba_ssm.scan(*(inputs[name] for name in NAMES), True)
    assert y.dtype == torch.bfloat16


def test_float64_and_many_states_are_refused(kernel):
    inputs = make_inputs(length=3, dtype=torch.float64)
    with pytest.raises(ValueError, match="no float64: use backend='blocked'"):
        scan_mamba_ssm.scan(*(inputs[name] for name in NAMES), True)
    inputs = make_inputs(length=3, groups=1, dim=1, states=257)
    with pytest.raises(ValueError, match='at most 256 states, got 257'):
        scan_mamba_ssm.scan(*(inputs[name] for name in NAMES), True)


def test_missing_kernel_says_how_to_install_it():
    if scan_mamba_ssm.why_not('cuda') is None:
        pytest.skip('the kernel is installed')
    assert 'pip install mamba-ssm --no-deps' in scan_mamba_ssm.why_not('cuda')
