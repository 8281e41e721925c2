"""The four-direction scan of a map: shapes, checks, the definition, and where a backend has better.

The definition lays each group out as a sequence along its direction and calls
:func:`~.selective_scan`. A backend that reads the map in its directions by itself, or wants other
memory, has a function ``directional_scan`` besides ``scan``.
"""
from collections.abc import Callable
from functools import lru_cache
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .directions import DIRECTIONS, from_sequences, to_sequences
from .operator import infers_on_cpu, traced
from .precision import cast, linear_dtype, without_autocast
from .selective_scan import backend_module, resolve_backend

_GROUPS = len(DIRECTIONS)


def directional_scan(x: Tensor,
                     x_dbl: Tensor,
                     dt_weight: Tensor,
                     A_log: Tensor,
                     D: Tensor,
                     dt_bias: Tensor,
                     backend: str = 'auto',
                     out_dtype: Optional[torch.dtype] = None) -> Tensor:
    r"""Selective scan of a map, group g along ``DIRECTIONS[g]``, its step low-rank.

    With :math:`(r_t, B_t, C_t)` the R + 2N values of ``x_dbl`` at token t of a group and
    :math:`\Delta_t = \mathrm{softplus}(W r_t + \mathrm{bias})`, each group is the scan of
    :func:`~.selective_scan` with :math:`A = -\exp(A_{log})` (GroupMamba, equations 1 to 4;
    ``cross_selective_scan`` in the official ``classification/models/ss2d.py``). Step and scan are
    float32 inside, float64 for float64 input, whatever autocast says.

    Args:
        x: Map (batch, H, W, 4, d), floating.
        x_dbl: Step, B and C of each token and group, (batch, H, W, 4, R + 2N).
        dt_weight: W, (4, d, R).
        A_log: Of the state matrix, as Mamba keeps it, (4 * d, N).
        D: Skip, (4 * d,).
        dt_bias: (4 * d,).
        backend: As in :func:`~.selective_scan`.
        out_dtype: Of the result, rounded once; None means float32, or float64 for float64 input.

    Returns:
        y (batch, H, W, 4, d).

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or the backend is unknown.
        BackendUnavailableError: The backend asked for by name cannot run on this device.
    """
    check(x, x_dbl, dt_weight, A_log, D, dt_bias)
    out_dtype = out_dtype or torch.promote_types(x.dtype, torch.float32)
    if x.shape[1:3] == (1, 1) and not torch.is_grad_enabled():
        return one_token(x, x_dbl, dt_weight, D, dt_bias).to(out_dtype)
    module = backend_module(resolve_backend(backend, x.device.type, x.dtype))
    own = getattr(module, 'directional_scan', None)
    if own is not None:
        return own(x, x_dbl, dt_weight, A_log, D, dt_bias, out_dtype)
    return over_sequences(x, x_dbl, dt_weight, A_log, D, dt_bias, module.scan).to(out_dtype)


def over_sequences(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, A_log: Tensor, D: Tensor,
                   dt_bias: Tensor, scan: Callable[..., Tensor]) -> Tensor:
    """The definition: unroll, project the step, scan, roll back; shapes as at the door.

    Args:
        scan: As a backend's, (u, delta, A, B, C, D, delta_bias, delta_softplus) -> y.
    """
    height, width = x.shape[1:3]
    states, rank = A_log.shape[1], dt_weight.shape[2]
    dtype = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device.type):
        x, x_dbl, dt_weight, A_log, D, dt_bias = cast(
            dtype, x, x_dbl, dt_weight, A_log, D, dt_bias)
        u = to_sequences(x).flatten(2)  # (batch, L, C)
        dt, B, C = to_sequences(x_dbl).split([rank, states, states], dim=-1)
        delta = grouped_linear(dt.flatten(2), dt_weight, dt_bias)
        y = scan(
            u.transpose(1, 2),  # (batch, C, L)
            delta.transpose(1, 2),
            -torch.exp(A_log),
            B.permute(0, 2, 3, 1),  # (batch, 4, N, L)
            C.permute(0, 2, 3, 1),
            D,
            None,
            True)
    return from_sequences(y.transpose(1, 2).view(u.shape[0], -1, *x.shape[3:]), height, width)


