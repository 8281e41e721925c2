"""The scan as Triton kernels, parallel over L: two launches forward, two backward; one where the
sequences are short and many.

The kernels are in ``scan_triton_kernels``; Triton is imported when a scan first runs. They serve
sequences (``scan``) and maps (``directional_scan``). Each door has two operators that are known to
torch.library, so torch.compile sees no graph break. Gradients are bitwise reproducible. Only the
inputs and one float32 state per 4 or 8 tokens are kept for the backward.
"""
import os
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .directional_scan import over_sequences
from .directions import DIRECTIONS
from .kernel_launch import launch
from .operator import Operator

_TRITON = (3, 6)  # what the kernels are tested with; tuples of tensors came after 3.1
MAX_STATES = 4  # states in registers at once; more are scanned in slices
MAX_RANK = 8  # of a map's step, likewise; more are projected by torch
_LANES = 128  # of a tile: 4 warps, one (chunk, channel) a thread
_MANY_LANES = 2**16  # where long chunks still fill a large GPU
_SHORT = 256  # tokens of a sequence that one lane walks
_MANY_SEQUENCES = 2**14  # where that fills it

# how the groups of a map walk, bit g for group g
_COLUMNS = sum(direction.by_columns << g for g, direction in enumerate(DIRECTIONS))
_BACKWARD = sum(direction.backward << g for g, direction in enumerate(DIRECTIONS))


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


