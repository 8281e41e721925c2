"""The scan with its projection as one function against the modules that define it.

On a machine without a GPU, its tests are run by one subprocess in Triton's interpreter.
"""
from importlib import import_module

import pytest
import torch
from test_around_scan import randn
from test_scan_triton import by_a_subprocess, passed_in_the_interpreter, runs, small_tiles
from test_selective_scan import DEVICE, relative

from mmgroupmamba.models import layers
from mmgroupmamba.models.layers import GroupedSSM, init_weights
from mmgroupmamba.ops import (
    BackendUnavailableError,
    directional_scan,
    grouped_linear,
    projected_scan,
)

module = import_module('mmgroupmamba.ops.projected_scan')


@pytest.fixture(autouse=True)
def small(monkeypatch):
    small_tiles(monkeypatch)


@pytest.fixture
def calls(monkeypatch):
    """How often the function ran in a layer's place."""
    calls = []
    monkeypatch.setattr(layers, 'projected_scan', lambda *args: calls.append(args) or
                        projected_scan(*args))
    return calls


@by_a_subprocess
def test_in_the_interpreter():
    assert passed_in_the_interpreter(__file__) > 7


def inputs_of(channels=20, states=1, shape=(2, 3, 4)):
    dim = channels // 4
    rank = -(-dim // 16)
    return dict(x=randn(*shape, channels), weight=randn(4, rank + 2 * states, dim, seed=1),
                dt_weight=randn(4, dim, rank, seed=2), A_log=randn(channels, states, seed=3),
                D=randn(channels, seed=4), dt_bias=randn(channels, seed=5))


def defined(x, weight, *scanned):
    grouped = *x.shape[:3], 4, -1
    return directional_scan(x.view(grouped), grouped_linear(x, weight).view(grouped), *scanned,
                            backend='reference')


def run(function, inputs, **options):
    inputs = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    y = function(*inputs.values(), **options)
    cotangent = torch.cos(torch.arange(y.numel(), device=DEVICE)).view_as(y)
    cotangent = cotangent.transpose(0, 1).contiguous().transpose(0, 1).to(y.dtype)
    return y.detach(), dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), cotangent)))


@runs
@pytest.mark.parametrize('channels, states, shape', [
    (20, 1, (2, 3, 4)), (80, 2, (1, 2, 3)), (4, 1, (1, 1, 1)),
])
def test_is_the_definition(channels, states, shape):
    exact = inputs_of(channels, states, shape)
    want, want_grads = run(defined, exact)
    y, grads = run(projected_scan, {k: v.float() for k, v in exact.items()})
    assert relative(y, want) < 2e-6 and y.dtype == torch.float32
    for name, got in grads.items():
        assert got.dtype == torch.float32 and relative(got, want_grads[name]) < 4e-6, name


@runs
@pytest.mark.parametrize('half', [False, True])
def test_under_autocast(half):
    """Of a map in float32, or in half precision as its convolution leaves it."""
    exact = inputs_of()
    inputs = {k: v.float() for k, v in exact.items()}
    if half:
        inputs['x'] = inputs['x'].bfloat16()
        exact['x'] = inputs['x'].double()
    with torch.autocast(DEVICE, torch.bfloat16):
        y, grads = run(projected_scan, inputs, out_dtype=torch.bfloat16)
    want, want_grads = run(defined, exact)
    assert y.dtype == torch.bfloat16 and relative(y, want) < 2**-6
    for name, got in grads.items():
        assert got.dtype == inputs[name].dtype and relative(got, want_grads[name]) < 2**-6, name


@runs
def test_same_bits_again_and_in_any_layout():
    inputs = {k: v.float() for k, v in inputs_of().items()}
    views = dict(inputs, x=inputs['x'].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1))
    assert not views['x'].is_contiguous()
    first, again, viewed = ((y, *grads.values()) for y, grads in (
        run(projected_scan, case) for case in (inputs, inputs, views)))
    assert all(torch.equal(one, other) for one, other in zip(first, again))
    # of another layout, cuBLAS sums in another order
    assert max(relative(other, one) for one, other in zip(first, viewed)) < 1e-6


def ssm_and_map(channels=20):
    torch.manual_seed(0)
    ssm = GroupedSSM(channels, scan_backend='triton').apply(init_weights).to(DEVICE)
    return ssm, randn(2, 3, 4, channels).float()


@runs
def test_a_layer_trains_by_it(calls):
    ssm, x = ssm_and_map()
    ssm.D.requires_grad_(False)
    ssm.scan(x).sum().backward()
    assert len(calls) == 1 and ssm.D.grad is None
    learned = {name for name, p in ssm.named_parameters() if p.grad is not None}
    assert learned == {'x_proj.weight', 'dt_proj.weight', 'dt_bias', 'A_log'}


@runs
@pytest.mark.parametrize('change', [
    lambda ssm: ssm.x_proj.register_forward_hook(lambda module, inputs, y: 2 * y),
    lambda ssm: setattr(ssm, 'x_proj', torch.nn.Linear(20, 12, bias=False).to(DEVICE)),
    lambda ssm: setattr(ssm, 'scan_backend', 'blocked'),
], ids=['hook', 'replaced', 'backend'])
def test_what_is_changed_inside_has_its_say(calls, change):
    ssm, x = ssm_and_map()
    change(ssm)
    want = directional_scan(
        x.view(2, 3, 4, 4, 5), ssm.x_proj(x).view(2, 3, 4, 4, 3), ssm.dt_proj.weight, ssm.A_log,
        ssm.D, ssm.dt_bias, backend='blocked')
    assert relative(ssm.scan(x), want) < 2e-6 and not calls


@runs
def test_not_where_nothing_is_learned_or_somebody_looks_on(calls):
    ssm, x = ssm_and_map()
    with torch.no_grad():
        ssm.scan(x)
    torch.compile(ssm.scan, fullgraph=True, backend='aot_eager')(x)
    ssm.requires_grad_(False)
    ssm.scan(x)
    assert not calls
    ssm.scan(x.requires_grad_()).sum().backward()
    assert calls and x.grad is not None


@runs
@pytest.mark.parametrize('name, shape', [
    ('x', (2, 3, 20)), ('weight', (4, 4, 5)), ('dt_weight', (4, 5)), ('A_log', (20, )),
    ('D', (5, )), ('dt_bias', (4, 5)),
])
def test_wrong_shape_is_named(name, shape):
    inputs = dict({k: v.float() for k, v in inputs_of().items()},
                  **{name: torch.zeros(shape, device=DEVICE)})
    with pytest.raises(ValueError, match=rf'{name} (must be|\()'):
        projected_scan(*inputs.values())


@runs
@pytest.mark.parametrize('name', ['x', 'weight'])
def test_float64_is_refused(name):
    inputs = {k: v.to(torch.float64 if k == name else torch.float32)
              for k, v in inputs_of().items()}
    with pytest.raises(ValueError, match='projected_scan: the Triton kernels have no float64'):
        projected_scan(*inputs.values())


def test_device_without_triton_is_refused(monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    monkeypatch.setattr(import_module('mmgroupmamba.ops.selective_scan'), '_resolved', {})
    inputs = {k: v.float().cpu() for k, v in inputs_of().items()}
    with pytest.raises(BackendUnavailableError, match="scan backend 'triton' cannot run"):
        projected_scan(*inputs.values())
