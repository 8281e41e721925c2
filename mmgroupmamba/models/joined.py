"""Modules of a backbone that is folded for inference on a GPU: several steps in one kernel.

Each computes as the plain modules it stands for, in their place or beside them.
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
    layer_norm_pair,
    linear_dtype,
)

from .groupmamba import GroupMamba
from .layers import Block, Downsample, LayerNorm, Stem, is_plain


class FirstConv(nn.Module):
    """The stem's first convolution with its folded BatchNorm and ReLU, over squares of pixels:
    (B, 3, H, W) in any layout -> (B, C, ceil(H / 2), ceil(W / 2)), channels last."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        squares = image_squares(x, self.weight.dtype, 'triton')
        return conv_relu(squares, self.weight, self.bias, 2, 'triton').permute(0, 3, 1, 2)


class NormPair(nn.Module):
    """A stage's first norm and its first layer's: (B, H, W, C) -> both norms."""

    def __init__(self, first: LayerNorm, second: LayerNorm) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.first, self.second
        if torch.is_grad_enabled() or not (is_plain(first) and is_plain(second)):
            x = first(x)
            return x, second(x)
        return layer_norm_pair(x, first.weight, first.bias, first.eps, second.weight, second.bias,
                               second.eps, None, linear_dtype(x), first.real, first.offset,
                               'triton')


def join(part: nn.Module, dtype: Optional[torch.dtype]) -> None:
    """Put such modules into a part of a model, where its norms are kernels; again, nothing more.

    Args:
        part: On a GPU, padded and with its groups' linear maps joined (``models/fuse.py``).
        dtype: In which the linear maps and convolutions will be; None means that they stay.
    """
    for stem in [m for m in part.modules() if isinstance(m, Stem)]:
        _join_first_conv(stem, dtype)
    for block in [m for m in part.modules() if isinstance(m, Block)]:
        channels = len(block.norm.weight)
        block.joins_end = (block.all_fused and dtype is not None and dtype.itemsize == 2
                           and block.norm.real is None and joins_mixer_end(channels))
        block.joins_sum = block.joins_end and joins_linear_sum(
            channels, block.ffn.fc2.in_features)
    for stage in part.stages if isinstance(part, GroupMamba) else ():
        embed, block = stage.embed, stage.blocks[0]
        if (type(embed) in (Stem, Downsample) and type(block) is Block and block.all_fused
                and is_plain(embed.norm) and is_plain(block.mixer.norm)):
            block.door = NormPair(embed.norm, block.mixer.norm)
            embed.norm = nn.Identity()


def _join_first_conv(stem: Stem, dtype: Optional[torch.dtype]) -> None:
    if dtype is None or dtype.itemsize != 2 or getattr(stem.norm, 'backend', '') != 'triton':
        return
    conv, norm, relu, *_ = stem.convs
    if not (type(conv) is nn.Conv2d and isinstance(norm, nn.Identity) and type(relu) is nn.ReLU
            and conv.weight.shape[1:] == (3, 7, 7) and is_plain(conv, {nn.Conv2d})):
        return
    weight = F.pad(conv.weight, (1, 0, 1, 0))  # 7 x 7 at the end of 8 x 8
    weight = weight.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (out, 3, 4, 2, 4, 2)
    weight = F.pad(weight.permute(2, 4, 1, 3, 5, 0).flatten(2, 4), (0, 0, 0, 4)).to(dtype)
    if convolves_with_relu(weight):
        stem.convs[0] = FirstConv(weight.contiguous(), conv.bias.to(dtype))
        stem.convs[2] = nn.Identity()
        stem.channels_last = False