def one_token(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """The scan of a map of one pixel, such as the class token: no state enters, nothing to unroll.

    From h = delta x B and y = <C, h> + D x, y = (delta <B, C> + D) x; shapes as at the door. For
    inference: A has no part in it and would be left without a gradient.
    """
    states = (x_dbl.shape[-1] - dt_weight.shape[2]) // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device.type):
        x, x_dbl, dt_weight, D, dt_bias = cast(dtype, x, x_dbl, dt_weight, D, dt_bias)
        dt, B, C = x_dbl.split([dt_weight.shape[2], states, states], dim=-1)
        delta = F.softplus(grouped_linear(dt.flatten(3), dt_weight, dt_bias))
        delta = delta.unflatten(-1, x.shape[3:])
        return (delta * (B * C).sum(-1, keepdim=True) + D.view(x.shape[3:])) * x


def grouped_linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """One linear map for each group of channels: (..., G * in), (G, out, in) -> (..., G * out).

    On CUDA as one product with a block-diagonal matrix: so few channels do not fill a GPU's tiles,
    and the gradient of a batched weight, a long sum for each of a few values, takes 20 times as
    long.
    """
    groups, outputs, inputs = weight.shape
    if x.is_cuda:
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad
                                           for t in (x, weight, bias)):
            return _GroupedLinear.apply(x, weight, bias)
        return F.linear(x, block_diagonal(weight, linear_dtype(x)), bias)
    tokens = x.reshape(-1, groups, inputs).transpose(0, 1)  # (G, tokens, in)
    out = None
    if infers_on_cpu(x) and all(t is None or t.dtype == x.dtype for t in (weight, bias)):
        # else a copy puts the groups side by side
        out = x.new_empty(tokens.shape[1], groups, outputs).transpose(0, 1)
    if bias is None:
        y = torch.bmm(tokens, weight.transpose(1, 2), out=out)
    else:
        y = torch.baddbmm(bias.view(groups, 1, outputs), tokens, weight.transpose(1, 2), out=out)
    return y.transpose(0, 1).reshape(*x.shape[:-1], -1)


def block_diagonal(weight: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
    """(G, out, in) -> (G * out, G * in), zero between the groups; in a dtype, or its own. Without
    gradients."""
    groups, outputs, inputs = weight.shape
    eye = _eye.__wrapped__ if traced() else _eye
    blocks = weight.new_empty(groups, outputs, groups, inputs, dtype=dtype)
    torch.mul(weight.unsqueeze(2), eye(groups, weight.dtype, weight.device), out=blocks)
    return blocks.view(groups * outputs, groups * inputs)


def of_block_diagonal(matrix: Tensor, shape: torch.Size) -> Tensor:
    """(G * out, G * in) -> (G, out, in): what :func:`block_diagonal` made it of."""
    groups, outputs, inputs = shape
    blocks = matrix.view(groups, outputs, groups, inputs).diagonal(dim1=0, dim2=2)
    return blocks.permute(2, 0, 1)


@lru_cache(maxsize=16)
def _eye(groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.eye(groups, dtype=dtype, device=device).view(groups, 1, groups, 1)


class _GroupedLinear(torch.autograd.Function):
    """By a block-diagonal matrix, as one node."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        matrix = block_diagonal(weight, linear_dtype(x))
        ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, matrix)
        return F.linear(x, matrix, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        x, matrix = ctx.saved_tensors
        groups, outputs, inputs = ctx.weight_shape
        with without_autocast(x.device.type):
            rows = grad.reshape(-1, groups * outputs)
            of_x = of_weight = of_bias = None
            if ctx.needs_input_grad[0]:
                of_x = (rows @ matrix).view(x.shape).to(x.dtype)
            if ctx.needs_input_grad[1]:
                matrix = rows.t() @ x.reshape(-1, groups * inputs).to(rows.dtype)
                of_weight = of_block_diagonal(matrix, ctx.weight_shape).to(ctx.weight_dtype)
            if ctx.needs_input_grad[2]:
                of_bias = rows.sum(0).to(ctx.bias_dtype)
        return of_x, of_weight, of_bias


def check(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, A_log: Tensor, D: Tensor,
          dt_bias: Tensor) -> None:
    """Raise ValueError unless the arguments are what :func:`directional_scan` wants."""
    if x.dim() != 5 or x.shape[3] != _GROUPS or 0 in x.shape:
        raise ValueError('directional_scan: x must be (batch, H, W, 4, d) and not empty, got '
                         f'{tuple(x.shape)}')
    if dt_weight.dim() != 3 or A_log.dim() != 2:
        raise ValueError('directional_scan: dt_weight must be (4, d, R) and A_log (4 * d, N), got '
                         f'{tuple(dt_weight.shape)} and {tuple(A_log.shape)}')
    batch, height, width, _, dim = x.shape
    rank, states = dt_weight.shape[2], A_log.shape[1]
    for name, tensor, shape in (
            ('x', x, x.shape),
            ('x_dbl', x_dbl, (batch, height, width, _GROUPS, rank + 2 * states)),
            ('dt_weight', dt_weight, (_GROUPS, dim, rank)),
            ('A_log', A_log, (_GROUPS * dim, states)),
            ('D', D, (_GROUPS * dim, )),
            ('dt_bias', dt_bias, (_GROUPS * dim, ))):
        if tensor.shape != shape or 0 in shape:
            raise ValueError(f'directional_scan: {name} must be {shape} and not empty, got '
                             f'{tuple(tensor.shape)}')
        if tensor.device != x.device:
            raise ValueError(f'directional_scan: {name} is on {tensor.device}, x on {x.device}')
        if not tensor.is_floating_point():
            raise ValueError(f'directional_scan: {name} must be real floating, got {tensor.dtype}')
