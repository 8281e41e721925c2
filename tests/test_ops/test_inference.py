"""The kernels of inference against their definitions.

On a machine without a GPU, the Triton tests are run by one subprocess in Triton's interpreter.
"""
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from test_around_scan import check_operator
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

from mmgroupmamba.models import GroupMamba, fuse, layers
from mmgroupmamba.models.joined import FirstConv
from mmgroupmamba.ops import (
    MixerEnd,
    block_diagonal,
    conv_relu,
    convolves_with_relu,
    image_squares,
    inference_triton,
    joins_linear_sum,
    joins_mixer_end,
    layer_norm_pair,
    linear_sum,
    mixer_end,
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    small_tiles(monkeypatch)


@by_a_subprocess
def test_in_the_interpreter():
    assert passed_in_the_interpreter(__file__) > 30


def randn(*shape, seed=0, scale=1.):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE)


def end_inputs(batch, height, width, dim, dtype):
    c = 4 * dim
    shape = batch, height, width, c
    joint = randn(batch, height, width, 2 * c, seed=1).to(dtype)
    weights = MixerEnd(
        randn(4, dim, seed=2) + 1, randn(4, dim, seed=3),
        block_diagonal(randn(4, dim, dim, seed=4, scale=dim**-.5), dtype),
        randn(c, seed=5) + 1, randn(c, seed=6), randn(c, c, seed=7, scale=c**-.5).to(dtype),
        randn(c, seed=8).to(dtype), randn(c, seed=9) + 1, randn(c, seed=10), 1e-5, 1e-4, 1e-6)
    return (randn(*shape[:3], 4, dim, seed=11).to(dtype), joint[..., c:],
            randn(*shape, seed=12).to(dtype), randn(batch, 1, 1, c, seed=13),
            randn(*shape, seed=14), weights)


def wide(inputs):
    """All in float64."""
    *tensors, weights = inputs
    weights = MixerEnd(*(t.double() if isinstance(t, torch.Tensor) else t for t in weights))
    return *(t.double() for t in tensors), weights


@runs
@pytest.mark.parametrize('shape, dim', [
    ((2, 5, 3), 16),
    ((1, 9, 10), 12),  # two tiles; groups made up with zeros
    ((3, 1, 1), 32),
    ((1, 2, 70), 5),
])
def test_mixer_end(shape, dim):
    inputs = end_inputs(*shape, dim, torch.float16)
    want = mixer_end(*wide(inputs))
    plain, fused = mixer_end(*inputs), mixer_end(*inputs, backend='triton')
    assert [t.dtype for t in fused] == [torch.float32, torch.float16]
    for got, of_plain, exact in zip(fused, plain, want):
        assert got.shape == of_plain.shape and got.is_contiguous()
        # one rounding less on the way
        assert relative(got, exact) < 1.05 * max(relative(of_plain, exact), 2**-12)


@runs
def test_mixer_end_takes_any_stream_and_layout():
    *maps, residual, weights = end_inputs(2, 3, 4, 8, torch.float16)
    want = mixer_end(*maps, residual.half(), weights)
    got = mixer_end(*(t.transpose(1, 2).contiguous().transpose(1, 2) if t.shape[1] == 3 else t
                      for t in maps), residual.half(), weights, backend='triton')
    for a, b in zip(got, want):
        assert a.dtype == torch.float16
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)


def sum_inputs(batch, height, width, channels, hidden, dtype, out=2):
    return dict(
        x=randn(batch, height, width, hidden).to(dtype),
        weight=randn(channels, hidden, seed=1, scale=hidden**-.5).to(dtype),
        bias=randn(channels, seed=2).to(dtype),
        residual=randn(batch, height, width, channels, seed=3),
        norm_weight=randn(channels, seed=4) + 1, norm_bias=randn(channels, seed=5), eps=1e-5,
        next_weight=randn(out * channels, channels, seed=6, scale=channels**-.5).to(dtype))


