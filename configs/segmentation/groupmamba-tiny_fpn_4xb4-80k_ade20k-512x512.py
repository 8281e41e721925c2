_base_ = [
    '../_base_/models/fpn_groupmamba.py', '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_80k_fpn.py', '../_base_/segmentation_runtime.py'
]

# the authors' distilled ImageNet weights, see README.md
checkpoint = 'checkpoints/groupmamba_tiny.pth'
model = dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=checkpoint)))
train_dataloader = dict(batch_size=4)
default_hooks = dict(checkpoint=dict(interval=8000))
