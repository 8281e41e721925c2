import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmgroupmamba.ops import DIRECTIONS, from_sequences, to_sequences
from mmgroupmamba.ops.directions import _orders, scan_orders


def walk(height, width, direction):
    """The cells in scan order, written as nested loops."""
    if direction.by_columns:
        cells = [(h, w) for w in range(width) for h in range(height)]
    else:
        cells = [(h, w) for h in range(height) for w in range(width)]
    return cells[::-1] if direction.backward else cells


@pytest.mark.parametrize('height, width', [(1, 1), (1, 5), (5, 1), (3, 4), (4, 3), (6, 6)])
def test_order_is_that_of_the_directions(height, width):
    x = torch.arange(2 * height * width * 4 * 3.).view(2, height, width, 4, 3)
    sequences = to_sequences(x)
    for g, direction in enumerate(DIRECTIONS):
        want = torch.stack([x[:, h, w, g] for h, w in walk(height, width, direction)], 1)
        assert torch.equal(sequences[:, :, g], want)
    assert torch.equal(from_sequences(sequences, height, width), x)


@pytest.mark.parametrize('height, width', [(2, 5), (5, 2)])
def test_gradient_goes_back_to_its_cell(height, width):
    """The official backward swaps the sides of the column directions: ours must not."""
    x = torch.randn(1, height, width, 4, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(to_sequences, x)
    y = to_sequences(x).detach().requires_grad_()
    torch.autograd.gradcheck(lambda y: from_sequences(y, height, width), y)


def test_four_different_directions():
    assert [(d.by_columns, d.backward) for d in DIRECTIONS] == [
        (False, False), (True, False), (False, True), (True, True)]


def test_orders_are_kept_and_may_be_kept():
    """Those made in inference mode serve a backward pass later; fake ones are not kept."""
    with FakeTensorMode():
        to_sequences(torch.zeros(1, 6, 11, 4, 2))
    with torch.inference_mode():
        to_sequences(torch.zeros(1, 6, 11, 4, 2))
    x = torch.randn(1, 6, 11, 4, 2, requires_grad=True)
    assert type(scan_orders(6, 11, x.device).rows) is torch.Tensor
    y = to_sequences(x)
    grad, = torch.autograd.grad(y, x, y.detach())
    assert torch.equal(grad, x.detach())
    for _ in range(2):
        for width in range(1, 300):
            scan_orders(2, width, x.device)
    assert len(_orders) <= 256
