"""Folded models on a CPU, their weights laid out for oneDNN: the plain modules wherever that does
not serve."""
import copy
import warnings
from functools import partial
from importlib import import_module

import pytest
import torch
from test_fuse import MICRO, relative, stirred
from torch import nn

from mmgroupmamba.models import GroupMamba, fuse
from mmgroupmamba.models.layers import ChannelsLastConv2d, ConvFFN
from mmgroupmamba.models.packed import PackedConv, PackedFFN
from mmgroupmamba.ops import PackedConvs, packed_conv

IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch):
    if not packed_conv.available():
        pytest.skip('this PyTorch has no oneDNN')
    counted = []
    conv = PackedConvs.conv

    def counting(self, *args, **kwargs):
        counted.append(1)
        return conv(self, *args, **kwargs)

    monkeypatch.setattr(PackedConvs, 'conv', counting)
    return counted


def test_backbone(calls):
    model = stirred(GroupMamba(MICRO))
    with torch.no_grad():
        images = [IMAGE, IMAGE[:1, :, :37, :50], IMAGE[..., :33], IMAGE]
        wants = [model(image) for image in images]
        fuse(model)
        blocks = 5
        for image, want in zip(images, wants):
            calls.clear()
            assert max(relative(g, w) for g, w in zip(model(image), want)) < 1e-5
            assert len(calls) == 4 + 3 + 3 * blocks  # stem, downsampling, feed-forwards
        assert not any(module.training for module in model.modules())
        state = [type(module) for module in model.modules()]
        assert [type(module) for module in fuse(model).modules()] == state
    packed = [m.plain for m in model.modules() if isinstance(m, (PackedConv, PackedFFN))]
    kinds = [sum(type(m) is kind for m in packed)
             for kind in (nn.Conv2d, ChannelsLastConv2d, ConvFFN)]
    assert kinds == [4, 3, blocks]


