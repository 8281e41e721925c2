"""The block that trains as one function against its modules, outputs and every gradient.

On a machine without a GPU, its tests are run by one subprocess in Triton's interpreter.
"""
from copy import deepcopy
from functools import partial
from importlib import import_module

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_around_scan import randn
from test_scan_triton import (
    Recorder,
    by_a_subprocess,
    compile_launch,
    compiles,
    passed_in_the_interpreter,
    runs,
    small_tiles,
)
from test_selective_scan import DEVICE, relative
from torch.utils.checkpoint import checkpoint

from mmgroupmamba.models import layers
from mmgroupmamba.models.layers import Block
from mmgroupmamba.ops import (
    FUSED_OPS,
    around_scan_triton,
    block_diagonal,
    training_block,
    trains_whole,
)
from mmgroupmamba.ops.training_block import _places, _prepare

module = import_module('mmgroupmamba.ops.training_block')
_GroupedLinear = import_module('mmgroupmamba.ops.directional_scan')._GroupedLinear
CHANNELS = 20


@pytest.fixture(autouse=True)
def small(monkeypatch):
    small_tiles(monkeypatch)


@by_a_subprocess
def test_in_the_interpreter():
    assert passed_in_the_interpreter(__file__) > 4


class Factors(nn.Module):
    """Stands for stochastic depth: gives each branch its factors in turn."""

    def __init__(self, factors):
        super().__init__()
        self.factors, self.calls = factors, 0

    def forward(self, x):
        self.calls += 1
        return x * self.factors[(self.calls - 1) % 2].to(x.dtype)


def make_blocks(depth=2):
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block(CHANNELS, 1.5, scan_backend='triton', fused_ops=FUSED_OPS)
                           for _ in range(depth))
    blocks.apply(layers.init_weights)
    with torch.no_grad():
        for p in blocks.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return blocks.to(DEVICE)


def plainly(blocks):
    """The same in float64, of plain modules."""
    plain = nn.ModuleList(Block(CHANNELS, 1.5, scan_backend='reference') for _ in blocks)
    plain.load_state_dict(blocks.state_dict())
    for ours, theirs in zip(blocks, plain):
        theirs.drop_path = deepcopy(ours.drop_path)
    return plain.double().to(DEVICE)


def run(blocks, x, amp=False):
    """Output, and gradients by name; the first block gets one map, the others two."""
    x = x.detach().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=amp):
        maps = (x, )
        for block in blocks:
            maps = block(*maps)
            maps = maps if isinstance(maps, tuple) else (maps, )
        y = sum(maps)
    cotangent = torch.cos(torch.arange(y.numel(), device=y.device)).view_as(y).to(y.dtype)
    grads = torch.autograd.grad(y, [x, *blocks.parameters()], cotangent)
    return y, dict(zip(['x', *(name for name, _ in blocks.named_parameters())], grads))


@pytest.fixture
def calls(monkeypatch):
    """How often a block was one function."""
    counted = []
    monkeypatch.setattr(layers, 'training_block',
                        lambda *args: counted.append(1) or training_block(*args))
    return counted


def check(blocks, x):
    y, grads = run(blocks, x)
    want, want_grads = run(plainly(blocks), x.double())
    assert relative(y, want) < 2e-6
    for name, got in grads.items():
        assert got.dtype == torch.float32 and got.shape == want_grads[name].shape
        if 'skip_scale' not in name:  # noise: the norm behind it takes the scale away
            assert relative(got, want_grads[name]) < 1e-5, name


@runs
def test_is_the_block(calls):
    check(make_blocks(), randn(2, 1, 3, CHANNELS).float())
    assert len(calls) == 2


@runs
def test_as_exact_as_the_modules_under_autocast(calls):
    blocks, x = make_blocks(1), randn(2, 2, 2, CHANNELS).float()
    want, want_grads = run(plainly(blocks), x.double())
    y, grads = run(blocks, x, amp=True)
    assert len(calls) == 1
    blocks[0].all_fused = False
    y_modules, modules_grads = run(blocks, x, amp=True)
    assert len(calls) == 1 and y.dtype == y_modules.dtype
    assert relative(y, want) < 1.1 * relative(y_modules, want)
    for name, got in grads.items():
        if 'skip_scale' not in name:
            error, other = (relative(g, want_grads[name]) for g in (got, modules_grads[name]))
            assert got.dtype == torch.float32 and error < 1.5 * other + 2**-8, name


