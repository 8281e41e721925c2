"""Folding for inference: the same outputs, from fewer modules."""
import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import fuse_conv_bn
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmgroupmamba.models import GroupMamba, fuse
from mmgroupmamba.models.fuse import (
    _ConvReLU,
    _join_activations,
    _join_groups,
    _pack_pixels,
    pad_channels,
)
from mmgroupmamba.models.layers import (
    GroupedLinear,
    GroupedSSM,
    ModulatedGroupMamba,
    init_weights,
)
from mmgroupmamba.registry import HOOKS

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
MICRO = dict(
    stem_hidden_dim=8, embed_dims=(16, 16, 32, 32), depths=(1, 2, 1, 1), mlp_ratios=(2, 2, 2, 2))


@torch.no_grad()
def stirred(model: nn.Module) -> nn.Module:
    """No scale 1, no shift 0, no statistics of a fresh model."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


def test_backbone():
    model = stirred(GroupMamba(MICRO, drop_path_rate=0.2))
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        want = model(image)
        assert fuse(model.train()) is model
        got = model(image)
    assert max(relative(g, w) for g, w in zip(got, want)) < 1e-5
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_classifier():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        import mmgroupmamba.models.classification  # noqa: F401  registers the head
        model = stirred(MODELS.build(dict(
            type='ImageClassifier',
            backbone=dict(type='mmgroupmamba.GroupMamba', arch=MICRO, out_indices=(3, ),
                          final_norm=False),
            neck=dict(type='mmgroupmamba.ClassBlockNeck', embed_dim=32),
            head=dict(type='mmgroupmamba.DistilledLinearHead', num_classes=5, in_channels=32))))
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = model.head(model.extract_feat(image))
        heads = sum(isinstance(module, nn.Linear) for module in model.head.modules())
        fuse(model)
        got = model.head(model.extract_feat(image))
    assert relative(got, want) < 1e-5
    with pytest.raises(ValueError, match='folded into one for inference'):
        model.head.logits(model.extract_feat(image))
    assert heads == 2 and sum(isinstance(m, nn.Linear) for m in model.head.modules()) == 1


def test_segmentor():
    with DefaultScope.overwrite_default_scope('mmseg'):
        import mmseg.models  # noqa: F401  registers
        model = stirred(MODELS.build(dict(
            type='EncoderDecoder',
            backbone=dict(type='mmgroupmamba.GroupMamba', arch=MICRO),
            decode_head=dict(
                type='UPerHead', in_channels=[16, 16, 32, 32], in_index=[0, 1, 2, 3],
                pool_scales=(1, 2), channels=16, num_classes=4, norm_cfg=dict(type='BN')))))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = model(image, mode='tensor')
        got = fuse(model)(image, mode='tensor')
    assert relative(got, want) < 1e-5
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())


ODD = dict(
    stem_hidden_dim=8, embed_dims=(16, 20, 36, 24), depths=(1, 2, 1, 1), mlp_ratios=(2, 2, 2, 2))


@pytest.mark.parametrize('arch, most', [(ODD, 2.), (ODD, 1.5), ('tiny', 1.05)])
def test_padding(arch, most):
    model = stirred(GroupMamba(arch))
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        want = model(image)
        pad_channels(model, most=most)
        got = model(image)
    assert [g.shape for g in got] == [w.shape for w in want]
    assert max(relative(g, w) for g, w in zip(got, want)) < 1e-5
    widths = [stage.blocks[0].mixer.ssm.dim for stage in model.stages]
    if arch == 'tiny':
        assert widths == [16, 32, 88, 112]  # 87 is no multiple of 8
    else:  # of 4, 5, 9 and 6
        assert widths == ([8, 8, 16, 8] if most == 2 else [4, 5, 9, 8])
    for stage in model.stages:
        for module in stage.blocks.modules():
            if isinstance(module, nn.Linear):
                assert module.weight.shape == (module.out_features, module.in_features)


def test_groups_joined():
    model = stirred(GroupMamba(MICRO))
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        want = model(image)
        _join_groups(model)
        got = model(image)
        assert max(relative(g, w) for g, w in zip(got, want)) < 1e-5
        for module in model.modules():
            if isinstance(module, GroupedSSM):
                assert isinstance(module.in_proj, nn.Linear)
                joint = torch.cat([module.in_proj.weight, module.gate_proj.weight])
                module.joint_proj = nn.Linear(*reversed(joint.shape), bias=False)
                module.joint_proj.weight.copy_(joint)
                module.in_proj = module.gate_proj = None
        again = model(image)
    assert max(relative(g, w) for g, w in zip(again, want)) < 1e-5


@pytest.mark.parametrize('size', [(64, 96), (65, 33), (34, 63)])
def test_pixels_packed(size):
    model = fuse_conv_bn(stirred(GroupMamba(MICRO, out_indices=(0, ))))
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        want = model(image)
        for _ in range(2):  # once is enough
            _pack_pixels(model)
            got = model(image)
            assert relative(got[0], want[0]) < 1e-5
    strides = [m.stride for m in model.stages[0].embed.convs if isinstance(m, nn.Conv2d)]
    assert strides == [(1, 1)] * 3


@pytest.mark.parametrize('fault', [0, 1])
def test_activations_joined(monkeypatch, fault):
    """By cuDNN's operator, for which another stands here; one that gives something else is left."""
    monkeypatch.setattr(torch, 'cudnn_convolution_relu', lambda x, weight, bias, *options:
                        F.relu(F.conv2d(x, weight, bias, *options)) + fault)
    model = fuse_conv_bn(stirred(GroupMamba(MICRO, out_indices=(0, ))))
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of autocast without a GPU
        want = model(image)
        _pack_pixels(model)
        _join_activations(model.stages[0].embed.convs)
        assert relative(model(image)[0], want[0]) < 1e-5
    joined = sum(isinstance(m, _ConvReLU) for m in model.modules())
    assert joined == (0 if fault else 3)


