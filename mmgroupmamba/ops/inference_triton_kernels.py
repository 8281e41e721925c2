"""The Triton kernels of ``inference_triton``, which imports this module when it launches one.

Maps are contiguous, channels last, but for the gate and the image, which come with their strides.
What is multiplied as matrices is in half precision, sums and norms are float32, and a value is
rounded where it is stored or goes into a product. Channels and tile sizes are compile-time
constants, a map's size is not.
"""
import triton
import triton.language as tl

from .around_scan_triton_kernels import (
    _affine,
    _counted,
    _normed,
    _rows,
)
from .scan_triton_kernels import _sigmoid


@triton.jit
def _known(values, known, at):
    """Of a vector in float32, what is known; zero elsewhere."""
    if known is None:
        loaded = tl.load(values + at)
    else:
        loaded = tl.load(values + at, known, other=0.)
    return loaded.to(tl.float32)


@triton.jit
def _unit(x, known, share, eps, axis: tl.constexpr):
    """To mean 0 and variance 1 along an axis, of what is known."""
    mean = tl.expand_dims(tl.sum(x, axis) * share, axis)
    centred = x - mean
    if known is not None:
        centred = tl.where(known, centred, 0.)
    square = tl.sum(centred * centred, axis) * share
    return centred * tl.rsqrt(tl.expand_dims(square, axis) + eps)


@triton.jit
def _linear(x, weight, rows, columns, C: tl.constexpr, known, known_rows):
    """x (ROWS, in) times a linear layer's weight (out, in), of which `rows` and `columns` are the
    channels, (out, 1) and (1, in)."""
    if known is None:
        matrix = tl.load(weight + rows * C + columns)
    else:
        matrix = tl.load(weight + rows * C + columns, known & known_rows, other=0.)
    return tl.dot(x.to(weight.dtype.element_ty), tl.trans(matrix))


