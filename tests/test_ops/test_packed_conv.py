"""Convolutions with weights laid out for oneDNN once, against PyTorch's own."""
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from mmgroupmamba.ops import PackedConvs, packed_conv, packs

ACTIVATIONS = dict(none=lambda x: x, silu=F.silu, gelu=F.gelu)


@pytest.fixture(autouse=True)
def no_gradients():
    if not packed_conv.available():
        pytest.skip('this PyTorch has no oneDNN')
    with torch.no_grad():
        yield


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('activation', ACTIVATIONS)
@pytest.mark.parametrize('inputs, outputs, kernel, stride, groups', [
    (3, 32, 7, 2, 1), (32, 64, 3, 2, 1), (20, 20, 3, 1, 20), (348, 348, 1, 1, 4),
    (348, 36, 1, 1, 4), (16, 64, 1, 1, 1), (5, 7, 3, 1, 1)])
def test_is_the_convolution(inputs, outputs, kernel, stride, groups, activation):
    convs, padding = PackedConvs(), kernel // 2
    weight, bias = randn(outputs, inputs // groups, kernel, kernel), randn(outputs, seed=1)
    for shape in ((2, 9, 14), (1, 1, 1), (1, 7, 1), (3, 1, 5), (2, 9, 14)):
        x = channels_last(randn(shape[0], inputs, *shape[1:], seed=2))
        for b in (bias, None):
            want = ACTIVATIONS[activation](
                F.conv2d(x, weight, b, stride, padding, groups=groups))
            for image in (x, x.contiguous()):
                got = convs.conv('', image, weight, b, stride, padding, groups, activation)
                torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
        if x.shape[2] > 1:
            assert got.shape[2:] == want.shape[2:]
            assert convs.conv('', x, weight, b, stride, padding, groups).is_contiguous(
                memory_format=torch.channels_last)


def test_laid_out_once(monkeypatch):
    calls = []
    reorder = torch.ops.mkldnn._reorder_convolution_weight
    monkeypatch.setattr(torch.ops.mkldnn, '_reorder_convolution_weight',
                        lambda *args: calls.append(1) or reorder(*args))
    convs, weight = PackedConvs(), randn(8, 4, 3, 3)
    x = channels_last(randn(1, 4, 6, 6, seed=1))

    def right(name='a', weight=weight):
        return torch.allclose(convs.conv(name, x, weight, None), F.conv2d(x, weight), atol=1e-5)

    assert all(right() for _ in range(3)) and len(calls) == 1
    assert right('b') and len(calls) == 2
    weight.mul_(2)  # changed in place
    assert all(right() for _ in range(2)) and len(calls) == 3
    assert right(weight=randn(8, 4, 3, 3, seed=2)) and len(calls) == 4  # another
    assert right(weight=weight[:4]) and right(weight=weight[4:]) and len(calls) == 6
    learned = torch.nn.Parameter(weight.clone())
    assert right(weight=learned)
    for seed in range(20):  # its memory may be the one that was given back
        learned.data = torch.zeros(1)
        learned.data = randn(8, 4, 3, 3, seed=seed)
        assert right(weight=learned)


def test_what_is_laid_out_is_not_copied():
    convs, weight = PackedConvs(), randn(8, 4, 3, 3)
    x = channels_last(randn(1, 4, 6, 6, seed=1))
    want = convs.conv('a', x, weight, None)
    for other in (copy.deepcopy(convs), pickle.loads(pickle.dumps(convs))):
        assert not other._packed
        assert torch.equal(other.conv('a', x, weight, None), want)
    with torch.inference_mode():
        assert torch.equal(convs.conv('a', x, weight, None), want)


@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_what_is_not_finite_shows(activation):
    """A broken image or a diverged model does not pass for a sound one."""
    x, weight = randn(1, 4, 6, 6), randn(8, 4, 3, 3)
    x[0, 0, 2, 2] = torch.nan
    x[0, 1, 5, 5] = torch.inf
    got = PackedConvs().conv('', channels_last(x), weight, None, activation=activation)
    want = ACTIVATIONS[activation](F.conv2d(x, weight))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5, equal_nan=True)
    assert got.isnan().any()


def test_unknown_activation_is_named():
    with pytest.raises(ValueError, match="unknown activation 'relu': choose one of none, silu"):
        PackedConvs().conv('', randn(1, 4, 6, 6), randn(8, 4, 3, 3), None, activation='relu')


def test_where_it_serves():
    x, weight = randn(1, 4, 6, 6), randn(8, 4, 3, 3)
    assert packs(x, weight)
    with torch.enable_grad():
        assert not packs(x, weight)
    with torch.autocast('cpu', torch.bfloat16):
        assert not packs(x, weight)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not packs(x, weight)
    assert not packs(x.double(), weight.double()) and not packs(x.bfloat16(), weight)
    assert not packs(x, weight.to('meta')) and not packs(x.to('meta'), weight)
    with torch.inference_mode():
        assert packs(x, weight) and not packs(x, weight.clone())  # whose changes are not counted


def test_found_whatever_the_defaults():
    packed_conv.available.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device('meta'):
            assert packed_conv.available()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('fault', ['missing', 'raises', 'wrong'])
def test_operators_that_do_not_work_are_left(monkeypatch, fault):
    """Private operators may change: then it is PyTorch's convolution."""
    packed_conv.available.cache_clear()
    conv = torch.ops.mkldnn._convolution_pointwise

    def broken(*args):
        if fault == 'raises':
            raise RuntimeError('no such schema')
        return conv(*args) + 1

    if fault == 'missing':
        monkeypatch.setattr(torch.ops.mkldnn, '_convolution_pointwise', None)
        monkeypatch.delattr(torch.ops.mkldnn, '_reorder_convolution_weight')
        monkeypatch.setattr(type(torch.ops.mkldnn), '__getattr__',
                            lambda self, name: (_ for _ in ()).throw(AttributeError(name)))
    else:
        monkeypatch.setattr(torch.ops.mkldnn, '_convolution_pointwise', broken)
    try:
        assert not packs(randn(1, 4, 6, 6), randn(8, 4, 3, 3))
    finally:
        monkeypatch.undo()
        packed_conv.available.cache_clear()
    assert packs(randn(1, 4, 6, 6), randn(8, 4, 3, 3))
