"""The Triton kernels of ``scan_triton``, which imports this module when it launches the first.

A lane is one channel of one chunk of T tokens and walks its chunk token by token. A tile (one
program) is CHUNKS chunks x CHANNELS channels of one group of one sequence. Every recurrence goes
over L in two launches:

1. ``summary_kernel``: what a chunk does to the state that enters it, state -> decay * state +
   drive, composed over the chunks of a tile and stored after each chunk.
2. ``forward_kernel``, ``backward_kernel``: compose the tiles before this one, which gives the
   state that enters each chunk, and walk the chunk again from there.

The gradient's recurrence is read from the end by index arithmetic: walk q = 0, 1, ... visits
the last chunk first. States are float32 and stored as (batch, walk, N, channel).

What belongs to a token and a group is one row of RANK + 2N values, [r | B | C]: lane i of a chunk
loads value i, and ``_value`` shows it to all of them, so CHANNELS is no less than RANK + 2N.

The kernels serve two doors. Of a sequence (COLUMNS = BACKWARD = RANK = 0, height 1) token t is
cell t of the memory, and `delta` is the step of each channel. Of a map, ``_cells`` says in which
cell h * W + w token t of a group is, `weight` (channels, RANK) times r is the step, and A comes as
log(-A). Everything is read and written at its cell: no order but the memory's exists outside the
registers.

Tokens are loaded STEP at a time ahead of their use, so the loads are in flight together. N, RANK,
T, STEP, CHUNKS and CHANNELS are compile-time constants, those of ``scan_triton.tile_sizes``; sizes
are run-time arguments. No atomics: the same input gives the same bits.
"""
import triton
import triton.language as tl

# no recompilation when these become 1 or a multiple of 16
RUNTIME = ['height', 'width', 'chunks', 'groups', 'dim', 'x_batch', 'x_group', 'd_batch', 'd_group',
           'r_batch', 'r_group', 'g_batch', 'g_group']


@triton.jit
def _compose(decay_0, drive_0, decay_1, drive_1):
    return decay_0 * decay_1, decay_1 * drive_0 + drive_1


@triton.jit
def _exp_minus(x):
    """exp(-|x|), as a power of two: one instruction, where exp takes five."""
    return tl.exp2(tl.abs(x) * -1.442695041)


@triton.jit
def _reciprocal(x):
    """1 / x for x >= 1, in two instructions instead of the division's nine."""
    return tl.rsqrt(x * x)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), relatively exact for x -> -inf: log(1 + e) = 2 artanh(e / (2 + e)).

    2 artanh(s) / s for s <= 1 / 3 as a polynomial in s * s, fitted to 4e-9.
    """
    e = _exp_minus(x)
    s = e * _reciprocal(2 + e)
    square = s * s
    series = square * 0.2817830706 + 0.2796057462
    series = series * square + 0.4002491558
    series = series * square + 0.6666631444
    series = series * square + 2.000000008
    return tl.maximum(x, 0.) + s * series


@triton.jit
def _sigmoid(x):
    e = _exp_minus(x)
    return tl.where(x >= 0, 1., e) * _reciprocal(1 + e)


@triton.jit
def _tile(chunks, groups, dim, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr):
    """Decode the program: neighbours in memory (channels, then groups) run side by side."""
    pid = tl.program_id(0)
    parts = tl.cdiv(dim, CHANNELS)
    part = pid % parts
    group = pid // parts % groups
    rest = pid // (parts * groups)
    tiles = chunks // CHUNKS
    return part, group, rest % tiles, (rest // tiles).to(tl.int64)


@triton.jit
def _cells(token, group, height, width, STEP: tl.constexpr, COLUMNS: tl.constexpr,
           BACKWARD: tl.constexpr):
    """The cells of STEP tokens in a row, in the order of the tokens; past the end, anything.

    Bit g of COLUMNS and BACKWARD says how group g walks. By columns, the next cell is `width` on,
    or at a column's foot as far round as the map is long. Backward, the map is turned by a half.
    """
    last = height * width - 1
    cell = token
    step = 1
    around = last
    if COLUMNS:
        by_columns = (COLUMNS >> group) & 1 != 0
        step = tl.where(by_columns, width, 1)
        cell = tl.where(by_columns, token % height * width + token // height, token)
    if BACKWARD:
        backward = (BACKWARD >> group) & 1 != 0
        cell = tl.where(backward, last - cell, cell)
        step = tl.where(backward, -step, step)
        around = tl.where(backward, -last, last)
    cells = ()
    for _ in tl.static_range(STEP):
        cells += (cell, )
        cell += step
        if COLUMNS:  # outside on either side: a negative cell is a large one without its sign
            cell = tl.where(cell.to(tl.uint32) > last, cell - around, cell)
    return cells


@triton.jit
def _columns(matrix, channel, valid, COUNT: tl.constexpr):
    """The COUNT columns of a matrix (channels, COUNT) at a tile's channels."""
    columns = ()
    for k in tl.static_range(COUNT):
        columns += (tl.load(matrix + channel * COUNT + k, valid, other=0.), )
    return columns


