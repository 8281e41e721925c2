_base_ = [
    '../_base_/models/upernet_groupmamba.py', '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_160k.py', '../_base_/segmentation_runtime.py'
]

# the authors' distilled ImageNet weights, see README.md
checkpoint = 'checkpoints/groupmamba_tiny.pth'
model = dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=checkpoint)))