@runs
def test_stochastic_depth(calls, monkeypatch):
    blocks = make_blocks(1)
    factors = torch.tensor([[1.25, 1.25], [0., 1.25]], device=DEVICE).t()[..., None, None, None]
    assert not factors.is_contiguous()
    blocks[0].drop_path = Factors(factors)
    monkeypatch.setattr(Block, '_keep', lambda self, x: factors)
    check(blocks, randn(2, 1, 2, CHANNELS).float())
    assert len(calls) == 1


@runs
def test_same_bits_again_and_recomputed(calls):
    blocks, x = make_blocks(1), randn(1, 2, 2, CHANNELS).float()
    first, grads = run(blocks, x)
    forward = blocks[0].forward
    blocks[0].forward = partial(checkpoint, forward, use_reentrant=False)
    second, again = run(blocks, x)
    assert len(calls) == 3
    for one, other in zip((first, *grads.values()), (second, *again.values())):
        assert torch.equal(one, other)


@runs
@pytest.mark.parametrize('channels, hidden', [(20, 1), (37, 8), (65, 11)])
def test_affinity_is_the_layers(channels, hidden):
    """Values, and gradients in all tokens of images of six."""
    torch.manual_seed(0)
    affinity = layers.ChannelAffinity(channels).to(DEVICE).double()
    affinity.fc1 = nn.Linear(channels, hidden).to(DEVICE).double()
    affinity.fc2 = nn.Linear(hidden, channels).to(DEVICE).double()
    x = randn(3, 2, 3, channels).requires_grad_()
    skip = torch.full((1, ), 0.7, dtype=torch.float64, device=DEVICE, requires_grad=True)
    factor = skip * affinity(x)
    dfactor = randn(3, channels, seed=1)
    want = torch.autograd.grad(factor, [x, skip, *affinity.parameters()],
                               dfactor.view(factor.shape))

    squeeze, squeeze_bias, excite, excite_bias = (p.detach().float()
                                                  for p in affinity.parameters())
    got, mean, squeezed, values = around_scan_triton.affinity_forward(
        x.detach().float(), squeeze, squeeze_bias, excite, excite_bias, skip.detach().float())
    assert relative(mean, x.detach().mean((1, 2))) < 1e-6
    assert relative(got, factor.flatten(1)) < 1e-6
    assert hidden == 1 or (squeezed == 0).any() and (squeezed > 0).any()
    sums = torch.full((3, 5, channels), torch.nan, device=DEVICE)
    sums[:, 2] = dfactor
    shift = around_scan_triton.affinity_backward(
        sums, values, squeezed, squeeze, excite, skip.detach().float(), 6)
    before_sigmoid, before_relu = sums[:, 3], sums[:, 4, :hidden]
    grads = (shift[:, None, None].expand(x.shape), sums[:, 4, hidden].sum().view(1),
             before_relu.t() @ mean, before_relu.sum(0), before_sigmoid.t() @ squeezed,
             before_sigmoid.sum(0))
    for got, expected in zip(grads, want):
        assert got.shape == expected.shape and relative(got, expected) < 2e-6


@compiles
@pytest.mark.parametrize('arch', [80, 90])
@pytest.mark.parametrize('channels', [64, 348, 512])
def test_compiles_without_spills(monkeypatch, channels, arch):
    """What is launched otherwise than by the operators."""
    from mmgroupmamba.ops import around_scan_triton_kernels, scan_triton_kernels

    launches = []
    for name in dir(around_scan_triton_kernels):
        if name.endswith('_kernel'):
            kernel = getattr(around_scan_triton_kernels, name)
            monkeypatch.setattr(around_scan_triton_kernels, name, Recorder(kernel, launches))
    for name in ('summary_kernel', 'forward_kernel', 'backward_kernel'):
        kernel = getattr(scan_triton_kernels, name)
        monkeypatch.setattr(scan_triton_kernels, name, Recorder(kernel, []))
    x = torch.empty(2, 4, 4, channels, requires_grad=True)
    branch = torch.empty_like(x, dtype=torch.bfloat16, requires_grad=True)
    keep = torch.ones(2, 2, 1, 1, 1)
    with torch.autocast('cpu', torch.bfloat16):
        maps = training_block(x, branch, keep, Block(channels, 1)._weights(), 1e-5, 1e-6)
    torch.autograd.grad(maps, [x, branch], [torch.empty_like(y) for y in maps])
    monkeypatch.undo()
    others = [(kernel, a) for kernel, a in launches if 'affinity' in kernel.__name__
              or a.get('PITCHED') or a.get('branch') is not None]
    assert [kernel.__name__ for kernel, _ in others] == [
        'affinity_forward_kernel', 'norm_backward_kernel', 'affinity_backward_kernel',
        'gate_backward_kernel', 'conv_backward_kernel', 'norm_backward_kernel']
    for kernel, arguments in others:
        registers, spilled = compile_launch(kernel, arguments, arch)
        print(f'{kernel.__name__} on sm_{arch}: {registers} registers')
        assert spilled == 0, kernel.__name__


