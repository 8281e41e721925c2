"""Gradients of one step, by one process with the whole batch or by two with half of it each.

    python ddp_gradients.py CASE FILE
    torchrun --nproc_per_node 2 ddp_gradients.py CASE FILE

Every normalisation that looks at the batch is in eval mode; there is no dropout.
"""
import os
import sys

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from torch.nn.modules.batchnorm import _BatchNorm

ARCH = dict(stem_hidden_dim=8, embed_dims=[16, 16, 32, 48], depths=[1] * 4, mlp_ratios=[2] * 4)
BATCH, SIZE, CLASSES = 4, (64, 96), 5
CLASSIFIER = dict(
    type='ImageClassifier',
    backbone=dict(type='mmgroupmamba.GroupMamba', arch=ARCH, out_indices=(3, ), norm_eval=True,
                  final_norm=False),
    neck=dict(type='mmgroupmamba.ClassBlockNeck', embed_dim=48, mlp_ratio=2),
    head=dict(type='mmgroupmamba.DistilledLinearHead', num_classes=CLASSES, in_channels=48))
CASES = dict(
    classifier=dict(CLASSIFIER, type='mmgroupmamba.DistilledImageClassifier', teacher=CLASSIFIER),
    upernet=dict(
        type='EncoderDecoder',
        backbone=dict(type='mmgroupmamba.GroupMamba', arch=ARCH, norm_eval=True),
        decode_head=dict(
            type='UPerHead', in_channels=ARCH['embed_dims'], in_index=[0, 1, 2, 3], channels=16,
            pool_scales=(1, 2), dropout_ratio=0, num_classes=CLASSES, align_corners=False,
            norm_cfg=dict(type='BN')),
        auxiliary_head=dict(
            type='FCNHead', in_channels=32, in_index=2, channels=16, num_convs=1, dropout_ratio=0,
            concat_input=False, num_classes=CLASSES, align_corners=False,
            norm_cfg=dict(type='BN')),
        train_cfg=dict(), test_cfg=dict(mode='whole')))


def samples(case: str, part: slice) -> tuple[torch.Tensor, list]:
    """Images and their annotations, of `part` of the batch."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, *SIZE, generator=generator)
    labels = torch.randint(CLASSES, (BATCH, *SIZE), generator=generator)
    if case == 'classifier':
        from mmpretrain.structures import DataSample
        data = [DataSample().set_gt_label(int(label[0, 0])) for label in labels]
    else:
        from mmseg.structures import SegDataSample
        data = [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels]
    return images[part], data[part]


def main(case: str, path: str) -> None:
    init_default_scope('mmpretrain' if case == 'classifier' else 'mmseg')
    if case == 'classifier':
        import mmgroupmamba.models.classification  # noqa: F401
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = MODELS.build(Config(CASES[case]).to_dict()).train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    part = slice(None)
    run = model
    if 'RANK' in os.environ:
        dist.init_process_group('gloo')
        half = BATCH // dist.get_world_size()
        part = slice(half * dist.get_rank(), half * (dist.get_rank() + 1))
        run = MMDistributedDataParallel(model, find_unused_parameters=False)
    losses = run(*samples(case, part), mode='loss')
    model.parse_losses(losses)[0].backward()
    if part == slice(None) or dist.get_rank() == 0:
        torch.save({name: p.grad for name, p in model.named_parameters()}, path)
    if part != slice(None):
        dist.barrier()
        dist.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
