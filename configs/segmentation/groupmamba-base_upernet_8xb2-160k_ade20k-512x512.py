_base_ = './groupmamba-tiny_upernet_8xb2-160k_ade20k-512x512.py'

checkpoint = 'checkpoints/groupmamba_base.pth'
model = dict(
    backbone=dict(arch='base', init_cfg=dict(checkpoint=checkpoint)),
    decode_head=dict(in_channels=[96, 192, 424, 512]),
    auxiliary_head=dict(in_channels=424))
