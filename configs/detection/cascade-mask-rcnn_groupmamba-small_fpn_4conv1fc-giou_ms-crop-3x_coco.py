_base_ = './cascade-mask-rcnn_groupmamba-tiny_fpn_4conv1fc-giou_ms-crop-3x_coco.py'

checkpoint = 'checkpoints/groupmamba_small.pth'
model = dict(
    backbone=dict(arch='small', init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[64, 128, 348, 512]))
