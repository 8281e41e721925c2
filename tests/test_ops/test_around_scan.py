"""What stands around the scan: the definitions, and every backend against them in float64.

On a machine without a GPU, the Triton tests are run by one subprocess in Triton's interpreter.
"""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn import fuse_conv_bn
from test_scan_triton import (
    Recorder,
    by_a_subprocess,
    compile_launch,
    compiles,
    passed_in_the_interpreter,
    runs,
)
from test_selective_scan import DEVICE, relative

from mmgroupmamba import ops
from mmgroupmamba.models import GroupMamba, fuse
from mmgroupmamba.models.fuse import _fold_biases, _join_groups, pad_channels
from mmgroupmamba.models.layers import ChannelAffinity
from mmgroupmamba.ops import (
    BackendUnavailableError,
    add_layer_norm,
    around_scan_triton,
    channel_affinity,
    depthwise_conv,
    gated_layer_norm,
    layer_norm,
    modulate_layer_norm,
    with_padding,
)

ACTIVATIONS = ('gelu', 'silu', 'none')


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


def conv_inputs(batch=2, height=5, width=3, channels=20):
    return dict(x=randn(batch, height, width, channels), weight=randn(channels, 1, 3, 3, seed=1),
                bias=randn(channels, seed=2))


def gate_inputs(batch=2, height=5, width=3, groups=4, dim=5):
    return dict(y=randn(batch, height, width, groups, dim),
                gate=randn(batch, height, width, groups * dim, seed=1),
                weight=randn(groups, dim, seed=2), bias=randn(groups, dim, seed=3))


def norm_inputs(batch=2, height=5, width=3, channels=20):
    shape = batch, height, width, channels
    return dict(x=randn(*shape), residual=randn(*shape, seed=1), weight=randn(channels, seed=2),
                bias=randn(channels, seed=3))


def plain_norm_inputs(*shape):
    inputs = norm_inputs(*shape)
    del inputs['residual']
    return inputs


def modulate_inputs(batch=2, height=5, width=3, channels=20):
    shape = batch, height, width, channels
    return dict(y=randn(*shape), x=randn(*shape, seed=1),
                factor=randn(batch, 1, 1, channels, seed=4), weight=randn(channels, seed=2),
                bias=randn(channels, seed=3))


def affinity_inputs(batch=2, height=5, width=3, channels=20, hidden=3):
    return dict(x=randn(batch, height, width, channels),
                squeeze=randn(hidden, channels, seed=1), squeeze_bias=randn(hidden, seed=2),
                excite=randn(channels, hidden, seed=3), excite_bias=randn(channels, seed=4),
                skip=randn(1, seed=5))


CASES = [
    ('depthwise_conv', conv_inputs, dict(activation='gelu')),
    ('gated_layer_norm', gate_inputs, {}),
    ('add_layer_norm', norm_inputs, {}),
    ('layer_norm', plain_norm_inputs, {}),
    ('modulate_layer_norm', modulate_inputs, {}),
    ('channel_affinity', affinity_inputs, {}),
]
NORMS = CASES[1:5]
MAPS = ('x', 'y', 'gate', 'residual')


def run(operator, inputs, backend, **options):
    """Outputs and the gradients of all inputs."""
    inputs = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    outputs = getattr(ops, operator)(**inputs, **options, backend=backend)
    outputs = (outputs, ) if isinstance(outputs, torch.Tensor) else outputs
    cotangents = [torch.cos(torch.arange(y.numel(), device=y.device)).view_as(y).to(y.dtype)
                  for y in outputs]
    grads = torch.autograd.grad(outputs, list(inputs.values()), cotangents)
    return [y.detach() for y in outputs], dict(zip(inputs, grads))


def check(operator, inputs, dtypes, backend='triton', tolerance=1e-6, **options):
    """Against the float64 definition; `dtypes` is one, or one an input."""
    if isinstance(dtypes, torch.dtype):
        dtypes = dict.fromkeys(inputs, dtypes)
    inputs = {k: v.to(dtypes[k]) for k, v in inputs.items()}
    outputs, grads = run(operator, inputs, backend, **options)
    exact = {k: v.double() for k, v in inputs.items()}
    want, want_grads = run(operator, exact, 'torch', **options)
    for got, expected in zip(outputs, want):
        assert torch.isfinite(got).all() and relative(got, expected) < tolerance
    for name, got in grads.items():
        assert got.shape == inputs[name].shape and got.dtype == inputs[name].dtype
        assert torch.isfinite(got).all(), name
        assert relative(got, want_grads[name]) < 2 * tolerance, name
    return outputs


@by_a_subprocess
def test_in_the_interpreter():
    assert passed_in_the_interpreter(__file__) > 40


