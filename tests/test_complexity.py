from copy import copy
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmgroupmamba import complexity
from mmgroupmamba.complexity import (
    Part,
    build_model,
    count,
    count_config,
    counted_scans,
    markdown_table,
    scan_flops,
)
from mmgroupmamba.launch import LaunchError
from mmgroupmamba.models import GroupMamba, layers
from mmgroupmamba.ops import directional_scan

SHAPES = Path(__file__).parents[1] / 'configs/shapes'
# one block a stage; C, hidden channels of the FFN, dt_rank = ceil(C / 4 / 16), C // 16
ARCH = dict(stem_hidden_dim=8, embed_dims=(16, 32, 64, 128), depths=(1, 1, 1, 1),
            mlp_ratios=(2, 2, 3, 1))
STAGES = [(16, 32, 1, 1), (32, 64, 1, 2), (64, 192, 1, 4), (128, 128, 2, 8)]
SHAPE = (64, 96)


@pytest.fixture(autouse=True)
def restore_scope():
    """Leave the other tests the default scope they had."""
    before = copy(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(before)


def by_hand() -> dict[str, int]:
    """Multiply-adds of ARCH at SHAPE; LayerNorm 5 a value (4 without affine), BatchNorm 2."""
    height, width = SHAPE
    half = height // 2 * width // 2
    conv = half * 8 * (3 * 7 * 7 + 8 * 3 * 3 + 8 * 3 * 3)  # stem
    batch_norm = 3 * 2 * 8 * half
    bmm = linear = layer_norm = scan = 0
    before = 8
    for i, (channels, hidden, rank, reduced) in enumerate(STAGES):
        tokens = (height >> i + 2) * (width >> i + 2)
        quarter = channels // 4
        conv += tokens * 9 * before * channels  # the stem's last, or downsampling
        # the layer: four groups of in_proj, gate_proj, x_proj, dt_proj, out_proj, and depthwise
        bmm += 4 * tokens * quarter * (quarter + quarter + rank + 2 + rank + quarter)
        conv += 9 * tokens * channels
        scan += tokens * channels * 10
        linear += 2 * channels * reduced + tokens * channels**2  # affinity and proj
        # feed-forward
        linear += 2 * tokens * channels * hidden
        conv += tokens * hidden * 9
        # embed, the layer's own norm twice, ffn, stage; the groups' norm
        layer_norm += tokens * channels * (5 * 5 + 4)
        before = channels
    return dict(conv=conv, bmm=bmm, linear=linear, layer_norm=layer_norm, batch_norm=batch_norm,
                scan=scan)


def test_scan_formula():
    assert scan_flops(batch=2, length=7, channels=8, states=3) == 9 * 2 * 7 * 8 * 3 + 2 * 8 * 7


@pytest.mark.parametrize('d_state', [1, 3])
def test_scan_of_a_layer(d_state):
    """One scan call for the four groups, attributed to the module that makes it."""

    class Model(nn.Module):

        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 16, 1)
            self.ssm = layers.GroupedSSM(16, d_state)

        def forward(self, x):
            return self.ssm(self.first(x).permute(0, 2, 3, 1))

    counted = count(Model(), (5, 6))
    want = 9 * 30 * 16 * d_state + 30 * 16
    assert counted.operators['scan'] == counted.total.scan == want
    assert counted.parts['ssm'].scan == want
    assert counted.parts['first'] == Part(3 * 16 + 16, 30 * 3 * 16, 0)


def test_whole_model_by_hand():
    model = GroupMamba(ARCH)
    counted = count(model, SHAPE)
    assert counted.operators == by_hand()
    assert counted.total.flops == sum(by_hand().values())
    assert counted.total.params == sum(p.numel() for p in model.parameters())
    assert list(counted.parts) == [f'stages.{i}' for i in range(4)]
    assert Part(*map(sum, zip(*counted.parts.values()))) == counted.total
    assert sum(counted.layers.values()) == counted.total.flops
    height, width = SHAPE
    steps = sum((height >> i + 2) * (width >> i + 2) * channels * rank
                for i, (channels, _, rank, _) in enumerate(STAGES))
    assert counted.layers['stages.*.blocks.*.mixer.ssm'] == counted.total.scan + steps
    assert counted.layers['stages.*.blocks.*.ffn.conv'] == sum(
        9 * hidden * (64 >> i + 2) * (96 >> i + 2) for i, (_, hidden, *_) in enumerate(STAGES))
    # of the gate, and in place of the convolution
    assert counted.uncounted['aten::silu'] == counted.uncounted['aten::silu_'] == 4


