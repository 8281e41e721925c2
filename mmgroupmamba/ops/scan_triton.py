"""The scan as Triton kernels, parallel over L: two launches forward, two backward.

The kernels are in ``scan_triton_kernels``; Triton is imported when a scan first runs. The two
operators are known to torch.library, so torch.compile sees no graph break. Gradients are bitwise
reproducible. Only the inputs and one float32 state per 4 or 8 tokens are kept for the backward.
"""
import os
from functools import lru_cache
from importlib import import_module
from typing import NamedTuple, Optional

import torch
from torch import Tensor

_TRITON = (3, 6)  # what the kernels are tested with; tuples of tensors came after 3.1
_MAX_STATES = 4  # states in registers at once; more are scanned in slices
_LANES = 128  # of a tile: 4 warps, one (chunk, channel) a thread
_MANY_LANES = 2**16  # where long chunks still fill a large GPU


class Tile(NamedTuple):
    """Compile-time sizes of the kernels.

    Attributes:
        T: Tokens of a chunk.
        STEP: Tokens loaded at once, and between two kept states.
        CHUNKS: Chunks of a tile.
        CHANNELS: Channels of a tile.
    """
    T: int
    STEP: int
    CHUNKS: int
    CHANNELS: int


def tile_sizes(batch: int, groups: int, dim: int, states: int, length: int) -> Tile:
    """One of four tiles for a number of states: long or short chunks, few or many channels."""
    channels = 16 if dim <= 16 else 32
    chunks = _LANES // channels
    long_chunks = -(-length // 64)
    enough = long_chunks >= chunks and batch * groups * dim * long_chunks >= _MANY_LANES
    return Tile(64 if enough else 16, 8 if states == 1 else 4, chunks, channels)


def _interpreted() -> bool:
    return os.environ.get('TRITON_INTERPRET') == '1'


@lru_cache(maxsize=None)
def _triton_problem() -> Optional[str]:
    try:
        version = import_module('triton').__version__
    except ImportError as error:
        return f'{str(error).splitlines()[0]}; install it with `pip install triton`'
    if tuple(int(part) for part in version.split('.')[:2]) < _TRITON:
        return (f'needs triton {_TRITON[0]}.{_TRITON[1]} or newer, not {version}: it comes with a '
                'newer torch')
    return None


def why_not(device_type: str) -> Optional[str]:
    if device_type != 'cuda' and not (device_type == 'cpu' and _interpreted()):
        return (f'Triton kernels run on CUDA tensors only, not on {device_type}; for tests, '
                'TRITON_INTERPRET=1 in the environment interprets them on the CPU')
    return _triton_problem()


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor],
         delta_bias: Optional[Tensor], delta_softplus: bool) -> Tensor:
    """See :func:`mmgroupmamba.ops.selective_scan`. Fastest where the channels of u and delta
    are contiguous in memory; no layout is copied.

    Raises:
        ValueError: float64 input.
    """
    if u.dtype == torch.float64:
        raise ValueError("the Triton kernels have no float64: use backend='blocked'")
    A = A.float()
    D, delta_bias = (t if t is None else t.float() for t in (D, delta_bias))
    delta, B, C = (t.float() if t.dtype == torch.float64 else t for t in (delta, B, C))
    states = A.shape[1]
    if states <= _MAX_STATES:
        return _run(u, delta, A, B, C, D, delta_bias, delta_softplus)
    # y is a sum over the states
    y = 0
    for first in range(0, states, _MAX_STATES):
        some = slice(first, first + _MAX_STATES)
        y = y + _run(u.float(), delta, A[:, some], B[:, :, some], C[:, :, some],
                     D if first == 0 else None, delta_bias, delta_softplus)
    return y.to(u.dtype)


def _run(u, delta, A, B, C, D, delta_bias, delta_softplus) -> Tensor:
    tensors = [t for t in (u, delta, A, B, C, D, delta_bias) if t is not None]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    y, _ = _forward(u, delta, A, B, C, D, delta_bias, delta_softplus, keep)
    return y