@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_depthwise_conv_is_the_module(activation):
    inputs = conv_inputs()
    conv = nn.Conv2d(20, 20, 3, padding=1, groups=20).to(DEVICE, torch.float64)
    conv.load_state_dict(dict(weight=inputs['weight'], bias=inputs['bias']))
    module = dict(gelu=nn.GELU(), silu=nn.SiLU(), none=nn.Identity())[activation]
    want = module(conv(inputs['x'].permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    assert torch.equal(depthwise_conv(**inputs, activation=activation), want)


def test_gated_layer_norm_is_one_norm_a_group():
    inputs = gate_inputs()
    groups = [F.layer_norm(y, y.shape[-1:], weight, bias) for y, weight, bias in zip(
        inputs['y'].unbind(3), inputs['weight'], inputs['bias'], strict=True)]
    want = torch.cat(groups, -1) * F.silu(inputs['gate'])
    torch.testing.assert_close(gated_layer_norm(**inputs), want)


def test_add_layer_norm_is_the_layers():
    inputs = norm_inputs()
    norm = nn.LayerNorm(20, eps=1e-6).to(DEVICE, torch.float64)
    norm.load_state_dict(dict(weight=inputs['weight'], bias=inputs['bias']))
    total, normed = add_layer_norm(**inputs, eps=1e-6)
    assert torch.equal(total, inputs['x'] + inputs['residual'])
    assert torch.equal(normed, norm(total))


def test_layer_norm_is_the_layer():
    inputs = plain_norm_inputs()
    norm = nn.LayerNorm(20, eps=1e-6).to(DEVICE, torch.float64)
    norm.load_state_dict(dict(weight=inputs['weight'], bias=inputs['bias']))
    assert torch.equal(layer_norm(**inputs, eps=1e-6), norm(inputs['x']))


@pytest.mark.parametrize('backend', ['torch', pytest.param('triton', marks=runs)])
def test_layer_norm_with_an_offset(backend):
    """Of a convolution's bias, with gradients and without."""
    inputs = dict(plain_norm_inputs(), offset=randn(20, seed=6))
    exact = dict(inputs)
    added = exact.pop('offset')
    exact['x'] = exact['x'] + added
    want, want_grads = run('layer_norm', exact, 'torch')
    want_grads['offset'] = want_grads['x'].sum((0, 1, 2))
    inputs = {k: v.float() for k, v in inputs.items()}
    outputs, grads = run('layer_norm', inputs, backend)
    with torch.no_grad():
        outputs.append(layer_norm(**inputs, backend=backend))
        inputs['offset'] = torch.stack([inputs['offset']] * 2, 1)[:, 0]
        outputs.append(layer_norm(**inputs, backend=backend))
    assert all(relative(y, want[0]) < 1e-6 for y in outputs)
    for name, got in grads.items():
        assert relative(got, want_grads[name]) < 2e-6, name
    with pytest.raises(ValueError, match=r'layer_norm: offset must be \(20,\)'):
        layer_norm(**dict(inputs, offset=randn(5)), backend=backend)


def test_modulate_layer_norm_is_the_layers():
    inputs = modulate_inputs()
    norm = nn.LayerNorm(20).to(DEVICE, torch.float64)
    norm.load_state_dict(dict(weight=inputs['weight'], bias=inputs['bias']))
    want = norm(inputs['y'] * inputs['x'] * inputs['factor'])
    assert torch.equal(modulate_layer_norm(**inputs), want)


@pytest.mark.parametrize('backend', ['torch', pytest.param('triton', marks=runs)])
@pytest.mark.parametrize('operator, inputs, options', CASES)
def test_precision_is_the_arguments(operator, inputs, options, backend):
    with torch.autocast(DEVICE, torch.bfloat16):
        check(operator, inputs(), torch.float32, backend, **options)
    mixed = {k: torch.bfloat16 if k in ('x', 'gate') else torch.float32 for k in inputs()}
    outputs = check(operator, inputs(), mixed, backend, tolerance=2 ** -7, **options)
    # the other map's dtype, or float32 at least
    wide = operator in ('add_layer_norm', 'modulate_layer_norm', 'channel_affinity')
    assert outputs[-1].dtype == (torch.float32 if wide else torch.bfloat16)


@pytest.mark.parametrize('backend', ['torch', pytest.param('triton', marks=runs)])
def test_dtypes_of_add_layer_norm(backend):
    """As PyTorch's addition and F.layer_norm have them, unless the norm's is asked for."""
    half, full = torch.bfloat16, torch.float32
    for autocast in (False, True):
        for x, residual in ((half, half), (half, full), (full, half), (full, full)):
            inputs = {k: v.to(dict(x=x, residual=residual).get(k, full))
                      for k, v in norm_inputs(1, 1, 1, 4).items()}
            with torch.autocast(DEVICE, half, enabled=autocast):
                got = add_layer_norm(**inputs, backend=backend)
                total = inputs['x'] + inputs['residual']
                weights = [inputs[k].to(total.dtype) for k in ('weight', 'bias')]
                want = total, F.layer_norm(total, (4, ), *weights)
                asked = add_layer_norm(**inputs, norm_dtype=half, backend=backend)
            assert [t.dtype for t in got] == [t.dtype for t in want]
            assert [t.dtype for t in asked] == [total.dtype, half]


@runs
@pytest.mark.parametrize('activation, shape', [
    ('gelu', (1, 1, 1, 20)), ('silu', (2, 1, 7, 20)), ('none', (1, 7, 1, 20)),
    ('gelu', (2, 5, 3, 20)), ('silu', (3, 2, 9, 7)), ('gelu', (1, 1, 3, 348)),
    # rows two ahead; in parts, by columns of four and of seven, four and two channels a thread
    ('gelu', (1, 11, 5, 512)), ('silu', (1, 10, 7, 544)), ('none', (2, 1, 2, 640)),
])
def test_depthwise_conv(activation, shape):
    check('depthwise_conv', conv_inputs(*shape), torch.float32, activation=activation)


@runs
def test_depthwise_conv_in_parts():
    """Columns in parts of rows."""
    assert around_scan_triton.conv_sizes(1, 11, 3, 20, False)[1] == 6
    check('depthwise_conv', conv_inputs(1, 11, 3), torch.float32, activation='gelu')


@runs
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_depthwise_conv_linear(dtype):
    """What lies between convolution and linear layer is not kept."""
    inputs = {k: v.float() for k, v in conv_inputs(2, 5, 3).items()}
    inputs = dict(x=inputs['x'].to(dtype), conv_weight=inputs['weight'],
                  conv_bias=inputs['bias'], weight=randn(7, 20, seed=3).float(),
                  bias=randn(7, seed=4).float())
    kept = []
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: kept.append(t.shape) or t, lambda t: t):
            (y, ), grads = run('depthwise_conv_linear', inputs, 'triton', activation='gelu')
    assert kept.count((2, 5, 3, 20)) == 1 and y.dtype == dtype
    (want, ), want_grads = run('depthwise_conv_linear', {k: v.double() for k, v in inputs.items()},
                               'torch', activation='gelu')
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert relative(y, want) < tolerance
    for name, got in grads.items():
        assert got.dtype == inputs[name].dtype and got.shape == inputs[name].shape
        assert relative(got, want_grads[name]) < 2 * tolerance, name
    with torch.no_grad():
        again = ops.depthwise_conv_linear(**{k: v.float() for k, v in inputs.items()},
                                          activation='gelu', backend='triton')
    assert relative(again, want) < tolerance


@runs
@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_depthwise_conv_of_large_values(activation):
    inputs = conv_inputs()
    inputs['x'] *= 10. ** torch.arange(-5., 15.).to(DEVICE)  # a power for each channel
    check('depthwise_conv', inputs, torch.float32, activation=activation)
    inputs['weight'] *= 0
    inputs['bias'] = torch.linspace(-12, 7, 20).to(DEVICE)  # the tail: each channel for itself
    y = depthwise_conv(**{k: v.float() for k, v in inputs.items()}, activation=activation,
                       backend='triton')
    want = depthwise_conv(**{k: v.float().double() for k, v in inputs.items()},
                          activation=activation)
    if activation == 'gelu':  # PyTorch's loses the tail in 1 + erf, also in float64
        z = inputs['bias'].float().double()
        want = (z * torch.special.erfc(-z / 2**.5) / 2).expand_as(want)
    # an exponent of 72 is rounded to 4e-6
    assert ((y.double() - want).abs() <= 1e-5 * want.abs()).all()


@runs
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_gelu_of_half_precision(dtype):
    """The shorter formulas for what is rounded to half precision, value by value: GELU to an eighth
    of its rounding, its derivative absolutely to 1e-4 besides its rounding."""
    z = torch.linspace(-12, 12, 1600, dtype=torch.float64).to(dtype).to(DEVICE)
    x = z.view(1, 1, 80, 20).requires_grad_()
    centre = torch.zeros(20, 1, 3, 3, device=DEVICE)
    centre[:, :, 1, 1] = 1
    y = depthwise_conv(x, centre, torch.zeros(20, device=DEVICE), 'gelu', 'triton')
    slope, = torch.autograd.grad(y.sum(), x)

    exact = x.detach().double().requires_grad_()
    want = F.gelu(exact)
    want_slope, = torch.autograd.grad(want.sum(), exact)
    rounding = torch.finfo(dtype).eps / 2
    if DEVICE == 'cpu' and dtype == torch.bfloat16:
        rounding *= 2  # the interpreter cuts off
    off = (y.double() - want).abs()
    assert (off <= 1.12 * rounding * want.abs() + 1e-7).all()
    off = (slope.double() - want_slope).abs()
    assert (off <= rounding * want_slope.abs() + 1e-4).all()


@runs
@pytest.mark.parametrize('shape', [
    (1, 1, 1, 4, 5), (2, 1, 7, 4, 16), (1, 7, 1, 4, 87), (2, 5, 3, 2, 1), (1, 1, 2, 1, 130),
])
def test_gated_layer_norm(shape):
    check('gated_layer_norm', gate_inputs(*shape), torch.float32)


@runs
@pytest.mark.parametrize('shape', [
    (1, 1, 1, 20), (2, 1, 7, 20), (1, 7, 1, 348), (2, 5, 3, 20), (1, 1, 2, 1100),
])
def test_add_layer_norm(shape):
    check('add_layer_norm', norm_inputs(*shape), torch.float32, eps=1e-6)


@runs
@pytest.mark.parametrize('shape', [
    (1, 1, 1, 20), (3, 1, 7, 20), (1, 7, 1, 348), (2, 5, 3, 20), (2, 1, 2, 1100),
])
def test_norms_without_a_sum(shape):
    check('layer_norm', plain_norm_inputs(*shape), torch.float32, eps=1e-6)
    check('modulate_layer_norm', modulate_inputs(*shape), torch.float32, eps=1e-6)


def padded(inputs, width):
    """Each quarter of the channels (each group of a gated norm) with zeros behind."""
    grouped = 'gate' in inputs

    def pad(name, value):
        if grouped and name != 'gate':
            return F.pad(value, (0, width - value.shape[-1]))
        return with_padding(value, width)

    return {k: pad(k, v) for k, v in inputs.items()}


@pytest.mark.parametrize('backend', ['torch', pytest.param('triton', marks=runs)])
@pytest.mark.parametrize('operator, inputs, options', NORMS)
def test_padding_does_not_count(operator, inputs, options, backend):
    """Outputs and gradients are those of the map without it, and zero in it."""
    dtype = torch.float64 if backend == 'torch' else torch.float32
    inputs = {k: v.to(dtype) for k, v in inputs().items()}
    want, want_grads = run(operator, {k: v.double() for k, v in inputs.items()}, 'torch',
                           **options)
    wide = {k: v.requires_grad_() for k, v in padded(inputs, 8).items()}
    outputs = getattr(ops, operator)(**wide, **options, real=5, backend=backend)
    outputs = (outputs, ) if isinstance(outputs, torch.Tensor) else outputs
    cotangents = [torch.cos(torch.arange(y.numel(), device=DEVICE)).view_as(y).to(dtype)
                  for y in want]
    grads = torch.autograd.grad(outputs, list(wide.values()),
                                [with_padding(c, 8) for c in cotangents])
    for got, expected in zip(outputs, want):
        assert relative(got, with_padding(expected, 8)) < 1e-6
    for (name, grad), got in zip(padded(want_grads, 8).items(), grads):
        assert relative(got, grad) < 2e-6, name


@runs
def test_norms_in_the_dtype_of_the_next_layer():
    for operator, inputs in (('layer_norm', plain_norm_inputs),
                             ('modulate_layer_norm', modulate_inputs)):
        inputs = {k: v.float() for k, v in inputs().items()}
        got = getattr(ops, operator)(**inputs, norm_dtype=torch.bfloat16, backend='triton')
        want = getattr(ops, operator)(**inputs, norm_dtype=torch.bfloat16)
        assert got.dtype == want.dtype == torch.bfloat16
        torch.testing.assert_close(got, want, atol=0, rtol=2**-7)


@runs
@pytest.mark.parametrize('used', [0, 1])
def test_add_layer_norm_of_which_one_output_is_used(used):
    inputs = {k: v.float().requires_grad_() for k, v in norm_inputs().items()}
    grads = [torch.autograd.grad(add_layer_norm(**inputs, backend=backend)[used].square().sum(),
                                 list(inputs.values()), allow_unused=True)
             for backend in ('torch', 'triton')]
    for want, got in zip(*grads):
        assert (want is None) == (got is None)
        assert want is None or relative(got, want) < 2e-6


@runs
def test_norms_sum_over_many_tiles(monkeypatch):
    monkeypatch.setattr(around_scan_triton, '_PARTS', 2)
    assert around_scan_triton.norm_sizes(2 * 30 * 11, 20)[1:] == (21, 11)
    check('add_layer_norm', norm_inputs(2, 30, 11), torch.float32)
    check('gated_layer_norm', gate_inputs(2, 30, 11), torch.float32)
    check('layer_norm', plain_norm_inputs(2, 30, 11), torch.float32)
    assert around_scan_triton._image_sizes(torch.empty(2, 30, 11, 20))[2:] == (11, 11)
    check('modulate_layer_norm', modulate_inputs(2, 30, 11), torch.float32, tolerance=2e-6)
    monkeypatch.setattr(around_scan_triton, '_PARTS', 6)
    assert around_scan_triton._image_sizes(torch.empty(2, 30, 11, 20))[2:] == (11, 4)
    check('modulate_layer_norm', modulate_inputs(2, 30, 11), torch.float32, tolerance=2e-6)


@runs
def test_norms_of_large_values():
    scale = (10. ** torch.arange(-1., 14.).to(DEVICE)).view(1, 5, 3, 1)  # of each token
    inputs = norm_inputs()
    check('add_layer_norm', dict(inputs, x=inputs['x'] * scale), torch.float32)
    inputs = gate_inputs()
    inputs.update(y=inputs['y'] * scale[..., None], gate=inputs['gate'] * 40)
    check('gated_layer_norm', inputs, torch.float32)


@runs
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('operator, inputs, options', CASES)
def test_half_precision_is_float32_inside(operator, inputs, options, dtype):
    # the sum is rounded before it is normed, as PyTorch's
    tolerance = torch.finfo(dtype).eps / (1 if operator == 'add_layer_norm' else 2)
    outputs = check(operator, inputs(1), dtype, tolerance=tolerance, **options)
    assert all(y.dtype == (torch.float32 if operator == 'channel_affinity' else dtype)
               for y in outputs)
    mixed = {k: dtype if k in MAPS[:1] + MAPS[2:] else torch.float32 for k in inputs()}
    check(operator, inputs(1), mixed, tolerance=tolerance, **options)


@runs
@pytest.mark.parametrize('operator, inputs, options', CASES)
def test_same_bits_again(operator, inputs, options):
    inputs = {k: v.float() for k, v in inputs(2, 2).items()}
    (first, grads), (second, again) = (run(operator, inputs, 'triton', **options)
                                       for _ in range(2))
    for one, other in zip((*first, *grads.values()), (*second, *again.values())):
        assert torch.equal(one, other)


@runs
@pytest.mark.parametrize('operator, inputs, options', CASES)
def test_any_memory_layout(operator, inputs, options):
    inputs = {k: v.float() for k, v in inputs(2, 2).items()}
    views = {k: v.transpose(0, -1).contiguous().transpose(0, -1) for k, v in inputs.items()}
    assert not any(v.is_contiguous() for v in views.values() if v.dim() > 1)
    want, want_grads = run(operator, inputs, 'triton', **options)
    got, grads = run(operator, views, 'triton', **options)
    for one, other in zip((*got, *grads.values()), (*want, *want_grads.values())):
        assert torch.equal(one, other)


@runs
@pytest.mark.parametrize('operator, inputs, options, name', [
    (*CASES[0], 'x'), (*CASES[1], 'gate'),
])
@pytest.mark.parametrize('shape', [(2, 5, 3), (1, 1, 3), (2, 1, 1), (1, 1, 1)])
def test_some_channels_of_a_map(monkeypatch, operator, inputs, options, name, shape):
    """They are read where they lie."""
    inputs = {k: v.float() for k, v in inputs(*shape).items()}
    want, want_grads = run(operator, inputs, 'triton', **options)
    for first in (0, 20):
        both = torch.full((*shape, 40), torch.nan, device=DEVICE)
        part = both[..., first:first + 20].copy_(inputs[name])
        assert around_scan_triton._pitched(part) is part
        got, grads = run(operator, dict(inputs, **{name: part}), 'triton', **options)
        for one, other in zip((*got, *grads.values()), (*want, *want_grads.values())):
            assert torch.equal(one, other)


@runs
@pytest.mark.parametrize('fused_ops', ['all', ['layer_norm'], ['add_layer_norm']])
def test_model_of_fused_ops_is_the_model(monkeypatch, fused_ops):
    """Outputs and gradients, of recomputed blocks; outputs also folded, padded and joined."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    arch = dict(stem_hidden_dim=4, embed_dims=(20, 20, 20, 20), depths=(2, 1, 1, 1),
                mlp_ratios=(1, 1, 1, 1))
    torch.manual_seed(0)
    options = dict(arch=arch, out_indices=(0, ), norm_eval=True)
    plain = GroupMamba(**options).to(DEVICE).train()
    fused = GroupMamba(**options, fused_ops=fused_ops, with_cp=True).to(DEVICE).train()
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    fused.load_state_dict(plain.state_dict())
    image = randn(1, 3, 32, 40).float()
    outputs, grads = [], []
    for model in (plain, fused):
        outputs.append(model(image))
        sum(y.square().sum() for y in outputs[-1]).backward()
        grads.append({k: p.grad for k, p in model.named_parameters()})
    assert max(relative(*pair) for pair in zip(*reversed(outputs))) < 1e-5
    for name, want in grads[0].items():
        if 'skip_scale' not in name:  # noise: the norm behind it takes the scale away
            assert relative(grads[1][name], want) < 1e-4, name
    if fused_ops != 'all':
        return
    pad_channels(fused, most=2)
    if DEVICE == 'cuda':
        fuse(fused)
    else:  # what is done there
        fused.eval()
        fuse_conv_bn(fused.requires_grad_(False))
        _fold_biases(fused)
        _join_groups(fused)
    assert fused.stages[0].embed.proj.bias is None
    assert fused.stages[0].blocks[0].mixer.ssm.joint_proj is not None
    with torch.no_grad():
        assert max(relative(*pair) for pair in zip(fused(image), outputs[0])) < 1e-5


@runs
@pytest.mark.parametrize('operator, inputs, options', CASES)
def test_no_graph_break(operator, inputs, options):
    inputs = [v.float().requires_grad_() for v in inputs(1, 2).values()]

    def function(*args):
        outputs = getattr(ops, operator)(*args, **options, backend='triton')
        return outputs.sin() if isinstance(outputs, torch.Tensor) else outputs[0] * outputs[1]

    y = torch.compile(function, fullgraph=True, backend='aot_eager')(*inputs)
    want = function(*inputs)
    assert torch.equal(y, want)
    for one, other in zip(*(torch.autograd.grad(t.sum(), inputs) for t in (y, want))):
        assert torch.equal(one, other)


def check_operator(operator, *args, autograd):
    tests = ('test_schema', 'test_faketensor') + ('test_autograd_registration', ) * autograd
    torch.library.opcheck(operator, args, test_utils=tests)


@runs
def test_norms_operators_are_what_torch_library_is_told():
    inputs = [v.float().requires_grad_() for v in gate_inputs(1, 2).values()]
    check_operator(around_scan_triton.GATE.op, *inputs, 1e-5, None, autograd=True)
    y, gate, weight, bias = (v.detach() for v in inputs)
    check_operator(around_scan_triton.GATE.backward_op, gate, y, gate, weight, bias, 1e-5, None,
                   autograd=False)
    inputs = [v.float().requires_grad_() for v in norm_inputs(1, 2).values()]
    check_operator(around_scan_triton.ADD_NORM.op, *inputs, 1e-5, torch.bfloat16,
                   None, autograd=True)
    x, total, weight, _ = (v.detach() for v in inputs)
    plain = inputs[0], *inputs[2:]
    check_operator(around_scan_triton.NORM.op, *plain, 1e-5, torch.bfloat16, None,
                   autograd=True)
    check_operator(around_scan_triton.NORM.backward_op, x, total, weight, 1e-5, None,
                   autograd=False)
    for grad_total in (None, x):
        check_operator(around_scan_triton.ADD_NORM.backward_op, grad_total, x, total, weight, 1e-5,
                       None, autograd=False)


def test_channel_affinity_is_the_module():
    inputs = affinity_inputs()
    affinity = ChannelAffinity(20)
    affinity.fc1, affinity.fc2 = nn.Linear(20, 3), nn.Linear(3, 20)
    affinity.to(DEVICE, torch.float64).load_state_dict({
        'fc1.weight': inputs['squeeze'], 'fc1.bias': inputs['squeeze_bias'],
        'fc2.weight': inputs['excite'], 'fc2.bias': inputs['excite_bias']})
    torch.testing.assert_close(channel_affinity(**inputs), inputs['skip'] * affinity(inputs['x']))


@runs
@pytest.mark.parametrize('shape, hidden', [
    ((3, 1, 1, 20), 1), ((1, 5, 13, 37), 8), ((2, 9, 15, 65), 11), ((2, 5, 9, 200), 3),
])
def test_affinity_of_any_size(monkeypatch, shape, hidden):
    """Several tiles a part, several parts an image, more parts than are summed at once."""
    tile_of = around_scan_triton.sum_sizes

    def sum_sizes(batch, tokens, dim):
        tile, *_ = tile_of(batch, tokens, dim)
        tiles = -(-tokens // 4)
        return tile._replace(ROWS=4), -(-tiles // 3), 3

    inputs = affinity_inputs(*shape, hidden)
    check('channel_affinity', inputs, torch.float32)
    monkeypatch.setattr(around_scan_triton, 'sum_sizes', sum_sizes)
    monkeypatch.setattr(around_scan_triton, '_SUMS', 1)
    check('channel_affinity', inputs, torch.float32)


@runs
def test_what_is_changed_inside_has_its_say():
    """A stage's norm and the affinity's parts, eager and compiled."""
    arch = dict(stem_hidden_dim=4, embed_dims=(16, 16, 16, 16), depths=(1, 1, 1, 1),
                mlp_ratios=(1, 1, 1, 1))
    stage = GroupMamba(arch, (0, ), fused_ops='all').to(DEVICE).eval().stages[0]
    image = randn(1, 3, 32, 32).float()
    mixer = stage.blocks[0].mixer
    x = randn(1, 2, 2, 16).float()
    calls = []
    with torch.no_grad():
        plain = stage(image)
        stage.norm.register_forward_hook(lambda module, inputs, y: calls.append(y.shape))
        assert relative(stage(image), plain) < 1e-6 and calls == [plain.shape]

        def compiled(x):
            torch.compiler.reset()
            return torch.compile(mixer.factor, fullgraph=True, backend='aot_eager')(x)

        plain = mixer.factor(x)
        assert torch.equal(compiled(x), plain)

        class Louder(nn.Linear):

            def forward(self, x):
                return super().forward(x) + 1

        mixer.affinity.fc2 = Louder(1, 16).to(DEVICE)
        for factor in (mixer.factor(x), compiled(x)):
            assert relative(factor, mixer.skip_scale * mixer.affinity(x)) < 1e-6
            assert (factor > plain).all()


@runs
@pytest.mark.parametrize('operator, inputs, options', [
    ('gated_layer_norm', gate_inputs(2, 5, 4, 4, 70), {}),
    ('add_layer_norm', norm_inputs(2, 5, 4, 130), dict(eps=1e-6)),
    ('layer_norm', plain_norm_inputs(2, 5, 4, 130), {}),
    ('modulate_layer_norm', modulate_inputs(2, 5, 4, 130), {}),
])
def test_tiles_of_many_tokens(monkeypatch, operator, inputs, options):
    """Forward they are larger where a launch has many of them."""
    monkeypatch.setattr(around_scan_triton, '_PROGRAMS', 0)
    monkeypatch.setattr(around_scan_triton, '_PARTS', 1)
    check(operator, inputs, torch.float32, **options)


def test_sizes_of_norms():
    def rows(*args, **options):
        return around_scan_triton.norm_sizes(*args, **options)[0].ROWS

    for dim, few in ((64, 16), (128, 8), (348, 2)):
        assert rows(196, dim) == rows(196, dim, forward=True) == rows(2**20, dim) == few
        many = few if dim == 64 else 2 * few
        assert rows(2**20, dim, forward=True) == rows(196, dim, 128, forward=True) == many


def test_sizes_of_a_sum():
    for batch, tokens, dim in ((128, 3136, 64), (128, 49, 448), (1, 200_704, 64), (1, 1, 348)):
        tile, parts, together = around_scan_triton.sum_sizes(batch, tokens, dim)
        assert tile.ROWS * (parts * together - together) < tokens <= tile.ROWS * parts * together
        assert parts <= 256 and (parts == 1 or batch * parts <= 2048)


@runs
def test_affinity_operators_are_what_torch_library_is_told():
    inputs = [v.float().requires_grad_() for v in affinity_inputs(2, 2).values()]
    check_operator(around_scan_triton.AFFINITY.op, *inputs, autograd=True)
    x, squeeze, _, excite, _, skip = (v.detach() for v in inputs)
    grad, mean, squeezed, affinity = around_scan_triton.AFFINITY.op(*inputs)
    check_operator(around_scan_triton.AFFINITY.backward_op, grad.detach(), mean.detach(),
                   squeezed.detach(), affinity.detach(), squeeze, excite, skip, 6, autograd=False)


@runs
def test_modulation_operators_are_what_torch_library_is_told():
    inputs = [v.float().requires_grad_() for v in modulate_inputs(2, 2).values()]
    check_operator(around_scan_triton.MODULATE.op, *inputs, 1e-5, torch.bfloat16, None,
                   autograd=True)
    y, x, factor, weight, _ = (v.detach() for v in inputs)
    check_operator(around_scan_triton.MODULATE.backward_op, y, y, x, factor, weight, 1e-5, None,
                   autograd=False)


@runs
def test_conv_operators_are_what_torch_library_is_told():
    x, weight, bias = (v.float().requires_grad_() for v in conv_inputs(1, 2).values())
    check_operator(around_scan_triton.CONV.op, x, weight, bias, 'gelu', autograd=True)
    x, weight, bias = (v.detach() for v in (x, weight, bias))
    check_operator(around_scan_triton.CONV.backward_op, x, x, weight, bias, 'gelu', autograd=False)


@runs
@pytest.mark.parametrize('operator, inputs, options', CASES)
def test_float64_is_refused(operator, inputs, options):
    with pytest.raises(ValueError, match="no float64: use backend='torch'"):
        run(operator, inputs(), 'triton', **options)


@pytest.mark.parametrize('operator, inputs, options', CASES)
def test_backend_by_name_never_falls_back(monkeypatch, operator, inputs, options):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    inputs = {k: v.cpu() for k, v in inputs().items()}
    with pytest.raises(BackendUnavailableError, match=f"{operator}: backend 'triton' cannot run"):
        run(operator, inputs, 'triton', **options)
    with pytest.raises(ValueError, match=f'{operator}: unknown backend .*: choose one of torch, '):
        run(operator, inputs, 'cuda', **options)


@pytest.mark.parametrize('operator, inputs, options, name, shape', [
    (*CASES[0], 'x', (2, 5, 20)), (*CASES[0], 'x', (2, 0, 3, 20)),
    (*CASES[0], 'weight', (20, 3, 3)), (*CASES[0], 'bias', (20, 1)),
    (*CASES[1], 'y', (2, 5, 3, 20)), (*CASES[1], 'gate', (2, 5, 3, 4, 5)),
    (*CASES[1], 'weight', (20, )), (*CASES[1], 'bias', (4, 1)),
    (*CASES[2], 'x', (2, 15, 20)), (*CASES[2], 'residual', (5, 3, 20)),
    (*CASES[2], 'weight', (1, )), (*CASES[2], 'bias', (20, 1)),
    (*CASES[3], 'x', (2, 15, 20)), (*CASES[3], 'weight', (1, )), (*CASES[3], 'bias', (20, 1)),
    (*CASES[4], 'y', (2, 15, 20)), (*CASES[4], 'x', (2, 5, 1, 20)),
    (*CASES[4], 'factor', (2, 20)), (*CASES[4], 'weight', (1, )), (*CASES[4], 'bias', (20, 1)),
    (*CASES[5], 'x', (2, 15, 20)), (*CASES[5], 'squeeze', (20, 20)),
    (*CASES[5], 'squeeze_bias', (3, 1)), (*CASES[5], 'excite', (3, 20)),
    (*CASES[5], 'excite_bias', (1, )), (*CASES[5], 'skip', (20, )),
])
def test_wrong_shape_is_named(operator, inputs, options, name, shape):
    with pytest.raises(ValueError, match=f'{operator}: {name} must be'):
        getattr(ops, operator)(**dict(inputs(), **{name: torch.zeros(shape, device=DEVICE)}),
                               **options)


@pytest.mark.parametrize('operator, inputs, options', NORMS)
@pytest.mark.parametrize('real', [0, 6])
def test_wrong_padding_is_named(operator, inputs, options, real):
    with pytest.raises(ValueError, match=f'{operator}: real must be 1 to 5, of 4 groups'):
        getattr(ops, operator)(**inputs(), **options, real=real)


def test_linear_layer_that_does_not_fit_is_named():
    inputs = conv_inputs()
    with pytest.raises(ValueError, match=r'depthwise_conv_linear: weight must be \(3, 20\)'):
        ops.depthwise_conv_linear(inputs['x'], inputs['weight'], inputs['bias'], 'gelu',
                                  randn(3, 21), randn(3))


def test_wrong_option_and_dtype_are_named():
    with pytest.raises(ValueError, match='unknown activation .* choose one of gelu, silu, none'):
        depthwise_conv(**conv_inputs(), activation='relu')
    with pytest.raises(ValueError, match='depthwise_conv: bias must be real floating'):
        depthwise_conv(**dict(conv_inputs(), bias=torch.zeros(20, dtype=torch.int, device=DEVICE)),
                       activation='none')


# of tiny, small and base: channels of the stages and of the feed-forwards
CHANNELS = (64, 96, 128, 192, 348, 424, 448, 512)
HIDDEN = (512, 768, 1024, 1392, 1536, 1696, 1792, 2048)


def launches_of(monkeypatch, operator, inputs, dtypes, **options):
    """Launches of an operator and of its backward, recorded without running."""
    from mmgroupmamba.ops import around_scan_triton_kernels

    launches = []
    for name in dir(around_scan_triton_kernels):
        if name.endswith('_kernel'):
            kernel = getattr(around_scan_triton_kernels, name)
            monkeypatch.setattr(around_scan_triton_kernels, name, Recorder(kernel, launches))
    if isinstance(dtypes, torch.dtype):
        dtypes = dict.fromkeys(inputs, dtypes)
    inputs = {k: torch.empty(v.shape, dtype=dtypes[k]).requires_grad_() for k, v in inputs.items()}
    if operator not in ('depthwise_conv', 'channel_affinity'):
        options['real'] = None
    outputs = getattr(around_scan_triton, operator)(**inputs, **options)
    outputs = (outputs, ) if isinstance(outputs, torch.Tensor) else outputs
    torch.autograd.grad(outputs, list(inputs.values()), [torch.empty_like(y) for y in outputs])
    monkeypatch.undo()
    return launches


def variants(launches):
    """What makes the compiler compile again."""
    return {(kernel.__name__, *((k, v) for k, v in arguments.items() if k.isupper()))
            for kernel, arguments in launches}


@compiles
def test_few_variants_of_the_convolution(monkeypatch):
    dtypes = dict(x=torch.bfloat16, weight=torch.float32, bias=torch.float32)
    launches = []
    for channels, activation in ((CHANNELS, 'silu'), (HIDDEN, 'gelu')):
        for c in channels:
            for height, width in ((1, 1), (7, 7), (14, 14), (25, 42), (56, 56), (3, 100)):
                launches += launches_of(monkeypatch, 'depthwise_conv',
                                        conv_inputs(1, height, width, c), dtypes,
                                        activation=activation)
    # forward, for each number of channels lanes of 4 and of 7 columns; backward, two tiles and two
    # activations
    kernels = [name for name, *_ in variants(launches)]
    assert kernels.count('conv_forward_kernel') == 2 * (len(CHANNELS) + len(HIDDEN))
    assert kernels.count('conv_backward_kernel') == 4


@compiles
def test_few_variants_of_the_norms(monkeypatch):
    launches = []
    for c in CHANNELS:
        for shape in ((1, 1, 1), (1, 7, 7), (2, 25, 42)):
            for operator, inputs in (('gated_layer_norm', gate_inputs(*shape, 4, c // 4)),
                                     ('add_layer_norm', norm_inputs(*shape, c)),
                                     ('layer_norm', plain_norm_inputs(*shape, c)),
                                     ('modulate_layer_norm', modulate_inputs(*shape, c))):
                grouped = operator == 'gated_layer_norm'
                options = {} if grouped else dict(norm_dtype=torch.float32)
                launches += launches_of(monkeypatch, operator, inputs, torch.float32, eps=1e-5,
                                        **options)
    # two kernels: of the groups' norm, of the norm with and without a sum, of the modulation
    assert len(variants(launches)) == 2 * 6 + 2 * 5 + 2 * 5


@compiles
@pytest.mark.parametrize('arch', [80, 90])
@pytest.mark.parametrize('operator, inputs, options, dtype', [
    ('depthwise_conv', conv_inputs(1, 1, 1, 512), dict(activation='gelu'), torch.bfloat16),
    ('depthwise_conv', conv_inputs(1, 1, 14, 348), dict(activation='silu'), torch.float32),
    ('depthwise_conv', conv_inputs(1, 1, 14, 1392), dict(activation='gelu'), torch.bfloat16),
    ('depthwise_conv', conv_inputs(1, 1, 4, 1024), dict(activation='gelu'), torch.float32),
    ('gated_layer_norm', gate_inputs(1, 1, 1, 4, 87), dict(eps=1e-5), torch.bfloat16),
    ('gated_layer_norm', gate_inputs(1, 1, 1, 4, 128), dict(eps=1e-5), torch.float32),
    ('add_layer_norm', norm_inputs(1, 1, 1, 348),
     dict(eps=1e-5, norm_dtype=torch.float32), torch.bfloat16),
    ('add_layer_norm', norm_inputs(1, 1, 1, 512),
     dict(eps=1e-5, norm_dtype=torch.float32), torch.float32),
    ('layer_norm', plain_norm_inputs(1, 1, 1, 64),
     dict(eps=1e-5, norm_dtype=torch.bfloat16), torch.float32),
    ('modulate_layer_norm', modulate_inputs(1, 1, 1, 348),
     dict(eps=1e-5, norm_dtype=torch.bfloat16), torch.bfloat16),
    ('modulate_layer_norm', modulate_inputs(1, 1, 1, 512),
     dict(eps=1e-5, norm_dtype=torch.float32), torch.float32),
    ('channel_affinity', affinity_inputs(1, 1, 1, 64, 4), {}, torch.bfloat16),
    ('channel_affinity', affinity_inputs(1, 1, 1, 512, 32), {}, torch.float32),
])
def test_compiles_without_spills(monkeypatch, operator, inputs, options, dtype, arch):
    dtypes = {k: dtype if k in ('x', 'gate', 'residual') or k == 'y' and 'factor' in inputs
              else torch.float32 for k in inputs}
    for kernel, arguments in launches_of(monkeypatch, operator, inputs, dtypes, **options):
        registers, spilled = compile_launch(kernel, arguments, arch)
        print(f'sm_{arch} {dtype} {kernel.__name__}: {registers} registers')
        assert spilled == 0, kernel.__name__
