# What the three tasks share. Hooks stand in default_hooks, a dict, because a child config adds to
# a dict and replaces a list: custom_hooks stays free for the user.
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=3),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    # load_from and resume: official names translated, what does not match named
    checkpoint_guard=dict(type='mmgroupmamba.CheckpointHook'),
    # labels outside the classes, heads that do not fit the data: named before they crash
    data_guard=dict(type='mmgroupmamba.DataCheckHook'))

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))

vis_backends = [dict(type='LocalVisBackend')]
log_level = 'INFO'
load_from = None
resume = False
randomness = dict(seed=None, deterministic=False)