def _chunks(length: int, tile: Tile) -> int:
    """Chunks that cover the sequence, a multiple of a tile's."""
    return -(-length // (tile.T * tile.CHUNKS)) * tile.CHUNKS


def _launch_sizes(u: Tensor, B: Tensor) -> tuple[Tile, int, tuple[int, ...], int]:
    """Tile, number of chunks, the kernels' size arguments, number of programs."""
    batch, channels, length = u.shape
    groups, states = B.shape[1:3]
    dim = channels // groups
    tile = tile_sizes(batch, groups, dim, states, length)
    chunks = _chunks(length, tile)
    programs = batch * groups * -(-dim // tile.CHANNELS) * (chunks // tile.CHUNKS)
    return tile, chunks, (length, chunks, groups, dim), programs


def _tiles_at_once(chunks: int, tile: Tile) -> int:
    return 16 if chunks // tile.CHUNKS <= 16 else 64


def _channels_last(u: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
    """Empty (batch, channels, L) whose memory is (batch, L, channels)."""
    batch, channels, length = u.shape
    return u.new_empty(batch, length, channels, dtype=dtype or u.dtype).transpose(1, 2)


def _kept_states(u: Tensor, A: Tensor, B: Tensor, keep: bool) -> Tensor:
    tile, chunks, _, _ = _launch_sizes(u, B)
    stops = chunks * tile.T // tile.STEP if keep else 0
    return u.new_empty(u.shape[0], stops, A.shape[1], u.shape[1], dtype=torch.float32)


def _summary(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, bias: Optional[Tensor],
             softplus: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    """Decay and state after each chunk, counted from its tile's start: (batch, chunks, N, C)."""
    kernels = import_module('.scan_triton_kernels', __package__)
    tile, chunks, sizes, programs = _launch_sizes(x, B)
    decay = x.new_empty(x.shape[0], chunks, A.shape[1], x.shape[1], dtype=torch.float32)
    state = torch.empty_like(decay)
    kernels.summary_kernel[(programs, )](
        x, delta, A, B, bias, decay, state, *sizes, *x.stride(), *delta.stride(), *B.stride(),
        N=A.shape[1], **tile._asdict(), SOFTPLUS=softplus, REVERSE=reverse)
    return decay, state


@torch.library.custom_op('mmgroupmamba::triton_scan', mutates_args=())
def _forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor],
             bias: Optional[Tensor], softplus: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """y (batch, channels, L), and the states that the backward starts from (none unless keep)."""
    kernels = import_module('.scan_triton_kernels', __package__)
    tile, chunks, sizes, programs = _launch_sizes(u, B)
    A = A.contiguous()
    D, bias = (t if t is None else t.contiguous() for t in (D, bias))
    y = _channels_last(u)
    entry = _kept_states(u, A, B, keep)
    with torch.cuda.device_of(u):
        decay, state = _summary(u, delta, A, B, bias, softplus, reverse=False)
        kernels.forward_kernel[(programs, )](
            u, delta, A, B, C, D, bias, decay, state, y, entry if keep else None, *sizes,
            *u.stride(), *delta.stride(), *B.stride(), *C.stride(), *y.stride(),
            N=A.shape[1], **tile._asdict(), TILES=_tiles_at_once(chunks, tile),
            SOFTPLUS=softplus)
    return y, entry


@_forward.register_fake
def _(u, delta, A, B, C, D, bias, softplus, keep):
    return _channels_last(u), _kept_states(u, A, B, keep)


@torch.library.custom_op('mmgroupmamba::triton_scan_backward', mutates_args=())
def _backward(grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
              D: Optional[Tensor], bias: Optional[Tensor], entry: Tensor, softplus: bool
              ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D and bias; the last two also where these are None."""
    kernels = import_module('.scan_triton_kernels', __package__)
    tile, chunks, sizes, programs = _launch_sizes(u, B)
    batch, channels, length = u.shape
    groups, states = B.shape[1:3]
    A = A.contiguous()
    D, bias = (t if t is None else t.contiguous() for t in (D, bias))
    du, ddelta = _channels_last(u), _channels_last(u, delta.dtype)
    parts = -(-channels // groups // tile.CHANNELS)
    dB = u.new_empty(parts, batch, length, groups, states, dtype=torch.float32)
    dC = torch.empty_like(dB)
    sums = u.new_empty(batch, chunks // tile.CHUNKS, states + 2, channels, dtype=torch.float32)
    with torch.cuda.device_of(u):
        decay, state = _summary(grad, delta, A, C, bias, softplus, reverse=True)
        kernels.backward_kernel[(programs, )](
            u, delta, A, B, C, D, bias, grad, decay, state, entry, du, ddelta, dB, dC, sums,
            *sizes, *u.stride(), *delta.stride(), *B.stride(), *C.stride(), *grad.stride(),
            N=states, **tile._asdict(), TILES=_tiles_at_once(chunks, tile), SOFTPLUS=softplus)
    dB, dC = ((t[0] if parts == 1 else t.sum(0)).permute(0, 2, 3, 1).to(like.dtype)
              for t, like in ((dB, B), (dC, C)))
    sums = sums.sum((0, 1))
    return (du, ddelta, sums[:states].t().contiguous(), dB, dC, sums[states].clone(),
            sums[states + 1].clone())


@_backward.register_fake
def _(grad, u, delta, A, B, C, D, bias, entry, softplus):
    def like(t):  # (batch, G, N, L) with memory (batch, L, G, N)
        return t.new_empty(t.shape[0], t.shape[3], *t.shape[1:3]).permute(0, 2, 3, 1)

    return (_channels_last(u), _channels_last(u, delta.dtype), A.new_empty(A.shape), like(B),
            like(C), A.new_empty(A.shape[0]), A.new_empty(A.shape[0]))


def _save(ctx, inputs, output):
    *tensors, ctx.softplus, ctx.kept = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx, grad, _):
    *tensors, entry = ctx.saved_tensors
    grads = list(_backward(grad, *tensors, entry, ctx.softplus))
    for i in (5, 6):
        if tensors[i] is None:
            grads[i] = None
    return (*grads, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)
