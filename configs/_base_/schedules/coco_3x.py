# Three times as long, as mmdet's mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco (A)
_base_ = './coco_1x.py'

param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
train_cfg = dict(max_epochs=36)
