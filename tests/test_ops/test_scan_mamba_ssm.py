"""The adapter, on a stand-in for the CUDA kernel that checks the kernel's own terms."""
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from test_directional_scan import check as check_map
from test_directional_scan import make_inputs as make_map
from test_selective_scan import NAMES, make_inputs, relative, run
from torch.utils._python_dispatch import TorchDispatchMode

from mmgroupmamba.ops import directional_scan, scan_mamba_ssm, selective_scan
from mmgroupmamba.ops.directional_scan import over_sequences

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason='the stand-in is for machines without a GPU')


def channels_last(inputs):
    return {
        k: v.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()
        if v.dim() > 2 else v for k, v in inputs.items()
    }


def between_nans(inputs):
    """Each in the middle of larger memory, one value off what vectors of 16 bytes want."""
    return {k: F.pad(v.detach(), (1, 2), value=torch.nan)[..., 1:-2].requires_grad_()
            for k, v in inputs.items()}


@pytest.mark.parametrize('absent', [(), ('D', ), ('delta_bias', ), ('D', 'delta_bias')])
@pytest.mark.parametrize('softplus', [True, False])
@pytest.mark.parametrize('layout', [dict, channels_last, between_nans])
@pytest.mark.parametrize('length', [1, 9, 128])
def test_equals_reference(mamba_kernel, absent, softplus, layout, length):
    inputs = make_inputs(length=length, states=2)
    if not softplus:
        with torch.no_grad():
            inputs['delta'].abs_()
            inputs['delta_bias'].abs_()
    inputs = dict(layout(inputs), **dict.fromkeys(absent))
    exact = {k: v if v is None else v.detach().double().requires_grad_()
             for k, v in inputs.items()}
    y, grads = run(inputs, 'mamba_ssm', delta_softplus=softplus)
    want, want_grads = run(exact, 'reference', delta_softplus=softplus)
    present = [k for k in NAMES if inputs[k] is not None]
    assert y.dtype == torch.float32 and relative(y, want) < 1e-6
    for name, got, expected in zip(present, grads, want_grads):
        assert got.shape == inputs[name].shape and relative(got, expected) < 2e-6, name
    assert mamba_kernel == ['fwd', 'bwd']


@pytest.mark.parametrize('length', [2048, 2049])
def test_states_between_chunks_have_the_kernels_shape(mamba_kernel, length):
    y, grads = run(make_inputs(1, 1, 2, length, states=3), 'mamba_ssm', delta_softplus=True)
    assert all(torch.isfinite(t).all() for t in (y, *grads))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('kept', [(), ('delta', ), ('u', ), ('u', 'delta', 'C')])
def test_dtypes_are_made_one_and_none_is_narrowed(mamba_kernel, dtype, kept):
    inputs = make_inputs(length=9)
    for name in ('u', 'delta', 'B', 'C', 'A'):
        if name not in kept:
            inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    y, grads = run(inputs, 'mamba_ssm', delta_softplus=True)
    want, want_grads = run(exact, 'reference', delta_softplus=True)
    assert y.dtype == inputs['u'].dtype
    assert relative(y, want) < max(1e-6, torch.finfo(y.dtype).eps)
    for name, got, expected in zip(NAMES, grads, want_grads):
        assert got.dtype == inputs[name].dtype
        assert relative(got, expected) < 2 * torch.finfo(dtype).eps, name


def test_float64_of_the_others_is_float32(mamba_kernel):
    inputs = make_inputs(length=9)
    inputs['delta'] = inputs['delta'].detach().double().requires_grad_()
    y, grads = run(inputs, 'mamba_ssm', delta_softplus=True)
    assert y.dtype == torch.float32 and grads[1].dtype == torch.float64


@pytest.mark.parametrize('height, width', [(1, 1), (1, 7), (7, 1), (3, 5), (5, 3), (8, 16)])
@pytest.mark.parametrize('dim, rank, states', [(6, 2, 1), (5, 1, 3)])
def test_map_equals_reference(mamba_kernel, height, width, dim, rank, states):
    check_map(make_map(2, height, width, dim, rank, states), 'mamba_ssm')
    assert mamba_kernel == ['fwd', 'bwd']


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_map_of_half_precision_is_float32_inside(mamba_kernel, dtype):
    with torch.autocast('cpu', torch.bfloat16):
        check_map(make_map(dtype=dtype), 'mamba_ssm', tolerance=torch.finfo(dtype).eps)


@pytest.mark.parametrize('bias', [-60., 0., 200.])
def test_extreme_steps_stay_finite(mamba_kernel, bias):
    for inputs, scan, options in ((make_inputs(length=130), selective_scan,
                                   dict(delta_softplus=True)), (make_map(), directional_scan, {})):
        with torch.no_grad():
            inputs['dt_bias' if scan is directional_scan else 'delta_bias'].fill_(bias)
        y = scan(**inputs, backend='mamba_ssm', **options)
        grads = torch.autograd.grad(y.sum(), list(inputs.values()))
        assert all(torch.isfinite(t).all() for t in (y, *grads))


