"""Each dense config, shrunk: its backbone comes whole from any of the three kinds of file, and
every parameter of the model gets a gradient."""
from copy import deepcopy

import pytest
import torch
from building import CONFIGS, load
from mmdet.testing import demo_mm_inputs
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

import mmgroupmamba.models.classification  # noqa: F401
from mmgroupmamba.checkpoint import from_official

DENSE = [name for name in CONFIGS if '_fpn_' in name or '_upernet_' in name]
WIDTH = 16


def shrink(node) -> None:
    """Make the widths of a model's heads 16, at any depth."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key.endswith('channels') and key != 'in_channels' and isinstance(value, int):
                node[key] = WIDTH
            elif key == 'in_channels':
                node[key] = WIDTH if isinstance(value, int) else [WIDTH] * len(value)
            shrink(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            shrink(value)


def small(name: str, arch: dict):
    """The config, its heads 16 wide, its backbone of `arch`."""
    cfg = load(name)
    shrink(cfg.model)
    dims = arch['embed_dims']
    cfg.model.backbone.arch = arch
    dims = [dims[i] for i in cfg.model.backbone.get('out_indices', range(4))]
    if 'neck' in cfg.model:
        cfg.model.neck.in_channels = dims
    else:
        cfg.model.decode_head.in_channels = dims
        cfg.model.auxiliary_head.in_channels = dims[cfg.model.auxiliary_head.in_index]
    return cfg


def build(cfg) -> torch.nn.Module:
    return revert_sync_batchnorm(MODELS.build(cfg.model))


def other_classes(node) -> None:
    if isinstance(node, dict):
        if 'num_classes' in node:
            node['num_classes'] = 7
        node = node.values()
    if not isinstance(node, str) and hasattr(node, '__iter__'):
        for value in node:
            other_classes(value)


def shuffled(state: dict) -> dict:
    """A state dict with values of its own for each tensor, so that none can pass for another."""
    return {k: torch.rand_like(v) + 1 if v.is_floating_point() else v + 3
            for k, v in state.items()}


def official(cfg, golden, path) -> dict:
    state = shuffled(golden['state_dict'])
    torch.save({'model': state}, path)
    model = MODELS.build(cfg.model.backbone)
    return from_official(state, model.state_dict())


def own_classifier(cfg, golden, path) -> dict:
    channels = golden['arch']['embed_dims'][-1]
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(dict(
            type='ImageClassifier',
            backbone=dict(type='mmgroupmamba.GroupMamba', arch=golden['arch'], out_indices=(3, ),
                          final_norm=False),
            neck=dict(type='mmgroupmamba.ClassBlockNeck', embed_dim=channels),
            head=dict(type='mmgroupmamba.DistilledLinearHead', num_classes=5,
                      in_channels=channels)))
    state = shuffled(model.state_dict())
    torch.save(dict(state_dict=state, meta=dict(epoch=300)), path)
    backbone = {k.removeprefix('backbone.'): v
                for k, v in state.items() if k.startswith('backbone.')}
    norms = [f'stages.{i}.norm.{part}' for i in range(3) for part in ('weight', 'bias')]
    assert set(norms) <= set(backbone)
    return {**backbone, 'stages.3.norm.weight': state['neck.norm.weight'],
            'stages.3.norm.bias': state['neck.norm.bias']}


def dense_of_other_classes(cfg, golden, path) -> dict:
    other = deepcopy(cfg)
    other_classes(other.model)
    state = shuffled(MODELS.build(other.model).state_dict())
    torch.save(dict(state_dict=state, meta=dict(iter=160000)), path)
    return {k.removeprefix('backbone.'): v
            for k, v in state.items() if k.startswith('backbone.')}


@pytest.mark.parametrize('kind', [official, own_classifier, dense_of_other_classes])
@pytest.mark.parametrize('name', DENSE)
def test_each_backbone_tensor_comes_from_the_file(name, kind, golden, tmp_path):
    cfg = small(name, golden['arch'])
    if cfg.model.backbone.get('init_cfg') is None:
        assert '-nano_' in name  # nobody published weights; the first run sets type, too
        cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='none.pth')
    wanted = kind(cfg, golden, tmp_path / 'file.pth')
    cfg.merge_from_dict({'model.backbone.init_cfg.checkpoint': str(tmp_path / 'file.pth')})
    model = build(cfg)
    with torch.no_grad():
        for tensor in model.backbone.state_dict().values():
            tensor.fill_(float('nan') if tensor.is_floating_point() else -1)
    model.init_weights()
    loaded = model.backbone.state_dict()
    assert len(loaded) == len(wanted)
    for key, tensor in loaded.items():
        assert torch.equal(tensor, wanted[key].reshape(tensor.shape)), key


def detection_batch(model, classes: int) -> dict:
    batch = demo_mm_inputs(2, [[3, 96, 128]] * 2, num_items=[4, 4], num_classes=classes,
                           with_mask=getattr(model, 'with_mask', False))
    return model.data_preprocessor(batch, training=True)


def segmentation_batch(model, classes: int) -> dict:
    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo=dict(img_shape=(64, 96), ori_shape=(64, 96)))
        sample.gt_sem_seg = PixelData(data=torch.randint(0, classes, (1, 64, 96)))
        samples.append(sample)
    return dict(inputs=torch.randn(2, 3, 64, 96), data_samples=samples)


@pytest.mark.parametrize('name', DENSE)
def test_every_parameter_gets_a_gradient(name, golden):
    torch.manual_seed(0)
    cfg = small(name, golden['arch'])
    cfg.model.backbone.update(init_cfg=None, drop_path_rate=0.)
    model = build(cfg).train()
    if cfg.default_scope == 'mmdet':
        classes = len(cfg.train_dataloader.dataset.get('metainfo', {}).get('classes', ())) or 80
        data = detection_batch(model, classes)
    else:
        data = segmentation_batch(model, model.num_classes)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    assert torch.isfinite(loss)
    missing = [k for k, p in model.named_parameters() if p.grad is None]
    assert not missing
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    # none of the backbone's is cut off, such as a norm that nothing reads; the affinity's one to
    # three hidden units may be dead at this size
    assert not [k for k, p in model.backbone.named_parameters()
                if not p.grad.any() and '.affinity.' not in k]
    assert 'find_unused_parameters' not in cfg
