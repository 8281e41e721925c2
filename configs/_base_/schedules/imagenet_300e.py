# Sources: P the paper, R the official classification code.

# 8 GPUs x 128 images (R)
auto_scale_lr = dict(enable=False, base_batch_size=1024)

optim_wrapper = dict(
    type='AmpOptimWrapper',  # R; the scan itself stays in float32
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
    # R: no decay where a tensor of the released model has one dimension or its name ends in
    # .bias. The backbone stacks the tensors of the four groups, so the ones whose own shape
    # would say otherwise are named.
    paramwise_cfg=dict(
        norm_decay_mult=0.,
        bias_decay_mult=0.,
        flat_decay_mult=0.,  # D and skip_scale
        custom_keys={
            'ssm.norm.': dict(decay_mult=0.),  # (4, d) stacks four (d,)
            # two dimensions and more in the released code, and so they decay there (R)
            'ssm.A_log': dict(decay_mult=1.),
            'ssm.x_proj': dict(decay_mult=1.),
            'ssm.dt_proj': dict(decay_mult=1.),
            'ssm.dt_bias': dict(decay_mult=1.),  # stacks four dt_projs_bias of (1, d)
        }))

# R: 20 epochs of linear warm-up from 1e-6, cosine over the other 280 to 1e-5, each iteration
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, end=20, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-5,
        begin=20,
        end=300,
        T_max=280,
        convert_to_iter_based=True),
]

train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()

# R: decay 0.9999, buffers too. The average is what is evaluated; evaluate_on_origin=True adds the
# plain weights
custom_hooks = [
    dict(
        type='EMAHook',
        ema_type='ExponentialMovingAverage',
        momentum=1e-4,
        update_buffers=True)
]
