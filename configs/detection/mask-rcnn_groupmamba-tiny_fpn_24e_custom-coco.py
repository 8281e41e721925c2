# Your own data in COCO's format: only data_root, classes and schedule differ from the 1x config.
# The learning rate is for 8 GPUs x 2 images: train with --auto-scale-lr.
_base_ = './mask-rcnn_groupmamba-tiny_fpn_1x_coco.py'

data_root = 'data/custom/'  # images/, train.json and val.json
classes = ('cat', 'dog')  # the names in the files; ('cat', ) where there is only one
num_classes = len(classes)
max_epochs = 24

model = dict(
    roi_head=dict(bbox_head=dict(num_classes=num_classes), mask_head=dict(num_classes=num_classes)))

metainfo = dict(classes=classes)
train_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file='train.json',
        data_prefix=dict(img='images/')))
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file='val.json',
        data_prefix=dict(img='images/')))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'val.json')
test_evaluator = val_evaluator

param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(
        type='MultiStepLR', begin=0, end=max_epochs, by_epoch=True, milestones=[16, 22], gamma=0.1),
]
train_cfg = dict(max_epochs=max_epochs)
