"""The Triton kernels of ``around_scan_triton``, which imports this module when it launches one.

Maps are contiguous, channels last. Arithmetic is float32; a value is rounded once, when it is
stored. Channels are counted in units of ALIGN, a power of two, which tells the compiler how wide a
load may be. Tile sizes are compile-time constants from a small set; a map's size is not. What is
summed over pixels is summed by each program for itself and then by torch, in a fixed order: no
atomics, the same input gives the same bits.
"""
import triton
import triton.language as tl

from .scan_triton_kernels import _reciprocal, _sigmoid

# no recompilation when these become 1 or a multiple of 16
RUNTIME = ['batch', 'height', 'width', 'rows', 'units', 'tokens', 'groups', 'blocks', 'tiles',
           'parts', 'area', 'pitch', 'channels', 'hidden']


@triton.jit
def _normal(z):
    """exp(-z**2 / 2) and the normal distribution's Phi(z), relatively exact in both tails.

    Phi(-z) exp(z**2 / 2) as a polynomial in 1 / (1 + a z), fitted to scipy's erfcx: to 2.4e-8.
    """
    scaled = z * 0.8493218003  # sqrt(log2(e) / 2)
    bell = tl.exp2(-scaled * scaled)
    t = _reciprocal(1. + 0.27 * tl.abs(z))
    tail = t * 0.0289944937 - 0.126653583
    tail = tail * t + 0.170145234
    tail = tail * t - 0.069637732
    tail = tail * t + 0.108133248
    tail = tail * t + 0.0719124705
    tail = tail * t + 0.101847451
    tail = tail * t + 0.107537436
    tail = tail * t + 0.107720994
    tail *= t * bell
    return bell, tl.where(z < 0, tail, 1. - tail)


@triton.jit
def _gelu_to_half(z):
    """GELU for what is rounded to half precision: max(z, 0) - |z| Phi(-|z|), in eight instructions.

    log2 Phi(-z) as a polynomial in z, fitted to scipy's log_ndtr: the product to 6e-5, relatively,
    where it is above 1e-3 (half precision: 5e-4 and 4e-3). GELU of inf is NaN here.
    """
    z_abs = tl.abs(z)
    log = z_abs * -0.000353570423 + 0.00614277609
    log = log * z_abs - 0.0492705524
    log = log * z_abs - 0.462776233
    log = log * z_abs - 1.14975995
    log = log * z_abs - 1.00008849
    return tl.maximum(z, 0.) - z_abs * tl.exp2(log)


@triton.jit
def _gelu_slope_to_half(z):
    """The derivative of GELU, absolutely to 7e-5: g(|z|) or 1 - g(|z|) with
    g(z) = Phi(-z) - z exp(-z**2 / 2) / sqrt(2 pi), and g(z) exp(z**2 / 2) a polynomial."""
    # the polynomial stays finite
    z_abs = tl.minimum(tl.abs(z), 8., propagate_nan=tl.PropagateNan.ALL)
    scaled = z_abs * 0.8493218003  # sqrt(log2(e) / 2)
    bell = tl.exp2(-scaled * scaled)
    g = z_abs * -0.00273962 + 0.02528027
    g = g * z_abs - 0.0996618
    g = g * z_abs + 0.23543308
    g = g * z_abs - 0.79550977
    g = g * z_abs + 0.49993728
    g *= bell
    return tl.where(z < 0, g, 1. - g)


@triton.jit
def _activate(z, HALF: tl.constexpr, ACTIVATION: tl.constexpr):
    if ACTIVATION == 'gelu':
        if HALF:
            z = _gelu_to_half(z)
        else:
            _, below = _normal(z)
            z *= below
    elif ACTIVATION == 'silu':
        z *= _sigmoid(z)
    return z


@triton.jit
def _slope(z, HALF: tl.constexpr, ACTIVATION: tl.constexpr):
    """The derivative of the activation."""
    if ACTIVATION == 'gelu':
        if HALF:
            slope = _gelu_slope_to_half(z)
        else:
            bell, below = _normal(z)
            slope = below + z * bell * 0.3989422804
    elif ACTIVATION == 'silu':
        s = _sigmoid(z)
        slope = s * (1. + z * (1. - s))
    else:
        slope = tl.full(z.shape, 1., tl.float32)
    return slope


