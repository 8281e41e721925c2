"""Every backend against the reference: outputs and every gradient, at awkward lengths."""
import pytest
import torch

from mmgroupmamba.ops import (
    BackendUnavailableError,
    available_backends,
    resolve_backend,
    selective_scan,
)

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
FAST = [name for name, reason in available_backends(DEVICE).items()
        if reason is None and name != 'reference']
NAMES = ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')


def make_inputs(batch=2, groups=4, dim=3, length=65, states=1, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    channels = groups * dim
    inputs = dict(
        u=randn(batch, channels, length),
        delta=randn(batch, channels, length),
        A=-torch.exp(randn(channels, states)),
        B=randn(batch, groups, states, length),
        C=randn(batch, groups, states, length),
        D=randn(channels),
        delta_bias=randn(channels) - 1)
    return {k: v.to(DEVICE, dtype).requires_grad_() for k, v in inputs.items()}


def run(inputs, backend, **kwargs):
    y = selective_scan(**inputs, backend=backend, **kwargs)
    cotangent = torch.cos(torch.arange(y.numel(), device=y.device)).view_as(y).to(y.dtype)
    present = [v for v in inputs.values() if v is not None]
    return y.detach(), torch.autograd.grad(y, present, cotangent)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize('backend', FAST)
@pytest.mark.parametrize('states', [1, 2, 3])
@pytest.mark.parametrize('length', [1, 2, 3, 7, 63, 64, 65, 240])
def test_equals_reference(backend, length, states):
    inputs = make_inputs(length=length, states=states)
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    y, grads = run(inputs, backend, delta_softplus=True)
    want, want_grads = run(exact, 'reference', delta_softplus=True)
    assert relative(y, want) < 1e-6
    for name, got, expected in zip(NAMES, grads, want_grads):
        assert got.shape == inputs[name].shape and got.dtype == inputs[name].dtype
        assert relative(got, expected) < 2e-6, name


@pytest.mark.parametrize('backend', FAST)
@pytest.mark.parametrize('absent', [('D', ), ('delta_bias', ), ('D', 'delta_bias')])
@pytest.mark.parametrize('softplus', [True, False])
def test_optional_arguments(backend, absent, softplus):
    inputs = make_inputs(length=17)
    if not softplus:
        with torch.no_grad():
            inputs['delta'].abs_()
            inputs['delta_bias'].abs_()
    inputs.update(dict.fromkeys(absent))
    y, grads = run(inputs, backend, delta_softplus=softplus)
    want, want_grads = run(inputs, 'reference', delta_softplus=softplus)
    for got, expected in zip((y, *grads), (want, *want_grads)):
        assert relative(got, expected) < 2e-6


@pytest.mark.parametrize('states', [1, 2, 3])
@pytest.mark.parametrize('length', [1, 7, 63, 65])
@pytest.mark.parametrize('groups', [1, 2])
def test_gradcheck_blocked(length, states, groups):
    inputs = make_inputs(1, groups, 2, length, states, torch.float64)

    def scan(*args):
        return selective_scan(*args, delta_softplus=True, backend='blocked')

    torch.autograd.gradcheck(scan, tuple(v.cpu() for v in inputs.values()), fast_mode=True)


@pytest.mark.parametrize('backend', FAST)
def test_any_memory_layout(backend):
    inputs = make_inputs(length=30)
    permuted = {
        k: v.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()
        if v.dim() > 2 else v for k, v in inputs.items()
    }
    y, grads = run(inputs, backend, delta_softplus=True)
    got, got_grads = run(permuted, backend, delta_softplus=True)
    for one, other in zip((got, *got_grads), (y, *grads)):
        assert relative(one, other) < 1e-6


@pytest.mark.parametrize('backend', ['reference', *FAST])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_inside(backend, dtype):
    inputs = make_inputs(length=100, dtype=dtype)
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    with torch.autocast(DEVICE, torch.bfloat16):
        y, grads = run(inputs, backend, delta_softplus=True)
    want, want_grads = run(exact, 'reference', delta_softplus=True)
    eps = torch.finfo(dtype).eps
    assert y.dtype == dtype and relative(y, want) < eps
    for name, got, expected in zip(NAMES, grads, want_grads):
        assert relative(got, expected) < eps, name


@pytest.mark.parametrize('backend', ['reference', *FAST])
@pytest.mark.parametrize('bias', [-60., -20., 0., 20., 200.])
def test_extreme_steps_stay_finite(backend, bias):
    inputs = make_inputs(length=130)
    with torch.no_grad():
        inputs['delta_bias'].fill_(bias)
    y, grads = run(inputs, backend, delta_softplus=True)
    for tensor in (y, *grads):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize('backend', FAST)
def test_long_sequence_is_exact(backend):
    inputs = make_inputs(1, 1, 2, 70_000)
    y = selective_scan(**inputs, delta_softplus=True, backend=backend).detach()
    exact = {k: v.detach().double() for k, v in inputs.items()}
    want = selective_scan(**exact, delta_softplus=True, backend='reference')
    assert torch.isfinite(y).all() and relative(y, want) < 1e-6


def test_auto_takes_blocked_on_cpu():
    assert resolve_backend('auto', 'cpu') == 'blocked'


def test_auto_takes_the_first_that_runs_on_cuda(monkeypatch):
    """In the order that docs/performance.md measured; float64 is for the one that has it."""
    from mmgroupmamba.ops import selective_scan as door  # the function: its module's globals
    table = door.__globals__
    runs = {'triton', 'mamba_ssm', 'blocked'}
    for name in ('triton', 'mamba_ssm', 'blocked'):
        monkeypatch.setattr(table['backend_module'](name), 'why_not',
                            lambda _, name=name: None if name in runs else 'absent')
    for name in ('triton', 'mamba_ssm', 'blocked'):
        monkeypatch.setitem(table, '_resolved', {})
        assert resolve_backend('auto', 'cuda', torch.float32) == name
        assert resolve_backend('auto', 'cuda', torch.float64) == 'blocked'
        runs.discard(name)


def test_unknown_backend_lists_the_legal_ones():
    with pytest.raises(ValueError, match='unknown scan .*reference, blocked, mamba_ssm, triton'):
        selective_scan(**make_inputs(length=4), backend='cuda')


def test_backend_by_name_never_falls_back():
    assert 'CUDA' in available_backends('cpu')['mamba_ssm']
    with pytest.raises(BackendUnavailableError, match='mamba_ssm.*CUDA'):
        inputs = {k: v.cpu() for k, v in make_inputs(length=4).items()}
        selective_scan(**inputs, backend='mamba_ssm')


@pytest.mark.parametrize('name, shape', [
    ('u', (2, 12)), ('u', (2, 13, 5)), ('delta', (2, 12, 4)), ('A', (12, 2)), ('A', (12, )),
    ('B', (2, 4, 1, 4)), ('B', (2, 5, 1, 5)), ('C', (2, 4, 2, 5)), ('D', (4, )),
    ('delta_bias', (12, 1)),
])
def test_wrong_shape_is_named(name, shape):
    inputs = make_inputs(length=5)
    inputs[name] = torch.zeros(shape, device=DEVICE)
    with pytest.raises(ValueError, match='selective_scan: '):
        selective_scan(**inputs)


def test_wrong_dtype_is_named():
    inputs = make_inputs(length=5)
    inputs['C'] = inputs['C'].detach().to(torch.complex64)
    with pytest.raises(ValueError, match='C must be real floating'):
        selective_scan(**inputs)