@runs
@pytest.mark.parametrize('shape', [(2, 5, 3, 64, 128), (1, 7, 10, 48, 64), (1, 1, 1, 128, 192)])
@pytest.mark.parametrize('out', [0, 1, 2])
def test_linear_sum(shape, out):
    inputs = sum_inputs(*shape, torch.float16, out)
    if not out:
        inputs['next_weight'] = None
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    want = linear_sum(**exact, norm_dtype=torch.float64)
    for dtype in (torch.float16, torch.float32):
        plain = linear_sum(**inputs, norm_dtype=dtype)
        fused = linear_sum(**inputs, norm_dtype=dtype, backend='triton')
        assert [t.dtype for t in fused[:2]] == [torch.float32, dtype]
        assert (fused[2] is None) == (not out)
        for got, of_plain, of in list(zip(fused, plain, want))[:3 if out else 2]:
            assert got.shape == of_plain.shape and got.dtype == of_plain.dtype
            assert relative(got, of) < 1.05 * max(relative(of_plain, of), 2**-12)


@runs
@pytest.mark.parametrize('shape, real', [
    ((2, 5, 3, 64), None), ((1, 3, 11, 128), None), ((1, 3, 3, 352), 87), ((1, 1, 1, 20), None)])
@pytest.mark.parametrize('offset', [False, True])
def test_layer_norm_pair(shape, real, offset):
    c = shape[-1]
    x, vectors = randn(*shape), [randn(c, seed=k) for k in range(5)]
    if real is not None:
        inside = torch.arange(c, device=DEVICE) % (c // 4) < real
        x, vectors = x * inside, [v * inside for v in vectors]
    w, b, next_w, next_b, shift = vectors
    options = dict(real=real, offset=shift if offset else None)
    wants = layer_norm_pair(x, w, b, 1e-5, next_w, next_b, 1e-6, **options)
    for dtype in (torch.float32, torch.float16):
        gots = layer_norm_pair(x, w, b, 1e-5, next_w, next_b, 1e-6, next_dtype=dtype, **options,
                               backend='triton')
        for got, want, of in zip(gots, wants, (torch.float32, dtype)):
            assert got.dtype == of
            torch.testing.assert_close(got, want.to(of))


@runs
def test_dtypes_of_layer_norm_pair():
    x, w = randn(1, 2, 2, 16), randn(16)
    for dtype in (None, torch.float16):
        one, other = (layer_norm_pair(x, w, w, 1e-5, w, w, 1e-5, dtype, backend=b)
                      for b in ('torch', 'triton'))
        assert [t.dtype for t in one] == [t.dtype for t in other]
    with pytest.raises(ValueError, match='real'):
        layer_norm_pair(x, w, w, 1e-5, w, w, 1e-5, real=99, backend='triton')


@runs
@pytest.mark.parametrize('shape', [(2, 3, 6, 8), (1, 3, 7, 5), (2, 3, 1, 9)])
@pytest.mark.parametrize('channels_last', [False, True])
def test_image_squares(shape, channels_last):
    image = randn(*shape)
    if channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    want = image_squares(image, torch.float16)
    assert torch.equal(image_squares(image, torch.float16, 'triton'), want)
    # the definition, by its words
    got = image_squares(image, torch.float32)
    padded = F.pad(image, (0, shape[3] % 2, 0, shape[2] % 2))
    for dy in range(2):
        for dx in range(2):
            assert torch.equal(got[..., 2 * dy + dx:12:4],
                               padded[:, :, dy::2, dx::2].permute(0, 2, 3, 1))
    assert not got[..., 12:].any()


@runs
@pytest.mark.parametrize('kernel, before, channels, out', [(4, 2, 16, 32), (3, 1, 32, 16),
                                                           (4, 0, 16, 64)])
@pytest.mark.parametrize('shape', [(2, 5, 7), (1, 1, 1), (3, 9, 12)])
def test_conv_relu(kernel, before, channels, out, shape):
    x = randn(*shape, channels).half()
    weight = randn(kernel, kernel, channels, out, seed=1, scale=.1).half()
    bias = randn(out, seed=2).half()
    want = conv_relu(x.double(), weight.double(), bias.double(), before)
    got = conv_relu(x, weight, bias, before, 'triton')
    assert got.dtype == torch.float16 and relative(got, want) < 2**-11
    assert (got == 0).any() or got.numel() < 100


@runs
def test_conv_relu_hands_nan_on():
    x = randn(1, 4, 4, 16).half()
    x[0, 0, 0, 0] = float('nan')
    y = conv_relu(x, randn(3, 3, 16, 16, scale=.1).half(), randn(16).half(), 1, 'triton')
    assert y[0, :2, :2].isnan().all() and not y[0, 2:].isnan().any()


def test_what_the_kernels_are_for():
    assert [c for c in (32, 48, 64, 96, 128, 192, 348) if joins_mixer_end(c)] == [
        32, 48, 64, 96, 128]
    assert [c for c in (32, 36, 48, 128, 192) if joins_linear_sum(c, 4 * c)] == [32, 48, 128]
    assert not joins_linear_sum(32, 96)
    assert convolves_with_relu(torch.empty(4, 4, 16, 32, dtype=torch.half))
    for shape, dtype in (((4, 4, 16, 32), torch.float32), ((4, 4, 16, 24), torch.half),
                         ((4, 4, 12, 32), torch.half), ((4, 4, 16, 8), torch.half)):
        assert not convolves_with_relu(torch.empty(shape, dtype=dtype))


@runs
def test_errors_name_the_argument():
    inputs = end_inputs(1, 2, 2, 8, torch.float16)
    with pytest.raises(ValueError, match=r'gate must be \(1, 2, 2, 32\)'):
        mixer_end(inputs[0], inputs[1][..., 1:], *inputs[2:])
    with pytest.raises(ValueError, match='linear maps must be in the dtype of x'):
        mixer_end(*inputs[:2], inputs[2].float(), *inputs[3:])
    with pytest.raises(ValueError, match='half precision and few channels'):
        mixer_end(*wide(inputs), backend='triton')
    with pytest.raises(ValueError, match='unknown backend'):
        mixer_end(*inputs, backend='cuda')
    inputs = sum_inputs(1, 2, 2, 32, 64, torch.float16)
    with pytest.raises(ValueError, match=r'linear_sum: residual must be \(1, 2, 2, 32\)'):
        linear_sum(**dict(inputs, residual=inputs['residual'][..., 1:]), norm_dtype=torch.half)
    with pytest.raises(ValueError, match='linear maps must be in the dtype of x'):
        linear_sum(**dict(inputs, next_weight=inputs['residual'][0, 0]), norm_dtype=torch.half)
    with pytest.raises(ValueError, match='half precision and few channels'):
        linear_sum(**sum_inputs(1, 2, 2, 32, 32, torch.float16), norm_dtype=torch.half,
                   backend='triton')
    x = randn(1, 2, 2, 16)
    with pytest.raises(ValueError, match=r'layer_norm_pair: next_bias must be \(16,\)'):
        layer_norm_pair(x, x[0, 0, 0], x[0, 0, 0], 1e-5, x[0, 0, 0], x[0, 0, 0, 1:], 1e-5)
    with pytest.raises(ValueError, match=r'image must be \(batch, 3, H, W\)'):
        image_squares(randn(1, 4, 2, 2), torch.float16)
    with pytest.raises(ValueError, match='powers of two'):
        conv_relu(x, randn(3, 3, 16, 16), randn(16), 1, 'triton')
    for options, message in (
            (dict(bias=randn(15)), 'bias must be'),
            (dict(before=3), 'before must be 0 to 2, got 3'),
            (dict(weight=randn(3, 3, 8, 16)), r'weight must be \(3, 3, 16, 16\)'),
            (dict(x=x.half()), 'x must be in the dtype of the weight'),
            (dict(x=x[0]), 'x must be .batch, H, W, C.')):
        with pytest.raises(ValueError, match=f'conv_relu: {message}'):
            conv_relu(**dict(dict(x=x, weight=randn(3, 3, 16, 16), bias=randn(16), before=1),
                             **options))


@compiles
@pytest.mark.parametrize('arch', [80, 90])
@pytest.mark.parametrize('dim', [16, 24, 32])
def test_mixer_end_compiles_without_spills(monkeypatch, arch, dim):
    from mmgroupmamba.ops import inference_triton_kernels

    launches = []
    kernel = inference_triton_kernels.mixer_end_kernel
    monkeypatch.setattr(inference_triton_kernels, 'mixer_end_kernel', Recorder(kernel, launches))
    inference_triton.MIXER_END(*(t for t in end_inputs(1, 8, 8, dim, torch.bfloat16)[:5]),
                               *end_inputs(1, 8, 8, dim, torch.bfloat16)[5])
    (kernel, arguments), = launches
    registers, spilled = compile_launch(kernel, arguments, arch)
    print(f'sm_{arch}: {registers} registers')
    assert spilled == 0


@compiles
@pytest.mark.parametrize('arch', [80, 90])
def test_the_others_compile_without_spills(monkeypatch, arch):
    from mmgroupmamba.ops import inference_triton_kernels

    launches = []
    for name in ('linear_sum_kernel', 'norm_pair_kernel', 'squares_kernel', 'conv_relu_kernel'):
        kernel = getattr(inference_triton_kernels, name)
        monkeypatch.setattr(inference_triton_kernels, name, Recorder(kernel, launches))
    half = torch.bfloat16
    for c in (64, 128, 352):
        inference_triton.NORM_PAIR(torch.empty(1, 4, 4, c, dtype=half), torch.empty(c, dtype=half),
                                   *(torch.empty(c) for _ in range(4)), 1e-5, 1e-5, torch.float32,
                                   half, None)
    inference_triton.SQUARES(torch.empty(1, 3, 8, 8), half)
    for out in (32, 64):
        inference_triton.CONV_RELU(torch.empty(1, 8, 8, 16, dtype=half),
                                   torch.empty(4, 4, 16, out, dtype=half),
                                   torch.empty(out, dtype=half), 2)
    for c in (64, 96, 128):
        inputs = sum_inputs(1, 8, 8, c, 8 * c, half)
        inputs = inputs | dict(next_weight=inputs.pop('next_weight'))
        for norm_dtype, following in ((half, inputs['next_weight']), (torch.float32, None)):
            *tensors, eps, _ = inputs.values()
            inference_triton.LINEAR_SUM(*tensors, eps, norm_dtype, following)
    assert len(launches) == 12
    for kernel, arguments in launches:
        registers, spilled = compile_launch(kernel, arguments, arch)
        print(f'{kernel.__name__} on sm_{arch}: {registers} registers')
        assert spilled == 0, kernel.__name__


# groups of 8, 12, 31 (made up to 32 by `fuse`) and 36 channels
ARCH = dict(stem_hidden_dim=16, embed_dims=(32, 48, 124, 144), depths=(2, 1, 1, 1),
            mlp_ratios=(2, 4, 2, 2))


def folded(monkeypatch, dtype=None, before=lambda model: None, **options):
    """A model of which every weight counts, with its copy folded as on CUDA, and images in both
    layouts."""
    torch.manual_seed(0)
    model = GroupMamba(ARCH, fused_ops='all', **options).to(DEVICE).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith('running_var'):
                tensor.uniform_(0.5, 2)
            elif name.endswith(('weight', 'skip_scale')) and tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor) / 4)
            elif tensor.dim() > 1 and name.endswith('weight'):
                tensor.normal_(std=tensor[0].numel()**-.5)
            elif name.endswith(('bias', 'running_mean')) and 'dt_bias' not in name:
                tensor.normal_(std=0.5)
    before(model)
    copy = deepcopy(model)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch.Tensor, 'is_cuda', property(lambda self: True))
        fuse(copy, dtype)
    image = randn(1, 3, 33, 34)
    return model, copy, [image, image.contiguous(memory_format=torch.channels_last)]


