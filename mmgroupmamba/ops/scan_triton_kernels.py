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

Tokens are loaded STEP at a time ahead of their use, so the loads are in flight together. N, T,
STEP, CHUNKS and CHANNELS are compile-time constants from a small set; lengths are run-time
arguments. No atomics: the same input gives the same bits.
"""
import triton
import triton.language as tl

# no recompilation when these become 1 or a multiple of 16
RUNTIME = ['length', 'chunks', 'groups', 'dim', 'x_batch', 'd_batch', 'b_batch', 'c_batch',
           'g_batch', 'b_group', 'c_group']


@triton.jit
def _compose(decay_0, drive_0, decay_1, drive_1):
    return decay_0 * decay_1, decay_1 * drive_0 + drive_1


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), relatively exact for x -> -inf: log(1 + e) = 2 artanh(e / (2 + e))."""
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)  # <= 1 / 3, so that the series' next term is below 1e-8
    square = s * s
    series = 1 / 15.
    for k in tl.static_range(7):
        series = series * square + 1. / (13 - 2 * k)
    return tl.maximum(x, 0.) + 2 * s * series


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1., e) / (1 + e)


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
def _step_size(delta, bias, inside, SOFTPLUS: tl.constexpr):
    """float32 step (0 past the end: decay 1, drive 0) and what softplus was given."""
    raw = delta.to(tl.float32) + bias
    step = raw
    if SOFTPLUS:
        step = _softplus(raw)
    return tl.where(inside, step, 0.), raw


@triton.jit
def _entering(decay, state, batch, tile, q, channel, valid, chunks, channels, n,
              N: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr,
              TILES: tl.constexpr):
    """The state that enters each chunk of a tile, (CHUNKS, CHANNELS), from the summaries."""
    row = tl.arange(0, TILES)[:, None]
    carry = tl.zeros((1, CHANNELS), tl.float32)
    first = 0
    while first < tile:
        earlier = first + row
        known = (earlier < tile) & valid
        at = ((batch * chunks + earlier * CHUNKS + CHUNKS - 1) * N + n) * channels + channel
        a = tl.load(decay + at, known, other=1.)
        h = tl.load(state + at, known, other=0.)
        a, h = tl.associative_scan((a, h), 0, _compose)
        a = tl.sum(tl.where(row == TILES - 1, a, 0.), 0)[None, :]
        h = tl.sum(tl.where(row == TILES - 1, h, 0.), 0)[None, :]
        carry = a * carry + h
        first += TILES
    known = (q % CHUNKS > 0) & valid
    at = ((batch * chunks + q - 1) * N + n) * channels + channel
    a = tl.load(decay + at, known, other=1.)
    return a * carry + tl.load(state + at, known, other=0.)


@triton.jit
def _over_channels(x):
    """The sum over the channels of a tile, on the lane of each."""
    return tl.broadcast_to(tl.sum(x, 1)[:, None], x.shape)


