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
_orders: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}


def to_sequences(x: Tensor) -> Tensor:
    """Unroll each group of a map along its direction.

    Args:
        x: Map of shape (B, H, W, 4, d), group g in ``x[:, :, :, g]``.

    Returns:
        Sequences of shape (B, L, 4, d), L = H * W.
    """
    order, back = scan_orders(*x.shape[1:3], x.device)
    rows = _Reorder.apply(x.flatten(1, 3), order, back)
    return rows.unflatten(1, (-1, len(DIRECTIONS)))


def from_sequences(y: Tensor, height: int, width: int) -> Tensor:
    """Put each token back on its place: the inverse of :func:`to_sequences`.

    Args:
        y: Sequences of shape (B, L, 4, d).
        height: H of the map.
        width: W of the map, H * W = L.

    Returns:
        Map of shape (B, H, W, 4, d).
    """
    order, back = scan_orders(height, width, y.device)
    rows = _Reorder.apply(y.flatten(1, 2), back, order)
    return rows.unflatten(1, (height, width, len(DIRECTIONS)))


def scan_orders(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The four orders as one permutation of a map's rows, and its inverse.

    Row t * 4 + g of a map is group g of token t, t counted row after row.

    Returns:
        For each step l and group g, at l * 4 + g, the row that is read there; and the inverse,
        for each row its place in the sequences. Both (L * 4,), kept for the sizes seen last.
    """
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


def _make_orders(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows = torch.arange(height * width * len(DIRECTIONS), device=device)
    groups = []
    for direction, group in zip(DIRECTIONS, rows.view(height, width, -1).unbind(-1)):
        order = (group.t() if direction.by_columns else group).flatten()
        groups.append(order.flip(0) if direction.backward else order)
    order = torch.stack(groups, -1).flatten()
    return order, torch.empty_like(order).scatter_(0, order, rows)


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