class Louder(torch.nn.Module):
    """Twice what a module gives."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return 2 * self.module(*inputs)


@runs
def test_folded_model_joins_steps(monkeypatch):
    model, copy, images = folded(monkeypatch, torch.float16)
    assert [s.blocks[0].joins_end for s in copy.stages] == [True, True, False, False]
    assert copy.stages[2].blocks[0].norm.real == 31
    assert isinstance(copy.stages[0].embed.convs[0], FirstConv)
    exact = GroupMamba(ARCH, scan_backend='reference').to(DEVICE).double().eval()
    exact.load_state_dict(model.state_dict())
    ends, sums, pairs = [], [], []
    monkeypatch.setattr(layers, 'layer_norm_pair',
                        lambda *args: pairs.append(1) or layer_norm_pair(*args))
    monkeypatch.setattr(layers, 'mixer_end', lambda *args: ends.append(1) or mixer_end(*args))
    monkeypatch.setattr(layers, 'linear_sum',
                        lambda *args: sums.append(args[-2] is not None) or linear_sum(*args))
    with torch.no_grad():
        wants = exact(images[0].double())
        with torch.autocast(DEVICE, torch.float16):
            plain = model(images[0])
            assert not ends and not sums and not pairs
            for image in images:
                for got, of_plain, want in zip(copy(image), plain, wants):
                    assert got.dtype == of_plain.dtype and got.shape == want.shape
                    assert relative(got, want) < 1.2 * relative(of_plain, want)
    assert len(ends) == 2 * 3 and len(pairs) == 2 * 4
    assert sums == [True, False, False] * 2  # into the second block, out of two stages


@runs
def test_folded_in_float32_joins_norms_alone(monkeypatch):
    model, copy, images = folded(monkeypatch, out_indices=(1, ))
    assert not any(m.joins_end for m in copy.modules() if isinstance(m, layers.Block))
    assert not any(isinstance(m, FirstConv) for m in copy.modules())
    assert all(stage.joins_norms for stage in copy.stages)
    with torch.no_grad():
        for got, want in zip(copy(images[0]), model(images[0])):
            assert relative(got, want) < 1e-5


@runs
def test_hooks_have_their_say(monkeypatch):
    """Where the modules are called as without folding, and wherever several steps are one."""
    _, copy, (image, _) = folded(monkeypatch, torch.float16, out_indices=(0, ))
    seen = []
    with torch.no_grad(), torch.autocast(DEVICE, torch.float16):
        want, = copy(image)
        for name in ('embed', 'blocks.1', 'blocks.0.drop_path', 'blocks.1.mixer.ssm.joint_proj',
                     'blocks.0.mixer.proj', 'blocks.0.ffn.fc2'):
            handle = copy.stages[0].get_submodule(name).register_forward_hook(
                lambda _, inputs, y: seen.append((inputs, y)))
            got, = copy(image)
            handle.remove()
            assert seen and relative(got, want) < 1e-2, name
            for inputs, y in seen:  # what it was given and gave before
                outputs = y if type(y) is tuple else (y, )
                assert all(isinstance(t, torch.Tensor) for t in (*inputs, *outputs)), name
            seen.clear()


@runs
def test_what_is_replaced_has_its_say(monkeypatch):
    """After folding; and before it, what folding does not look into."""
    model, copy, (image, _) = folded(
        monkeypatch, torch.float16, out_indices=(0, ),
        before=lambda model: replace(model, 'blocks.1.drop_path'))
    with torch.no_grad(), torch.autocast(DEVICE, torch.float16):
        plain = copy(image)[0]
        assert relative(plain, model(image)[0]) < 5e-3
        for name in ('embed.norm', 'blocks.0.drop_path', 'blocks.0.mixer.proj', 'embed'):
            for each in (model, copy):
                replace(each, name)
            got = copy(image)[0]
            assert relative(got, model(image)[0]) < 5e-3 and relative(got, plain) > 0.02, name
            plain = got


def replace(model, name):
    """A part of the first stage by a louder one."""
    *parents, last = name.split('.')
    parent = model.stages[0].get_submodule('.'.join(parents))
    setattr(parent, last, Louder(getattr(parent, last)))


@runs
def test_replaced_by_other_kinds(monkeypatch):
    _, copy, (image, _) = folded(monkeypatch, torch.float16, out_indices=(0, ))
    stage = copy.stages[0]
    with torch.no_grad(), torch.autocast(DEVICE, torch.float16):
        plain, = copy(image)
        stage.blocks[0].ffn.fc2.float()
        assert relative(copy(image)[0], plain) < 1e-2
        norm = stage.blocks[0].mixer.norm
        stage.blocks[0].mixer.norm = deepcopy(norm)
        stage.blocks[0].mixer.norm.weight.mul_(3)
        tripled, = copy(image)
        norm.weight.mul_(3)
        stage.blocks[0].mixer.norm = norm
        assert torch.equal(copy(image)[0], tripled) and relative(tripled, plain) > 0.02
        for block in stage.blocks:
            block.mixer.ssm = torch.nn.Identity()
        assert relative(copy(image)[0], plain) > 0.02


@runs
def test_parts_of_another_kind_are_left(monkeypatch):
    def replace(model):
        block = model.stages[0].blocks[0]
        block.norm = Louder(block.norm)
        block.norm.of_sum = block.norm.module.of_sum
        model.stages[1].blocks[0].ffn = torch.nn.Identity()

    _, copy, (image, _) = folded(monkeypatch, torch.float16, replace, out_indices=(1, ))
    assert [[b.joins_end for b in s.blocks] for s in copy.stages] == [[False, True], [False]]
    with torch.no_grad(), torch.autocast(DEVICE, torch.float16):
        copy(image)


@runs
def test_folded_without_its_autocast_or_with_another(monkeypatch):
    _, copy, (image, _) = folded(monkeypatch, torch.float16, out_indices=(0, ))
    with torch.no_grad():
        with pytest.raises(ValueError, match='in the dtype of the weight'):
            copy(image)
        with torch.autocast(DEVICE, torch.float16):
            want, = copy(image)
        assert relative(copy.float()(image)[0], want) < 1e-2


@runs
def test_gradient_of_the_image(monkeypatch):
    model, copy, (image, _) = folded(monkeypatch, torch.float16, out_indices=(0, ))
    grads = []
    stems = [each.stages[0].embed.convs for each in (model, copy)]
    for convs, amp in ((stems[0][:3], False), (stems[1][:1], True)):
        x = image.clone().requires_grad_()
        with torch.autocast(DEVICE, torch.float16, enabled=amp):
            grads += torch.autograd.grad(convs(x).float().square().sum(), x)
    assert relative(*reversed(grads)) < 5e-3
    w = randn(3, 3, 16, 16).half().requires_grad_()
    with pytest.raises(RuntimeError, match="triton_conv_relu has no gradient: use backend='torch'"):
        conv_relu(randn(1, 2, 2, 16).half(), w, randn(16).half(), 1, 'triton')


@runs
def test_folded_twice_is_once(monkeypatch):
    _, copy, (image, _) = folded(monkeypatch, torch.float16, out_indices=(1, ))
    with torch.no_grad(), torch.autocast(DEVICE, torch.float16):
        want = copy(image)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, 'is_cuda', property(lambda self: True))
            fuse(copy, torch.float16)
        for got, of in zip(copy(image), want):
            assert torch.equal(got, of)


@runs
def test_operators_are_what_torch_library_is_told():
    *maps, weights = end_inputs(1, 2, 2, 8, torch.float16)
    check_operator(inference_triton.MIXER_END.op, *maps, *weights, autograd=False)
    inputs = sum_inputs(1, 2, 2, 32, 64, torch.float16)
    *tensors, eps, following = inputs.values()
    for then in (following, None):
        check_operator(inference_triton.LINEAR_SUM.op, *tensors, eps, torch.float16, then,
                       autograd=False)
    x, w = randn(1, 2, 2, 16), randn(16)
    check_operator(inference_triton.NORM_PAIR.op, x, None, w, w, w, w, 1e-5, 1e-5, torch.float32,
                   torch.float16, None, autograd=False)
    check_operator(inference_triton.SQUARES.op, randn(1, 3, 5, 4), torch.float16, autograd=False)
    check_operator(inference_triton.CONV_RELU.op, x.half(), randn(3, 3, 16, 16).half(), w.half(),
                   1, autograd=False)


@runs
def test_folded_model_is_one_graph(monkeypatch):
    _, copy, (image, _) = folded(monkeypatch, torch.float16, out_indices=(0, ))
    with torch.no_grad(), torch.autocast(DEVICE, torch.float16):
        want, = copy(image)
        got, = torch.compile(copy, fullgraph=True, backend='aot_eager')(image)
    assert torch.equal(got, want)
