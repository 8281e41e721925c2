# UperNet's optimiser and schedule of ADE20K at half the batch, as SegFormer (mmseg's
# segformer_mit-b0_8xb1-160k_cityscapes-1024x1024) has them for Cityscapes
_base_ = './ade20k_160k.py'

auto_scale_lr = dict(base_batch_size=8)  # 4 GPUs x 2 images
