_base_ = [
    '../_base_/models/mask-rcnn_groupmamba_fpn.py', '../_base_/datasets/camvid_instance.py',
    '../_base_/schedules/coco_1x.py', '../_base_/detection_runtime.py'
]

# the authors' distilled ImageNet weights, see README.md
checkpoint = 'checkpoints/groupmamba_tiny.pth'
model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=checkpoint)),
    rpn_head=dict(anchor_generator=dict(scales=[4])),  # people are small in frames of 480x360
    roi_head=dict(bbox_head=dict(num_classes=3), mask_head=dict(num_classes=3)))

# ours
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=200),
    dict(type='MultiStepLR', begin=0, end=24, by_epoch=True, milestones=[16, 22], gamma=0.1),
]
train_cfg = dict(max_epochs=24, val_interval=4)
auto_scale_lr = dict(base_batch_size=4)
