"""What stands around the scan, as Triton kernels: one launch forward, one backward and a sum.

The kernels are in ``around_scan_triton_kernels``; Triton is imported when the first runs. The
operators are known to torch.library, so torch.compile sees no graph break. Gradients are bitwise
reproducible. Nothing is kept for the backward but what went in, and the sum that came out.
"""
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .directions import DIRECTIONS
from .kernel_launch import launch
from .operator import Operator
from .precision import cast, linear_dtype, without_autocast
from .scan_triton import why_not as why_not  # the same Triton, the same devices

GROUPS = len(DIRECTIONS)
_THREADS, _LANES = 64, 256  # of a tile of the convolution: forward; backward, two a thread
_PROGRAMS = 1024  # of a launch of 4 warps that fills a large GPU twice over
# Columns of a lane. An input pixel is loaded (K + 2) / K times forward. Backward, z is computed
# (K + 2) / K times; a fourth column would take 217 registers instead of 128.
_FORWARD, _BACKWARD = (4, 7), 3
_WIDE = 512  # channels of a map that comes from memory, not from a cache
_FORWARD_WARPS = 2  # of the norms' kernels: 16 or 32 values a thread, up to a quarter faster

_PARTS = 512  # of what the norms' weight and bias are summed over: four a multiprocessor
_IMAGE_PARTS = 256  # at most, of an image's sum over its tokens: one program sums them up
_SUMS = 4096  # of its sums that it loads at once, up to 32 a thread


class ConvTile(NamedTuple):
    """Compile-time sizes of the convolution's kernels.

    Attributes:
        COLUMNS: Columns of a lane.
        STRIPS: Lanes of a channel.
        CHANNELS: Channels of a tile.
        AHEAD: Rows that are loaded ahead of their use.
    """
    COLUMNS: int
    STRIPS: int
    CHANNELS: int
    AHEAD: int = 1