class Writes(TorchDispatchMode):
    """Counts the operations that do nothing but write values in another order or place."""
    NAMES = ('clone', 'copy_', 'contiguous', 'flip', 'stack', 'cat', 'gather', 'scatter')

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.name().split('::')[1].split('.')[0]
        if name in self.NAMES and out.is_floating_point() and out.numel() >= self.size:
            self.count[name] += 1
        return out


def test_each_sequence_is_written_once(mamba_kernel):
    """The definition, over the same kernel, writes x, x_dbl, the step and y 7 times."""
    inputs = make_map(2, 8, 16, 4, 2, 1)  # x and x_dbl are of one size

    def count(scan, *args):
        with Writes(inputs['x'].numel() / 4) as forward:
            y = scan(*inputs.values(), *args)
        with Writes(inputs['x'].numel() / 4) as backward:
            grads = torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))
        # the layouts that the layers around take without a copy
        assert y.is_contiguous() and grads[0].is_contiguous() and grads[1].is_contiguous()
        return forward.count, backward.count

    # x, x_dbl, y; backward the same, and the gradients of step, B and C put side by side
    assert count(scan_mamba_ssm.directional_scan, torch.float32) == (
        Counter(gather=3), Counter(gather=3, cat=1))
    forward, backward = count(over_sequences, scan_mamba_ssm.scan)
    assert (forward.total(), backward.total()) == (7, 5)


def test_no_graph_break(mamba_kernel):
    for inputs, scan in ((make_inputs(length=9), selective_scan), (make_map(), directional_scan)):
        torch._dynamo.reset()
        tensors = list(inputs.values())
        options = dict(delta_softplus=True) if scan is selective_scan else {}

        def run_it(*args, scan=scan, options=options):
            return scan(*args, backend='mamba_ssm', **options).sin()

        y = torch.compile(run_it, fullgraph=True, backend='aot_eager')(*tensors)
        want = run_it(*tensors)
        torch.testing.assert_close(y, want)
        for got, expected in zip(*(torch.autograd.grad(t.sum(), tensors) for t in (y, want))):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize('absent', [(), ('D', 'delta_bias')])
@pytest.mark.parametrize('layout', [dict, between_nans])
def test_the_operators_are_what_torch_library_is_told(mamba_kernel, absent, layout):
    inputs = dict(layout(make_inputs(length=128, states=2)), **dict.fromkeys(absent))
    for name in ('A', 'D', 'delta_bias'):
        inputs[name] = inputs[name] if inputs[name] is None else inputs[name].contiguous()
    args = tuple(t if t is None else t.detach().requires_grad_() for t in inputs.values())
    torch.library.opcheck(scan_mamba_ssm._scan.op, (*args, True))
    y, kept = scan_mamba_ssm._forward(*args, True)
    args = [t if t is None else t.detach() for t in (torch.ones_like(y), *args, kept)]
    torch.library.opcheck(scan_mamba_ssm._scan.backward_op, (*args, True),
                          test_utils=('test_schema', 'test_faketensor'))


@pytest.mark.parametrize('sizes, message', [
    (dict(states=257), 'at most 256 states, got 257'),
    (dict(dim=2**16), 'at most 65535 channels, got 65536'),
    (dict(batch=2**12, dim=2**11, length=2**19), r'32 bits.* make the batch smaller'),
])
def test_what_is_too_large_is_refused(mamba_kernel, sizes, message):
    sizes = dict(dict(batch=1, dim=1, length=3, states=1), **sizes)
    batch, dim, length, states = sizes.values()
    u = torch.zeros(1).expand(batch, dim, length)
    B = torch.zeros(1).expand(batch, 1, states, length)
    with pytest.raises(ValueError, match=message):
        scan_mamba_ssm._forward(u, u, torch.zeros(1).expand(dim, states), B, B, None, None, True)


def test_float64_is_refused(mamba_kernel):
    with pytest.raises(ValueError, match="no float64: use backend='blocked'"):
        selective_scan(**make_inputs(length=3, dtype=torch.float64), backend='mamba_ssm')
    with pytest.raises(ValueError, match="no float64: use backend='blocked'"):
        directional_scan(**make_map(dtype=torch.float64), backend='mamba_ssm')


def test_missing_kernel_says_how_to_install_it():
    if scan_mamba_ssm.why_not('cuda') is None:
        pytest.skip('the kernel is installed')
    assert 'pip install mamba-ssm --no-deps' in scan_mamba_ssm.why_not('cuda')