@triton.jit
def _rates(A, channel, valid, N: tl.constexpr, RANK: tl.constexpr):
    """A's columns (of a map, from log(-A)), for powers of two instead of e: one instruction each,
    where exp takes five."""
    rates = ()
    for n in tl.static_range(N):
        rate = tl.load(A + channel * N + n, valid, other=0.)
        if RANK > 0:
            rate = -tl.exp(rate)
        rates += (rate * 1.442695041, )
    return rates


@triton.jit
def _value(row, i):
    """Value i of a token's row, on every lane of its chunk: one shuffle."""
    return tl.gather(row, tl.full(row.shape, i, tl.int32), 1)


@triton.jit
def _step_size(source, weights, bias, inside, RANK: tl.constexpr, SOFTPLUS: tl.constexpr):
    """The step (0 past the end: decay 1, drive 0) and what softplus was given.

    `source` is the step as the door was given it, or of a map the token's row.
    """
    if RANK == 0:
        raw = source.to(tl.float32)
    else:
        raw = _value(source, 0) * weights[0]
    for k in tl.static_range(1, RANK):
        raw += _value(source, k) * weights[k]
    raw += bias  # last: where it is large, the sum is rounded once
    step = raw
    if SOFTPLUS:
        step = _softplus(raw)
    return tl.where(inside, step, 0.), raw


@triton.jit
def _end(chunk, n, channel, channels, N: tl.constexpr):
    """Where a chunk's decay is in `ends` (batch, chunk, N, 2, channel); its state is `channels` on.
    """
    return (chunk * N + n) * 2 * channels + channel


@triton.jit
def _entering(ends, batch, tile, q, channel, valid, chunks, channels, n,
              N: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr,
              TILES: tl.constexpr):
    """The state that enters each chunk of a tile, (CHUNKS, CHANNELS), from the summaries."""
    row = tl.arange(0, TILES)[:, None]
    carry = tl.zeros((1, CHANNELS), tl.float32)
    first = 0
    while first < tile:
        earlier = first + row
        known = (earlier < tile) & valid
        at = _end(batch * chunks + earlier * CHUNKS + CHUNKS - 1, n, channel, channels, N)
        a = tl.load(ends + at, known, other=1.)
        h = tl.load(ends + at + channels, known, other=0.)
        a, h = tl.associative_scan((a, h), 0, _compose)
        a = tl.sum(tl.where(row == TILES - 1, a, 0.), 0)[None, :]
        h = tl.sum(tl.where(row == TILES - 1, h, 0.), 0)[None, :]
        carry = a * carry + h
        first += TILES
    known = (q % CHUNKS > 0) & valid
    at = _end(batch * chunks + q - 1, n, channel, channels, N)
    a = tl.load(ends + at, known, other=1.)
    return a * carry + tl.load(ends + at + channels, known, other=0.)