def test_a_layer(monkeypatch):
    layer = stirred(ModulatedGroupMamba(24).apply(init_weights))
    x = torch.randn(2, 5, 3, 24)
    with torch.no_grad():
        want = layer(x)
        monkeypatch.setattr(torch.Tensor, 'is_cuda', property(lambda self: True))
        assert fuse(layer) is layer
        assert relative(layer(x), want) < 1e-5
    assert not any(isinstance(module, GroupedLinear) and module is not layer.ssm.dt_proj
                   for module in layer.modules())
    assert fuse(layer, torch.bfloat16).ssm.x_proj.weight.dtype == torch.bfloat16
    assert layer.ssm.x_proj.weight.shape == (4 * 4, 24)  # of R + 2N = 3 values, a fourth


def test_cast_for_autocast_changes_nothing():
    image = torch.randn(1, 3, 64, 96)
    model = stirred(GroupMamba(MICRO))
    models = [fuse(copy.deepcopy(model), dtype) for dtype in (None, torch.bfloat16)]
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        want, got = (model(image) for model in models)
    assert all(torch.equal(g, w) for g, w in zip(got, want))
    casts = {p.dtype for p in models[1].parameters()}
    assert casts == {torch.bfloat16, torch.float32}
    assert models[1].stages[0].blocks[0].mixer.ssm.A_log.dtype == torch.float32


def test_refused():
    with pytest.raises(ValueError, match='Linear has no GroupMamba in it'):
        fuse(nn.Linear(3, 4))


def test_twice_is_once():
    model = fuse(stirred(GroupMamba(MICRO)))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = model(image)
        assert all(torch.equal(g, w) for g, w in zip(fuse(model)(image), want))


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('wrap', [lambda model: model, nn.DataParallel])
def test_hook_leaves_the_model_alone(wrap, amp):
    runner = SimpleNamespace(model=wrap(stirred(GroupMamba(MICRO)).to(DEVICE)),
                             test_loop=SimpleNamespace(fp16=amp))
    model, before = runner.model, copy.deepcopy(runner.model.state_dict())
    image = torch.randn(1, 3, 64, 64, device=DEVICE)
    hook = HOOKS.build(dict(type='mmgroupmamba.FuseHook'))
    hook.before_test_epoch(runner)
    assert runner.model is not model and isinstance(runner.model, GroupMamba)
    dtype = torch.get_autocast_dtype(DEVICE) if amp else torch.float32
    assert runner.model.stages[0].blocks[0].mixer.proj.weight.dtype == dtype
    with torch.no_grad(), torch.autocast(DEVICE, enabled=amp):
        got = runner.model(image)
    hook.after_test_epoch(runner)
    assert runner.model is model and model.state_dict().keys() == before.keys()
    with torch.no_grad():
        tolerance = 3e-2 if amp else 1e-5
        assert max(relative(g, w) for g, w in zip(got, model(image))) < tolerance
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