@triton.jit
def _strips(batch, height, width, rows, channels, COLUMNS: tl.constexpr, STRIPS: tl.constexpr,
            CHANNELS: tl.constexpr):
    """Decode the program: its first row, the first column of each lane's strip, (STRIPS, 1), the
    pixel there, the lane's channel, (1, CHANNELS), and whether there is such a lane."""
    pid = tl.program_id(0)
    channel_tiles = tl.cdiv(channels, CHANNELS)
    c = pid % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    parts = tl.cdiv(height, rows)
    row = pid // channel_tiles % parts * rows
    strip = pid // (channel_tiles * parts) * STRIPS + tl.arange(0, STRIPS)[:, None]
    across = tl.cdiv(width, COLUMNS)
    column = strip % across * COLUMNS
    image = strip // across
    pixel = (image.to(tl.int64) * height + row) * width + column
    return row, column, pixel, c, (image < batch) & (c < channels)


@triton.jit
def _load_row(x, lane, inside, row_inside, apart, COUNT: tl.constexpr):
    """COUNT neighbours in a row, the first of them at x + lane, zero outside the map.

    What is the same for all lanes stays in `x`: uniform registers.
    """
    values = ()
    for j in tl.static_range(COUNT):
        values += (tl.load(x + j * apart + lane, inside[j] & row_inside, other=0.), )
    return values


@triton.jit
def _widen(narrow, COUNT: tl.constexpr):
    values = ()
    for j in tl.static_range(COUNT):
        values += (narrow[j].to(tl.float32), )
    return values


@triton.jit(do_not_specialize=['batch', 'height', 'width', 'rows'])
def conv_forward_kernel(
        x, weight, bias, y, batch, height, width, rows,
        ACTIVATION: tl.constexpr, DIM: tl.constexpr, PITCH: tl.constexpr, COLUMNS: tl.constexpr,
        STRIPS: tl.constexpr, CHANNELS: tl.constexpr, AHEAD: tl.constexpr):
    """A lane is a channel of a strip of COLUMNS columns and walks down `rows` rows.

    Each pixel is loaded once for the three rows of output that it is in, AHEAD rows before its use.
    Pixels of x, of which DIM channels are read, are PITCH apart: it may be a part of a map of more
    channels. Both are known when the kernel is compiled, so that a row's loads share an address.
    """
    HALF: tl.constexpr = y.dtype.element_ty.primitive_bitwidth == 16
    first, column, pixel, c, valid = _strips(
        batch, height, width, rows, DIM, COLUMNS, STRIPS, CHANNELS)
    lane = pixel * DIM + c
    stop = tl.minimum(first + rows, height)
    line = width.to(tl.int64) * DIM
    source = pixel * PITCH + c
    taps = ()
    for k in tl.static_range(9):
        taps += (tl.load(weight + c * 9 + k, c < DIM, other=0.).to(tl.float32), )
    shift = tl.load(bias + c, c < DIM, other=0.).to(tl.float32)
    shift = tl.broadcast_to(shift, (STRIPS, CHANNELS))
    inside = ()
    for j in tl.static_range(COLUMNS + 2):
        inside += (valid & (column + j >= 1) & (column + j <= width), )
    above = ()  # what is summed so far of the row above the loaded one, and of this one
    here = ()
    for _ in tl.static_range(COLUMNS):
        above += (shift, )
        here += (shift, )

    source_line = width.to(tl.int64) * PITCH
    x -= source_line + PITCH
    y -= 2 * line
    row = first - 1
    ahead = ()
    for i in tl.static_range(AHEAD):
        ahead += (_load_row(x, source, inside, (row + i >= 0) & (row + i <= stop)
                            & (row + i < height), PITCH, COLUMNS + 2), )
        x += source_line
    while row <= first + rows:
        following = ()
        for i in tl.static_range(AHEAD):  # so that what was loaded is used where it is
            xs = _widen(ahead[i], COLUMNS + 2)
            following += (_load_row(x, source, inside, (row + AHEAD <= stop)
                                    & (row + AHEAD < height), PITCH, COLUMNS + 2), )
            x += source_line
            next_above = ()
            next_here = ()
            for k in tl.static_range(COLUMNS):
                done = above[k]
                middle = here[k]
                below = shift
                for j in tl.static_range(3):
                    done += xs[k + j] * taps[6 + j]
                    middle += xs[k + j] * taps[3 + j]
                    below += xs[k + j] * taps[j]
                tl.store(y + k * DIM + lane,
                         _activate(done, HALF, ACTIVATION).to(y.dtype.element_ty),
                         inside[k + 1] & (row > first) & (row <= stop))
                next_above += (middle, )
                next_here += (below, )
            above = next_above
            here = next_here
            y += line
            row += 1
        ahead = following