def tile_sizes(batch: int, groups: int, dim: int, states: int, length: int, rank: int = 0,
               keep: bool = True) -> Tile:
    """One of four tiles for a number of states and a rank: few or many channels, long or short
    chunks. Where there are many short sequences, as in a large batch of small images, each is one
    chunk, or the four of one tile: a tile for every eight tokens of length."""
    # what the backward has registers for; if it does not follow, the forward has more
    step = 8 if states == 1 and (rank in (1, 2) or rank and not keep) else 4
    channels = 16 if dim <= 16 else 32
    chunks = _LANES // channels
    if channels == 32 and batch * groups * dim >= _MANY_SEQUENCES:
        for few in (1, chunks):
            if length <= few * _SHORT:
                return Tile(-(-length // (8 * few)) * 8, step, few, channels)
    long_chunks = -(-length // 64)
    enough = long_chunks >= chunks and batch * groups * dim * long_chunks >= _MANY_LANES
    return Tile(64 if enough else 16, step, chunks, channels)


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
    _refuse_float64(u)
    A = A.float()
    D, delta_bias = (t if t is None else t.float() for t in (D, delta_bias))
    delta, B, C = (t.float() if t.dtype == torch.float64 else t for t in (delta, B, C))
    states = A.shape[1]
    if states <= MAX_STATES:
        return _scan(u, delta, A, B, C, D, delta_bias, delta_softplus)
    # y is a sum over the states
    y = 0
    for first in range(0, states, MAX_STATES):
        some = slice(first, first + MAX_STATES)
        y = y + _scan(u.float(), delta, A[:, some], B[:, :, some], C[:, :, some],
                      D if first == 0 else None, delta_bias, delta_softplus)
    return y.to(u.dtype)


def directional_scan(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, A_log: Tensor, D: Tensor,
                     dt_bias: Tensor, out_dtype: torch.dtype) -> Tensor:
    """See :func:`mmgroupmamba.ops.directional_scan`. Map and step are read and written where they
    lie, and the step is never stored; a layout in which H and W are not one dimension is copied.
    With more than 4 states, or a rank above 8, the map is laid out for :func:`scan` instead.

    Raises:
        ValueError: float64 input.
    """
    _refuse_float64(x)
    if A_log.shape[1] > MAX_STATES or dt_weight.shape[2] > MAX_RANK:
        return over_sequences(x, x_dbl, dt_weight, A_log, D, dt_bias, scan).to(out_dtype)
    if x_dbl.dtype == torch.float64:
        x_dbl = x_dbl.float()
    dt_weight, A_log, D, dt_bias = (t.float() for t in (dt_weight, A_log, D, dt_bias))
    keep = _differentiates(x, x_dbl, dt_weight, A_log, D, dt_bias)
    y, _ = MAPS(x, x_dbl, dt_weight, A_log, D, dt_bias, keep, out_dtype)
    return y


def _refuse_float64(x: Tensor) -> None:
    if x.dtype == torch.float64:
        raise ValueError("the Triton kernels have no float64: use backend='blocked'")


def _differentiates(*tensors: Optional[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _scan(u, delta, A, B, C, D, delta_bias, delta_softplus) -> Tensor:
    keep = _differentiates(u, delta, A, B, C, D, delta_bias)
    y, _ = SEQUENCES(u, delta, A, B, C, D, delta_bias, delta_softplus, keep)
    return y


class _Plan(NamedTuple):
    """How the kernels of a scan are launched.

    Attributes:
        programs: How many.
        chunks: That cover a sequence, a multiple of a tile's.
        tile: Their sizes.
        sizes: The kernels' sizes at run time.
        constants: The kernels' compile-time arguments.
    """
    programs: int
    chunks: int
    tile: Tile
    sizes: tuple[int, int, int, int, int]
    constants: dict[str, int]

    @property
    def tiles_at_once(self) -> int:
        """Tiles whose summaries are composed in one step."""
        return _tiles_at_once(self.chunks // self.tile.CHUNKS)


def _tiles_at_once(tiles: int) -> int:
    return 16 if tiles <= 16 else 64


@lru_cache(maxsize=None)
def _kernels() -> ModuleType:
    return import_module('.scan_triton_kernels', __package__)


@lru_cache(maxsize=1024)
def _plan(batch: int, groups: int, dim: int, states: int, width: int, softplus: bool,
          height: int = 1, rank: int = 0, keep: bool = True) -> _Plan:
    """The launch for sequences of `width` tokens, or for maps whose step has a rank."""
    length = height * width
    tile = tile_sizes(batch, groups, dim, states, length, rank, keep)
    chunks = -(-length // (tile.T * tile.CHUNKS)) * tile.CHUNKS
    programs = batch * groups * -(-dim // tile.CHANNELS) * (chunks // tile.CHUNKS)
    constants = dict(N=states, RANK=rank, COLUMNS=_COLUMNS if rank else 0,
                     BACKWARD=_BACKWARD if rank else 0, SOFTPLUS=softplus, **tile._asdict(),
                     num_warps=max(tile.CHUNKS * tile.CHANNELS // 32, 1))
    return _Plan(programs, chunks, tile, (height, width, chunks, groups, dim), constants)


def _plan_sequences(u: Tensor, B: Tensor, softplus: bool) -> _Plan:
    """For u (batch, channels, L) and B (batch, G, N, L)."""
    batch, channels, length = u.shape
    groups, states = B.shape[1:3]
    return _plan(batch, groups, channels // groups, states, length, softplus)


def _plan_maps(x: Tensor, dt_weight: Tensor, A_log: Tensor, keep: bool = True) -> _Plan:
    """For x (batch, H, W, 4, d), dt_weight (4, d, R) and A_log (channels, N)."""
    batch, height, width, groups, dim = x.shape
    return _plan(batch, groups, dim, A_log.shape[1], width, True, height, dt_weight.shape[2], keep)


class _Operand(NamedTuple):
    """What the kernels see as (batch, groups, values, cell), by its strides: no view is made."""
    tensor: Tensor
    strides: tuple[int, int, int, int]


def _by_cells(x: Tensor) -> _Operand:
    """Of (batch, H, W, groups, values); copied only where H and W are not one dimension."""
    _, height, width, _, _ = x.shape
    batch, row, cell, group, value = x.stride()
    if height > 1 and width > 1 and row != width * cell:
        return _by_cells(x.contiguous())
    return _Operand(x, (batch, group, value, cell if width > 1 else row))


def _by_tokens(x: Tensor, groups: int) -> _Operand:
    """Of (batch, channels, L)."""
    batch, channel, token = x.stride()
    return _Operand(x, (batch, x.shape[1] // groups * channel, channel, token))


def _channels_last(u: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
    """Empty (batch, channels, L) whose memory is (batch, L, channels)."""
    batch, channels, length = u.shape
    return u.new_empty(batch, length, channels, dtype=dtype or u.dtype).transpose(1, 2)


def _kept_states(plan: _Plan, x: Tensor, A: Tensor, keep: bool) -> Tensor:
    stops = plan.chunks * plan.tile.T // plan.tile.STEP if keep else 0
    return A.new_empty(x.shape[0], stops, A.shape[1], A.shape[0])


def _summary(plan: _Plan, x: _Operand, delta: Optional[_Operand], weight: Optional[Tensor],
             rows: _Operand, A: Tensor, bias: Optional[Tensor], reverse: bool) -> Optional[Tensor]:
    """Decay and state after each chunk, counted from its tile's start: (batch, chunks, N, 2, C);
    None if there is but one chunk."""
    if plan.chunks == 1:
        return None
    ends = A.new_empty(x.tensor.shape[0], plan.chunks, A.shape[1], 2, A.shape[0])
    launch(_kernels().summary_kernel, plan.programs,
           (x.tensor, _tensor(delta), weight, rows.tensor, A, bias, ends),
           (*plan.sizes, *_strides(x, delta, rows)), **plan.constants, REVERSE=reverse)
    return ends


def _launch_forward(plan: _Plan, x: _Operand, delta: Optional[_Operand], weight: Optional[Tensor],
                    rows: _Operand, A: Tensor, D: Optional[Tensor], bias: Optional[Tensor],
                    y: Tensor, entry: Optional[Tensor]) -> None:
    """Fill y, which lies in memory as (batch, cell, channels), and, if it is given, entry. The step
    is `delta` or, of a map, `weight` times what stands first in its rows."""
    ends = _summary(plan, x, delta, weight, rows, A, bias, reverse=False)
    launch(_kernels().forward_kernel, plan.programs,
           (x.tensor, _tensor(delta), weight, rows.tensor, A, D, bias, ends, y, entry),
           (*plan.sizes, *_strides(x, delta, rows)), **plan.constants, TILES=plan.tiles_at_once)


def _launch_backward(plan: _Plan, x: _Operand, delta: Optional[_Operand], weight: Optional[Tensor],
                     rows: _Operand, A: Tensor, D: Optional[Tensor], bias: Optional[Tensor],
                     grad: _Operand, entry: Tensor, dx: Tensor, ddelta: Optional[Tensor],
                     drows: Tensor) -> Tensor:
    """Fill dx, ddelta if the step is given, and drows.

    Returns:
        Gradients of A (of a map, log(-A)), D, bias and weight, (N + 1 + 1 + R, channels).
    """
    channels, states = A.shape
    sums = A.new_empty(x.tensor.shape[0], plan.chunks // plan.tile.CHUNKS,
                       states + 2 + plan.constants['RANK'], channels)
    ends = _summary(plan, grad, delta, weight, rows, A, bias, reverse=True)
    launch(_kernels().backward_kernel, plan.programs,
           (x.tensor, _tensor(delta), weight, rows.tensor, A, D, bias, grad.tensor, ends, entry,
            dx, ddelta, drows, sums),
           (*plan.sizes, *_strides(x, delta, rows, grad)), **plan.constants,
           TILES=plan.tiles_at_once)
    return sums.sum((0, 1))


def _sums_fake(A: Tensor, rank: int) -> Tensor:
    return A.new_empty(A.shape[1] + 2 + rank, A.shape[0])


def of_sums(sums: Tensor, states: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of A (channels, N), D, bias (channels,) and weight (channels, R)."""
    return sums[:states].t(), sums[states], sums[states + 1], sums[states + 2:].t()


def _tensor(operand: Optional[_Operand]) -> Optional[Tensor]:
    return None if operand is None else operand.tensor


def _strides(*operands: Optional[_Operand]) -> list[int]:
    return [stride for t in operands for stride in ((0, 0, 0, 0) if t is None else t.strides)]


def _empty_drows(plan: _Plan, rows: Tensor) -> Tensor:
    """Each part's share in the gradient of rows: (part, batch, cell, G, R + 2N)."""
    height, width, _, groups, dim = plan.sizes
    parts = -(-dim // plan.tile.CHANNELS)
    values = plan.constants['RANK'] + 2 * plan.constants['N']
    return rows.new_empty(parts, rows.shape[0], height * width, groups, values,
                          dtype=rows.dtype if parts == 1 else torch.float32)


def _summed(drows: Tensor, dtype: torch.dtype) -> Tensor:
    return (drows[0] if len(drows) == 1 else drows.sum(0)).to(dtype)


def _rows(B: Tensor, C: Tensor) -> Tensor:
    """A sequence's rows (batch, G, 2N, L), the values of a token side by side in memory."""
    return torch.cat([t.permute(0, 3, 1, 2) for t in (B, C)], -1).permute(0, 2, 3, 1)


def _contiguous(*tensors: Optional[Tensor]) -> list[Optional[Tensor]]:
    return [t if t is None else t.contiguous() for t in tensors]


def _forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor],
             bias: Optional[Tensor], softplus: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """y (batch, channels, L), and the states that the backward starts from (none unless keep)."""
    plan, groups = _plan_sequences(u, B, softplus), B.shape[1]
    A, D, bias = _contiguous(A, D, bias)
    y = _channels_last(u)
    entry = _kept_states(plan, u, A, keep)
    rows = _rows(B, C)
    _launch_forward(plan, _by_tokens(u, groups), _by_tokens(delta, groups), None,
                    _Operand(rows, rows.stride()), A, D, bias, y, entry if keep else None)
    return y, entry


def _forward_fake(u, delta, A, B, C, D, bias, softplus, keep):
    return _channels_last(u), _kept_states(_plan_sequences(u, B, softplus), u, A, keep)


def _backward(grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
              D: Optional[Tensor], bias: Optional[Tensor], entry: Tensor, softplus: bool
              ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, B beside C (batch, L, G, 2N), and of A, D and bias as of_sums takes
    them."""
    plan, groups = _plan_sequences(u, B, softplus), B.shape[1]
    A, D, bias = _contiguous(A, D, bias)
    du, ddelta = _channels_last(u), _channels_last(u, delta.dtype)
    rows = _rows(B, C)
    drows = _empty_drows(plan, rows)
    sums = _launch_backward(plan, _by_tokens(u, groups), _by_tokens(delta, groups), None,
                            _Operand(rows, rows.stride()), A, D, bias, _by_tokens(grad, groups),
                            entry, du, ddelta, drows)
    return du, ddelta, _summed(drows, rows.dtype), sums


def _backward_fake(grad, u, delta, A, B, C, D, bias, entry, softplus):
    rows = B.new_empty(B.shape[0], B.shape[3], B.shape[1], 2 * B.shape[2],
                       dtype=torch.promote_types(B.dtype, C.dtype))
    return _channels_last(u), _channels_last(u, delta.dtype), rows, _sums_fake(A, 0)


def _save(ctx, inputs, output):
    *tensors, ctx.softplus, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx, backward, grad, _):
    *tensors, entry = ctx.saved_tensors
    _, _, A, B, C, D, bias = tensors
    du, ddelta, drows, sums = backward(grad, *tensors, entry, ctx.softplus)
    dB, dC = (t.permute(0, 2, 3, 1) for t in drows.chunk(2, -1))
    dA, dD, dbias, _ = of_sums(sums, A.shape[1])
    return (du, ddelta, dA, dB.to(B.dtype), dC.to(C.dtype), None if D is None else dD,
            None if bias is None else dbias, None, None)


SEQUENCES = Operator('triton_scan', _forward, _backward, _forward_fake, _backward_fake, _save,
                     _differentiate)


def _map_forward(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, A_log: Tensor, D: Tensor,
                 bias: Tensor, keep: bool, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y (batch, H, W, 4, d), and the states that the backward starts from (none unless keep)."""
    plan = _plan_maps(x, dt_weight, A_log, keep)
    dt_weight, A_log, D, bias = _contiguous(dt_weight, A_log, D, bias)
    y = x.new_empty(x.shape, dtype=out_dtype)
    entry = _kept_states(plan, x, A_log, keep)
    _launch_forward(plan, _by_cells(x), None, dt_weight, _by_cells(x_dbl), A_log, D, bias, y,
                    entry if keep else None)
    return y, entry


def _map_forward_fake(x, x_dbl, dt_weight, A_log, D, bias, keep, out_dtype):
    return (x.new_empty(x.shape, dtype=out_dtype),
            _kept_states(_plan_maps(x, dt_weight, A_log), x, A_log, keep))


def _map_backward(grad: Tensor, x: Tensor, x_dbl: Tensor, dt_weight: Tensor, A_log: Tensor,
                  D: Tensor, bias: Tensor, entry: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of x_dbl, and of the others as of_sums takes them."""
    plan = _plan_maps(x, dt_weight, A_log)
    dt_weight, A_log, D, bias = _contiguous(dt_weight, A_log, D, bias)
    drows = _empty_drows(plan, x_dbl)
    dx = x.new_empty(x.shape)
    sums = _launch_backward(plan, _by_cells(x), None, dt_weight, _by_cells(x_dbl), A_log, D, bias,
                            _by_cells(grad), entry, dx, None, drows)
    return dx, _summed(drows, x_dbl.dtype).view(x_dbl.shape), sums


def _map_backward_fake(grad, x, x_dbl, dt_weight, A_log, D, bias, entry):
    return (x.new_empty(x.shape), x_dbl.new_empty(x_dbl.shape),
            _sums_fake(A_log, dt_weight.shape[2]))


def _save_map(ctx, inputs, output):
    *tensors, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _differentiate_map(ctx, backward, grad, _):
    saved = ctx.saved_tensors  # once: recomputed blocks unpack nothing twice
    dt_weight, A_log = saved[2:4]
    dx, dx_dbl, sums = backward(grad, *saved)
    dA, dD, dbias, dweight = of_sums(sums, A_log.shape[1])
    return dx, dx_dbl, dweight.reshape(dt_weight.shape), dA, dD, dbias, None, None


MAPS = Operator('triton_directional_scan', _map_forward, _map_backward, _map_forward_fake,
                _map_backward_fake, _save_map, _differentiate_map)
