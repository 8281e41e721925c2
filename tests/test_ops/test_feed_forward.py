"""The feed-forward in one function, in slabs or whole, against its modules."""
from importlib import import_module

import pytest
import torch

from mmgroupmamba.benchmarking import measure
from mmgroupmamba.models import GroupMamba, layers
from mmgroupmamba.models.layers import ConvFFN
from mmgroupmamba.ops import feed_forward, grouped_linear

module = import_module('mmgroupmamba.ops.feed_forward')


@pytest.fixture
def calls(monkeypatch):
    counted = []
    monkeypatch.setattr(layers, 'feed_forward',
                        lambda *args: counted.append(1) or feed_forward(*args))
    return counted


@pytest.fixture
def small_slabs(monkeypatch):
    for name, value in dict(_SLAB=1000, _WHOLE=300, _NARROWEST=4).items():
        monkeypatch.setattr(module, name, value)


def make(channels=8, hidden=50, dtype=torch.float32):
    torch.manual_seed(0)
    return ConvFFN(channels, hidden).to(dtype)


def plainly(ffn, x):
    return ffn.fc2(ffn.conv(ffn.fc1(x)))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('shape', [(1, 1, 1, 8), (2, 3, 5, 8), (1, 8, 1, 8), (3, 4, 6, 8)])
def test_is_its_modules(shape, dtype, calls):
    ffn, x = make(dtype=dtype), torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        got, want = ffn(x), plainly(ffn, x)
    assert len(calls) == 1 and got.is_contiguous()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize('hidden', [50, 64, 7])
@pytest.mark.parametrize('shape', [(1, 1, 2, 8), (2, 3, 5, 8), (1, 9, 4, 8)])
def test_slabs_are_the_whole(shape, hidden, calls, small_slabs, monkeypatch):
    ffn, x, widths = make(hidden=hidden), torch.randn(shape), []
    conv = module.depthwise_conv
    monkeypatch.setattr(module, 'depthwise_conv',
                        lambda x, *args: widths.append(x.shape[3]) or conv(x, *args))
    with torch.no_grad():
        got, want = ffn(x), plainly(ffn, x)
    torch.testing.assert_close(got, want)
    assert len(calls) == 1 and sum(widths) == hidden
    assert len(widths) > 1 or hidden == 7 or x[..., 0].numel() == 2


@pytest.mark.parametrize('tokens, hidden, width', [
    (49, 1792, 1792), (196, 1392, 1392), (784, 1024, 1024),  # of tiny at 224 x 224
    (3136, 512, 256), (128**2, 512, 128), (200 * 336, 512, 64), (100 * 168, 1024, 128),
    (50 * 84, 1392, 464), (10**7, 512, 64), (10**7, 20, 64)])
def test_width_of_slabs(tokens, hidden, width):
    assert module.slab_width(tokens, hidden, 4) == width


def test_whole_model_under_autocast(small_slabs):
    """Where maps are in half precision and weights are not."""
    model = GroupMamba('nano').eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert all(torch.isfinite(y).all() for y in model(x))


@pytest.mark.parametrize('name, shape', [
    ('x', (3, 8)), ('x', (1, 0, 3, 8)), ('fc1_weight', (50, 9)), ('fc1_bias', (49, )),
    ('conv_weight', (51, 1, 3, 3)), ('conv_bias', (51, )), ('fc2_weight', (8, 60)),
    ('fc2_bias', (9, ))])
def test_wrong_shape_is_named(name, shape):
    shapes = dict(x=(1, 2, 3, 8), fc1_weight=(50, 8), fc1_bias=(50, ), conv_weight=(50, 1, 3, 3),
                  conv_bias=(50, ), fc2_weight=(8, 50), fc2_bias=(8, ))
    tensors = {k: torch.zeros(s) for k, s in dict(shapes, **{name: shape}).items()}
    words = 'fc2_weight' if name == 'fc2_bias' else name
    with pytest.raises(ValueError, match=f'feed_forward: {words} must be') as raised:
        feed_forward(activation='gelu', **tensors)
    assert '\n' not in str(raised.value)


def test_less_memory_for_a_large_map():
    ffn, x = make(16, 128), torch.randn(1, 192, 192, 16)
    with torch.no_grad():
        whole = measure.peak_memory(lambda _: plainly(ffn, x), 'cpu')
        slabs = measure.peak_memory(lambda _: ffn(x), 'cpu')
    assert slabs < 0.6 * whole


def test_only_in_eager_inference_on_plain_modules(calls):
    ffn, x = make(), torch.randn(1, 3, 3, 8)
    assert ffn(x).requires_grad
    with torch.no_grad():
        with torch.autocast('cpu', torch.bfloat16):
            assert ffn(x).dtype == torch.bfloat16
        traced = torch.jit.trace(ffn, x, check_trace=False)
        hook = ffn.fc2.register_forward_hook(lambda *_: torch.zeros(()))
        assert ffn(x) == 0
        hook.remove()
        ffn.fc1.forward = lambda x: x.new_zeros(*x.shape[:3], 50)
        torch.testing.assert_close(ffn(x), plainly(ffn, x))
        del ffn.fc1.forward
        half = ffn.bfloat16()
        assert torch.func.vmap(half)(x[None].bfloat16()).dtype == torch.bfloat16
        weight = torch.randn(4, 3, 2)
        torch.testing.assert_close(
            torch.func.vmap(lambda x: grouped_linear(x, weight))(x[None])[0],
            grouped_linear(x, weight))
        ffn.float()
        assert not calls
        torch.testing.assert_close(ffn(x), traced(x))
    assert len(calls) == 1