@triton.jit(do_not_specialize=RUNTIME)
def conv_backward_kernel(
        x, grad, weight, bias, dx, sums, batch, height, width, rows, units, pitch,
        ACTIVATION: tl.constexpr, PITCHED: tl.constexpr, ALIGN: tl.constexpr,
        COLUMNS: tl.constexpr, STRIPS: tl.constexpr, CHANNELS: tl.constexpr):
    """dx, and the program's sums for the weight's nine taps and the bias: (program, 10, channel).
    PITCHED, the pixels of dx are as far apart as those of x.

    Lanes as forward. The gradient dz before the activation is needed one pixel around the strip,
    and for it x two pixels around: z is computed again from x.
    """
    HALF: tl.constexpr = dx.dtype.element_ty.primitive_bitwidth == 16
    channels = units * ALIGN
    apart = pitch * ALIGN
    first, column, pixel, c, valid = _strips(
        batch, height, width, rows, channels, COLUMNS, STRIPS, CHANNELS)
    lane = pixel * channels + c
    stop = tl.minimum(first + rows, height)
    line = width.to(tl.int64) * channels
    source_line = width.to(tl.int64) * apart
    source = pixel * apart + c
    zero = tl.zeros((STRIPS, CHANNELS), tl.float32)
    taps = ()
    partial = ()
    for k in tl.static_range(9):
        taps += (tl.load(weight + c * 9 + k, c < channels, other=0.).to(tl.float32), )
        partial += (zero, )
    partial += (zero, )
    shift = tl.load(bias + c, c < channels, other=0.).to(tl.float32)
    shift = tl.broadcast_to(shift, (STRIPS, CHANNELS))
    inside = ()
    for j in tl.static_range(COLUMNS + 4):
        inside += (valid & (column + j >= 2) & (column + j < width + 2), )
    around = inside[1:COLUMNS + 3]
    dx_above = ()
    dx_here = ()
    for _ in tl.static_range(COLUMNS):
        dx_above += (zero, )
        dx_here += (zero, )

    dx_lane = source if PITCHED else lane
    dx_apart = apart if PITCHED else channels
    dx_line = source_line if PITCHED else line
    x -= 2 * source_line + 2 * apart
    grad -= line + channels
    dx -= 2 * dx_line
    above = _widen(_load_row(x, source, inside, first > 1, apart, COLUMNS + 4), COLUMNS + 4)
    x += source_line
    here = _widen(_load_row(x, source, inside, first > 0, apart, COLUMNS + 4), COLUMNS + 4)
    row = first - 1  # of dz; x is loaded a row ahead, dx is done a row behind
    while row <= first + rows:
        x += source_line
        below = _widen(_load_row(x, source, inside, (row <= stop) & (row + 1 < height), apart,
                                 COLUMNS + 4), COLUMNS + 4)
        dy = _load_row(grad, lane, around, (row >= 0) & (row <= stop) & (row < height), channels,
                       COLUMNS + 2)
        grad += line
        dz = ()
        for j in tl.static_range(COLUMNS + 2):
            z = shift
            for k in tl.static_range(3):
                z += above[j + k] * taps[k]
                z += here[j + k] * taps[3 + k]
                z += below[j + k] * taps[6 + k]
            dz += (dy[j].to(tl.float32) * _slope(z, HALF, ACTIVATION), )

        next_above = ()
        next_here = ()
        for k in tl.static_range(COLUMNS):
            done = dx_above[k]
            middle = dx_here[k]
            after = zero
            for j in tl.static_range(3):
                done += dz[k + 2 - j] * taps[j]
                middle += dz[k + 2 - j] * taps[3 + j]
                after += dz[k + 2 - j] * taps[6 + j]
            tl.store(dx + k * dx_apart + dx_lane, done.to(dx.dtype.element_ty),
                     around[k + 1] & (row > first) & (row <= stop))
            next_above += (middle, )
            next_here += (after, )
        dx += dx_line
        dx_above = next_above
        dx_here = next_here

        own = ()
        for k in tl.static_range(COLUMNS):
            own += (tl.where((row >= first) & (row < stop), dz[k + 1], 0.), )
        next_partial = ()
        for j in tl.static_range(10):
            total = partial[j]
            for k in tl.static_range(COLUMNS):
                if j < 3:
                    total += own[k] * above[k + j + 1]
                elif j < 6:
                    total += own[k] * here[k + j - 2]
                elif j < 9:
                    total += own[k] * below[k + j - 5]
                else:
                    total += own[k]
            next_partial += (total, )
        partial = next_partial
        above = here
        here = below
        row += 1

    sums += tl.program_id(0) // tl.cdiv(channels, CHANNELS) * 10 * channels + c
    for j in tl.static_range(10):
        tl.store(sums + j * channels, tl.sum(partial[j], 0)[None, :], c < channels)


