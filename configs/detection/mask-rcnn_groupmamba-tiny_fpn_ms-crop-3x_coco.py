_base_ = [
    '../_base_/models/mask-rcnn_groupmamba_fpn.py',
    '../_base_/datasets/coco_instance_ms-crop.py', '../_base_/schedules/coco_3x.py',
    '../_base_/detection_runtime.py'
]

# the authors' distilled ImageNet weights, see README.md
checkpoint = 'checkpoints/groupmamba_tiny.pth'
model = dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=checkpoint)))
