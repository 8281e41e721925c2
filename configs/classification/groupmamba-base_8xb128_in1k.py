_base_ = './groupmamba-tiny_8xb128_in1k.py'

model = dict(
    backbone=dict(arch='base'), neck=dict(embed_dim=512), head=dict(in_channels=512))