@triton.jit
def _share(dim):
    """1 / dim, correctly rounded: one channel is 0 once its mean is taken off."""
    return tl.div_rn(tl.full((), 1., tl.float32), dim.to(tl.float32))


@triton.jit
def _counted(dim, WIDTH: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr):
    """Which channels count, (1, BLOCK), and 1 / their number: of every WIDTH the first REAL, the
    others are zero; all, if WIDTH is 0."""
    column = tl.arange(0, BLOCK)[None, :]
    counted = column < dim
    if WIDTH > 0:
        counted &= column % WIDTH < REAL
        dim = dim // WIDTH * REAL
    return counted, _share(dim)


@triton.jit
def _normed(x, counted, share, eps):
    """Rows, zero where it does not count, to mean 0 and variance 1; and 1 / deviation, (ROWS, 1).
    """
    mean = tl.sum(x, 1)[:, None] * share
    centred = tl.where(counted, x - mean, 0.)
    scale = tl.rsqrt(tl.sum(centred * centred, 1)[:, None] * share + eps)
    return centred * scale, scale


@triton.jit
def _normed_backward(grad, normed, scale, counted, share):
    """The gradient of what was normed, of rows that are zero where it does not count."""
    mean = tl.sum(grad, 1)[:, None] * share
    along = tl.sum(grad * normed, 1)[:, None] * share
    return tl.where(counted, scale * (grad - mean - normed * along), 0.)


