"""Thin lazy adapter to the CUDA kernel that mamba-ssm installs: one launch forward, one backward.

Only the compiled module ``selective_scan_cuda`` is imported, and only when it is asked for:
importing the package ``mamba_ssm`` itself would pull in transformers, which can break mmpretrain.
The two operators are known to torch.library, so torch.compile sees no graph break.

The kernel's terms, some of which it does not check (``csrc/selective_scan/*`` of mamba-ssm):
u, delta, B and C of one dtype, fp16, bf16 or float32, tokens adjacent in memory; A, D and bias
float32; at most 256 states; a launch has a row of blocks for the channels (16 bits), and its states
are indexed with 32 bits; where L is a multiple of 128 it reads 16 bytes at once.
"""
from functools import lru_cache
from importlib import import_module
from typing import Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .directions import DIRECTIONS, scan_orders
from .operator import Operator
from .precision import without_autocast

_CHUNK = 2048  # tokens between two states that the kernel keeps for its backward
_MAX_STATES = 256
_MAX_CHANNELS = 2**16 - 1
_MAX_KEPT = 2**31 - 1
_VECTORS = 128  # a multiple of which L is where the kernel reads 16 bytes at once


@lru_cache(maxsize=None)
def _import_error() -> Optional[str]:
    try:
        import_module('selective_scan_cuda')
    except ImportError as error:
        return str(error).splitlines()[0]
    return None


def why_not(device_type: str) -> Optional[str]:
    if device_type != 'cuda':
        return f"mamba-ssm's kernel runs on CUDA tensors only, not on {device_type}"
    error = _import_error()
    if error is not None:
        return (f'{error}; install it with '
                '`pip install mamba-ssm --no-deps --no-build-isolation`, which needs nvcc of '
                "torch's CUDA version, or with `make gpu`")
    return None


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor],
         delta_bias: Optional[Tensor], delta_softplus: bool) -> Tensor:
    """See :func:`mmgroupmamba.ops.selective_scan`. No copy of what is contiguous along L and of one
    dtype; several dtypes meet in float32.

    Raises:
        ValueError: float64 u, more than 256 states or 65,535 channels, or a batch too long for the
            kernel's 32-bit indices.
    """
    if u.dtype == torch.float64:
        raise ValueError("mamba-ssm's kernel has no float64: use backend='blocked'")
    same = u.dtype == delta.dtype == B.dtype == C.dtype
    x, delta, B, C = (_rows(t if same else t.float()) for t in (u, delta, B, C))
    A, D, delta_bias = (t if t is None else t.float().contiguous() for t in (A, D, delta_bias))
    y, _ = _scan(x, delta, A, B, C, D, delta_bias, delta_softplus)
    return y.to(u.dtype)


def directional_scan(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, A_log: Tensor, D: Tensor,
                     dt_bias: Tensor, out_dtype: torch.dtype) -> Tensor:
    """See :func:`mmgroupmamba.ops.directional_scan`: the sequences are written as the kernel reads
    them, each once, and so is the map.

    Raises:
        ValueError: As :func:`scan`.
    """
    if x.dtype == torch.float64:
        raise ValueError("mamba-ssm's kernel has no float64: use backend='blocked'")
    height, width = x.shape[1:3]
    states, rank = A_log.shape[1], dt_weight.shape[2]
    with without_autocast(x.device.type):
        order, inverse, *_ = scan_orders(height, width, x.device)
        u = _Reorder.apply(x.flatten(1, 2), order, inverse, _BATCH_FIRST, False)
        # (4, R + 2N, batch, L): then the step is one matrix product a group
        sequences = _Reorder.apply(x_dbl.flatten(1, 2), order, inverse, _GROUPS_FIRST, False)
        dt, B, C = sequences.float().split([rank, states, states], 1)
        delta = _Project.apply(dt_weight.float(), dt.flatten(2)).unflatten(2, dt.shape[2:])
        y = scan(
            u.float().flatten(1, 2),  # (batch, C, L)
            delta.permute(2, 0, 1, 3).flatten(1, 2),
            -torch.exp(A_log.float()),
            B.permute(2, 0, 1, 3),  # (batch, 4, N, L)
            C.permute(2, 0, 1, 3),
            D,
            dt_bias,
            True)
        y = y.to(out_dtype).unflatten(1, (len(DIRECTIONS), -1))
        y = _Reorder.apply(y, order, inverse, _BATCH_FIRST, True)
    return y.unflatten(1, (height, width))


# where the dims of sequences stand in a map's (batch, L, 4, c)
_BATCH_FIRST = (0, 2, 3, 1)  # (batch, 4, c, L)
_GROUPS_FIRST = (2, 3, 0, 1)  # (4, c, batch, L)


