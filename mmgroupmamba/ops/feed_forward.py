"""The feed-forward with a depthwise convolution as one function, for inference on a CPU.

Its modules are the definition. Here the first linear map is the 1x1 convolution that it is, which
adds the bias within the product; and where the hidden map, the widest of a block, does not fit a
CPU's cache, it is made and used up in slabs of channels, which the convolution between the two
linear maps does not mix.
"""
from typing import Optional

import torch.nn.functional as F
from torch import Tensor

from .around_scan import check_tensors, depthwise_conv
from .packed_conv import PackedConvs

_SLAB = 2**23  # bytes: what pays by measurement, see docs/performance.md
_WHOLE = 5 * 2**20  # bytes of a map that is not cut
_NARROWEST = 64  # channels: below, the products take longer


def feed_forward(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, conv_weight: Tensor,
                 conv_bias: Tensor, activation: str, fc2_weight: Tensor, fc2_bias: Tensor,
                 convs: Optional[PackedConvs] = None) -> Tensor:
    """Linear map, depthwise 3x3 convolution with activation, linear map; without gradients.

    Args:
        x: Map (batch, H, W, C), in the dtype of the weights.
        fc1_weight, fc1_bias: (D, C) and (D,).
        conv_weight, conv_bias, activation: As for :func:`~.depthwise_conv` of D channels.
        fc2_weight, fc2_bias: (C', D) and (C',).
        convs: Where the weights are laid out for oneDNN, if they are.

    Returns:
        (batch, H, W, C').

    Raises:
        ValueError: Shapes or devices do not fit together, or the activation is unknown.
    """
    hidden, channels = len(fc1_weight), x.shape[-1]
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError('feed_forward: x must be (batch, H, W, C) and not empty, got '
                         f'{tuple(x.shape)}')
    check_tensors('feed_forward', x.device, x=(x, x.shape),
                  fc1_weight=(fc1_weight, (hidden, channels)), fc1_bias=(fc1_bias, (hidden, )),
                  conv_weight=(conv_weight, (hidden, 1, 3, 3)), conv_bias=(conv_bias, (hidden, )),
                  fc2_weight=(fc2_weight, (len(fc2_bias), hidden)),
                  fc2_bias=(fc2_bias, (len(fc2_weight), )))
    width = slab_width(x.numel() // x.shape[-1], hidden, x.element_size())
    image = x.permute(0, 3, 1, 2)
    y = None
    for number, first in enumerate(range(0, hidden, width)):
        slab = slice(first, first + width)
        fc1 = fc1_weight[slab, :, None, None], fc1_bias[slab]
        conv = conv_weight[slab], conv_bias[slab]
        if convs is None:  # of the slab before this one, nothing is kept beyond the next line
            wide = F.conv2d(image, *fc1)
            wide = depthwise_conv(wide.permute(0, 2, 3, 1), *conv, activation)
        else:
            wide = convs.conv(('fc1', number), image, *fc1)
            wide = convs.conv(('conv', number), wide, *conv, padding=1, groups=wide.shape[1],
                              activation=activation)
            if width == hidden:
                y = convs.conv('fc2', wide, fc2_weight[:, :, None, None], fc2_bias)
                return y.permute(0, 2, 3, 1)
            wide = wide.permute(0, 2, 3, 1)
        if y is None:
            y = F.linear(wide, fc2_weight[:, slab], fc2_bias)
        else:
            y.view(-1, y.shape[-1]).addmm_(wide.flatten(0, 2), fc2_weight[:, slab].t())
    return y


def slab_width(tokens: int, hidden: int, element_size: int) -> int:
    """Hidden channels of a slab, for a map of so many tokens."""
    size = tokens * hidden * element_size
    slabs = max(-(-size // _SLAB), 1 if size <= _WHOLE else 2)
    width = -(-hidden // slabs)
    return hidden if slabs == 1 else max(-(-width // 16) * 16, _NARROWEST)