@triton.jit(do_not_specialize=['tokens', 'tiles'])
def mixer_end_kernel(
        y, gate, x, factor, residual, group_weight, group_bias, out_proj, norm_weight, norm_bias,
        proj, proj_bias, next_weight, next_bias, total, normed,
        tokens, tiles, group_eps, norm_eps, next_eps,
        DIM: tl.constexpr, PITCH: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """A program is ROWS tokens of an image, which has `tiles` of them. A group has DIM channels,
    D of a tile; tokens of the gate are PITCH apart."""
    C: tl.constexpr = 4 * DIM
    BLOCK: tl.constexpr = 4 * D
    lane = tl.arange(0, BLOCK)
    column = (lane // D * DIM + lane % D)[None, :]
    row = (lane // D * DIM + lane % D)[:, None]
    image = tl.program_id(0) // tiles
    token = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)[:, None]
    inside = token < tokens
    known = None
    known_rows = None
    known_group = None
    if D != DIM:
        known = (lane % D < DIM)[None, :]
        known_rows = (lane % D < DIM)[:, None]
        known_group = (tl.arange(0, D) < DIM)[None, None, :]
        inside &= known
    cell = image.to(tl.int64) * tokens + token
    at = cell * C + column
    scanned = tl.load(y + at, inside, other=0.).to(tl.float32)
    g = tl.load(gate + cell * PITCH + column, inside, other=0.).to(tl.float32)
    entered = tl.load(x + at, inside, other=0.)

    value = _unit(tl.reshape(scanned, (ROWS, 4, D)), known_group, 1. / DIM, group_eps, 2)
    value = tl.reshape(value, (ROWS, BLOCK)) * _known(group_weight, known, column)
    value += _known(group_bias, known, column)
    value = _linear(value * (g * _sigmoid(g)), out_proj, row, column, C, known, known_rows)

    value *= entered.to(tl.float32) * _known(factor + image * C, known, column)
    value = _unit(value, known, 1. / C, norm_eps, 1) * _known(norm_weight, known, column)
    value = _linear(value + _known(norm_bias, known, column), proj, row, column, C, known,
                    known_rows)

    value += _known(proj_bias, known, column)
    value += tl.load(residual + at, inside, other=0.).to(tl.float32)
    tl.store(total + at, value.to(total.dtype.element_ty), inside)
    value = _unit(value, known, 1. / C, next_eps, 1) * _known(next_weight, known, column)
    value += _known(next_bias, known, column)
    tl.store(normed + at, value.to(normed.dtype.element_ty), inside)


@triton.jit(do_not_specialize=['tokens'])
def linear_sum_kernel(
        x, weight, bias, residual, norm_weight, norm_bias, next_weight, total, normed, out, tokens,
        eps, IN: tl.constexpr, C: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
        ROWS: tl.constexpr, STEP: tl.constexpr):
    """A program is ROWS tokens: their IN channels STEP at a time, C channels of the stream, and
    OUT channels of the linear map behind the norm, none if that is 0."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    inside = token < tokens
    known = None
    known_rows = None
    if C != BLOCK:
        known = column < C
        known_rows = row < C
    k = tl.arange(0, STEP)[None, :]
    value = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(0, IN, STEP, num_stages=4):
        part = tl.load(x + token * IN + first + k, inside, other=0.)
        if known_rows is None:
            matrix = tl.load(weight + row * IN + first + k)
        else:
            matrix = tl.load(weight + row * IN + first + k, known_rows, other=0.)
        value = tl.dot(part, tl.trans(matrix), value)
    at = token * C + column
    if known is not None:
        inside &= known
    value += _known(bias, known, column) + tl.load(residual + at, inside, other=0.).to(tl.float32)
    tl.store(total + at, value.to(total.dtype.element_ty), inside)
    value = _unit(value, known, 1. / C, eps, 1) * _known(norm_weight, known, column)
    value += _known(norm_bias, known, column)
    tl.store(normed + at, value.to(normed.dtype.element_ty), inside)
    for first in tl.static_range(0, OUT, C):
        part = _linear(value, next_weight + first * C, row, column, C, known, known_rows)
        tl.store(out + token * OUT + first + column, part.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=['tokens', 'units'])
def norm_pair_kernel(x, offset, weight, bias, next_weight, next_bias, first, second, tokens, units,
                     eps, next_eps, WIDTH: tl.constexpr, REAL: tl.constexpr, ALIGN: tl.constexpr,
                     ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The LayerNorm of x + offset, which is rounded and stored, and its own."""
    dim = units * ALIGN
    counted, share = _counted(dim, WIDTH, REAL, BLOCK)
    at, inside = _rows(tl.program_id(0), 0, tokens, 1, dim, ROWS, BLOCK)
    w, b, column, known = _affine(weight, bias, 0, dim, BLOCK)
    value = tl.load(x + at, inside, other=0.).to(tl.float32)
    if offset is not None:
        value += tl.load(offset + column, known, other=0.).to(tl.float32)
    normed, _ = _normed(value, counted, share, eps)
    rounded = (normed * w + b).to(first.dtype.element_ty)
    tl.store(first + at, rounded, inside)
    w, b, _, _ = _affine(next_weight, next_bias, 0, dim, BLOCK)
    normed, _ = _normed(rounded.to(tl.float32), counted, share, next_eps)
    tl.store(second + at, (normed * w + b).to(second.dtype.element_ty), inside)


@triton.jit(do_not_specialize=['squares', 'height', 'width'])
def squares_kernel(image, packed, squares, height, width, x_batch, x_channel, x_row, x_column,
                   BLOCK: tl.constexpr):
    """(B, 3, height, width) to (B, ceil(height / 2), ceil(width / 2), 16): of a square of 2 x 2
    pixels the channels 4 c + 2 dy + dx and four zeros. A program is BLOCK squares."""
    square = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    k = tl.arange(0, 16)[None, :]
    across = tl.cdiv(width, 2)
    down = tl.cdiv(height, 2)
    line = square // across
    row = line % down * 2 + k // 2 % 2
    column = square % across * 2 + k % 2
    at = (line // down).to(tl.int64) * x_batch + (k // 4).to(tl.int64) * x_channel
    at += row.to(tl.int64) * x_row + column.to(tl.int64) * x_column
    inside = (square < squares) & (k < 12) & (row < height) & (column < width)
    value = tl.load(image + at, inside, other=0.)
    tl.store(packed + square.to(tl.int64) * 16 + k, value.to(packed.dtype.element_ty),
             square < squares)


@triton.jit(do_not_specialize=['pixels', 'height', 'width'])
def conv_relu_kernel(x, weight, bias, y, pixels, height, width, KERNEL: tl.constexpr,
                     BEFORE: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
                     ROWS: tl.constexpr):
    """ReLU of a convolution that keeps height and width, with BEFORE pixels of padding above and
    to the left; its weight is (KERNEL, KERNEL, IN, OUT). A program is ROWS pixels.

    A product for each of the weight's pixels: the next pixels' values are on their way meanwhile.
    """
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    line = pixel // width
    column = pixel % width
    row = tl.where(pixel < pixels, line % height, -KERNEL)  # nothing is inside
    k = tl.arange(0, IN)
    out = tl.arange(0, OUT)[None, :]
    at = (pixel.to(tl.int64) - BEFORE * (width + 1)) * IN + k[None, :]
    z = tl.zeros((ROWS, OUT), tl.float32)
    for tap in tl.range(0, KERNEL * KERNEL, num_stages=3):
        i = tap // KERNEL
        j = tap % KERNEL
        inside = (row + i >= BEFORE) & (row + i < height + BEFORE)
        inside &= (column + j >= BEFORE) & (column + j < width + BEFORE)
        value = tl.load(x + at + (i * width + j) * IN, inside, other=0.)
        z = tl.dot(value, tl.load(weight + (tap * IN + k[:, None]) * OUT + out), z)
    z += tl.load(bias + out).to(tl.float32)
    z = tl.where(z < 0, 0., z)
    tl.store(y + pixel.to(tl.int64) * OUT + out, z.to(y.dtype.element_ty), pixel < pixels)
