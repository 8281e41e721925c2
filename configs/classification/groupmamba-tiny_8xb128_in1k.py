_base_ = [
    '../_base_/models/groupmamba_cls_distilled.py', '../_base_/datasets/imagenet_bs128_224.py',
    '../_base_/schedules/imagenet_300e.py', '../_base_/classification_runtime.py'
]
