"""What inference does in one step, as Triton kernels; see ``inference``.

The kernels are in ``inference_triton_kernels``; Triton is imported when the first runs. The
operators are known to torch.library, so torch.compile sees no graph break; none has a backward.
"""
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Optional

import torch
from torch import Tensor

from .around_scan_triton import _align, _block, _counted, _pitch, _pitched
from .directions import DIRECTIONS
from .kernel_launch import launch
from .operator import InferenceOperator

_GROUPS = len(DIRECTIONS)
_WIDEST = 128  # channels of a tile: both weights and the tile are a multiprocessor's at once
_ROWS, _VALUES = 64, 2**12  # tokens and values of a tile, at most
_STEP = 64  # channels that are added up at once
_SQUARES = 128  # of a program
_OUTPUTS = 2**13  # of a program of the convolution


@lru_cache(maxsize=None)
def _kernels() -> ModuleType:
    return import_module('.inference_triton_kernels', __package__)


def _group_block(dim: int) -> int:
    """Of a tile that holds a group's channels: a power of two, at least 4."""
    return 1 << max(dim - 1, 3).bit_length()


def joins_mixer_end(channels: int) -> bool:
    """Whether :func:`mixer_end` is for so many channels: beyond, the matrices do not fit."""
    return _GROUPS * _group_block(channels // _GROUPS) <= _WIDEST


def _mixer_end(y: Tensor, gate: Tensor, x: Tensor, factor: Tensor, residual: Tensor,
               group_weight: Tensor, group_bias: Tensor, out_proj: Tensor, norm_weight: Tensor,
               norm_bias: Tensor, proj: Tensor, proj_bias: Tensor, next_weight: Tensor,
               next_bias: Tensor, group_eps: float, norm_eps: float, next_eps: float
               ) -> tuple[Tensor, Tensor]:
    total, normed = _mixer_end_fake(y, gate, x, factor, residual)
    gate = _pitched(gate)
    batch, height, width, channels = x.shape
    dim, tokens = channels // _GROUPS, height * width
    block = _group_block(dim)
    rows = min(_VALUES // (_GROUPS * block), _ROWS)
    tiles = -(-tokens // rows)
    contiguous = (t.contiguous() for t in (
        x, factor, residual, group_weight, group_bias, out_proj, norm_weight, norm_bias, proj,
        proj_bias, next_weight, next_bias))
    launch(_kernels().mixer_end_kernel, batch * tiles,
           (y.contiguous(), gate, *contiguous, total, normed),
           (tokens, tiles, float(group_eps), float(norm_eps), float(next_eps)),
           DIM=dim, PITCH=_pitch(gate), D=block, ROWS=rows,
           num_warps=4 if rows == _ROWS else 8)
    return total, normed


def _mixer_end_fake(y, gate, x, factor, residual, *_):
    return (torch.empty_like(residual, memory_format=torch.contiguous_format),
            torch.empty_like(x, memory_format=torch.contiguous_format))


MIXER_END = InferenceOperator('triton_mixer_end', _mixer_end, _mixer_end_fake)


def joins_linear_sum(channels: int, hidden: int) -> bool:
    """Whether :func:`linear_sum` is for so many channels from so many."""
    return channels % 8 == 0 and _block(channels) <= _WIDEST and hidden % _STEP == 0


def _linear_sum(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor,
                norm_bias: Tensor, eps: float, norm_dtype: torch.dtype,
                next_weight: Optional[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    results = _linear_sum_fake(x, weight, bias, residual, norm_weight, norm_bias, eps, norm_dtype,
                               next_weight)
    channels, hidden = weight.shape
    tokens, block = x.numel() // hidden, _block(channels)
    contiguous = (t if t is None else t.contiguous() for t in (
        x, weight, bias, residual, norm_weight, norm_bias, next_weight))
    launch(_kernels().linear_sum_kernel, -(-tokens // _ROWS), (*contiguous, *results),
           (tokens, float(eps)), IN=hidden, C=channels, OUT=results[2].shape[-1], BLOCK=block,
           ROWS=_ROWS, STEP=_STEP)
    return results


def _linear_sum_fake(x, weight, bias, residual, norm_weight, norm_bias, eps, norm_dtype,
                     next_weight):
    out = 0 if next_weight is None else len(next_weight)
    total = torch.empty_like(residual, memory_format=torch.contiguous_format)
    return total, torch.empty_like(total, dtype=norm_dtype), x.new_empty(*x.shape[:3], out)


LINEAR_SUM = InferenceOperator('triton_linear_sum', _linear_sum, _linear_sum_fake)


def _norm_pair(x: Tensor, offset: Optional[Tensor], weight: Tensor, bias: Tensor,
               next_weight: Tensor, next_bias: Tensor, eps: float, next_eps: float,
               dtype: torch.dtype, next_dtype: torch.dtype, real: Optional[int]
               ) -> tuple[Tensor, Tensor]:
    first, second = _norm_pair_fake(x, offset, weight, bias, next_weight, next_bias, eps, next_eps,
                                    dtype, next_dtype)
    dim = x.shape[-1]
    tokens, block, align = x.numel() // dim, _block(dim), _align(dim, 8)
    rows = max(2048 // block, 1)
    weights = (t if t is None else t.contiguous()
               for t in (offset, weight, bias, next_weight, next_bias))
    launch(_kernels().norm_pair_kernel, -(-tokens // rows),
           (x.contiguous(), *weights, first, second),
           (tokens, dim // align, float(eps), float(next_eps)), **_counted(dim, _GROUPS, real),
           ALIGN=align, ROWS=rows, BLOCK=block,
           # those with which the compiler keeps a row where it was loaded
           num_warps={64: 4, 128: 8}.get(block, 2))
    return first, second


def _norm_pair_fake(x, offset, weight, bias, next_weight, next_bias, eps, next_eps, dtype,
                    next_dtype, real=None):
    return tuple(torch.empty_like(x, dtype=t, memory_format=torch.contiguous_format)
                 for t in (dtype, next_dtype))


NORM_PAIR = InferenceOperator('triton_norm_pair', _norm_pair, _norm_pair_fake)


def _squares(image: Tensor, dtype: torch.dtype) -> Tensor:
    packed = _squares_fake(image, dtype)
    squares = packed.numel() // 16
    launch(_kernels().squares_kernel, -(-squares // _SQUARES), (image, packed),
           (squares, *image.shape[2:], *image.stride()), BLOCK=_SQUARES)
    return packed


def _squares_fake(image, dtype):
    batch, _, height, width = image.shape
    return image.new_empty(batch, -(-height // 2), -(-width // 2), 16, dtype=dtype)


SQUARES = InferenceOperator('triton_squares', _squares, _squares_fake)


def _conv_relu(x: Tensor, weight: Tensor, bias: Tensor, before: int) -> Tensor:
    y = _conv_relu_fake(x, weight, bias, before)
    _, height, width, channels = x.shape
    kernel, out = len(weight), weight.shape[3]
    pixels, rows = y.numel() // out, _OUTPUTS // max(out, 32)
    launch(_kernels().conv_relu_kernel, -(-pixels // rows),
           (x.contiguous(), weight.contiguous(), bias.contiguous(), y), (pixels, height, width),
           KERNEL=kernel, BEFORE=before, IN=channels, OUT=out, ROWS=rows)
    return y


def _conv_relu_fake(x, weight, bias, before):
    return x.new_empty(*x.shape[:3], weight.shape[3])


CONV_RELU = InferenceOperator('triton_conv_relu', _conv_relu, _conv_relu_fake)
