"""What stands around the scan, as Triton kernels: one launch forward, one backward and a sum.

The kernels are in ``around_scan_triton_kernels``; Triton is imported when the first runs. The
operators are known to torch.library, so torch.compile sees no graph break. Gradients are bitwise
reproducible. Nothing is kept for the backward but what went in.
"""
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from .scan_triton import why_not as why_not  # the same Triton, the same devices

_LANES = 256  # of a tile of the convolution, two a thread
_PROGRAMS = 1024  # of a launch that fills a large GPU twice over
# Columns of a lane. An input pixel is loaded (K + 2) / K times forward. Backward, z is computed
# (K + 2) / K times; a fourth column would take 217 registers instead of 128.
_FORWARD, _BACKWARD = 4, 3


class ConvTile(NamedTuple):
    """Compile-time sizes of the convolution's kernels.

    Attributes:
        COLUMNS: Columns of a lane.
        STRIPS: Lanes of a channel.
        CHANNELS: Channels of a tile.
    """
    COLUMNS: int
    STRIPS: int
    CHANNELS: int


def conv_sizes(batch: int, height: int, width: int, channels: int, columns: int
               ) -> tuple[ConvTile, int, int]:
    """Tile, the rows that a lane walks, and the programs of a channel tile."""
    block = 64 if (channels - 1) % 64 >= 32 else 32  # the one that wastes fewer lanes
    tile = ConvTile(columns, _LANES // block, block)
    across = -(-batch * -(-width // columns) // tile.STRIPS)
    programs = across * -(-channels // block)
    # no fewer than 8 rows: each part reads two or four more
    rows = -(-height // min(-(-_PROGRAMS // programs), -(-height // 8)))
    return tile, rows, across * -(-height // rows)


def _refuse_float64(*tensors: Tensor) -> None:
    if any(t.dtype == torch.float64 for t in tensors):
        raise ValueError("the Triton kernels have no float64: use backend='torch'")


def _align(channels: int, most: int) -> int:
    """The largest power of two that divides `channels`, at most `most`."""
    return min(channels & -channels, most)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """See :func:`mmgroupmamba.ops.depthwise_conv`. A map that is not contiguous is copied.

    Raises:
        ValueError: float64 input.
    """
    _refuse_float64(x, weight, bias)
    return _conv_forward(x.contiguous(), weight.contiguous(), bias.contiguous(), activation)


def _launch_conv(kernel: str, columns: int, x: Tensor, *tensors: Tensor, activation: str) -> None:
    batch, height, width, channels = x.shape
    tile, rows, programs = conv_sizes(*x.shape, columns)
    align = _align(channels, 2)  # what a thread loads at once
    kernels = import_module('.around_scan_triton_kernels', __package__)
    with torch.cuda.device_of(x):
        getattr(kernels, kernel)[(programs * -(-channels // tile.CHANNELS), )](
            x, *tensors, batch, height, width, rows, channels // align,
            ACTIVATION=activation, ALIGN=align, **tile._asdict())


@torch.library.custom_op('mmgroupmamba::triton_depthwise_conv', mutates_args=())
def _conv_forward(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    y = torch.empty_like(x)
    _launch_conv('conv_forward_kernel', _FORWARD, x, weight, bias, y, activation=activation)
    return y


@_conv_forward.register_fake
def _(x, weight, bias, activation):
    return torch.empty_like(x)


@torch.library.custom_op('mmgroupmamba::triton_depthwise_conv_backward', mutates_args=())
def _conv_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, activation: str
                   ) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    channels = x.shape[-1]
    dx = torch.empty_like(x)
    programs = conv_sizes(*x.shape, _BACKWARD)[2]
    sums = x.new_empty(programs, 10, channels, dtype=torch.float32)
    _launch_conv('conv_backward_kernel', _BACKWARD, x, grad.contiguous(), weight, bias, dx, sums,
                 activation=activation)
    sums = sums.sum(0)
    dweight = sums[:9].t().reshape(weight.shape)
    return dx, dweight.to(weight.dtype), sums[9].to(bias.dtype, copy=True)


@_conv_backward.register_fake
def _(grad, x, weight, bias, activation):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _save_conv(ctx, inputs, output):
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_conv(ctx, grad):
    return (*_conv_backward(grad, *ctx.saved_tensors, ctx.activation), None)


_conv_forward.register_autograd(_differentiate_conv, setup_context=_save_conv)
