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


def to_sequences(x: Tensor) -> Tensor:
    """Unroll each group of a map along its direction.

    Args:
        x: Map of shape (B, H, W, 4, d), group g in ``x[:, :, :, g]``.

    Returns:
        Sequences of shape (B, L, 4, d), L = H * W.
    """
    sequences = []
    for direction, group in zip(DIRECTIONS, x.unbind(3)):
        if direction.by_columns:
            group = group.transpose(1, 2)
        sequence = group.flatten(1, 2)  # (B, L, d)
        sequences.append(sequence.flip(1) if direction.backward else sequence)
    return torch.stack(sequences, 2)


def from_sequences(y: Tensor, height: int, width: int) -> Tensor:
    """Put each token back on its place: the inverse of :func:`to_sequences`.

    Args:
        y: Sequences of shape (B, L, 4, d).
        height: H of the map.
        width: W of the map, H * W = L.

    Returns:
        Map of shape (B, H, W, 4, d).
    """
    groups = []
    for direction, sequence in zip(DIRECTIONS, y.unbind(2)):
        if direction.backward:
            sequence = sequence.flip(1)
        if direction.by_columns:
            groups.append(sequence.unflatten(1, (width, height)).transpose(1, 2))
        else:
            groups.append(sequence.unflatten(1, (height, width)))
    return torch.stack(groups, 3)
