# A Swin of nano's size in nano's place: same head, data, schedule and seed, for comparison only
_base_ = '../groupmamba-nano_upernet_1xb8-2k_camvid-240x320.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        embed_dims=16,
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 4, 8),
        drop_path_rate=0.),
    decode_head=dict(in_channels=[16, 32, 64, 128]),
    auxiliary_head=dict(in_channels=64))