def test_same_count_for_every_backend():
    counts = [count(GroupMamba(ARCH, scan_backend=name), SHAPE)
              for name in ('auto', 'reference', 'blocked')]
    assert counts[0] == counts[1] == counts[2]


def test_backend_that_cannot_run_is_counted():
    cfg = dict(type='mmpretrain.ImageClassifier', backbone=dict(
        type='mmgroupmamba.GroupMamba', arch=ARCH, out_indices=(3, ), scan_backend='mamba_ssm',
        fused_ops=['add_layer_norm']))
    counted = count_config(Config(dict(default_scope='mmpretrain', model=cfg)), SHAPE)
    assert counted.total.scan == by_hand()['scan']
    assert cfg['backbone']['scan_backend'] == 'mamba_ssm'


def test_model_is_left_as_it_was():
    model = GroupMamba(ARCH, frozen_stages=1).train()
    training = [module.training for module in model.modules()]
    assert len(set(training)) == 2
    state = torch.get_rng_state()
    count(model, SHAPE)
    assert [module.training for module in model.modules()] == training
    assert 'forward' not in vars(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert layers.directional_scan is directional_scan


def test_patch_is_undone_after_an_error():
    model = GroupMamba(ARCH).train()
    with pytest.raises(ValueError, match='32x32'):
        count(model, (16, 64))
    assert layers.directional_scan is directional_scan
    assert model.training and model.stages[0].training
    with pytest.raises(KeyError), counted_scans():
        assert layers.directional_scan is not directional_scan
        raise KeyError
    assert layers.directional_scan is directional_scan


def test_detector_keeps_its_forward(monkeypatch):
    cfg = Config.fromfile(SHAPES / 'mask-rcnn_groupmamba-nano_fpn_1xb8-8e_shapes.py')
    model = build_model(cfg)

    def fail(*args, **kwargs):
        raise RuntimeError('in the middle of it')

    monkeypatch.setattr(model.roi_head, 'forward', fail)
    with pytest.raises(RuntimeError, match='in the middle of it'):
        count(model, (64, 64), 'mmdet')
    assert 'forward' not in vars(model)
    assert layers.directional_scan is directional_scan


def test_no_weights_are_read_and_no_teacher_is_built(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError('something was read')

    monkeypatch.setattr(torch, 'load', fail)
    cfg = Config.fromfile(SHAPES / 'groupmamba-nano_1xb16_shapes-128px.py')
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='nowhere.pth')
    cfg.model.update(type='mmgroupmamba.DistilledImageClassifier', teacher=dict(type='Nobody'))
    cfg.model.head.type = 'mmgroupmamba.DistilledLinearHead'
    before = cfg.pretty_text
    counted = count_config(cfg, (64, 64))
    assert counted.parts['head'] == Part(2 * (96 + 1) * 4, 2 * 96 * 4, 0)  # both heads
    assert cfg.pretty_text == before


def test_random_state_is_kept():
    cfg = Config.fromfile(SHAPES / 'groupmamba-nano_1xb16_shapes-128px.py')
    state = torch.get_rng_state()
    build_model(cfg)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('shape', [(31, 64), (64, 31), (0, 64), (-64, 64)])
def test_small_shapes(shape):
    cfg = Config(dict(default_scope='mmpretrain', model=dict(type='Whatever')))
    with pytest.raises(LaunchError, match='at least 32 x 32'):
        count_config(cfg, shape)


def test_other_configs():
    with pytest.raises(LaunchError, match='no model'):
        build_model(Config(dict(default_scope='mmpretrain')))
    swin = dict(type='ImageClassifier', backbone=dict(type='LeNet5'))
    with pytest.raises(LaunchError, match='not GroupMamba'):
        build_model(Config(dict(default_scope='mmpretrain', model=swin)))


def test_paper_shapes():
    assert complexity.PAPER_SHAPES == dict(
        mmpretrain=(224, 224), mmdet=(800, 1280), mmseg=(512, 2048))


def test_markdown_table():
    assert markdown_table(['a', 'b'], [['long', '1'], ['x', '23']]).splitlines() == [
        '| a    |  b |', '| ---- | -: |', '| long |  1 |', '| x    | 23 |']
