# Fine-tunes the authors' base model at 384x384. The paper has no such model: the schedule is
# Swin's for the same step (30 epochs, constant LR 1e-5, weight decay 1e-8), with 512 images a step.
# The teacher takes 224x224 only, so the average of both classifiers is trained on the labels.
_base_ = './groupmamba-tiny_single-head_8xb128_in1k.py'

load_from = 'checkpoints/groupmamba_base.pth'  # see README.md
model = dict(
    backbone=dict(arch='base'),
    neck=dict(embed_dim=512),
    head=dict(type='mmgroupmamba.DistilledLinearHead', in_channels=512))

train_pipeline = _base_.train_pipeline
train_pipeline[1].scale = 384
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = 438  # 256 / 224 of the crop
test_pipeline[2].crop_size = 384

train_dataloader = dict(batch_size=64, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=64, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
param_scheduler = [dict(type='LinearLR', start_factor=1e-3, end=1, convert_to_iter_based=True)]
train_cfg = dict(max_epochs=30)
auto_scale_lr = dict(base_batch_size=512)
