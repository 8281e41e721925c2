"""The four scan directions over a map (H, W): data, not classes.

Group g of a layer reads its channels as one sequence of L = H * W tokens in the order of
``DIRECTIONS[g]``. The order of the groups is that of the released code (``CrossScan_1`` to
``CrossScan_4`` in the official ``classification/models/csms6s.py``), not of the paper's figure.
"""
from typing import NamedTuple

import torch
from torch import Tensor


class Direction(NamedTuple):
    """How one group walks the map.

    Attributes:
        name: What a reader calls it.
        by_columns: Column after column instead of row after row.
        backward: From the last token to the first.
    """
    name: str
    by_columns: bool
    backward: bool


DIRECTIONS = (
    Direction('rows forward', by_columns=False, backward=False),
    Direction('columns forward', by_columns=True, backward=False),
    Direction('rows backward', by_columns=False, backward=True),
    Direction('columns backward', by_columns=True, backward=True),
)

_MANY_SIZES = 256


class Orders(NamedTuple):
    """The four directions over one map size as indices.

    Attributes:
        tokens: For each group and step l the token read there, (4, L), counted row after row.
        places: For each group and token its step, (4, L): the inverse.
        rows: The same for a map's rows (L * 4, d), row t * 4 + g being group g of token t:
            for each step and group, at l * 4 + g, the row read there, (L * 4,).
        rows_back: For each row its place in the sequences, (L * 4,): the inverse.
    """
    tokens: Tensor
    places: Tensor
    rows: Tensor
    rows_back: Tensor


_orders: dict[tuple[int, int, torch.device], Orders] = {}


def to_sequences(x: Tensor) -> Tensor:
    """Unroll each group of a map along its direction.

    Args:
        x: Map of shape (B, H, W, 4, d), group g in ``x[:, :, :, g]``.

    Returns:
        Sequences of shape (B, L, 4, d), L = H * W.
    """
    orders = scan_orders(*x.shape[1:3], x.device)
    rows = _reorder(x.flatten(1, 3), orders.rows, orders.rows_back)
    return rows.view(x.shape[0], -1, *x.shape[3:])


def from_sequences(y: Tensor, height: int, width: int) -> Tensor:
    """Put each token back on its place: the inverse of :func:`to_sequences`.

    Args:
        y: Sequences of shape (B, L, 4, d).
        height: H of the map.
        width: W of the map, H * W = L.

    Returns:
        Map of shape (B, H, W, 4, d).
    """
    orders = scan_orders(height, width, y.device)
    rows = _reorder(y.flatten(1, 2), orders.rows_back, orders.rows)
    return rows.view(y.shape[0], height, width, *y.shape[2:])


def scan_orders(height: int, width: int, device: torch.device) -> Orders:
    """The directions over a map of H x W tokens; kept for the sizes seen last."""
    if torch.compiler.is_compiling():
        return _make_orders(height, width, device)
    key = height, width, device
    if key not in _orders:
        with torch.inference_mode(False):  # what is kept may be saved for a backward pass
            orders = _make_orders(height, width, device)
        if type(orders[0]) is not Tensor:  # fake or traced: not to be kept
            return orders
        while len(_orders) >= _MANY_SIZES:
            _orders.pop(next(iter(_orders)))
        _orders[key] = orders
    return _orders[key]


def _make_orders(height: int, width: int, device: torch.device) -> Orders:
    map_ = torch.arange(height * width, device=device).view(height, width)
    groups = []
    for direction in DIRECTIONS:
        tokens = (map_.t() if direction.by_columns else map_).flatten()
        groups.append(tokens.flip(0) if direction.backward else tokens)
    tokens = torch.stack(groups)
    places = torch.empty_like(tokens).scatter_(1, tokens, map_.flatten().expand_as(tokens))
    group = torch.arange(len(DIRECTIONS), device=device)
    rows, rows_back = ((t.t() * len(DIRECTIONS) + group).flatten() for t in (tokens, places))
    return Orders(tokens, places, rows, rows_back)


def _reorder(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    if not torch.is_grad_enabled():  # spare what an autograd.Function costs
        return x.index_select(1, order)
    return _Reorder.apply(x, order, back)


class _Reorder(torch.autograd.Function):
    """``x[:, order]``; the gradient goes back by the inverse instead of being summed up."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        order, back = ctx.saved_tensors
        return _Reorder.apply(grad, back, order), None, None
