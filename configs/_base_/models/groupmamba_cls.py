# GroupMamba with one linear classifier, for ImageNet without distillation and for fine-tuning.
# Only classification imports mmpretrain, and so only its configs name this module.
custom_imports = dict(
    imports=['mmgroupmamba.models.classification'], allow_failed_imports=False)

model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(
        num_classes=1000,
        mean=[123.675, 116.28, 103.53],  # RGB
        std=[58.395, 57.12, 57.375],
        to_rgb=True),
    backbone=dict(
        type='mmgroupmamba.GroupMamba',
        arch='tiny',
        out_indices=(3, ),
        drop_path_rate=0.05,  # R: the value really passed to the model, for all sizes
        final_norm=False),  # norm4 belongs to the class token
    neck=dict(type='mmgroupmamba.ClassBlockNeck', embed_dim=448, mlp_ratio=4),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=448,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        topk=(1, 5)),
    # R: one of the two for each batch, evenly
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]))