@triton.jit
def _rows(block, group, tokens, groups, dim, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of a tile of tokens of one group, (ROWS, BLOCK), and which are inside the map."""
    token = block * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    at = (token.to(tl.int64) * groups + group) * dim + column
    return at, (token < tokens) & (column < dim)


@triton.jit
def _pitched(block, group, apart, dim, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets as _rows has them, of tokens that are `apart` from each other."""
    token = block * ROWS + tl.arange(0, ROWS)[:, None]
    return token.to(tl.int64) * apart + group * dim + tl.arange(0, BLOCK)[None, :]


@triton.jit
def _affine(weight, bias, group, dim, BLOCK: tl.constexpr):
    """A group's weight and bias, (1, BLOCK), and where they are."""
    column = tl.arange(0, BLOCK)[None, :]
    at = group * dim + column
    w = tl.load(weight + at, column < dim, other=0.).to(tl.float32)
    b = tl.load(bias + at, column < dim, other=0.).to(tl.float32)
    return w, b, at, column < dim


@triton.jit(do_not_specialize=RUNTIME)
def gate_forward_kernel(y, gate, weight, bias, out, tokens, groups, units, pitch, eps,
                        WIDTH: tl.constexpr, REAL: tl.constexpr, ALIGN: tl.constexpr,
                        ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A program is ROWS tokens of a group; the groups of a token run side by side. Tokens of the
    gate are pitch * ALIGN apart."""
    dim = units * ALIGN
    counted, share = _counted(dim, WIDTH, REAL, BLOCK)
    group = tl.program_id(0) % groups
    at, inside = _rows(tl.program_id(0) // groups, group, tokens, groups, dim, ROWS, BLOCK)
    w, b, _, _ = _affine(weight, bias, group, dim, BLOCK)
    normed, _ = _normed(tl.load(y + at, inside, other=0.).to(tl.float32), counted, share, eps)
    at_gate = _pitched(tl.program_id(0) // groups, group, pitch * ALIGN, dim, ROWS, BLOCK)
    g = tl.load(gate + at_gate, inside, other=0.).to(tl.float32)
    value = (normed * w + b) * (g * _sigmoid(g))
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=RUNTIME)
def gate_backward_kernel(grad, y, gate, weight, bias, dy, dgate, sums, tokens, groups, units,
                         pitch, blocks, eps, PITCHED: tl.constexpr, WIDTH: tl.constexpr,
                         REAL: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
                         BLOCK: tl.constexpr):
    """dy and dgate; the sums for weight and bias over `blocks` tiles: (program, 2, channel).
    PITCHED, the tokens of dgate are as far apart as those of the gate."""
    dim = units * ALIGN
    counted, share = _counted(dim, WIDTH, REAL, BLOCK)
    group = tl.program_id(0) % groups
    part = tl.program_id(0) // groups
    w, b, column, known = _affine(weight, bias, group, dim, BLOCK)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    block = part * blocks
    while block < (part + 1) * blocks:
        at, inside = _rows(block, group, tokens, groups, dim, ROWS, BLOCK)
        dout = tl.load(grad + at, inside, other=0.).to(tl.float32)
        at_gate = _pitched(block, group, pitch * ALIGN, dim, ROWS, BLOCK)
        g = tl.load(gate + at_gate, inside, other=0.).to(tl.float32)
        value = tl.load(y + at, inside, other=0.).to(tl.float32)
        normed, scale = _normed(value, counted, share, eps)
        s = _sigmoid(g)
        through = dout * (g * s)  # of normed * w + b
        dg = dout * (normed * w + b) * (s * (1. + g * (1. - s)))
        tl.store(dgate + (at_gate if PITCHED else at), dg.to(dgate.dtype.element_ty), inside)
        dvalue = _normed_backward(through * w, normed, scale, counted, share)
        tl.store(dy + at, dvalue.to(dy.dtype.element_ty), inside)
        dweight += through * normed
        dbias += through
        block += 1
    sums += part * 2 * groups * dim + column
    tl.store(sums, tl.sum(dweight, 0)[None, :], known)
    tl.store(sums + groups * dim, tl.sum(dbias, 0)[None, :], known)


@triton.jit(do_not_specialize=RUNTIME)
def norm_forward_kernel(x, residual, offset, weight, bias, total, out, tokens, units, eps,
                        WIDTH: tl.constexpr, REAL: tl.constexpr, ALIGN: tl.constexpr,
                        ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The LayerNorm of x, to which `offset` is added where there is one, one a channel, or of
    x + residual, which is rounded and stored; a program is ROWS tokens."""
    dim = units * ALIGN
    counted, share = _counted(dim, WIDTH, REAL, BLOCK)
    at, inside = _rows(tl.program_id(0), 0, tokens, 1, dim, ROWS, BLOCK)
    w, b, column, known = _affine(weight, bias, 0, dim, BLOCK)
    value = tl.load(x + at, inside, other=0.).to(tl.float32)
    if offset is not None:
        value += tl.load(offset + column, known, other=0.).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + at, inside, other=0.).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + at, rounded, inside)
        value = rounded.to(tl.float32)
    normed, _ = _normed(value, counted, share, eps)
    tl.store(out + at, (normed * w + b).to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=RUNTIME)
