# Fine-tunes the authors' tiny model on folders of your own: data_root/{train,val}/<class>/*.jpg.
# Set data_root and num_classes, here or in a config that has this one as its base. All values are
# ours: layer-wise LR decay, no mixing of images, no average of weights (it needs long schedules).
_base_ = './groupmamba-tiny_single-head_8xb128_in1k.py'

data_root = 'data/custom'
num_classes = 10

load_from = 'checkpoints/groupmamba_tiny.pth'  # see README.md; the classifier starts anew
model = dict(
    data_preprocessor=dict(num_classes=num_classes),
    head=dict(num_classes=num_classes, topk=(1, )),
    train_cfg=None)

train_dataloader = dict(
    batch_size=64,
    drop_last=False,  # a small set may hold less than a batch
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root=data_root,
        data_prefix='train',
        pipeline=_base_.train_pipeline))
val_dataloader = dict(
    batch_size=64,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root=data_root,
        data_prefix='val',
        pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1, ))
test_evaluator = val_evaluator

optim_wrapper = dict(
    optimizer=dict(lr=2e-4),
    constructor='LearningRateDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.85))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, end=5, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-6,
        begin=5,
        end=50,
        T_max=45,
        convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=50)
custom_hooks = []
auto_scale_lr = dict(base_batch_size=64)
