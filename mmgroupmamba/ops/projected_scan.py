"""A map's scan together with the linear map that makes its step, B and C, as one function for
eager PyTorch and Triton.

``grouped_linear`` and ``directional_scan`` are the definition. The host's time for their single
operations and autograd nodes is more than a GPU's; here the same kernels and products are one node,
and the two gradients of the map meet in the product that makes the second.
"""
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import scan_triton
from .directional_scan import block_diagonal, check, of_block_diagonal
from .directions import DIRECTIONS
from .operator import traced
from .precision import linear_dtype, without_autocast
from .selective_scan import resolve_backend

_GROUPS = len(DIRECTIONS)


def scans_projected(x: Tensor, weight: Tensor, dt_weight: Tensor, A_log: Tensor, D: Tensor,
                    dt_bias: Tensor, backend: str) -> bool:
    """Whether :func:`projected_scan` runs on its arguments: in eager PyTorch, where one of them
    learns."""
    return (torch.is_grad_enabled() and not traced() and x.dtype != torch.float64
            and any(t.requires_grad for t in (x, weight, dt_weight, A_log, D, dt_bias))
            and resolve_backend(backend, x.device.type, x.dtype) == 'triton'
            and A_log.shape[1] <= scan_triton.MAX_STATES
            and dt_weight.shape[2] <= scan_triton.MAX_RANK)


def projected_scan(x: Tensor, weight: Tensor, dt_weight: Tensor, A_log: Tensor, D: Tensor,
                   dt_bias: Tensor, out_dtype: Optional[torch.dtype] = None) -> Tensor:
    """:func:`~.directional_scan` of a map, its ``x_dbl`` a grouped linear map of it; for training.

    Args:
        x: Map (batch, H, W, 4 * d), floating but not float64.
        weight: Of the linear map, (4, R + 2N, d). The product is in autocast's dtype.
        dt_weight, A_log, D, dt_bias: As for :func:`~.directional_scan`.
        out_dtype: Of the result, rounded once; None means float32.

    Returns:
        y (batch, H, W, 4, d).

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
        BackendUnavailableError: Triton's kernels cannot run on this device.
    """
    resolve_backend('triton', x.device.type)
    if torch.float64 in (x.dtype, weight.dtype):
        raise ValueError('projected_scan: the Triton kernels have no float64')
    if x.dim() != 4 or dt_weight.dim() != 3 or A_log.dim() != 2:
        raise ValueError('projected_scan: x must be (batch, H, W, 4 * d), dt_weight (4, d, R) and '
                         f'A_log (4 * d, N), got {tuple(x.shape)}, {tuple(dt_weight.shape)} and '
                         f'{tuple(A_log.shape)}')
    shape = _GROUPS, dt_weight.shape[2] + 2 * A_log.shape[1], x.shape[3] // _GROUPS
    if weight.shape != shape or weight.device != x.device:
        raise ValueError(f'projected_scan: weight must be {shape} and on {x.device}, got '
                         f'{tuple(weight.shape)} on {weight.device}')
    return _ProjectedScan.apply(x, weight, dt_weight, A_log, D, dt_bias,
                                out_dtype or torch.float32)


class _ProjectedScan(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, dt_weight: Tensor, A_log: Tensor, D: Tensor,
                dt_bias: Tensor, out_dtype: torch.dtype) -> Tensor:
        dtype = linear_dtype(x)  # autocast has nothing to cast below
        matrix = block_diagonal(weight, dtype)
        grouped = *x.shape[:3], _GROUPS, -1
        rows = F.linear(x if x.dtype == dtype else x.to(dtype), matrix).view(grouped)
        scanned = x.view(grouped), rows, dt_weight, A_log, D, dt_bias
        check(*scanned)
        scanned = *scanned[:2], *(t.float() for t in scanned[2:])
        y, states = scan_triton.MAPS.forward(*scanned, True, out_dtype)
        ctx.shape, ctx.dtypes = weight.shape, (weight.dtype, dt_weight.dtype, A_log.dtype,
                                               D.dtype, dt_bias.dtype)
        ctx.save_for_backward(*scanned, states, matrix)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        *scanned, states, matrix = ctx.saved_tensors
        x, rows, dt_weight, A_log, *_ = scanned
        with without_autocast(x.device.type):
            of_x, of_rows, sums = scan_triton.MAPS.backward(grad, *scanned, states)
            of_rows = of_rows.view(-1, len(matrix))
            tokens = of_x.view(len(of_rows), -1)
            if of_x.dtype == of_rows.dtype:
                tokens.addmm_(of_rows, matrix)
            else:
                tokens += of_rows @ matrix
            of_matrix = of_rows.t() @ x.reshape(tokens.shape).to(of_rows.dtype)
        of_A, of_D, of_bias, of_dt = scan_triton.of_sums(sums, A_log.shape[1])
        grads = (of_block_diagonal(of_matrix, ctx.shape), of_dt.reshape(dt_weight.shape), of_A,
                 of_D, of_bias)
        return (of_x.flatten(3), *(t if t.dtype == dtype else t.to(dtype)
                                   for t, dtype in zip(grads, ctx.dtypes)), None)
