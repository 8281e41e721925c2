# A Swin of nano's size in nano's place: same neck, heads, data, schedule and seed, for comparison
# only
_base_ = '../mask-rcnn_groupmamba-nano_fpn_1xb4-12e_camvid.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        embed_dims=16,
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 4, 8),
        drop_path_rate=0.),
    neck=dict(in_channels=[16, 32, 64, 128]))
