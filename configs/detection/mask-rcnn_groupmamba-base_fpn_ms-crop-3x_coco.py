_base_ = './mask-rcnn_groupmamba-tiny_fpn_ms-crop-3x_coco.py'

checkpoint = 'checkpoints/groupmamba_base.pth'
model = dict(
    backbone=dict(arch='base', init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[96, 192, 424, 512]))