class _Reorder(torch.autograd.Function):
    """Between a map (batch, L, 4, c) and the sequences of its groups, in one copy; the gradient
    too. Autograd would scatter what is gathered."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor, dims: tuple[int, ...],
                to_map: bool) -> Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.dims, ctx.to_map = dims, to_map
        return _roll(x, inverse, dims) if to_map else _unroll(x, order, dims)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        order, inverse = ctx.saved_tensors
        if ctx.to_map:
            grad = _unroll(grad, order, ctx.dims)
        else:
            grad = _roll(grad, inverse, ctx.dims)
        return grad, None, None, None, None


class _Project(torch.autograd.Function):
    """Batched matrix product (4, d, R), (4, R, n) -> (4, d, n), whose gradient is float32 under
    autocast too."""

    @staticmethod
    def forward(ctx, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(weight, x)
        return torch.bmm(weight, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        weight, x = ctx.saved_tensors
        with without_autocast(x.device.type):
            return torch.bmm(grad, x.transpose(1, 2)), torch.bmm(weight.transpose(1, 2), grad)


def _unroll(x: Tensor, order: Tensor, dims: tuple[int, ...]) -> Tensor:
    x = x.permute(dims)
    index = order.view([x.shape[i] if dim in (1, 2) else 1 for i, dim in enumerate(dims)])
    return x.gather(3, index.expand(x.shape))


def _roll(x: Tensor, inverse: Tensor, dims: tuple[int, ...]) -> Tensor:
    x = x.permute([dims.index(dim) for dim in range(4)])
    return x.gather(1, inverse.t()[:, :, None].expand(x.shape))


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _aligned(t: Tensor) -> Tensor:
    """A copy with the same strides where rows do not start at multiples of 16 bytes, as the kernel
    takes for granted."""
    starts = (t.data_ptr(), *(t.element_size() * stride for stride in t.stride()[:-1]))
    return t.clone() if t.shape[-1] % _VECTORS == 0 and any(s % 16 for s in starts) else t


def _kept_states(u: Tensor, A: Tensor) -> Tensor:
    batch, channels, length = u.shape
    chunks = (length + _CHUNK - 1) // _CHUNK
    return u.new_empty(batch, channels, chunks, 2 * A.shape[1], dtype=torch.float32)


def _forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor],
             bias: Optional[Tensor], softplus: bool) -> tuple[Tensor, Tensor]:
    """y (batch, channels, L) in delta's memory layout, and the states that the backward starts
    from: (batch, channels, ceil(L / 2048), 2N), float32."""
    batch, channels, length = u.shape
    states = A.shape[1]
    if states > _MAX_STATES:
        raise ValueError(f"mamba-ssm's kernel takes at most {_MAX_STATES} states, got {states}")
    if channels > _MAX_CHANNELS:
        raise ValueError(f"mamba-ssm's kernel takes at most {_MAX_CHANNELS} channels, got "
                         f'{channels}')
    if batch * channels * -(-length // _CHUNK) * states > _MAX_KEPT:
        raise ValueError("mamba-ssm's kernel indexes with 32 bits, too few for (batch, channels, "
                         f'L) = {tuple(u.shape)} and {states} states: make the batch smaller')
    kernel = import_module('selective_scan_cuda')
    u, delta, B, C = (_aligned(t) for t in (u, delta, B, C))
    y, kept, *_ = kernel.fwd(u, delta, A, B, C, D, None, bias, softplus)
    return y, kept


def _forward_fake(u, delta, A, B, C, D, bias, softplus):
    return torch.empty_like(delta), _kept_states(u, A)


def _backward(grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
              D: Optional[Tensor], bias: Optional[Tensor], kept: Tensor, softplus: bool
              ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D and bias; the last two empty where these are None."""
    kernel = import_module('selective_scan_cuda')
    grad, u, delta, B, C = (_aligned(t) for t in (grad, u, delta, B, C))
    du, ddelta, dA, dB, dC, dD, dbias, *_ = kernel.bwd(
        u, delta, A, B, C, D, None, bias, grad, kept, None, None, softplus, False)
    dD, dbias = (A.new_empty(0) if t is None else t for t in (dD, dbias))
    return du, ddelta, dA, dB.to(B.dtype), dC.to(C.dtype), dD, dbias


def _backward_fake(grad, u, delta, A, B, C, D, bias, kept, softplus):
    ends = (A.new_empty(0) if t is None else torch.empty_like(t) for t in (D, bias))
    return (*(torch.empty_like(t) for t in (u, delta, A, B, C)), *ends)


def _save(ctx, inputs, output):
    *tensors, ctx.softplus = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx, backward, grad, _):
    *tensors, kept = ctx.saved_tensors
    grads = backward(_rows(grad), *tensors, kept, ctx.softplus)
    return (*(None if t is None else g for t, g in zip(tensors, grads)), None)


_scan = Operator('mamba_scan', _forward, _backward, _forward_fake, _backward_fake, _save,
                 _differentiate)
