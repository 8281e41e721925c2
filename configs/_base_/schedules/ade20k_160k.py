# Sources: P the paper, A mmseg's swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k.

# 8 GPUs x 2 images (P, A)
auto_scale_lr = dict(enable=False, base_batch_size=16)

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),  # P, A
    # no decay on norms (A), by module type: the stem's and the heads' BatchNorm among them.
    # The SSM's terms as in coco_1x.py
    paramwise_cfg=dict(
        norm_decay_mult=0.,
        custom_keys={
            'ssm.norm.': dict(decay_mult=0.),
            'ssm.D': dict(decay_mult=0.),
            'ssm.conv.bias': dict(decay_mult=0.),
            'skip_scale': dict(decay_mult=0.),
        }))

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),  # A
    dict(type='PolyLR', power=1.0, eta_min=0., by_epoch=False, begin=1500, end=160000),  # A
]

train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