@triton.jit
def _load_block(x, delta, rows, first, group, height, width, valid, in_row, x_token, d_token,
                r_token, RANK: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
                BACKWARD: tl.constexpr):
    """Of STEP tokens from `first` on: their cells and what is there of x, of the rows and of the
    step that a sequence's door was given; past the end, of some other cell."""
    cells = _cells(first, group, height, width, STEP, COLUMNS, BACKWARD)
    xs = ()
    held = ()
    given = ()
    for s in tl.static_range(STEP):
        # a negative cell is a large one without its sign
        cell = tl.minimum(cells[s].to(tl.uint32), (height * width - 1).to(tl.uint32)).to(tl.int32)
        xs += (tl.load(x + cell * x_token, valid, other=0.), )
        held += (tl.load(rows + cell * r_token, in_row, other=0.), )
        if RANK == 0:
            given += (tl.load(delta + cell * d_token, valid, other=0.), )
    return cells, xs, held, given


@triton.jit(do_not_specialize=RUNTIME)
def summary_kernel(
        x, delta, weight, rows, A, bias, ends,
        height, width, chunks, groups, dim,
        x_batch, x_group, x_channel, x_token, d_batch, d_group, d_channel, d_token,
        r_batch, r_group, r_value, r_token,
        N: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr, BACKWARD: tl.constexpr,
        SOFTPLUS: tl.constexpr, T: tl.constexpr, STEP: tl.constexpr, CHUNKS: tl.constexpr,
        CHANNELS: tl.constexpr, REVERSE: tl.constexpr):
    """Forward: h -> a h + dt x B. Reverse, with x = dy and B = C: r -> a (r + x B)."""
    part, group, tile, batch = _tile(chunks, groups, dim, CHUNKS, CHANNELS)
    q = tile * CHUNKS + tl.arange(0, CHUNKS)[:, None]
    c = part * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    valid = c < dim
    channel = group * dim + c
    channels = groups * dim
    length = height * width
    x += batch * x_batch + group.to(tl.int64) * x_group + c * x_channel
    if RANK == 0:
        delta += batch * d_batch + group.to(tl.int64) * d_group + c * d_channel
    lane = tl.arange(0, CHANNELS)[None, :]
    in_row = lane < RANK + 2 * N
    rows += batch * r_batch + group.to(tl.int64) * r_group + lane * r_value
    shift = tl.zeros((1, CHANNELS), tl.float32)
    if bias is not None:
        shift = tl.load(bias + channel, valid, other=0.)
    weights = _columns(weight, channel, valid, RANK)
    rates = _rates(A, channel, valid, N, RANK)
    a = ()
    h = ()
    for _ in tl.static_range(N):
        a += (tl.full((CHUNKS, CHANNELS), 1., tl.float32), )
        h += (tl.zeros((CHUNKS, CHANNELS), tl.float32), )

    for block in range(T // STEP):
        first = q * T + block * STEP
        if REVERSE:
            first = chunks * T - STEP - first
        left = length - first
        cells, xs, held, given = _load_block(
            x, delta, rows, first, group, height, width, valid, in_row, x_token, d_token, r_token,
            RANK, STEP, COLUMNS, BACKWARD)
        for i in tl.static_range(STEP):
            inside = left > (STEP - 1 - i if REVERSE else i)
            row = held[STEP - 1 - i if REVERSE else i].to(tl.float32)
            value = xs[STEP - 1 - i if REVERSE else i].to(tl.float32)
            if RANK == 0:
                source = given[STEP - 1 - i if REVERSE else i]
            else:
                source = row
            dt, raw = _step_size(source, weights, shift, inside, RANK, SOFTPLUS)
            next_a = ()
            next_h = ()
            for n in tl.static_range(N):
                factor = tl.exp2(dt * rates[n])
                drive = value * _value(row, RANK + (N if REVERSE else 0) + n)
                next_a += (factor * a[n], )
                if REVERSE:  # past the end the walk begins, with what another cell holds
                    drive = tl.where(inside, drive, 0.)
                    next_h += (factor * (h[n] + drive), )
                else:
                    next_h += (factor * h[n] + dt * drive, )
            a = next_a
            h = next_h

    for n in tl.static_range(N):
        after_a, after_h = tl.associative_scan((a[n], h[n]), 0, _compose)
        at = _end(batch * chunks + q, n, channel, channels, N)
        tl.store(ends + at, after_a, valid)
        tl.store(ends + at + channels, after_h, valid)


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
        x, delta, weight, rows, A, D, bias, ends, y, entry,
        height, width, chunks, groups, dim,
        x_batch, x_group, x_channel, x_token, d_batch, d_group, d_channel, d_token,
        r_batch, r_group, r_value, r_token,
        N: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr, BACKWARD: tl.constexpr,
        SOFTPLUS: tl.constexpr, T: tl.constexpr, STEP: tl.constexpr, CHUNKS: tl.constexpr,
        CHANNELS: tl.constexpr, TILES: tl.constexpr):
    """y (batch, cell, channel), and into `entry`, unless None, the state before every STEP-th
    token. `ends` is None where a chunk is the whole sequence."""
    part, group, tile, batch = _tile(chunks, groups, dim, CHUNKS, CHANNELS)
    q = tile * CHUNKS + tl.arange(0, CHUNKS)[:, None]
    c = part * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    valid = c < dim
    channel = group * dim + c
    channels = groups * dim
    length = height * width
    x += batch * x_batch + group.to(tl.int64) * x_group + c * x_channel
    if RANK == 0:
        delta += batch * d_batch + group.to(tl.int64) * d_group + c * d_channel
    lane = tl.arange(0, CHANNELS)[None, :]
    in_row = lane < RANK + 2 * N
    rows += batch * r_batch + group.to(tl.int64) * r_group + lane * r_value
    y += batch * length * channels + channel
    shift = tl.zeros((1, CHANNELS), tl.float32)
    if bias is not None:
        shift = tl.load(bias + channel, valid, other=0.)
    skip = tl.zeros((1, CHANNELS), tl.float32)
    if D is not None:
        skip = tl.load(D + channel, valid, other=0.)
    weights = _columns(weight, channel, valid, RANK)
    rates = _rates(A, channel, valid, N, RANK)
    h = ()
    for n in tl.static_range(N):
        if ends is None:
            h += (tl.zeros((CHUNKS, CHANNELS), tl.float32), )
        else:
            h += (_entering(ends, batch, tile, q, channel, valid, chunks, channels, n,
                            N, CHUNKS, CHANNELS, TILES), )

    # one warp walks a long sequence: there is room for the loads of the block after this one
    AHEAD: tl.constexpr = ends is None and T >= 128
    ahead = ()
    if AHEAD:
        ahead = _load_block(x, delta, rows, q * T, group, height, width, valid, in_row, x_token,
                            d_token, r_token, RANK, STEP, COLUMNS, BACKWARD)
    for block in range(T // STEP):
        if entry is not None:
            stop = batch * (chunks * T // STEP) + q * (T // STEP) + block
            for n in tl.static_range(N):
                tl.store(entry + (stop * N + n) * channels + channel, h[n], valid)
        first = q * T + block * STEP
        left = length - first
        if AHEAD:
            cells, xs, held, given = ahead
            following = tl.minimum(first + STEP, T - STEP)
            ahead = _load_block(x, delta, rows, following, group, height, width, valid, in_row,
                                x_token, d_token, r_token, RANK, STEP, COLUMNS, BACKWARD)
        else:
            cells, xs, held, given = _load_block(
                x, delta, rows, first, group, height, width, valid, in_row, x_token, d_token,
                r_token, RANK, STEP, COLUMNS, BACKWARD)
        for s in tl.static_range(STEP):
            inside = left > s
            row = held[s].to(tl.float32)
            if RANK == 0:
                source = given[s]
            else:
                source = row
            dt, raw = _step_size(source, weights, shift, inside, RANK, SOFTPLUS)
            value = xs[s].to(tl.float32)
            out = skip * value
            next_h = ()
            for n in tl.static_range(N):
                drive = dt * value * _value(row, RANK + n)
                next_h += (tl.exp2(dt * rates[n]) * h[n] + drive, )
                out += next_h[n] * _value(row, RANK + N + n)
            h = next_h
            tl.store(y + cells[s] * channels, out.to(y.dtype.element_ty), inside & valid)


@triton.jit(do_not_specialize=RUNTIME)
def backward_kernel(
        x, delta, weight, rows, A, D, bias, grad, ends, entry,
        dx, ddelta, drows, sums,
        height, width, chunks, groups, dim,
        x_batch, x_group, x_channel, x_token, d_batch, d_group, d_channel, d_token,
        r_batch, r_group, r_value, r_token,
        g_batch, g_group, g_channel, g_token,
        N: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr, BACKWARD: tl.constexpr,
        SOFTPLUS: tl.constexpr, T: tl.constexpr, STEP: tl.constexpr, CHUNKS: tl.constexpr,
        CHANNELS: tl.constexpr, TILES: tl.constexpr):
    """Gradients of everything.

    With r = decay * dL/dh, which goes from a token to the one before it; `ends` as forward. dx and,
    of a given step, ddelta are laid out as (batch, cell, channel). `drows` holds the gradients of
    the rows, summed over a tile's channels: (part, batch, cell, group, RANK + 2N). `sums` holds
    those of A, D, bias and weight, summed over a tile's tokens: (batch, tile, N + 2 + RANK,
    channel).
    """
    part, group, tile, batch = _tile(chunks, groups, dim, CHUNKS, CHANNELS)
    q = tile * CHUNKS + tl.arange(0, CHUNKS)[:, None]
    chunk = chunks - 1 - q
    c = part * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    valid = c < dim
    channel = group * dim + c
    channels = groups * dim
    length = height * width
    x += batch * x_batch + group.to(tl.int64) * x_group + c * x_channel
    if RANK == 0:
        delta += batch * d_batch + group.to(tl.int64) * d_group + c * d_channel
        ddelta += batch * length * channels + channel
    lane = tl.arange(0, CHANNELS)[None, :]
    in_row = lane < RANK + 2 * N
    rows += batch * r_batch + group.to(tl.int64) * r_group + lane * r_value
    grad += batch * g_batch + group.to(tl.int64) * g_group + c * g_channel
    dx += batch * length * channels + channel
    batches = tl.num_programs(0) // (tl.cdiv(dim, CHANNELS) * groups * (chunks // CHUNKS))
    drows += ((part * batches + batch) * length * groups + group) * (RANK + 2 * N) + lane
    shift = tl.zeros((1, CHANNELS), tl.float32)
    if bias is not None:
        shift = tl.load(bias + channel, valid, other=0.)
    skip = tl.zeros((1, CHANNELS), tl.float32)
    if D is not None:
        skip = tl.load(D + channel, valid, other=0.)
    weights = _columns(weight, channel, valid, RANK)
    rates = _rates(A, channel, valid, N, RANK)
    r = ()
    dA = ()
    for n in tl.static_range(N):
        dA += (tl.zeros((CHUNKS, CHANNELS), tl.float32), )
        if ends is None:
            r += (tl.zeros((CHUNKS, CHANNELS), tl.float32), )
        else:
            r += (_entering(ends, batch, tile, q, channel, valid, chunks, channels, n,
                            N, CHUNKS, CHANNELS, TILES), )
    dD = tl.zeros((CHUNKS, CHANNELS), tl.float32)
    dbias = tl.zeros((CHUNKS, CHANNELS), tl.float32)
    dweight = ()
    for _ in tl.static_range(RANK):
        dweight += (tl.zeros((CHUNKS, CHANNELS), tl.float32), )

    for reverse_block in range(T // STEP):
        block = T // STEP - 1 - reverse_block
        stop = batch * (chunks * T // STEP) + chunk * (T // STEP) + block
        h = ()
        for n in tl.static_range(N):
            h += (tl.load(entry + (stop * N + n) * channels + channel, valid, other=0.), )
        first = chunk * T + block * STEP
        left = length - first
        cells = _cells(first, group, height, width, STEP, COLUMNS, BACKWARD)
        xs = ()
        held = ()
        sources = ()
        grads = ()
        for s in tl.static_range(STEP):
            inside = left > s
            xs += (tl.load(x + cells[s] * x_token, inside & valid, other=0.), )
            held += (tl.load(rows + cells[s] * r_token, inside & in_row, other=0.).to(tl.float32), )
            if RANK == 0:
                sources += (tl.load(delta + cells[s] * d_token, inside & valid, other=0.), )
            else:
                sources += (held[s], )
            grads += (tl.load(grad + cells[s] * g_token, inside & valid, other=0.), )
        before = ()  # the states before each token of the block, n fastest; and the last
        for s in tl.static_range(STEP):
            dt, raw = _step_size(sources[s], weights, shift, left > s, RANK, SOFTPLUS)
            value = xs[s].to(tl.float32)
            before += h
            next_h = ()
            for n in tl.static_range(N):
                drive = dt * value * _value(held[s], RANK + n)
                next_h += (tl.exp2(dt * rates[n]) * h[n] + drive, )
            h = next_h
        before += h

        for s in tl.static_range(STEP - 1, -1, -1):
            inside = left > s
            dt, raw = _step_size(sources[s], weights, shift, inside, RANK, SOFTPLUS)
            value = xs[s].to(tl.float32)
            dy = grads[s].to(tl.float32)
            into = tl.zeros((CHUNKS, CHANNELS), tl.float32)  # of dt * x
            exponent = tl.zeros((CHUNKS, CHANNELS), tl.float32)  # of dt through the decay
            drow = tl.zeros((CHUNKS, CHANNELS), tl.float32)
            next_r = ()
            next_dA = ()
            for n in tl.static_range(N):
                of_C = tl.sum(dy * before[(s + 1) * N + n], 1)[:, None]
                drow = tl.where(lane == RANK + N + n, of_C, drow)
                dh = dy * _value(held[s], RANK + N + n) + r[n]
                into += dh * _value(held[s], RANK + n)
                of_B = tl.sum(dh * (dt * value), 1)[:, None]
                drow = tl.where(lane == RANK + n, of_B, drow)
                next_r += (tl.exp2(dt * rates[n]) * dh, )
                of_exponent = next_r[n] * before[s * N + n]
                exponent += of_exponent * (rates[n] * 0.6931471806)  # A itself
                next_dA += (dA[n] + of_exponent * dt, )
            r = next_r
            dA = next_dA
            ddt = tl.where(inside, exponent + into * value, 0.)
            if SOFTPLUS:
                ddt *= _sigmoid(raw)
            dD += dy * value
            dbias += ddt
            out = into * dt + dy * skip
            tl.store(dx + cells[s] * channels, out.to(dx.dtype.element_ty), inside & valid)
            if RANK == 0:
                tl.store(ddelta + cells[s] * channels, ddt.to(ddelta.dtype.element_ty),
                         inside & valid)
            next_dweight = ()
            for k in tl.static_range(RANK):
                next_dweight += (dweight[k] + ddt * _value(held[s], k), )
                drow = tl.where(lane == k, tl.sum(ddt * weights[k], 1)[:, None], drow)
            dweight = next_dweight
            tl.store(drows + cells[s] * (groups * (RANK + 2 * N)),
                     drow.to(drows.dtype.element_ty), inside & in_row)

    sums += (batch * (chunks // CHUNKS) + tile) * (N + 2 + RANK) * channels + channel
    for n in tl.static_range(N):
        of_A = tl.sum(dA[n], 0)[None, :]
        if RANK > 0:  # of log(-A)
            of_A *= rates[n] * 0.6931471806
        tl.store(sums + n * channels, of_A, valid)
    tl.store(sums + N * channels, tl.sum(dD, 0)[None, :], valid)
    tl.store(sums + (N + 1) * channels, tl.sum(dbias, 0)[None, :], valid)
    for k in tl.static_range(RANK):
        tl.store(sums + (N + 2 + k) * channels, tl.sum(dweight[k], 0)[None, :], valid)
