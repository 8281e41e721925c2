# From scratch, for a CPU; nano is ours, not the paper's
_base_ = './groupmamba-tiny_upernet_1xb8-4k_camvid-360x480.py'

model = dict(
    data_preprocessor=dict(size=(240, 320)),
    backbone=dict(arch='nano', drop_path_rate=0., init_cfg=None),
    decode_head=dict(in_channels=[32, 48, 64, 96], channels=64),
    auxiliary_head=dict(in_channels=64, channels=64))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(480, 360), ratio_range=(0.5, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(240, 320), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

optim_wrapper = dict(optimizer=dict(lr=2e-3, weight_decay=0.05), clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, begin=0, end=100),
    dict(type='PolyLR', power=1.0, eta_min=0., by_epoch=False, begin=100, end=2000),
]
train_cfg = dict(max_iters=2000, val_interval=500)
default_hooks = dict(checkpoint=dict(interval=500))