@runs
def test_what_is_saved_may_be_moved(calls):
    """As offloading to another device does, each tensor by itself."""
    blocks, x = make_blocks(1), randn(1, 1, 2, CHANNELS).float()
    want, want_grads = run(blocks, x)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        got, grads = run(blocks, x)
    assert len(calls) == 2
    for one, other in zip((want, *want_grads.values()), (got, *grads.values())):
        assert torch.equal(one, other)


@runs
def test_frozen_weights_and_input_get_none(calls):
    block = make_blocks(1)[0]
    block.mixer.requires_grad_(False)
    y, branch = block(randn(1, 1, 2, CHANNELS).float())
    (y.sum() + branch.square().sum()).backward()
    assert len(calls) == 1
    for name, p in block.named_parameters():
        assert (p.grad is None) == name.startswith('mixer.'), name


@runs
def test_only_in_eager_training(calls):
    block, x = make_blocks(1)[0], randn(1, 1, 2, CHANNELS).float()
    with torch.no_grad():
        block(x)
    block.eval()(x)
    assert not calls


@runs
def test_float64_is_refused(calls):
    with pytest.raises(ValueError, match='no float64'):
        make_blocks(1).double()[0](randn(1, 1, 2, CHANNELS))
    assert not calls


@pytest.mark.parametrize('x, branch, keep, words', [
    ((1, 2, 20), None, None, r'x must be \(B, H, W, 20\)'),
    ((1, 2, 2, 24), None, None, r'x must be \(B, H, W, 20\)'),
    ((0, 2, 2, 20), None, None, 'and not empty'),
    ((1, 2, 2, 20), (1, 2, 20), None, r'branch must be \(1, 2, 2, 20\)'),
    ((1, 2, 2, 20), None, (2, 3, 1, 1, 1), r'keep must be \(2, 1, 1, 1, 1\)'),
])
def test_wrong_shape_is_named(x, branch, keep, words):
    x, branch, keep = (s if s is None else torch.zeros(s) for s in (x, branch, keep))
    with pytest.raises(ValueError, match=words):
        training_block(x, branch, keep, Block(CHANNELS, 1.5)._weights(), 1e-5, 1e-6)


def test_what_is_changed_inside_has_its_say():
    block = Block(CHANNELS, 1.5)
    assert block._weights() is not None
    hook = block.ffn.fc2.register_forward_hook(lambda *_: None)
    assert block._weights() is None
    hook.remove()
    assert block._weights() is not None
    block.ffn.fc2.forward = lambda x: x
    assert block._weights() is None
    del block.ffn.fc2.forward
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert block._weights() is None
    hook.remove()
    assert block._weights() is not None
    nn.utils.parametrize.register_parametrization(block.mixer.proj, 'weight', nn.Identity())
    assert block._weights() is None
    block = Block(CHANNELS, 1.5)
    block.ffn.fc1 = nn.Linear(CHANNELS, 30, bias=False)
    assert block._weights() is None


def test_affinity_without_squeezing_is_the_modules():
    """Its kernel has a row of channels for the hidden values and one more."""
    block, x = Block(CHANNELS, 1.5), torch.zeros(1, 2, 2, CHANNELS)
    for hidden, whole in ((CHANNELS - 1, True), (CHANNELS, False)):
        block.mixer.affinity = layers.ChannelAffinity(CHANNELS)
        block.mixer.affinity.fc1 = nn.Linear(CHANNELS, hidden)
        block.mixer.affinity.fc2 = nn.Linear(hidden, CHANNELS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, 'resolve_backend', lambda *_: 'triton')
            assert trains_whole(x, block._weights(), 'triton') == whole
    with pytest.raises(ValueError, match='squeeze must have fewer rows than the 20 channels'):
        training_block(x, None, None, block._weights(), 1e-5, 1e-6)


