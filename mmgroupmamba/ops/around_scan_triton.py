"""What stands around the scan, as Triton kernels: one launch forward, one backward and a sum.

The kernels are in ``around_scan_triton_kernels``; Triton is imported when the first runs. The
operators are known to torch.library, so torch.compile sees no graph break. Gradients are bitwise
reproducible. Nothing is kept for the backward but what went in, and the sum that came out.
"""
from importlib import import_module
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .scan_triton import why_not as why_not  # the same Triton, the same devices

_LANES = 256  # of a tile of the convolution, two a thread
_PROGRAMS = 1024  # of a launch that fills a large GPU twice over
# Columns of a lane. An input pixel is loaded (K + 2) / K times forward. Backward, z is computed
# (K + 2) / K times; a fourth column would take 217 registers instead of 128.
_FORWARD, _BACKWARD = 4, 3


_PARTS = 512  # of what the norms' weight and bias are summed over: four a multiprocessor


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


class NormTile(NamedTuple):
    """Compile-time sizes of the norms' kernels.

    Attributes:
        ALIGN: A power of two that divides the channels.
        ROWS: Tokens of a tile.
        BLOCK: Channels of a tile, all that are normed together.
    """
    ALIGN: int
    ROWS: int
    BLOCK: int


def norm_sizes(tokens: int, dim: int) -> tuple[NormTile, int, int]:
    """Tile, how many tiles of tokens there are, and how many of them are summed together."""
    block = 1 << max(dim - 1, 15).bit_length()
    tile = NormTile(_align(dim, 8), max(1024 // block, 1), block)
    blocks = -(-tokens // tile.ROWS)
    return tile, blocks, -(-blocks // _PARTS)


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


def gated_layer_norm(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See :func:`mmgroupmamba.ops.gated_layer_norm`. What is not contiguous is copied.

    Raises:
        ValueError: float64 input.
    """
    _refuse_float64(y, gate, weight, bias)
    return _gate_forward(*(t.contiguous() for t in (y, gate, weight, bias)), eps)


@torch.library.custom_op('mmgroupmamba::triton_gated_layer_norm', mutates_args=())
def _gate_forward(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    kernels = import_module('.around_scan_triton_kernels', __package__)
    groups, dim = weight.shape
    tokens = y.numel() // weight.numel()
    tile, blocks, _ = norm_sizes(tokens, dim)
    out = torch.empty_like(gate)
    with torch.cuda.device_of(y):
        kernels.gate_forward_kernel[(blocks * groups, )](
            y, gate, weight, bias, out, tokens, groups, dim // tile.ALIGN, eps, **tile._asdict())
    return out


@_gate_forward.register_fake
def _(y, gate, weight, bias, eps):
    return torch.empty_like(gate)


@torch.library.custom_op('mmgroupmamba::triton_gated_layer_norm_backward', mutates_args=())
def _gate_backward(grad: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float
                   ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y, gate, weight and bias."""
    kernels = import_module('.around_scan_triton_kernels', __package__)
    groups, dim = weight.shape
    tokens = y.numel() // weight.numel()
    tile, blocks, together = norm_sizes(tokens, dim)
    parts = -(-blocks // together)
    dy, dgate = torch.empty_like(y), torch.empty_like(gate)
    sums = y.new_empty(parts, 2, groups, dim, dtype=torch.float32)
    with torch.cuda.device_of(y):
        kernels.gate_backward_kernel[(parts * groups, )](
            grad.contiguous(), y, gate, weight, bias, dy, dgate, sums, tokens, groups,
            dim // tile.ALIGN, together, eps, **tile._asdict())
    dweight, dbias = sums.sum(0)
    return dy, dgate, dweight.to(weight.dtype, copy=True), dbias.to(bias.dtype, copy=True)


@_gate_backward.register_fake
def _(grad, y, gate, weight, bias, eps):
    return tuple(torch.empty_like(t) for t in (y, gate, weight, bias))


def _save_gate(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_gate(ctx, grad):
    return (*_gate_backward(grad, *ctx.saved_tensors, ctx.eps), None)


_gate_forward.register_autograd(_differentiate_gate, setup_context=_save_gate)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float,
                   norm_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :func:`mmgroupmamba.ops.add_layer_norm`. What is not contiguous is copied.

    Raises:
        ValueError: float64 input.
    """
    _refuse_float64(x, residual, weight, bias)
    return _add_norm_forward(*(t.contiguous() for t in (x, residual, weight, bias)), eps,
                             norm_dtype)


@torch.library.custom_op('mmgroupmamba::triton_add_layer_norm', mutates_args=())
def _add_norm_forward(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float,
                      norm_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x + residual in their promoted dtype, and its norm in norm_dtype."""
    kernels = import_module('.around_scan_triton_kernels', __package__)
    dim = x.shape[-1]
    tokens = x.numel() // dim
    tile, blocks, _ = norm_sizes(tokens, dim)
    total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    normed = torch.empty_like(x, dtype=norm_dtype)
    with torch.cuda.device_of(x):
        kernels.add_norm_forward_kernel[(blocks, )](
            x, residual, weight, bias, total, normed, tokens, dim // tile.ALIGN, eps,
            **tile._asdict())
    return total, normed


@_add_norm_forward.register_fake
def _(x, residual, weight, bias, eps, norm_dtype):
    return (torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype)),
            torch.empty_like(x, dtype=norm_dtype))


@torch.library.custom_op('mmgroupmamba::triton_add_layer_norm_backward', mutates_args=())
def _add_norm_backward(grad_total: Optional[Tensor], grad: Tensor, total: Tensor, weight: Tensor,
                       eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum and, in float32, of weight and bias."""
    kernels = import_module('.around_scan_triton_kernels', __package__)
    dim = total.shape[-1]
    tokens = total.numel() // dim
    tile, blocks, together = norm_sizes(tokens, dim)
    parts = -(-blocks // together)
    dx = torch.empty_like(total)
    sums = total.new_empty(parts, 2, dim, dtype=torch.float32)
    if grad_total is not None:
        grad_total = grad_total.contiguous()
    with torch.cuda.device_of(total):
        kernels.add_norm_backward_kernel[(parts, )](
            grad_total, grad.contiguous(), total, weight, dx, sums, tokens, dim // tile.ALIGN,
            together, eps, **tile._asdict())
    dweight, dbias = sums.sum(0)
    return dx, dweight.clone(), dbias.clone()


@_add_norm_backward.register_fake
def _(grad_total, grad, total, weight, eps):
    return (torch.empty_like(total), *(weight.new_empty(weight.shape, dtype=torch.float32)
                                       for _ in range(2)))


def _save_add_norm(ctx, inputs, output):
    x, residual, weight, bias, ctx.eps, _ = inputs
    ctx.dtypes = x.dtype, residual.dtype, bias.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], weight)


def _differentiate_add_norm(ctx, grad_total, grad):
    total, weight = ctx.saved_tensors
    of_x, of_residual, of_bias = ctx.dtypes
    if grad is None:
        dx, dweight, dbias = grad_total, None, None
    else:
        dx, dweight, dbias = _add_norm_backward(grad_total, grad, total, weight, ctx.eps)
        dweight, dbias = dweight.to(weight.dtype), dbias.to(of_bias)
    return dx.to(of_x), dx.to(of_residual), dweight, dbias, None, None


_add_norm_forward.register_autograd(_differentiate_add_norm, setup_context=_save_add_norm)
