# Semantic FPN as PVT (arXiv 2102.12122) trained it, and mmseg's Twins configs after it: batch 16,
# AdamW 1e-4, weight decay 1e-4, poly 0.9, 80k iterations. No decay on norms: ours, as elsewhere
_base_ = './ade20k_160k.py'

auto_scale_lr = dict(base_batch_size=16)  # 4 GPUs x 4 images
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=1e-4))
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=0., by_epoch=False, begin=0, end=80000),
]
train_cfg = dict(max_iters=80000, val_interval=8000)