@triton.jit(do_not_specialize=RUNTIME)
def summary_kernel(
        x, delta, A, B, bias, decay, state,
        length, chunks, groups, dim,
        x_batch, x_channel, x_token, d_batch, d_channel, d_token,
        b_batch, b_group, b_state, b_token,
        N: tl.constexpr, T: tl.constexpr, STEP: tl.constexpr, CHUNKS: tl.constexpr,
        CHANNELS: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr):
    """Forward: h -> a h + dt x B. Reverse, with x = dy and B = C: r -> a (r + x B)."""
    part, group, tile, batch = _tile(chunks, groups, dim, CHUNKS, CHANNELS)
    q = tile * CHUNKS + tl.arange(0, CHUNKS)[:, None]
    c = part * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    valid = c < dim
    channel = group * dim + c
    channels = groups * dim
    x += batch * x_batch + channel * x_channel
    delta += batch * d_batch + channel * d_channel
    B += batch * b_batch + group.to(tl.int64) * b_group
    shift = tl.zeros((1, CHANNELS), tl.float32)
    if bias is not None:
        shift = tl.load(bias + channel, valid, other=0.)
    rate = ()
    a = ()
    h = ()
    for n in tl.static_range(N):
        rate += (tl.load(A + channel * N + n, valid, other=0.), )
        a += (tl.full((CHUNKS, CHANNELS), 1., tl.float32), )
        h += (tl.zeros((CHUNKS, CHANNELS), tl.float32), )

    for block in range(T // STEP):
        xs = ()
        deltas = ()
        Bs = ()
        for s in tl.static_range(STEP):
            token = q * T + block * STEP + s
            if REVERSE:
                token = chunks * T - 1 - token
            inside = token < length
            xs += (tl.load(x + token * x_token, inside & valid, other=0.), )
            deltas += (tl.load(delta + token * d_token, inside & valid, other=0.), )
            for n in tl.static_range(N):
                Bs += (tl.load(B + token * b_token + n * b_state, inside, other=0.), )
        for s in tl.static_range(STEP):
            token = q * T + block * STEP + s
            if REVERSE:
                token = chunks * T - 1 - token
            dt, _ = _step_size(deltas[s], shift, token < length, SOFTPLUS)
            value = xs[s].to(tl.float32)
            next_a = ()
            next_h = ()
            for n in tl.static_range(N):
                factor = tl.exp(dt * rate[n])
                drive = value * Bs[s * N + n].to(tl.float32)
                next_a += (factor * a[n], )
                if REVERSE:
                    next_h += (factor * (h[n] + drive), )
                else:
                    next_h += (factor * h[n] + dt * drive, )
            a = next_a
            h = next_h

    for n in tl.static_range(N):
        after_a, after_h = tl.associative_scan((a[n], h[n]), 0, _compose)
        at = ((batch * chunks + q) * N + n) * channels + channel
        tl.store(decay + at, after_a, valid)
        tl.store(state + at, after_h, valid)


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
        x, delta, A, B, C, D, bias, decay, state, y, entry,
        length, chunks, groups, dim,
        x_batch, x_channel, x_token, d_batch, d_channel, d_token,
        b_batch, b_group, b_state, b_token, c_batch, c_group, c_state, c_token,
        g_batch, g_channel, g_token,
        N: tl.constexpr, T: tl.constexpr, STEP: tl.constexpr, CHUNKS: tl.constexpr,
        CHANNELS: tl.constexpr, TILES: tl.constexpr, SOFTPLUS: tl.constexpr):
    """y, and into `entry`, unless None, the state before every STEP-th token."""
    part, group, tile, batch = _tile(chunks, groups, dim, CHUNKS, CHANNELS)
    q = tile * CHUNKS + tl.arange(0, CHUNKS)[:, None]
    c = part * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    valid = c < dim
    channel = group * dim + c
    channels = groups * dim
    x += batch * x_batch + channel * x_channel
    delta += batch * d_batch + channel * d_channel
    B += batch * b_batch + group.to(tl.int64) * b_group
    C += batch * c_batch + group.to(tl.int64) * c_group
    y += batch * g_batch + channel * g_channel
    shift = tl.zeros((1, CHANNELS), tl.float32)
    if bias is not None:
        shift = tl.load(bias + channel, valid, other=0.)
    skip = tl.zeros((1, CHANNELS), tl.float32)
    if D is not None:
        skip = tl.load(D + channel, valid, other=0.)
    rate = ()
    h = ()
    for n in tl.static_range(N):
        rate += (tl.load(A + channel * N + n, valid, other=0.), )
        h += (_entering(decay, state, batch, tile, q, channel, valid, chunks, channels, n,
                        N, CHUNKS, CHANNELS, TILES), )

    for block in range(T // STEP):
        if entry is not None:
            stop = batch * (chunks * T // STEP) + q * (T // STEP) + block
            for n in tl.static_range(N):
                tl.store(entry + (stop * N + n) * channels + channel, h[n], valid)
        xs = ()
        deltas = ()
        Bs = ()
        Cs = ()
        for s in tl.static_range(STEP):
            token = q * T + block * STEP + s
            inside = token < length
            xs += (tl.load(x + token * x_token, inside & valid, other=0.), )
            deltas += (tl.load(delta + token * d_token, inside & valid, other=0.), )
            for n in tl.static_range(N):
                Bs += (tl.load(B + token * b_token + n * b_state, inside, other=0.), )
                Cs += (tl.load(C + token * c_token + n * c_state, inside, other=0.), )
        for s in tl.static_range(STEP):
            token = q * T + block * STEP + s
            inside = token < length
            dt, _ = _step_size(deltas[s], shift, inside, SOFTPLUS)
            value = xs[s].to(tl.float32)
            out = skip * value
            next_h = ()
            for n in tl.static_range(N):
                drive = dt * value * Bs[s * N + n].to(tl.float32)
                next_h += (tl.exp(dt * rate[n]) * h[n] + drive, )
                out += next_h[n] * Cs[s * N + n].to(tl.float32)
            h = next_h
            tl.store(y + token * g_token, out.to(y.dtype.element_ty), inside & valid)


@triton.jit(do_not_specialize=RUNTIME)
def backward_kernel(
        x, delta, A, B, C, D, bias, grad, decay, state, entry,
        dx, ddelta, dB, dC, sums,
        length, chunks, groups, dim,
        x_batch, x_channel, x_token, d_batch, d_channel, d_token,
        b_batch, b_group, b_state, b_token, c_batch, c_group, c_state, c_token,
        g_batch, g_channel, g_token,
        N: tl.constexpr, T: tl.constexpr, STEP: tl.constexpr, CHUNKS: tl.constexpr,
        CHANNELS: tl.constexpr, TILES: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Gradients of everything.

    With r = decay * dL/dh, which goes from a token to the one before it. dx and ddelta are laid
    out as (batch, L, channel); dB and dC are sums over a tile's channels, (part, batch, L,
    group, N); sums holds dA, dD and dbias summed over a tile's tokens, (batch, tile, N + 2,
    channel).
    """
    part, group, tile, batch = _tile(chunks, groups, dim, CHUNKS, CHANNELS)
    q = tile * CHUNKS + tl.arange(0, CHUNKS)[:, None]
    chunk = chunks - 1 - q
    c = part * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    valid = c < dim
    channel = group * dim + c
    channels = groups * dim
    x += batch * x_batch + channel * x_channel
    delta += batch * d_batch + channel * d_channel
    B += batch * b_batch + group.to(tl.int64) * b_group
    C += batch * c_batch + group.to(tl.int64) * c_group
    grad += batch * g_batch + channel * g_channel
    dx += batch * length * channels + channel
    ddelta += batch * length * channels + channel
    batches = tl.num_programs(0) // (tl.cdiv(dim, CHANNELS) * groups * (chunks // CHUNKS))
    dB += ((part * batches + batch) * length * groups + group) * N
    dC += ((part * batches + batch) * length * groups + group) * N
    shift = tl.zeros((1, CHANNELS), tl.float32)
    if bias is not None:
        shift = tl.load(bias + channel, valid, other=0.)
    skip = tl.zeros((1, CHANNELS), tl.float32)
    if D is not None:
        skip = tl.load(D + channel, valid, other=0.)
    rate = ()
    r = ()
    dA = ()
    for n in tl.static_range(N):
        rate += (tl.load(A + channel * N + n, valid, other=0.), )
        dA += (tl.zeros((CHUNKS, CHANNELS), tl.float32), )
        r += (_entering(decay, state, batch, tile, q, channel, valid, chunks, channels, n,
                        N, CHUNKS, CHANNELS, TILES), )
    dD = tl.zeros((CHUNKS, CHANNELS), tl.float32)
    dbias = tl.zeros((CHUNKS, CHANNELS), tl.float32)

    # the first lane stores what is summed over the lanes: in the layout of the other stores
    lane = tl.arange(0, CHANNELS)[None, :]
    for reverse_block in range(T // STEP):
        block = T // STEP - 1 - reverse_block
        stop = batch * (chunks * T // STEP) + chunk * (T // STEP) + block
        h = ()
        for n in tl.static_range(N):
            h += (tl.load(entry + (stop * N + n) * channels + channel, valid, other=0.), )
        xs = ()
        deltas = ()
        grads = ()
        Bs = ()
        for s in tl.static_range(STEP):
            token = chunk * T + block * STEP + s
            inside = token < length
            xs += (tl.load(x + token * x_token, inside & valid, other=0.), )
            deltas += (tl.load(delta + token * d_token, inside & valid, other=0.), )
            grads += (tl.load(grad + token * g_token, inside & valid, other=0.), )
            for n in tl.static_range(N):
                Bs += (tl.load(B + token * b_token + n * b_state, inside, other=0.), )
        before = ()  # the states before each token of the block, n fastest; and the last
        for s in tl.static_range(STEP):
            token = chunk * T + block * STEP + s
            dt, _ = _step_size(deltas[s], shift, token < length, SOFTPLUS)
            value = xs[s].to(tl.float32)
            before += h
            next_h = ()
            for n in tl.static_range(N):
                drive = dt * value * Bs[s * N + n].to(tl.float32)
                next_h += (tl.exp(dt * rate[n]) * h[n] + drive, )
            h = next_h
        before += h

        for s in tl.static_range(STEP - 1, -1, -1):
            token = chunk * T + block * STEP + s
            inside = token < length
            dt, raw = _step_size(deltas[s], shift, inside, SOFTPLUS)
            value = xs[s].to(tl.float32)
            dy = grads[s].to(tl.float32)
            into = tl.zeros((CHUNKS, CHANNELS), tl.float32)  # of dt * x
            exponent = tl.zeros((CHUNKS, CHANNELS), tl.float32)  # of dt through the decay
            next_r = ()
            next_dA = ()
            for n in tl.static_range(N):
                at = token * (groups * N) + n + lane
                C_n = tl.load(C + token * c_token + n * c_state, inside, other=0.)
                of_C = _over_channels(dy * before[(s + 1) * N + n])
                tl.store(dC + at, of_C, inside & (lane == 0))
                dh = dy * C_n.to(tl.float32) + r[n]
                into += dh * Bs[s * N + n].to(tl.float32)
                of_B = _over_channels(dh * (dt * value))
                tl.store(dB + at, of_B, inside & (lane == 0))
                next_r += (tl.exp(dt * rate[n]) * dh, )
                of_exponent = next_r[n] * before[s * N + n]
                exponent += of_exponent * rate[n]
                next_dA += (dA[n] + of_exponent * dt, )
            r = next_r
            dA = next_dA
            ddt = tl.where(inside, exponent + into * value, 0.)
            if SOFTPLUS:
                ddt *= _sigmoid(raw)
            dD += dy * value
            dbias += ddt
            out = into * dt + dy * skip
            tl.store(dx + token * channels, out.to(dx.dtype.element_ty), inside & valid)
            tl.store(ddelta + token * channels, ddt.to(ddelta.dtype.element_ty), inside & valid)

    sums += (batch * (chunks // CHUNKS) + tile) * (N + 2) * channels + channel
    for n in tl.static_range(N):
        tl.store(sums + n * channels, tl.sum(dA[n], 0)[None, :], valid)
    tl.store(sums + N * channels, tl.sum(dD, 0)[None, :], valid)
    tl.store(sums + (N + 1) * channels, tl.sum(dbias, 0)[None, :], valid)