@lru_cache(maxsize=1024)
def conv_sizes(batch: int, height: int, width: int, channels: int, backward: bool
               ) -> tuple[ConvTile, int, int]:
    """Tile, the rows that a lane walks, and the programs of a channel tile."""
    block = 64 if (channels - 1) % 64 >= 32 else 32  # the one that wastes fewer lanes
    if backward:
        tile = ConvTile(_BACKWARD, _LANES // block, block)
    else:
        tile = _forward_tile(width, channels, block)
    columns, block = tile.COLUMNS, tile.CHANNELS
    across = -(-batch * -(-width // columns) // tile.STRIPS)
    programs = across * -(-channels // block)
    # no fewer than 8 rows: each part reads two or four more
    rows = -(-height // min(-(-_PROGRAMS // programs), -(-height // 8)))
    return tile, rows, across * -(-height // rows)


def _forward_tile(width: int, channels: int, block: int) -> ConvTile:
    """The fastest of those measured (H200, batch 128; 1792 channels of 7 x 7 to 64 of 56 x 56)."""
    wide = channels >= _WIDE
    # those that waste fewer lanes; where it is the same, 4 if the map is wide
    columns = min(_FORWARD if wide else _FORWARD[::-1], key=lambda c: -(-width // c) * c)
    if wide and columns == 4 and channels % 128 == 0:  # registers for four channels a thread
        return ConvTile(columns, 2, 128, 2)
    return ConvTile(columns, 2 * _THREADS // block, block, 2 if wide or block == 64 else 1)


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


def _block(channels: int) -> int:
    """Of a tile that holds all channels: a power of two, at least 16."""
    return 1 << max(channels - 1, 15).bit_length()


def norm_sizes(tokens: int, dim: int, images: int = 1, forward: bool = False
               ) -> tuple[NormTile, int, int]:
    """Tile, how many tiles of tokens there are in an image, and how many are summed together."""
    block = _block(dim)
    rows = max(1024 // block, 1)
    if forward and block >= 128 and images * tokens >= 2 * rows * _PROGRAMS:
        rows *= 2  # 32 values a thread, where there are enough
    tile = NormTile(_align(dim, 8), rows, block)
    blocks = -(-tokens // tile.ROWS)
    return tile, blocks, -(-blocks // _PARTS)


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _refuse_float64(*tensors: Tensor) -> None:
    if any(t.dtype == torch.float64 for t in tensors):
        raise ValueError("the Triton kernels have no float64: use backend='torch'")


def _align(channels: int, most: int) -> int:
    """The largest power of two that divides `channels`, at most `most`."""
    return min(channels & -channels, most)


def _pitch(x: Tensor) -> int:
    """From a pixel (batch, H, W, C) to the next."""
    return x.stride(2) if x.shape[2] > 1 else x.stride(1) if x.shape[1] > 1 else x.stride(0)


def _pitched(x: Tensor) -> Tensor:
    """A map (batch, H, W, C) whose pixels are evenly apart, as far as the kernels can count."""
    _, height, width, channels = x.shape
    pitch = _pitch(x)
    even = (width * height * pitch, width * pitch, pitch, 1)
    same = all(n == 1 or stride == want for n, stride, want in zip(x.shape, x.stride(), even))
    return x if same and pitch >= channels and pitch % _align(channels, 8) == 0 else x.contiguous()


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """See :func:`mmgroupmamba.ops.depthwise_conv`. A map is read where it lies if it is contiguous
    or some channels of a map that is; else it is copied.

    Raises:
        ValueError: float64 input.
    """
    _refuse_float64(x, weight, bias)
    return CONV(_pitched(x), weight.contiguous(), bias.contiguous(), activation)


@lru_cache(maxsize=None)
def _kernels() -> ModuleType:
    return import_module('.around_scan_triton_kernels', __package__)


def _conv_forward(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    y = _contiguous_like(x)
    batch, height, width, channels = x.shape
    tile, rows, programs = conv_sizes(*x.shape, False)
    launch(_kernels().conv_forward_kernel, programs * -(-channels // tile.CHANNELS),
           (x, weight, bias, y), (batch, height, width, rows), ACTIVATION=activation, DIM=channels,
           PITCH=_pitch(x), **tile._asdict(), num_warps=_THREADS // 32)
    return y


def _conv_forward_fake(x, weight, bias, activation):
    return _contiguous_like(x)


def _conv_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, activation: str
                   ) -> tuple[Tensor, Tensor]:
    """Gradients of x and, (10, C) in float32, of the weight's nine taps and the bias."""
    dx = _contiguous_like(x)
    return dx, conv_backward(grad, x, weight, bias, activation, dx)


def conv_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, activation: str,
                  dx: Tensor) -> Tensor:
    """The gradients of taps and bias, (10, C) in float32. That of x fills dx, (B, H, W, C), which
    is contiguous or has its pixels as far apart as those of x."""
    batch, height, width, channels = x.shape
    tile, rows, programs = conv_sizes(*x.shape, True)
    sums = x.new_empty(programs, 10, channels, dtype=torch.float32)
    align = _align(channels, 2)  # what a thread loads at once
    launch(_kernels().conv_backward_kernel, programs * -(-channels // tile.CHANNELS),
           (x, grad.contiguous(), weight, bias, dx, sums),
           (batch, height, width, rows, channels // align, _pitch(x) // align),
           ACTIVATION=activation, PITCHED=not dx.is_contiguous(), ALIGN=align,
           COLUMNS=tile.COLUMNS, STRIPS=tile.STRIPS, CHANNELS=tile.CHANNELS,
           num_warps=_LANES // 64)
    return sums.sum(0)


def _conv_backward_fake(grad, x, weight, bias, activation):
    return _contiguous_like(x), x.new_empty(10, x.shape[-1], dtype=torch.float32)


def _save_conv(ctx, inputs, output):
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_conv(ctx, backward, grad):
    x, weight, bias = ctx.saved_tensors
    dx, sums = backward(grad, x, weight, bias, ctx.activation)
    dweight = sums[:9].t().reshape(weight.shape)
    return dx, dweight.to(weight.dtype), sums[9].to(bias.dtype), None


CONV = Operator('triton_depthwise_conv', _conv_forward, _conv_backward, _conv_forward_fake,
                _conv_backward_fake, _save_conv, _differentiate_conv)


def depthwise_conv_linear(x: Tensor, conv_weight: Tensor, conv_bias: Tensor, activation: str,
                          weight: Tensor, bias: Tensor) -> Tensor:
    """See :func:`mmgroupmamba.ops.depthwise_conv_linear`.

    Raises:
        ValueError: float64 input.
    """
    _refuse_float64(x, conv_weight, conv_bias)
    conv = _pitched(x), conv_weight.contiguous(), conv_bias.contiguous()
    return _ConvLinear.apply(*conv, activation, weight, bias, linear_dtype(x))


class _ConvLinear(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x: Tensor, conv_weight: Tensor, conv_bias: Tensor, activation: str,
                weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.activation, ctx.dtypes = activation, (weight.dtype, bias.dtype)
        with without_autocast(x.device.type):
            wide = _conv_forward(x, conv_weight, conv_bias, activation)
            wide, weight, bias = cast(dtype, wide, weight, bias)
            ctx.save_for_backward(x, conv_weight, conv_bias, weight)
            return F.linear(wide, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        x, conv_weight, conv_bias, weight = ctx.saved_tensors
        conv = x, conv_weight, conv_bias
        of_weight, of_bias = ctx.dtypes
        with without_autocast(x.device.type):
            wide = _conv_forward(*conv, ctx.activation).to(grad.dtype).flatten(0, 2)
            tokens = grad.reshape(-1, grad.shape[-1])
            dweight, dbias = tokens.t() @ wide, tokens.sum(0)
            dwide = (tokens @ weight).view(x.shape).to(x.dtype)
            dx, sums = _conv_backward(dwide, *conv, ctx.activation)
        dconv_weight = sums[:9].t().reshape(conv_weight.shape)
        return (dx, dconv_weight.to(conv_weight.dtype), sums[9].to(conv_bias.dtype), None,
                dweight.to(of_weight), dbias.to(of_bias), None)


def _counted(channels: int, groups: int, real: Optional[int]) -> dict[str, int]:
    """Of every how many channels how many count, compiled in; 0 of 0 are all."""
    return dict(WIDTH=0, REAL=0) if real is None else dict(WIDTH=channels // groups, REAL=real)


def gated_layer_norm(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float,
                     real: Optional[int]) -> Tensor:
    """See :func:`mmgroupmamba.ops.gated_layer_norm`. The gate may be some channels of a map; what
    else is not contiguous is copied.

    Raises:
        ValueError: float64 input.
    """
    _refuse_float64(y, gate, weight, bias)
    y, weight, bias = (t.contiguous() for t in (y, weight, bias))
    return GATE(y, _pitched(gate), weight, bias, eps, real)


def _gate_forward(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float,
                  real: Optional[int]) -> Tensor:
    groups, dim = weight.shape
    tokens = y.numel() // weight.numel()
    tile, blocks, _ = norm_sizes(tokens, dim, forward=True)
    out = _contiguous_like(gate)
    launch(_kernels().gate_forward_kernel, blocks * groups, (y, gate, weight, bias, out),
           (tokens, groups, dim // tile.ALIGN, _pitch(gate) // tile.ALIGN, float(eps)),
           **_counted(dim, 1, real), **tile._asdict(), num_warps=_FORWARD_WARPS)
    return out


def _gate_forward_fake(y, gate, weight, bias, eps, real):
    return _contiguous_like(gate)


def _gate_backward(grad: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float,
                   real: Optional[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y and gate and, (2, G, d) in float32, of weight and bias."""
    dgate = _contiguous_like(gate)
    dy, sums = gate_backward(grad, y, gate, weight, bias, eps, real, dgate)
    return dy, dgate, sums


def gate_backward(grad: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float,
                  real: Optional[int], dgate: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of y and, (2, G, d) in float32, of weight and bias. The gate's fills dgate,
    (B, H, W, G * d), which is contiguous or has its pixels as far apart as those of the gate."""
    groups, dim = weight.shape
    tokens = y.numel() // weight.numel()
    tile, blocks, together = norm_sizes(tokens, dim)
    parts = -(-blocks // together)
    dy = torch.empty_like(y)
    sums = y.new_empty(parts, 2, groups, dim, dtype=torch.float32)
    launch(_kernels().gate_backward_kernel, parts * groups,
           (grad.contiguous(), y, gate, weight, bias, dy, dgate, sums),
           (tokens, groups, dim // tile.ALIGN, _pitch(gate) // tile.ALIGN, together, float(eps)),
           PITCHED=not dgate.is_contiguous(), **_counted(dim, 1, real), **tile._asdict())
    return dy, sums.sum(0)


def _gate_backward_fake(grad, y, gate, weight, bias, eps, real):
    return (torch.empty_like(y), _contiguous_like(gate),
            y.new_empty(2, *weight.shape, dtype=torch.float32))


def _save_gate(ctx, inputs, output):
    *tensors, ctx.eps, ctx.real = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_gate(ctx, backward, grad):
    y, gate, weight, bias = ctx.saved_tensors
    dy, dgate, sums = backward(grad, y, gate, weight, bias, ctx.eps, ctx.real)
    return dy, dgate, sums[0].to(weight.dtype), sums[1].to(bias.dtype), None, None


GATE = Operator('triton_gated_layer_norm', _gate_forward, _gate_backward, _gate_forward_fake,
                _gate_backward_fake, _save_gate, _differentiate_gate)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, norm_dtype: torch.dtype,
               real: Optional[int], offset: Optional[Tensor] = None) -> Tensor:
    """See :func:`mmgroupmamba.ops.layer_norm`. What is not contiguous is copied. Where a gradient
    is wanted, `offset` is added by PyTorch.

    Raises:
        ValueError: float64 input.
    """
    _refuse_float64(x, weight, bias, *(() if offset is None else (offset, )))
    if offset is not None:
        offset = offset.contiguous()
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias, offset)):
            x, offset = x + offset, None
    x, weight, bias = (t.contiguous() for t in (x, weight, bias))
    return NORM(x, weight, bias, eps, norm_dtype, real, offset)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float,
                   norm_dtype: torch.dtype, real: Optional[int]) -> tuple[Tensor, Tensor]:
    """See :func:`mmgroupmamba.ops.add_layer_norm`. What is not contiguous is copied.

    Raises:
        ValueError: float64 input.
    """
    _refuse_float64(x, residual, weight, bias)
    return ADD_NORM(*(t.contiguous() for t in (x, residual, weight, bias)), eps, norm_dtype, real)


def _launch_norm(x: Tensor, residual: Optional[Tensor], weight: Tensor, bias: Tensor,
                 total: Optional[Tensor], out: Tensor, eps: float, real: Optional[int],
                 offset: Optional[Tensor] = None) -> None:
    dim = x.shape[-1]
    tokens = x.numel() // dim
    tile, blocks, _ = norm_sizes(tokens, dim, forward=True)
    launch(_kernels().norm_forward_kernel, blocks,
           (x, residual, offset, weight, bias, total, out),
           (tokens, dim // tile.ALIGN, float(eps)), **_counted(dim, GROUPS, real),
           **tile._asdict(), num_warps=_FORWARD_WARPS)


def norm_backward(grad_total: Optional[Tensor], grad: Tensor, total: Tensor, weight: Tensor,
                  eps: float, real: Optional[int], shift: Optional[Tensor] = None,
                  keep: Optional[Tensor] = None, branch: Optional[Tensor] = None
                  ) -> tuple[Tensor, Tensor]:
    """Gradients of what was normed and, in float32, of weight and bias.

    Args:
        grad_total: Of the sum that was normed, from elsewhere.
        grad: Of the norm.
        total: What was normed, (B, H, W, C).
        weight, eps, real: Of the norm.
        shift: (B, C), added to each image's pixels of `grad`.
        keep: One factor an image, for `branch`.
        branch: (B, H, W, C), filled with the first gradient, times `keep`, in its own dtype.

    Returns:
        The gradient of `total`, and sums (2, C) or, with `branch`, (3, C): the third is its own.
    """
    dim = total.shape[-1]
    tokens = total.numel() // dim
    tile, blocks, together = norm_sizes(tokens, dim)
    parts = -(-blocks // together)
    dx = torch.empty_like(total)
    sums = total.new_empty(parts, 2 if branch is None else 3, dim, dtype=torch.float32)
    if grad_total is not None:
        grad_total = grad_total.contiguous()
    launch(_kernels().norm_backward_kernel, parts,
           (grad_total, grad.contiguous(), total, weight, shift, keep, dx, branch, sums),
           (tokens, dim // tile.ALIGN, together, tokens // len(total), float(eps)),
           **_counted(dim, GROUPS, real), **tile._asdict())
    return dx, sums.sum(0)


def _norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, norm_dtype: torch.dtype,
                  real: Optional[int], offset: Optional[Tensor] = None) -> Tensor:
    normed = torch.empty_like(x, dtype=norm_dtype)
    _launch_norm(x, None, weight, bias, None, normed, eps, real, offset)
    return normed


def _norm_forward_fake(x, weight, bias, eps, norm_dtype, real, offset=None):
    return torch.empty_like(x, dtype=norm_dtype)


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, real: Optional[int]
                   ) -> tuple[Tensor, Tensor]:
    """Gradients of x and, (2, C) in float32, of weight and bias."""
    return norm_backward(None, grad, x, weight, eps, real)


def _norm_backward_fake(grad, x, weight, eps, real):
    return torch.empty_like(x), x.new_empty(2, x.shape[-1], dtype=torch.float32)


def _save_norm(ctx, inputs, output):
    x, weight, bias, ctx.eps, _, ctx.real, _ = inputs  # no gradient goes by an offset
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, weight)


def _differentiate_norm(ctx, backward, grad):
    x, weight = ctx.saved_tensors
    dx, sums = backward(grad, x, weight, ctx.eps, ctx.real)
    return dx, sums[0].to(weight.dtype), sums[1].to(ctx.bias_dtype), None, None, None, None


NORM = Operator('triton_layer_norm', _norm_forward, _norm_backward, _norm_forward_fake,
                _norm_backward_fake, _save_norm, _differentiate_norm)


def _add_norm_forward(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float,
                      norm_dtype: torch.dtype, real: Optional[int]) -> tuple[Tensor, Tensor]:
    """x + residual in their promoted dtype, and its norm in norm_dtype."""
    total, normed = _add_norm_forward_fake(x, residual, weight, bias, eps, norm_dtype, real)
    _launch_norm(x, residual, weight, bias, total, normed, eps, real)
    return total, normed


def _add_norm_forward_fake(x, residual, weight, bias, eps, norm_dtype, real):
    return (torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype)),
            torch.empty_like(x, dtype=norm_dtype))


def _add_norm_backward(grad_total: Optional[Tensor], grad: Tensor, total: Tensor, weight: Tensor,
                       eps: float, real: Optional[int]) -> tuple[Tensor, Tensor]:
    """Gradients of the sum and, (2, C) in float32, of weight and bias."""
    return norm_backward(grad_total, grad, total, weight, eps, real)


def _add_norm_backward_fake(grad_total, grad, total, weight, eps, real):
    return torch.empty_like(total), total.new_empty(2, total.shape[-1], dtype=torch.float32)


def _save_add_norm(ctx, inputs, output):
    x, residual, weight, bias, ctx.eps, _, ctx.real = inputs
    ctx.dtypes = x.dtype, residual.dtype, bias.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], weight)


def _differentiate_add_norm(ctx, backward, grad_total, grad):
    total, weight = ctx.saved_tensors
    of_x, of_residual, of_bias = ctx.dtypes
    if grad is None:
        dx, dweight, dbias = grad_total, None, None
    else:
        dx, sums = backward(grad_total, grad, total, weight, ctx.eps, ctx.real)
        dweight, dbias = sums[0].to(weight.dtype), sums[1].to(of_bias)
    return dx.to(of_x), dx.to(of_residual), dweight, dbias, None, None, None


ADD_NORM = Operator('triton_add_layer_norm', _add_norm_forward, _add_norm_backward,
                    _add_norm_forward_fake, _add_norm_backward_fake, _save_add_norm,
                    _differentiate_add_norm)


def modulate_layer_norm(y: Tensor, x: Tensor, factor: Tensor, weight: Tensor, bias: Tensor,
                        eps: float, norm_dtype: torch.dtype, real: Optional[int]) -> Tensor:
    """See :func:`mmgroupmamba.ops.modulate_layer_norm`. What is not contiguous is copied.

    Raises:
        ValueError: float64 input.
    """
    _refuse_float64(y, x, factor, weight, bias)
    tensors = (t.contiguous() for t in (y, x, factor, weight, bias))
    return MODULATE(*tensors, eps, norm_dtype, real)


def _image_sizes(x: Tensor, forward: bool = False) -> tuple[NormTile, int, int, int]:
    """Of an image: tile, tokens, how many tiles it has, and how many of them are summed
    together."""
    batch, height, width, dim = x.shape
    tile, tiles, _ = norm_sizes(height * width, dim, batch, forward)
    return tile, height * width, tiles, -(-batch * tiles // _PARTS)


def _modulate_forward(y: Tensor, x: Tensor, factor: Tensor, weight: Tensor, bias: Tensor,
                      eps: float, norm_dtype: torch.dtype, real: Optional[int]) -> Tensor:
    tile, tokens, tiles, _ = _image_sizes(x, forward=True)
    out = torch.empty_like(y, dtype=norm_dtype)
    launch(_kernels().modulate_forward_kernel, len(x) * tiles, (y, x, factor, weight, bias, out),
           (tokens, x.shape[-1] // tile.ALIGN, tiles, float(eps)),
           **_counted(x.shape[-1], GROUPS, real), **tile._asdict(), num_warps=_FORWARD_WARPS)
    return out


def _modulate_forward_fake(y, x, factor, weight, bias, eps, norm_dtype, real):
    return torch.empty_like(y, dtype=norm_dtype)


def _modulate_backward(grad: Tensor, y: Tensor, x: Tensor, factor: Tensor, weight: Tensor,
                       eps: float, real: Optional[int]
                       ) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y and x and, (batch, 3, C) in float32, each image's of weight, bias and
    factor."""
    sums = x.new_empty(len(x), 3, x.shape[-1], dtype=torch.float32)
    return *modulate_backward(grad, y, x, factor, weight, eps, real, sums), sums


def modulate_backward(grad: Tensor, y: Tensor, x: Tensor, factor: Tensor, weight: Tensor,
                      eps: float, real: Optional[int], sums: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and x; each image's of weight, bias and factor fill sums, (batch, 3, C) in
    float32."""
    tile, tokens, tiles, together = _image_sizes(x)
    parts = -(-tiles // together)
    dy, dx = torch.empty_like(y), torch.empty_like(x)
    partial = x.new_empty(len(x), parts, 3, x.shape[-1], dtype=torch.float32)
    launch(_kernels().modulate_backward_kernel, len(x) * parts,
           (grad.contiguous(), y, x, factor, weight, dy, dx, partial),
           (tokens, x.shape[-1] // tile.ALIGN, parts, together, float(eps)),
           **_counted(x.shape[-1], GROUPS, real), **tile._asdict())
    torch.sum(partial, 1, out=sums)
    return dy, dx


def _modulate_backward_fake(grad, y, x, factor, weight, eps, real):
    return (torch.empty_like(y), torch.empty_like(x),
            x.new_empty(len(x), 3, x.shape[-1], dtype=torch.float32))


def _save_modulate(ctx, inputs, output):
    *tensors, bias, ctx.eps, _, ctx.real = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(*tensors)


def _differentiate_modulate(ctx, backward, grad):
    y, x, factor, weight = ctx.saved_tensors
    dy, dx, sums = backward(grad, y, x, factor, weight, ctx.eps, ctx.real)
    dweight, dbias = sums[:, :2].sum(0)
    return (dy, dx, sums[:, 2].view(factor.shape).to(factor.dtype), dweight.to(weight.dtype),
            dbias.to(ctx.bias_dtype), None, None, None)


MODULATE = Operator('triton_modulate_layer_norm', _modulate_forward, _modulate_backward,
                    _modulate_forward_fake, _modulate_backward_fake, _save_modulate,
                    _differentiate_modulate)


def channel_affinity(x: Tensor, squeeze: Tensor, squeeze_bias: Tensor, excite: Tensor,
                     excite_bias: Tensor, skip: Tensor) -> Tensor:
    """See :func:`mmgroupmamba.ops.channel_affinity`. What is not contiguous is copied.

    Raises:
        ValueError: float64 input.
    """
    tensors = x, squeeze, squeeze_bias, excite, excite_bias, skip
    _refuse_float64(*tensors)
    factor, *_ = AFFINITY(*(t.contiguous() for t in tensors))
    return factor.view(len(x), 1, 1, -1)


@lru_cache(maxsize=1024)
def sum_sizes(batch: int, tokens: int, dim: int) -> tuple[NormTile, int, int]:
    """Tile of the sum over an image's tokens, its parts, and how many tiles each part sums."""
    block = min(_block(dim), 128)
    tile = NormTile(_align(dim, 8), max(4096 // block, 1), block)
    tiles = -(-tokens // tile.ROWS)
    programs = batch * -(-dim // block)
    together = -(-tiles // min(max(_PROGRAMS // programs, 1), _IMAGE_PARTS))
    return tile, -(-tiles // together), together


def _affinity_sizes(channels: int) -> dict[str, int]:
    """Compile-time sizes of the affinity's kernels: 8 hidden values at once, 16 of their weights a
    thread."""
    block = _block(channels)
    return dict(ROWS=8, BLOCK=block, num_warps=min(max(4, block // 64), 16))


def affinity_forward(x: Tensor, squeeze: Tensor, squeeze_bias: Tensor, excite: Tensor,
                     excite_bias: Tensor, skip: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Channel affinity (equations 5 to 7) of a map (B, H, W, C).

    Args:
        x: The map, contiguous.
        squeeze, excite: Weights, (R, C) and (C, R).
        squeeze_bias, excite_bias: (R,) and (C,).
        skip: Of the layer, (1,).

    Returns:
        In float32: affinity times skip (B, C), and what the backward takes: the mean of each
        image's tokens (B, C), hidden values (B, R), affinity (B, C).
    """
    batch, height, width, channels = x.shape
    hidden, area = len(squeeze), height * width
    tile, parts, together = sum_sizes(batch, area, channels)
    sums = x.new_empty(batch, parts, channels, dtype=torch.float32)
    launch(_kernels().sum_kernel, batch * parts * -(-channels // tile.BLOCK), (x, sums),
           (area, channels // tile.ALIGN, parts, together), **tile._asdict())
    squeezed = x.new_empty(batch, hidden, dtype=torch.float32)
    factor, mean, affinity = (x.new_empty(batch, channels, dtype=torch.float32) for _ in range(3))
    sizes = _affinity_sizes(channels)
    launch(_kernels().affinity_forward_kernel, batch,
           (sums, squeeze, squeeze_bias, excite, excite_bias, skip, mean, squeezed, affinity,
            factor), (channels, hidden, parts, area),
           PARTS=max(_SUMS // sizes['BLOCK'], 1), **sizes)
    return factor, mean, squeezed, affinity


def affinity_backward(sums: Tensor, affinity: Tensor, squeezed: Tensor, squeeze: Tensor,
                      excite: Tensor, skip: Tensor, area: int) -> Tensor:
    """The gradient (B, C) of each of an image's `area` tokens.

    Args:
        sums: Of each image, (B, 5, C) in float32, contiguous. The third row is the factor's
            gradient. The fourth is filled with that of the affinity before its sigmoid, the fifth,
            from left to right, with that of the hidden values before their ReLU and with the
            image's share in skip's.
        affinity, squeezed, squeeze, excite, skip: As forward.
    """
    hidden, channels = squeeze.shape
    shift = torch.empty_like(affinity)
    launch(_kernels().affinity_backward_kernel, len(sums),
           (sums, affinity, squeezed, squeeze, excite, skip, shift), (channels, hidden, area),
           **_affinity_sizes(channels))
    return shift


def affinity_gradients(sums: Tensor, mean: Tensor, squeezed: Tensor) -> tuple[Tensor, ...]:
    """Gradients of squeeze, squeeze_bias, excite, excite_bias and skip, from the sums that
    :func:`affinity_backward` filled, and these over all images, (5, C)."""
    hidden = squeezed.shape[1]
    over_images = sums.sum(0)
    return (sums[:, 4, :hidden].t() @ mean, over_images[4, :hidden], sums[:, 3].t() @ squeezed,
            over_images[3], over_images[4, hidden:hidden + 1], over_images)


def _affinity_fake(x, squeeze, squeeze_bias, excite, excite_bias, skip):
    batch, channels = len(x), x.shape[-1]
    factor, mean, affinity = (x.new_empty(batch, channels, dtype=torch.float32) for _ in range(3))
    return factor, mean, x.new_empty(batch, len(squeeze), dtype=torch.float32), affinity


def _affinity_backward(grad: Tensor, mean: Tensor, squeezed: Tensor, affinity: Tensor,
                       squeeze: Tensor, excite: Tensor, skip: Tensor, area: int
                       ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """In float32: the gradient (B, C) of each token of an image, and those of the weights, in the
    order of the arguments."""
    sums = grad.new_zeros(len(grad), 5, grad.shape[1], dtype=torch.float32)
    sums[:, 2] = grad
    shift = affinity_backward(sums, affinity, squeezed, squeeze, excite, skip, area)
    with without_autocast(grad.device.type):
        squeeze, squeeze_bias, excite, excite_bias, skip, _ = affinity_gradients(
            sums, mean, squeezed)
    # of what shares memory, copies
    return shift, squeeze, squeeze_bias.clone(), excite, excite_bias.clone(), skip.clone()


def _affinity_backward_fake(grad, mean, squeezed, affinity, squeeze, excite, skip, area):
    wide = dict(dtype=torch.float32)
    return (torch.empty_like(mean), squeeze.new_empty(squeeze.shape, **wide),
            squeeze.new_empty(len(squeeze), **wide), excite.new_empty(excite.shape, **wide),
            excite.new_empty(len(excite), **wide), skip.new_empty(1, **wide))


def _save_affinity(ctx, inputs, output):
    x, squeeze, squeeze_bias, excite, excite_bias, skip = inputs
    ctx.like = x.shape, [t.dtype for t in inputs]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], squeeze, excite, skip)


def _differentiate_affinity(ctx, backward, grad, *_):
    shape, dtypes = ctx.like
    shift, *of_weights = backward(grad, *ctx.saved_tensors, shape[1] * shape[2])
    grads = shift[:, None, None].expand(shape), *of_weights
    return tuple(t.to(dtype) for t, dtype in zip(grads, dtypes))


AFFINITY = Operator('triton_channel_affinity', affinity_forward, _affinity_backward,
                    _affinity_fake, _affinity_backward_fake, _save_affinity,
                    _differentiate_affinity)
