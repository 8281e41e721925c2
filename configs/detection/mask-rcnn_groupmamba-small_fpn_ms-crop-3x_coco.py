_base_ = './mask-rcnn_groupmamba-tiny_fpn_ms-crop-3x_coco.py'

checkpoint = 'checkpoints/groupmamba_small.pth'
model = dict(
    backbone=dict(arch='small', init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[64, 128, 348, 512]))
