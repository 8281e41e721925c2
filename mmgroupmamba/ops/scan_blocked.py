"""The scan in plain PyTorch on any device: O(log L) steps, each over all channels at once.

A recurrence over L tokens becomes one over L / 4: in every group of four each token takes in the
one before it, the recurrence runs over the groups' last tokens, and what enters a group is added to
its other tokens last (the work-efficient parallel scan of Brent and Kung, 1982; Blelloch, 1990; in
fours, because PyTorch's operations have a price of their own). Decays are values in (0, 1],
multiplied, never logarithms subtracted, so nothing overflows. The backward is the same recurrence
read from the end.

Forward and backward are operators of torch.library: torch.compile puts one node for each into its
graph, whatever L is.
"""
from itertools import pairwise
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import cast, without_autocast

_RADIX = 4
_WALKED = 16  # so few tokens are walked one by one


def why_not(device_type: str) -> Optional[str]:
    return None


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor],
         delta_bias: Optional[Tensor], delta_softplus: bool) -> Tensor:
    """See :func:`mmgroupmamba.ops.selective_scan`. Fastest where the channels of u and delta
    are contiguous in memory."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    with without_autocast(u.device.type):
        x, delta, A, B, C = cast(dtype, u, delta, A, B, C)
        D = D if D is None else D.to(dtype)
        if delta_bias is not None:
            delta = delta + delta_bias.to(dtype)[:, None]
        if delta_softplus:
            delta = F.softplus(delta)
        # the operator is for whom differentiates or traces: its door costs 60 microseconds
        inference = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        return (_scan if inference else _forward)(x, delta, A, B, C, D).to(u.dtype)


def _recurrence(decay: Tensor, h: Tensor, reverse: bool = False) -> None:
    """``h[t] += decay[t] * h[t - 1]`` along dim 1 (t + 1 when reversed), in place.

    Args:
        decay: (batch, L, S); overwritten.
        h: (batch, L, S), the drives; overwritten with the states.
        reverse: Run from the last token to the first.
    """
    length = h.shape[1]
    if length <= _WALKED:
        _walk(decay, h, reverse)
        return
    rest = length % _RADIX
    whole = slice(rest, length) if reverse else slice(length - rest)
    # (batch, L // 4, 4, S); of each group of four its tokens in the order of the recurrence
    groups = h.shape[0], -1, _RADIX, h.shape[2]
    decays, states = decay[:, whole].view(groups), h[:, whole].view(groups)
    decay_of, state_of = decays.unbind(2), states.unbind(2)
    if reverse:
        decay_of, state_of = decay_of[::-1], state_of[::-1]
    for i in range(1, _RADIX):
        state_of[i].addcmul_(decay_of[i], state_of[i - 1])
        decay_of[i].mul_(decay_of[i - 1])  # from now on the decay since the group's start
    _recurrence(decay_of[-1], state_of[-1], reverse)
    entering = state_of[-1][:, :, None]
    if reverse:
        states[:, :-1, 1:].addcmul_(decays[:, :-1, 1:], entering[:, 1:])
    else:
        states[:, 1:, :-1].addcmul_(decays[:, 1:, :-1], entering[:, :-1])
    if rest:
        last = slice(rest + 1) if reverse else slice(length - rest - 1, length)
        _walk(decay[:, last], h[:, last], reverse)


def _walk(decay: Tensor, h: Tensor, reverse: bool) -> None:
    """The recurrence token by token, the first of them left as it is."""
    steps = list(zip(decay.unbind(1), h.unbind(1)))
    if reverse:
        steps.reverse()
    for (_, before), (factor, state) in pairwise(steps):
        state.addcmul_(factor, before)


def _scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
          D: Optional[Tensor]) -> Tensor:
    """``y = C h + D x`` with ``h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t``.

    Shapes as at the door, y (batch, channels, L) laid out as (batch, L, channels). Inside, states
    are (batch, L, G, d, N), so that one token's channels are contiguous. The backward recomputes
    them: only the inputs are kept.
    """
    x, delta, A, B, C = _tokens_first(x, delta, A, B, C)
    decay, h = _drives(x, delta, A, B)
    _recurrence(decay.flatten(2), h.flatten(2))
    y = h.mul_(C).sum(-1) if h.shape[-1] > 1 else h.mul_(C).squeeze(-1)
    if D is not None:
        y.addcmul_(x, D.view(x.shape[2:]))
    return y.flatten(2).transpose(1, 2)


_forward = torch.library.custom_op('mmgroupmamba::blocked_scan', _scan, mutates_args=())


@_forward.register_fake
def _(x, delta, A, B, C, D):
    return _channels_last(x)


@torch.library.custom_op('mmgroupmamba::blocked_scan_backward', mutates_args=())
def _backward(grad_y: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
              D: Optional[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, delta, A, B, C and D; the last is of no meaning where D is None."""
    x, delta, A, B, C = _tokens_first(x, delta, A, B, C)
    grad_y = grad_y.transpose(1, 2).reshape(x.shape)
    decay, h = _drives(x, delta, A, B)
    _recurrence(decay.flatten(2).clone(), h.flatten(2))
    grad_C = _dot(h, grad_y, 3)

    # g_t = dL/dh_t = grad_y_t C_t + decay_{t+1} g_{t+1}
    grad_h = (grad_y[..., None] * C).contiguous()
    _recurrence(F.pad(decay[:, 1:].flatten(2), (0, 0, 0, 1)), grad_h.flatten(2), reverse=True)
    grad_B = _dot(grad_h, delta * x, 3)
    grad_input = _dot(grad_h, B, -1)  # of delta * x, (batch, L, G, d)

    # decay_t h_{t-1} g_t: what the exponent delta_t A receives
    exponent = grad_h.mul_(decay)
    exponent[:, 1:].mul_(h[:, :-1])
    exponent[:, 0].zero_()
    grad_delta = torch.addcmul(_dot(exponent, A, -1), grad_input, x)
    grad_A = (exponent * delta[..., None]).sum((0, 1))
    grad_x = grad_input * delta
    grad_D = (grad_y * x).sum((0, 1))
    if D is not None:
        grad_x.addcmul_(grad_y, D.view(x.shape[2:]))
    return (
        grad_x.flatten(2).transpose(1, 2),
        grad_delta.flatten(2).transpose(1, 2),
        grad_A.flatten(0, 1),
        grad_B.permute(0, 2, 3, 1),
        grad_C.permute(0, 2, 3, 1),
        grad_D.flatten(),
    )


