# Nano taught by a nano that was trained before: hard distillation in minutes on a CPU.
_base_ = './groupmamba-nano_1xb16_shapes-128px.py'

model = dict(
    type='mmgroupmamba.DistilledImageClassifier',
    head=dict(type='mmgroupmamba.DistilledLinearHead'),
    distillation='hard',
    alpha=0.5,
    # the base config's model, trained by the base config
    teacher=dict(
        _base_.model,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/groupmamba-nano_1xb16_shapes-128px/epoch_28.pth')))
