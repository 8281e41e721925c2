"""The scan in plain PyTorch on any device: two levels, O(sqrt(L)) sequential steps.

A sequence is cut into K chunks of T tokens. All chunks run side by side from a zero state
(T steps, each one operation over all chunks), the states at the chunk ends are carried from
chunk to chunk (K steps), and what enters a chunk reaches each of its tokens through the product
of the decays on the way: values in (0, 1], multiplied, never logarithms subtracted, so nothing
overflows. The backward is the same recurrence read from the end.
"""
import math
from itertools import pairwise
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def why_not(device_type: str) -> Optional[str]:
    return None


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor],
         delta_bias: Optional[Tensor], delta_softplus: bool) -> Tensor:
    """See :func:`mmgroupmamba.ops.selective_scan`. Fastest where the channels of u and delta
    are contiguous in memory."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    with torch.autocast(u.device.type, enabled=False):
        x, delta, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
        if delta_bias is not None:
            delta = delta + delta_bias.to(dtype)[:, None]
        if delta_softplus:
            delta = F.softplus(delta)
        y = _forward(x, delta, A, B, C)
        if D is not None:
            y = torch.addcmul(y, x, D.to(dtype)[:, None])
    return y.to(u.dtype)


def _recurrence(decay: Tensor, drive: Tensor, reverse: bool = False) -> None:
    """``h[t] = decay[t] * h[t - 1] + drive[t]`` along dim 1 (t + 1 when reversed), in place.

    Args:
        decay: (batch, L, S), contiguous; overwritten with cumulative products.
        drive: (batch, L, S), contiguous; overwritten with h.
        reverse: Run from the last token to the first.
    """
    length = drive.shape[1]
    # L = K * T + rest; the rest is a shorter last chunk, run after (or before) the others
    chunk = max(1, math.isqrt(length))
    whole = length - length % chunk
    parts = [tuple(t[:, :whole].unflatten(1, (-1, chunk)) for t in (decay, drive))]
    if whole < length:
        parts.append((decay[:, None, whole:], drive[:, None, whole:]))
    if reverse:
        parts.reverse()

    entering = None  # the state that enters the next part, (batch, S)
    for a, h in parts:  # (batch, K, T, S)
        tokens = range(h.shape[2])
        chunks = range(h.shape[1])
        if reverse:
            tokens, chunks = tokens[::-1], chunks[::-1]
        a_t, h_t = a.unbind(2), h.unbind(2)
        for before, now in pairwise(tokens):
            h_t[now].addcmul_(a_t[now], h_t[before])
            a_t[now].mul_(a_t[before])

        total, final = a_t[tokens[-1]], h_t[tokens[-1]]  # (batch, K, S)
        if entering is not None:
            h[:, chunks[0]].addcmul_(a[:, chunks[0]], entering[:, None])
        for before, now in pairwise(chunks):
            final[:, now].addcmul_(total[:, now], final[:, before])
        entering = final[:, chunks[-1]]
        inner, later, earlier = slice(None, -1), slice(1, None), slice(None, -1)
        if reverse:
            inner, later, earlier = slice(1, None), slice(None, -1), slice(1, None)
        h[:, later, inner].addcmul_(a[:, later, inner], final[:, earlier, None])


@torch.library.custom_op('mmgroupmamba::blocked_scan', mutates_args=())
def _forward(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """``y = C h`` with ``h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t``, shapes as at the door.

    An operator to torch.compile, which would unroll the loops for each length. Inside, states are
    (batch, L, G, d, N), so that one token's channels are contiguous. The backward recomputes them:
    only the inputs are kept.
    """
    x, delta, A, B, C = _tokens_first(x, delta, A, B, C)
    h, _ = _states(x, delta, A, B)
    return _dot(h, C, -1).flatten(2).transpose(1, 2)


@_forward.register_fake
def _(x, delta, A, B, C):
    return _channels_last(x)


@torch.library.custom_op('mmgroupmamba::blocked_scan_backward', mutates_args=())
def _backward(grad_y: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor
              ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, delta, A, B and C."""
    x, delta, A, B, C = _tokens_first(x, delta, A, B, C)
    grad_y = grad_y.transpose(1, 2).reshape(x.shape)
    h, decay = _states(x, delta, A, B)
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
    return (
        (grad_input * delta).flatten(2).transpose(1, 2),
        grad_delta.flatten(2).transpose(1, 2),
        grad_A.flatten(0, 1),
        grad_B.permute(0, 2, 3, 1),
        grad_C.permute(0, 2, 3, 1),
    )


@_backward.register_fake
def _(grad_y, x, delta, A, B, C):
    return (_channels_last(x), _channels_last(x), A.new_empty(A.shape), _channels_last(B),
            _channels_last(C))


def _channels_last(t: Tensor) -> Tensor:
    """Empty, of t's shape (batch, ..., L), whose memory is (batch, L, ...)."""
    return t.new_empty(t.shape[0], t.shape[-1], *t.shape[1:-1]).movedim(1, -1)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad_y):
    return _backward(grad_y, *ctx.saved_tensors)


_forward.register_autograd(_differentiate, setup_context=_save)


def _tokens_first(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
    groups = B.shape[1]
    return (
        x.transpose(1, 2).unflatten(2, (groups, -1)),  # (batch, L, G, d)
        delta.transpose(1, 2).unflatten(2, (groups, -1)),
        A.unflatten(0, (groups, -1)),  # (G, d, N)
        B.permute(0, 3, 1, 2)[:, :, :, None],  # (batch, L, G, 1, N)
        C.permute(0, 3, 1, 2)[:, :, :, None],
    )


def _states(x: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """h and the decays exp(delta A), both (batch, L, G, d, N) and contiguous."""
    decay = (delta[..., None] * A).contiguous().exp_()
    h = ((delta * x)[..., None] * B).contiguous()
    _recurrence(decay.flatten(2).clone(), h.flatten(2))
    return h, decay


def _dot(states: Tensor, other: Tensor, dim: int) -> Tensor:
    """Inner product of (batch, L, G, d, N) with `other` over the state (dim -1) or d (dim 3)."""
    if dim == 3:
        other = other[..., None]
    if states.shape[dim] == 1:
        return (states * other).squeeze(dim)
    return (states * other).sum(dim)
