"""Test-time augmentation against the average of the single augmentations, made by hand."""
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import BaseDataElement, PixelData

import mmgroupmamba.models.segmentation  # noqa: F401

ROOT = Path(__file__).parents[2]
ADE = 'groupmamba-tiny_upernet_8xb2-160k_ade20k-512x512.py'
MICRO = dict(
    stem_hidden_dim=8, embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2))
HEIGHT, WIDTH = 70, 90
RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


@pytest.fixture(scope='module')
def cfg():
    """ADE20K's config with a micro model."""
    cfg = Config.fromfile(ROOT / 'configs/segmentation' / ADE)
    norm = dict(type='BN')
    cfg.model.backbone.update(arch=MICRO, init_cfg=None)
    cfg.model.decode_head.update(
        in_channels=[16, 16, 32, 32], channels=16, num_classes=4, norm_cfg=norm)
    cfg.model.auxiliary_head = None
    return cfg


def build(cfg):
    torch.manual_seed(0)
    tta = MODELS.build(dict(cfg.tta_model, module=deepcopy(cfg.model)))
    torch.nn.init.normal_(tta.module.decode_head.conv_seg.weight)  # far from each other
    return tta.eval()


@pytest.fixture
def files(tmp_path):
    """Picture, label map, and the picture as an array (H, W, BGR)."""
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 256, (7, 9, 3), np.uint8), (WIDTH, HEIGHT))
    labels = rng.integers(0, 5, (HEIGHT, WIDTH), np.uint8)
    cv2.imwrite(str(tmp_path / 'image.png'), image)
    cv2.imwrite(str(tmp_path / 'labels.png'), labels)
    return tmp_path / 'image.png', tmp_path / 'labels.png', image


def logits_by_hand(model, image, ratio, flip):
    """Logits (4, H, W) of one augmentation: resized, flipped, and both undone."""
    size = int(WIDTH * ratio + 0.5), int(HEIGHT * ratio + 0.5)
    x = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    if flip:
        x = x[:, ::-1]
    x = (x[..., ::-1] - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    x = torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1))).float()[None]
    out = model.decode_head(model.backbone(x))
    out = F.interpolate(out, x.shape[-2:], mode='bilinear', align_corners=False)
    if flip:
        out = out.flip(3)
    return F.interpolate(out, (HEIGHT, WIDTH), mode='bilinear', align_corners=False)[0]


@torch.no_grad()
def test_tta_is_the_average_of_the_single_augmentations(cfg, files):
    image_path, label_path, image = files
    tta = build(cfg)
    assert type(tta).__name__ == 'SegLogitsTTA'
    data = Compose(cfg.tta_pipeline)(dict(
        img_path=str(image_path), seg_map_path=str(label_path), reduce_zero_label=False,
        label_map=None, seg_fields=[]))
    assert len(data['inputs']) == 12
    merged, = tta.test_step(pseudo_collate([data]))

    singles = [logits_by_hand(tta.module, image, ratio, flip)
               for ratio in RATIOS for flip in (False, True)]
    expected = sum(singles) / 12
    torch.testing.assert_close(merged.seg_logits.data, expected, atol=1e-4, rtol=1e-4)
    agreement = (merged.pred_sem_seg.data[0] == expected.argmax(0)).float().mean()
    assert merged.pred_sem_seg.data.shape == (1, HEIGHT, WIDTH) and agreement > 0.999
    assert len(expected.argmax(0).unique()) > 1
    # no single augmentation would do
    assert all((single.argmax(0) != expected.argmax(0)).any() for single in singles)
    assert merged.img_path == str(image_path)
    assert merged.gt_sem_seg.data.shape == (1, HEIGHT, WIDTH)


def sample(values):
    return BaseDataElement(seg_logits=PixelData(data=torch.tensor(values).reshape(-1, 1, 1)))


def merge(cfg, samples, **module):
    tta = build(cfg)
    del tta.module
    tta.module = SimpleNamespace(**module)
    merged, = tta.merge_preds([[sample(values) for values in samples]])
    return merged.seg_logits.data.flatten().tolist(), merged.pred_sem_seg.data.item()


def test_logits_are_averaged_not_probabilities(cfg):
    # as probabilities, two mild votes would outweigh a sure one
    mean, decision = merge(cfg, [[10., 0.], [0., 3.], [0., 3.]], out_channels=2)
    assert mean == pytest.approx([10 / 3, 2.]) and decision == 0


def test_one_channel_is_averaged_before_its_sigmoid(cfg):
    logits = torch.tensor([4., -1., -1.])
    mean, decision = merge(cfg, [[p] for p in logits.sigmoid().tolist()], out_channels=1,
                           decode_head=SimpleNamespace(threshold=0.6))
    assert mean == pytest.approx([torch.tensor(2 / 3).sigmoid().item()], rel=1e-4)
    assert decision == 1