def test_weights_are_all_of_the_blocks():
    block = Block(CHANNELS, 1.5)
    weights = block._weights()
    assert {id(w) for w in weights} == {id(p) for p in block.parameters()}
    assert len(set(map(id, weights))) == len(weights)


def test_factors_of_stochastic_depth():
    x = torch.empty(1000, 1, 1, CHANNELS, device=DEVICE)
    block = Block(CHANNELS, 1., drop_path=0.25)
    factors = block._keep(x)
    assert factors.shape == (2, 1000, 1, 1, 1)
    assert set(factors.unique().tolist()) == {0., torch.tensor(1 / 0.75).item()}
    assert 0.9 < factors.mean() < 1.1
    assert Block(CHANNELS, 1.)._keep(x) is None


@pytest.mark.parametrize('channels', [64, 348, 424])
def test_matrices_start_at_16_bytes(channels):
    """As a GPU's matrix units want them."""
    weights = Block(channels, 4).apply(layers.init_weights)._weights()
    prepared = _prepare(weights, torch.bfloat16)
    matrices = prepared._asdict()
    matrices['in_proj'], matrices['gate_proj'] = prepared.in_proj.chunk(2)
    for name in ('in_proj', 'gate_proj', 'x_proj', 'out_proj', 'proj', 'fc1', 'fc2'):
        matrix, want = matrices[name], getattr(weights, name)
        assert matrix.data_ptr() % 16 == 0 and matrix.is_contiguous(), name
        want = torch.block_diag(*want) if want.dim() == 3 else want
        assert torch.equal(matrix, want.bfloat16()), name


def test_places_of_block_diagonal_matrices():
    weights = [torch.randn(4, 3, 2), torch.randn(4, 1, 5)]
    source, target = _places(tuple(w.shape for w in weights), torch.device('cpu'))
    flat = torch.cat([*(w.flatten() for w in weights), torch.zeros(1)])
    matrices = torch.cat([block_diagonal(w).flatten() for w in weights])
    assert torch.equal(flat[source], matrices)
    assert torch.equal(matrices[target], flat[:-1])


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_block_diagonal(dtype):
    weight = torch.randn(4, 3, 5, device=DEVICE)
    got, want = block_diagonal(weight, dtype), torch.block_diag(*weight)
    assert torch.equal(got, want.to(dtype or torch.float32))


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('frozen', [None, 0, 1])
def test_grouped_linear_by_a_block_diagonal_matrix(bias, frozen):
    """As on CUDA, against a map for each group; what is frozen gets no gradient."""
    inputs = [torch.randn(2, 3, 20), torch.randn(4, 3, 5), torch.randn(12)][:2 + bias]
    inputs = [t.to(DEVICE, torch.float64).requires_grad_(i != frozen)
              for i, t in enumerate(inputs)]
    x, weight, *rest = inputs
    got = _GroupedLinear.apply(x, weight, rest[0] if bias else None)
    want = torch.cat([F.linear(part, one) for part, one in zip(x.chunk(4, -1), weight)], -1)
    want = want + rest[0] if bias else want
    torch.testing.assert_close(got, want)
    learned = [t for t in inputs if t.requires_grad]
    cotangent = torch.randn_like(got).transpose(0, 1).contiguous().transpose(0, 1)
    for one, other in zip(*(torch.autograd.grad(y, learned, cotangent) for y in (got, want))):
        torch.testing.assert_close(one, other)


def test_grouped_linear_under_autocast():
    x, weight = (torch.randn(shape, device=DEVICE).requires_grad_()
                 for shape in ((2, 3, 20), (4, 3, 5)))
    with torch.autocast(DEVICE, torch.bfloat16):
        got = _GroupedLinear.apply(x, weight, None)
    assert got.dtype == torch.bfloat16
    want = F.linear(x, torch.block_diag(*weight))
    grads, want_grads = (torch.autograd.grad(y, (x, weight), torch.ones_like(y))
                         for y in (got, want))
    for one, other in zip((got, *grads), (want, *want_grads)):
        assert one is got or one.dtype == torch.float32
        assert relative(one, other) < 2**-7