def test_slabs_of_the_feed_forward(calls, monkeypatch):
    module = import_module('mmgroupmamba.ops.feed_forward')
    for name, value in dict(_SLAB=1000, _WHOLE=300, _NARROWEST=4).items():
        monkeypatch.setattr(module, name, value)
    torch.manual_seed(0)
    ffn = ConvFFN(8, 50)
    packed = PackedFFN(ffn)
    with torch.no_grad():
        for shape in ((2, 3, 5, 8), (1, 1, 2, 8), (1, 9, 4, 8), (2, 3, 5, 8)):
            calls.clear()
            x = torch.randn(shape)
            want = ffn.fc2(ffn.conv(ffn.fc1(x)))
            torch.testing.assert_close(packed(x), want, atol=1e-5, rtol=1e-5)
            slabs = -(-50 // module.slab_width(x[..., 0].numel(), 50, 4))
            assert len(calls) == (3 if slabs == 1 else 2 * slabs)


def test_plain_where_it_does_not_serve(calls):
    model = fuse(stirred(GroupMamba(MICRO)))
    with torch.no_grad():
        want = model(IMAGE)
    calls.clear()
    image = IMAGE.clone().requires_grad_()
    got = model(image)
    torch.autograd.grad(got[-1].sum(), image)
    assert max(relative(g, w) for g, w in zip(got, want)) < 1e-5
    with torch.no_grad():
        with torch.autocast('cpu', torch.bfloat16):
            assert max(relative(g, w) for g, w in zip(model(IMAGE), want)) < 0.1
        traced = torch.jit.trace(model, IMAGE, check_trace=False)
        assert not calls
        assert max(relative(g, w) for g, w in zip(traced(IMAGE), want)) < 1e-5
        compiled = torch.compile(model.stages[0], fullgraph=True, backend='eager')
        assert relative(compiled(IMAGE), model.stages[0](IMAGE)) < 1e-5
        calls.clear()
        compiled(IMAGE)
        double = copy.deepcopy(model).double()(IMAGE.double())
        assert max(relative(g, w) for g, w in zip(want, double)) < 1e-5
        assert not calls


class OtherFFN(ConvFFN):

    def forward(self, x):
        return super().forward(x) / 2


def other_ffn(model):
    ffn = model.stages[1].blocks[0].ffn
    ffn.__class__ = OtherFFN


def other_forward(model):
    ffn = model.stages[1].blocks[0].ffn
    ffn.forward = lambda x: x / 2


def other_fc1(model):
    ffn = model.stages[1].blocks[0].ffn
    ffn.fc1 = nn.Sequential(ffn.fc1, nn.Identity())


def other_conv(model, **options):
    conv = model.stages[0].embed.proj
    model.stages[0].embed.proj = nn.Conv2d(
        conv.in_channels, conv.out_channels, 3, **dict(dict(stride=2, padding=1), **options))


def hooked(model, name):
    model.get_submodule(name).register_forward_hook(lambda module, args, y: y.cos())


@pytest.mark.parametrize('change', [
    other_ffn, other_forward, other_fc1, lambda m: other_conv(m, padding_mode='reflect'),
    lambda m: other_conv(m, dilation=2), lambda m: other_conv(m, padding='same', stride=1),
    lambda m: other_conv(m, padding=(1, 2)),
    lambda m: nn.utils.weight_norm(m.stages[0].embed.proj),
    *[partial(hooked, name=f'stages.0.{name}') for name in (
        'embed.proj', 'embed.convs', 'embed.convs.2', 'blocks.0.ffn', 'blocks.0.ffn.fc1')]])
def test_what_is_changed_inside_has_its_say(change):
    model = stirred(GroupMamba(MICRO))
    with torch.no_grad():
        plain = model(IMAGE)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # weight_norm has a successor
            change(model)
        want = model(IMAGE)
        if hasattr(model.stages[0].embed.proj, 'weight_g'):
            model.stages[0].embed.proj.weight_g.mul_(2)
            want = model(IMAGE)
        assert any(g.shape != w.shape or relative(g, w) > 1e-3 for g, w in zip(plain, want)) or (
            change is other_fc1)
        got = fuse(model)(IMAGE)
    assert max(relative(g, w) for g, w in zip(got, want)) < 1e-5


def test_what_is_not_finite_shows():
    model, image = fuse(stirred(GroupMamba(MICRO))), IMAGE.clone()
    image[0, 0, 20, 20] = torch.nan
    with torch.no_grad():
        assert model(image)[0][0].isnan().any() and not model(image)[0][1].isnan().any()


def test_wrong_number_of_channels_is_named():
    model = fuse(stirred(GroupMamba(MICRO)))
    with torch.no_grad(), pytest.raises(RuntimeError, match='to have 3 channels, but got 1'):
        model(IMAGE[:, :1])


def test_training_asks_no_packed_module():
    model = fuse(stirred(GroupMamba(MICRO)))
    assert model.stages[0].blocks[0]._weights() is None


def test_weights_that_change_afterwards(calls):
    model = fuse(stirred(GroupMamba(MICRO)))
    with torch.no_grad():
        model(IMAGE)
        other = fuse(stirred(GroupMamba(MICRO)))
        for parameter in other.parameters():
            parameter.mul_(1.1)
        want = other(IMAGE)
        model.load_state_dict(other.state_dict())
        assert all(torch.equal(g, w) for g, w in zip(model(IMAGE), want))
        copied = copy.deepcopy(model)
        for parameter in copied.parameters():
            parameter.mul_(0.9)
        assert relative(copied(IMAGE)[-1], want[-1]) > 1e-3
        assert all(torch.equal(g, w) for g, w in zip(model(IMAGE), want))


def test_folded_on_a_cpu_for_a_gpu(monkeypatch):
    model = fuse(stirred(GroupMamba(MICRO)))
    monkeypatch.setattr(torch.Tensor, 'is_cuda', property(lambda self: True))
    with pytest.raises(ValueError, match='GroupMamba was fused on a CPU: fuse the plain model'):
        fuse(model)


def test_without_onednn(monkeypatch):
    monkeypatch.setattr(packed_conv, 'available', lambda: False)
    model = stirred(GroupMamba(MICRO))
    with torch.no_grad():
        want = model(IMAGE)
        assert max(relative(g, w) for g, w in zip(fuse(model)(IMAGE), want)) < 1e-5
