_base_ = [
    '../_base_/models/upernet_groupmamba.py', '../_base_/datasets/camvid.py',
    '../_base_/schedules/ade20k_160k.py', '../_base_/segmentation_runtime.py'
]

# the authors' distilled ImageNet weights, see README.md
checkpoint = 'checkpoints/groupmamba_tiny.pth'
model = dict(
    data_preprocessor=dict(size=(360, 480)),
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=checkpoint)),
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11))

# ours, as the schedule: 87 rounds of the 367 frames
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=200),
    dict(type='PolyLR', power=1.0, eta_min=0., by_epoch=False, begin=200, end=4000),
]
train_cfg = dict(max_iters=4000, val_interval=1000)
default_hooks = dict(checkpoint=dict(interval=1000))
auto_scale_lr = dict(base_batch_size=8)
