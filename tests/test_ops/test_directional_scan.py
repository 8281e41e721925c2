"""The scan of a map: every backend against loops over its cells, outputs and every gradient."""
import pytest
import torch
from test_directions import walk
from test_selective_scan import DEVICE, FAST, relative

from mmgroupmamba.ops import DIRECTIONS, directional_scan, selective_scan

NAMES = ('x', 'x_dbl', 'dt_weight', 'A_log', 'D', 'dt_bias')


def make_inputs(batch=2, height=3, width=5, dim=6, rank=2, states=1, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = dict(
        x=randn(batch, height, width, 4, dim),
        x_dbl=randn(batch, height, width, 4, rank + 2 * states),
        dt_weight=randn(4, dim, rank),
        A_log=randn(4 * dim, states),
        D=randn(4 * dim),
        dt_bias=randn(4 * dim) - 1)
    return {k: v.to(DEVICE, dtype).requires_grad_() for k, v in inputs.items()}


def by_cells(x, x_dbl, dt_weight, A_log, D, dt_bias):
    """Token after token, as a person would walk the map."""
    height, width, _, dim = x.shape[1:]
    rank, states = dt_weight.shape[2], A_log.shape[1]
    A = -A_log.exp()
    y = torch.zeros_like(x)
    for g, direction in enumerate(DIRECTIONS):
        own = slice(g * dim, (g + 1) * dim)
        cells = walk(height, width, direction)
        dt, B, C = torch.stack([x_dbl[:, h, w, g] for h, w in cells], -1).split(
            [rank, states, states], 1)  # (batch, ., L)
        u = torch.stack([x[:, h, w, g] for h, w in cells], -1)
        out = selective_scan(u, dt_weight[g] @ dt, A[own], B[:, None], C[:, None], D[own],
                             dt_bias[own], delta_softplus=True, backend='reference')
        for i, (h, w) in enumerate(cells):
            y = y.index_put((torch.arange(len(x)), torch.tensor(h), torch.tensor(w),
                             torch.tensor(g)), out[..., i])
    return y


def run(function, inputs, amp=None, **kwargs):
    with torch.autocast(DEVICE, amp, enabled=amp is not None):
        y = function(**inputs, **kwargs)
    cotangent = torch.cos(torch.arange(y.numel(), device=y.device)).view_as(y).to(y.dtype)
    return y.detach(), torch.autograd.grad(y, list(inputs.values()), cotangent)


def check(inputs, backend, tolerance=1e-6, **autocast):
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    y, grads = run(directional_scan, inputs, backend=backend, **autocast)
    want, want_grads = run(by_cells, exact)
    assert y.dtype == torch.float32 and relative(y, want) < tolerance
    for name, got, expected in zip(NAMES, grads, want_grads):
        assert got.shape == inputs[name].shape and got.dtype == inputs[name].dtype
        assert relative(got, expected) < 2 * tolerance, name


@pytest.mark.parametrize('backend', ['reference', *FAST])
@pytest.mark.parametrize('height, width', [(1, 1), (1, 7), (7, 1), (3, 5), (5, 3), (9, 7)])
def test_walks_each_group_in_its_direction(backend, height, width):
    check(make_inputs(height=height, width=width), backend)


@pytest.mark.parametrize('backend', ['reference', *FAST])
@pytest.mark.parametrize('dim, rank, states', [(1, 1, 1), (4, 1, 3), (87, 6, 1), (16, 3, 2)])
def test_any_number_of_channels_ranks_and_states(backend, dim, rank, states):
    check(make_inputs(1, 4, 6, dim, rank, states), backend)


@pytest.mark.parametrize('backend', ['reference', *FAST])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_inside(backend, dtype):
    check(make_inputs(dtype=dtype), backend, tolerance=torch.finfo(dtype).eps, amp=torch.bfloat16)


@pytest.mark.parametrize('backend', ['reference', *FAST])
@pytest.mark.parametrize('height, width', [(3, 5), (1, 1)])
def test_the_dtype_asked_for(backend, height, width):
    inputs = make_inputs(height=height, width=width)
    half, wide = (run(directional_scan, inputs, backend=backend, out_dtype=dtype)
                  for dtype in (torch.bfloat16, None))
    assert half[0].dtype == torch.bfloat16 and wide[0].dtype == torch.float32
    assert torch.equal(half[0], wide[0].bfloat16())
    with torch.no_grad():
        y = directional_scan(**inputs, backend=backend, out_dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16 and relative(y, wide[0]) < 2**-8
    for got, want in zip(half[1], wide[1]):
        assert relative(got, want) < 1e-2


@pytest.mark.parametrize('backend', ['reference', *FAST])
@pytest.mark.parametrize('bias', [-60., 0., 200.])
def test_extreme_steps_stay_finite(backend, bias):
    inputs = make_inputs()
    with torch.no_grad():
        inputs['dt_bias'].fill_(bias)
    y, grads = run(directional_scan, inputs, backend=backend)
    for tensor in (y, *grads):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize('states', [1, 3])
def test_one_token_is_the_scan_of_one(states):
    inputs = make_inputs(3, 1, 1, states=states)
    want, grads = run(directional_scan, inputs)
    assert all(grad is not None for grad in grads)  # A's is zero
    with torch.no_grad():
        assert relative(directional_scan(**inputs), want) < 1e-6


@pytest.mark.parametrize('backend', ['reference', *FAST])
def test_parts_of_larger_maps(backend):
    """Views with strides of their own, as a split and a permuted map have."""
    inputs = make_inputs()
    views = {k: v.detach() for k, v in inputs.items()}
    views['x'] = torch.stack([views['x'], torch.full_like(views['x'], 1e9)], -1)[..., 0]
    views['x_dbl'] = views['x_dbl'].permute(3, 4, 0, 2, 1).contiguous().permute(2, 4, 3, 0, 1)
    views = {k: v.requires_grad_() for k, v in views.items()}
    y, grads = run(directional_scan, views, backend=backend)
    want, want_grads = run(directional_scan, inputs, backend=backend)
    for got, expected in zip((y, *grads), (want, *want_grads)):
        assert relative(got, expected) < 1e-6


@pytest.mark.parametrize('name, shape', [
    ('x', (2, 3, 5, 24)), ('x', (2, 3, 5, 3, 6)), ('x', (2, 0, 5, 4, 6)),
    ('x_dbl', (2, 3, 5, 4, 5)), ('x_dbl', (2, 5, 3, 4, 4)), ('dt_weight', (4, 2, 6)),
    ('dt_weight', (24, 2)), ('A_log', (24, )), ('A_log', (24, 2)), ('D', (6, )),
    ('dt_bias', (24, 1)),
])
def test_wrong_shape_is_named(name, shape):
    inputs = make_inputs()
    inputs[name] = torch.zeros(shape, device=DEVICE)
    with pytest.raises(ValueError, match='directional_scan: '):
        directional_scan(**inputs)


def test_wrong_dtype_is_named():
    inputs = make_inputs()
    inputs['D'] = inputs['D'].detach().long()
    with pytest.raises(ValueError, match='D must be real floating'):
        directional_scan(**inputs)


@pytest.mark.parametrize('backend', FAST)
def test_what_is_not_finite_spoils_no_other_direction(backend):
    """An infinite C in the last cell, whose output has no gradient: it reaches the gradients of the
    tokens that its step's state comes from, in no group more than in the reference."""
    counts = []
    for name in ('reference', backend):
        inputs = make_inputs(height=7, width=9, dim=8, rank=1)
        with torch.no_grad():
            inputs['x_dbl'][:, 6, 8, :, 2] = float('inf')
        y = directional_scan(**inputs, backend=name)
        weight = torch.ones_like(y)
        weight[:, 6, 8] = 0
        grad, = torch.autograd.grad(y, inputs['x'], weight)
        counts.append([(~grad[..., g, :].isfinite()).sum().item() for g in range(4)])
    assert counts[1] == counts[0]