@_backward.register_fake
def _(grad_y, x, delta, A, B, C, D):
    def like(t):  # (batch, G, N, L) with memory (batch, L, G, N)
        return t.new_empty(t.shape[0], t.shape[3], *t.shape[1:3]).permute(0, 2, 3, 1)

    return (_channels_last(x), _channels_last(x), A.new_empty(A.shape), like(B), like(C),
            A.new_empty(A.shape[0]))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad_y):
    inputs = ctx.saved_tensors
    *grads, grad_D = _backward(grad_y, *inputs)
    return (*grads, grad_D if inputs[-1] is not None else None)


_forward.register_autograd(_differentiate, setup_context=_save)


def _channels_last(x: Tensor) -> Tensor:
    """Empty (batch, channels, L) whose memory is (batch, L, channels)."""
    batch, channels, length = x.shape
    return x.new_empty(batch, length, channels).transpose(1, 2)


def _tokens_first(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
    batch, groups, _, length = B.shape
    grouped = batch, length, groups, -1
    return (
        x.transpose(1, 2).view(*grouped),  # (batch, L, G, d)
        delta.transpose(1, 2).view(*grouped),
        A.view(groups, -1, A.shape[1]),  # (G, d, N)
        B.permute(0, 3, 1, 2)[:, :, :, None],  # (batch, L, G, 1, N)
        C.permute(0, 3, 1, 2)[:, :, :, None],
    )


def _drives(x: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """exp(delta A) and delta x B, both (batch, L, G, d, N) and contiguous."""
    decay = (delta[..., None] * A).contiguous().exp_()
    drive = (delta * x)[..., None].expand(decay.shape).contiguous()
    return decay, drive.mul_(B)


def _dot(states: Tensor, other: Tensor, dim: int) -> Tensor:
    """Inner product of (batch, L, G, d, N) with `other` over the state (dim -1) or d (dim 3)."""
    if dim == 3:
        other = other[..., None]
    if states.shape[dim] == 1:
        return (states * other).squeeze(dim)
    return (states * other).sum(dim)
