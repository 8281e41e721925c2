_base_ = './groupmamba-tiny_upernet_8xb2-160k_ade20k-512x512.py'

checkpoint = 'checkpoints/groupmamba_small.pth'
model = dict(
    backbone=dict(arch='small', init_cfg=dict(checkpoint=checkpoint)),
    decode_head=dict(in_channels=[64, 128, 348, 512]))
