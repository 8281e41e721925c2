"""Thin lazy adapter to the CUDA kernel that mamba-ssm installs.

Only the compiled module ``selective_scan_cuda`` is imported, and only when it is asked for:
importing the package ``mamba_ssm`` itself would pull in transformers, which can break mmpretrain.
"""
from functools import lru_cache
from importlib import import_module
from typing import Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_MAX_STATES = 256


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
    """See :func:`mmgroupmamba.ops.selective_scan`.

    The kernel wants u, delta, B and C of one dtype (float32, float16 or bfloat16) and contiguous
    along L, and A, D and delta_bias in float32. It computes in float32; float64 is not for it.

    Raises:
        ValueError: float64 input, or more than 256 states.
    """
    if u.dtype == torch.float64:
        raise ValueError("mamba-ssm's kernel has no float64: use backend='blocked'")
    if A.shape[1] > _MAX_STATES:
        raise ValueError(f"mamba-ssm's kernel takes at most {_MAX_STATES} states, "
                         f'got {A.shape[1]}')
    u, delta, B, C = (t.to(u.dtype).contiguous() for t in (u, delta, B, C))
    A = A.float().contiguous()
    D, delta_bias = (t if t is None else t.float().contiguous() for t in (D, delta_bias))
    return _MambaScan.apply(u, delta, A, B, C, D, delta_bias, delta_softplus)


class _MambaScan(torch.autograd.Function):
    """One launch forward and one backward for all groups."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, delta_bias, delta_softplus):
        kernel = import_module('selective_scan_cuda')
        y, states, *_ = kernel.fwd(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
        ctx.delta_softplus = delta_softplus
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, states)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        kernel = import_module('selective_scan_cuda')
        u, delta, A, B, C, D, delta_bias, states = ctx.saved_tensors
        du, ddelta, dA, dB, dC, dD, dbias, *_ = kernel.bwd(
            u, delta, A, B, C, D, None, delta_bias, grad_y.contiguous(), states, None, None,
            ctx.delta_softplus, False)
        return (du, ddelta, dA, dB.to(B.dtype), dC.to(C.dtype), dD if D is not None else None,
                dbias if delta_bias is not None else None, None)