def norm_backward_kernel(grad_total, grad, total, weight, shift, keep, dx, branch, sums, tokens,
                         units, blocks, area, eps, WIDTH: tl.constexpr, REAL: tl.constexpr,
                         ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of what was normed; those of weight and bias summed as in
    gate_backward_kernel. An image is `area` tokens.

    Where they are given: `shift`, one an image and channel, is added to the gradient that comes in;
    `branch` gets the one that goes out, times `keep`, one an image, and the sums a third row, for
    its own.
    """
    SUMS: tl.constexpr = 2 if branch is None else 3
    dim = units * ALIGN
    counted, share = _counted(dim, WIDTH, REAL, BLOCK)
    part = tl.program_id(0)
    w, _, column, known = _affine(weight, weight, 0, dim, BLOCK)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    dbranch = tl.zeros((ROWS, BLOCK), tl.float32)
    block = part * blocks
    while block < (part + 1) * blocks:
        at, inside = _rows(block, 0, tokens, 1, dim, ROWS, BLOCK)
        token = block * ROWS + tl.arange(0, ROWS)[:, None]
        dout = tl.load(grad + at, inside, other=0.).to(tl.float32)
        if shift is not None:
            dout += tl.load(shift + token // area * dim + column, inside, other=0.).to(tl.float32)
        value = tl.load(total + at, inside, other=0.).to(tl.float32)
        normed, scale = _normed(value, counted, share, eps)
        dvalue = _normed_backward(dout * w, normed, scale, counted, share)
        if grad_total is not None:
            dvalue += tl.load(grad_total + at, inside, other=0.).to(tl.float32)
        tl.store(dx + at, dvalue.to(dx.dtype.element_ty), inside)
        if branch is not None:
            if keep is not None:
                dvalue *= tl.load(keep + token // area, token < tokens, other=0.).to(tl.float32)
            rounded = dvalue.to(branch.dtype.element_ty)
            tl.store(branch + at, rounded, inside)
            dbranch += rounded.to(tl.float32)
        dweight += dout * normed
        dbias += dout
        block += 1
    sums += part * SUMS * dim + column
    tl.store(sums, tl.sum(dweight, 0)[None, :], known)
    tl.store(sums + dim, tl.sum(dbias, 0)[None, :], known)
    if branch is not None:
        tl.store(sums + 2 * dim, tl.sum(dbranch, 0)[None, :], known)


@triton.jit
def _image_rows(block, image, tokens, dim, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """As _rows, of an image's own `tokens`."""
    token = block * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    at = (image.to(tl.int64) * tokens + token) * dim + column
    return at, (token < tokens) & (column < dim)


@triton.jit(do_not_specialize=RUNTIME)
def modulate_forward_kernel(y, x, factor, weight, bias, out, tokens, units, tiles,
                            eps, WIDTH: tl.constexpr, REAL: tl.constexpr, ALIGN: tl.constexpr,
                            ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The LayerNorm of y * x * factor, one factor an image and channel; a program is ROWS tokens
    of an image, which has `tiles` of them."""
    dim = units * ALIGN
    counted, share = _counted(dim, WIDTH, REAL, BLOCK)
    image = tl.program_id(0) // tiles
    at, inside = _image_rows(tl.program_id(0) % tiles, image, tokens, dim, ROWS, BLOCK)
    w, b, column, known = _affine(weight, bias, 0, dim, BLOCK)
    f = tl.load(factor + image * dim + column, known, other=0.).to(tl.float32)
    value = tl.load(y + at, inside, other=0.).to(tl.float32)
    value *= tl.load(x + at, inside, other=0.).to(tl.float32)
    normed, _ = _normed(value * f, counted, share, eps)
    tl.store(out + at, (normed * w + b).to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=RUNTIME)
def modulate_backward_kernel(grad, y, x, factor, weight, dy, dx, sums, tokens, units, parts,
                             blocks, eps, WIDTH: tl.constexpr, REAL: tl.constexpr,
                             ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dy and dx; the sums for weight, bias and factor over `blocks` tiles of an image, which has
    `parts` of them: (image, part, 3, channel)."""
    dim = units * ALIGN
    counted, share = _counted(dim, WIDTH, REAL, BLOCK)
    image = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    w, _, column, known = _affine(weight, weight, 0, dim, BLOCK)
    f = tl.load(factor + image * dim + column, known, other=0.).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    dfactor = tl.zeros((ROWS, BLOCK), tl.float32)
    block = part * blocks
    while block < (part + 1) * blocks:
        at, inside = _image_rows(block, image, tokens, dim, ROWS, BLOCK)
        dout = tl.load(grad + at, inside, other=0.).to(tl.float32)
        left = tl.load(y + at, inside, other=0.).to(tl.float32)
        right = tl.load(x + at, inside, other=0.).to(tl.float32)
        product = left * right
        normed, scale = _normed(product * f, counted, share, eps)
        dvalue = _normed_backward(dout * w, normed, scale, counted, share)
        tl.store(dy + at, (dvalue * (right * f)).to(dy.dtype.element_ty), inside)
        tl.store(dx + at, (dvalue * (left * f)).to(dx.dtype.element_ty), inside)
        dfactor += dvalue * product
        dweight += dout * normed
        dbias += dout
        block += 1
    sums += tl.program_id(0) * 3 * dim + column
    tl.store(sums, tl.sum(dweight, 0)[None, :], known)
    tl.store(sums + dim, tl.sum(dbias, 0)[None, :], known)
    tl.store(sums + 2 * dim, tl.sum(dfactor, 0)[None, :], known)


@triton.jit
def _matrix(weight, row, column, across, down, inside):
    return tl.load(weight + row * across + column * down, inside, other=0.).to(tl.float32)


@triton.jit(do_not_specialize=RUNTIME)
def sum_kernel(x, sums, tokens, units, parts, blocks,
               ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over `blocks` tiles of an image's tokens, of which it has `parts`: (image, part,
    channel); of BLOCK channels a program."""
    dim = units * ALIGN
    across = tl.cdiv(dim, BLOCK)
    first = tl.program_id(0) % across * BLOCK
    column = first + tl.arange(0, BLOCK)[None, :]
    part = tl.program_id(0) // across
    block = part % parts * blocks
    image = part // parts
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    end = block + blocks
    while block < end:
        token = block * ROWS + tl.arange(0, ROWS)[:, None]
        at = (image.to(tl.int64) * tokens + token) * dim + column
        total += tl.load(x + at, (token < tokens) & (column < dim), other=0.).to(tl.float32)
        block += 1
    tl.store(sums + part * dim + column, tl.sum(total, 0)[None, :], column < dim)


@triton.jit(do_not_specialize=RUNTIME)
def affinity_forward_kernel(sums, squeeze, squeeze_bias, excite, excite_bias, skip, mean, squeezed,
                            affinity, factor, channels, hidden, parts, area,
                            ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Channel affinity of an image, a program, from the sums of its tokens; factor is the affinity
    times skip. Of the hidden values ROWS at once, of the sums PARTS."""
    image = tl.program_id(0)
    column = tl.arange(0, BLOCK)[None, :]
    known = column < channels
    at = image * channels + column
    m = tl.zeros((1, BLOCK), tl.float32)
    first = 0
    while first < parts:
        part = first + tl.arange(0, PARTS)[:, None]
        m += tl.sum(_matrix(sums, image * parts + part, column, channels, 1,
                            (part < parts) & known), 0)[None, :]
        first += PARTS
    m /= area
    tl.store(mean + at, m, known)
    z = tl.load(excite_bias + column, known, other=0.).to(tl.float32)
    first = 0
    while first < hidden:
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < hidden) & known
        h = tl.sum(_matrix(squeeze, row, column, channels, 1, inside) * m, 1)[:, None]
        h += tl.load(squeeze_bias + row, row < hidden, other=0.).to(tl.float32)
        h = tl.where(h < 0, 0., h)
        tl.store(squeezed + image * hidden + row, h, row < hidden)
        z += tl.sum(_matrix(excite, row, column, 1, hidden, inside) * h, 0)[None, :]
        first += ROWS
    a = _sigmoid(z)
    tl.store(affinity + at, a, known)
    tl.store(factor + at, a * tl.load(skip).to(tl.float32), known)


@triton.jit(do_not_specialize=RUNTIME)
def affinity_backward_kernel(sums, affinity, squeezed, squeeze, excite, skip, shift, channels,
                             hidden, area, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient `shift` of each of the image's `area` tokens.

    In an image's sums, (5, channel), the third row is the factor's gradient. The fourth becomes the
    gradient before the sigmoid, the fifth that of the hidden values before their ReLU and, behind
    them, the image's share in skip's.
    """
    image = tl.program_id(0)
    column = tl.arange(0, BLOCK)[None, :]
    known = column < channels
    sums += (5 * image + 2) * channels
    a = tl.load(affinity + image * channels + column, known, other=0.)
    through = tl.load(sums + column, known, other=0.) * a
    g = through * (1. - a) * tl.load(skip).to(tl.float32)
    tl.store(sums + channels + column, g, known)
    sums += 2 * channels
    tl.store(sums + hidden, tl.sum(through))
    dmean = tl.zeros((1, BLOCK), tl.float32)
    first = 0
    while first < hidden:
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < hidden) & known
        h = tl.sum(_matrix(excite, row, column, 1, hidden, inside) * g, 1)[:, None]
        active = tl.load(squeezed + image * hidden + row, row < hidden, other=0.) > 0
        h = tl.where(active, h, 0.)
        tl.store(sums + row, h, row < hidden)
        dmean += tl.sum(_matrix(squeeze, row, column, channels, 1, inside) * h, 0)[None, :]
        first += ROWS
    tl.store(shift + image * channels + column, dmean / area, known)
