# Sources: P the paper, A mmdet's mask-rcnn_swin-t-p4-w7_fpn_1x_coco, which P follows.

# 8 GPUs x 2 images (P, A)
auto_scale_lr = dict(enable=False, base_batch_size=16)

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),  # P, A
    # No decay on norms. A spells it as names with 'norm'; by module type it holds for the stem's
    # BatchNorm too. The SSM's terms are those of one dimension in the released code: A_log and
    # dt_bias have two there and decay, as biases outside the SSM do (A).
    paramwise_cfg=dict(
        norm_decay_mult=0.,
        custom_keys={
            'ssm.norm.': dict(decay_mult=0.),
            'ssm.D': dict(decay_mult=0.),
            'ssm.conv.bias': dict(decay_mult=0.),
            'skip_scale': dict(decay_mult=0.),
        }))

param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),  # A
    # P; A has [8, 11]
    dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[9, 11], gamma=0.1),
]

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
