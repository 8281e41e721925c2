"""The definition of the scan: a loop over L that reads as the formula.

Slow, obvious and trusted; every other backend is compared with it.
"""
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import cast, without_autocast


def why_not(device_type: str) -> Optional[str]:
    return None


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor],
         delta_bias: Optional[Tensor], delta_softplus: bool) -> Tensor:
    """See :func:`mmgroupmamba.ops.selective_scan`. Linear in L; differentiated by autograd."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    with without_autocast(u.device.type):
        x, delta, A, B, C = cast(dtype, u, delta, A, B, C)
        if delta_bias is not None:
            delta = delta + delta_bias.to(dtype)[:, None]
        if delta_softplus:
            delta = F.softplus(delta)
        d = x.shape[1] // B.shape[1]
        B = B.repeat_interleave(d, 1)  # (batch, G * d, N, L)
        C = C.repeat_interleave(d, 1)

        h = x.new_zeros(*x.shape[:2], A.shape[1])  # (batch, G * d, N)
        y = []
        for x_t, delta_t, B_t, C_t in zip(x.unbind(-1), delta.unbind(-1), B.unbind(-1),
                                          C.unbind(-1)):
            h = torch.exp(delta_t[..., None] * A) * h + (delta_t * x_t)[..., None] * B_t
            y.append((h * C_t).sum(-1))
        y = torch.stack(y, -1)
        if D is not None:
            y = y + D.to(dtype)[:, None] * x
    return y.to(u.dtype)
