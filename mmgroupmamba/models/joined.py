"""For inference on a GPU: which steps of a backbone are one kernel.

Each computes as the plain modules it stands for, which stay where they are and have their say where
they are replaced or hooked.
"""
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmgroupmamba.ops import (
    conv_relu,
    convolves_with_relu,
    image_squares,
    joins_linear_sum,
    joins_mixer_end,
    linear_dtype,
)

from .groupmamba import GroupMamba
from .layers import Block, ConvFFN, LayerNorm, Stem, is_plain


class FirstConv(nn.Module):
    """The stem's first convolution with its folded BatchNorm and ReLU, over squares of pixels:
    (B, 3, H, W) in any layout -> (B, C, ceil(H / 2), ceil(W / 2)), channels last."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, dtype = self.weight, self.bias, linear_dtype(x)
        if torch.is_autocast_enabled(x.device.type):  # which may be another than was said
            weight, bias = weight.to(dtype), bias.to(dtype)
        learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        backend = 'torch' if learns or not convolves_with_relu(weight) else 'triton'
        squares = image_squares(x, dtype, backend)
        return conv_relu(squares, weight, bias, 2, backend).permute(0, 3, 1, 2)


def join(part: nn.Module, dtype: Optional[torch.dtype]) -> None:
    """Have a part of a model take steps at once where its norms are kernels; again, nothing less.

    Args:
        part: On a GPU, padded and with its groups' linear maps joined (``models/fuse.py``).
        dtype: In which the linear maps and convolutions will be; None means that they stay.
    """
    half = dtype is not None and dtype.itemsize == 2
    for stem in [m for m in part.modules() if isinstance(m, Stem)]:
        if half and getattr(stem.norm, 'backend', '') == 'triton':
            _join_first_conv(stem, dtype)
    for block in [m for m in part.modules() if isinstance(m, Block)]:
        if (half and block.all_fused and type(block.norm) is LayerNorm and block.norm.real is None
                and type(block.ffn) is ConvFFN):
            channels = len(block.norm.weight)
            block.joins_end |= joins_mixer_end(channels)
            block.joins_sum |= block.joins_end and joins_linear_sum(
                channels, block.ffn.fc2.in_features)
    for stage in part.stages if isinstance(part, GroupMamba) else ():
        block = stage.blocks[0]
        stage.joins_norms |= (type(block) is Block and block.all_fused
                              and getattr(stage.embed.norm, 'backend', '') == 'triton')


def over_squares(weight: Tensor) -> Tensor:
    """The weight (out, 3, 7, 7) of a convolution of stride 2 and padding 3 as that of one of stride
    1 over :func:`~mmgroupmamba.ops.image_squares`, (out, 16, 4, 4), two squares of padding before
    and one after."""
    weight = F.pad(weight, (1, 0, 1, 0))  # 7 x 7 at the end of 8 x 8
    weight = weight.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (out, 3, 4, 2, 4, 2)
    return F.pad(weight.permute(0, 1, 3, 5, 2, 4).flatten(1, 3), (0, 0, 0, 0, 0, 4))


def _join_first_conv(stem: Stem, dtype: torch.dtype) -> None:
    conv, norm, relu, *_ = stem.convs
    if not (type(conv) is nn.Conv2d and isinstance(norm, nn.Identity) and type(relu) is nn.ReLU
            and conv.weight.shape[1:] == (3, 7, 7) and is_plain(conv, {nn.Conv2d})):
        return
    weight = over_squares(conv.weight).permute(2, 3, 1, 0).to(dtype)
    if convolves_with_relu(weight):
        stem.convs[0] = FirstConv(weight.contiguous(), conv.bias.to(dtype))
        stem.convs[2] = nn.Identity()
        stem.channels_last = False
