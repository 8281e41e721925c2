_base_ = [
    '../_base_/models/upernet_groupmamba.py', '../_base_/datasets/cityscapes.py',
    '../_base_/schedules/cityscapes_160k.py', '../_base_/segmentation_runtime.py'
]

# the authors' distilled ImageNet weights, see README.md
checkpoint = 'checkpoints/groupmamba_tiny.pth'
model = dict(
    data_preprocessor=dict(size=(512, 1024)),
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=checkpoint)),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19))
