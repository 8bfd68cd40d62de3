"""Drive of a connection in one launch: convolution, 2x2 pooling, winners, unpooled neighbour (reference: ``drive``)."""

import triton
import triton.language as tl

from .tiles import convolve, place


@triton.jit
def larger(left, right, index_left, index_right):
    """The larger of two and its index; the left one wins ties, the first NaN wins over numbers."""
    take = (right > left) | ((right != right) & (left == left))
    return tl.where(take, right, left), tl.where(take, index_right, index_left)


@triton.jit
def store_pooled(
    acc, base, shared, above, row, row_above, inside, c0, winners, drive, winners_out, state, unpooled, CO, WU, gain,
    POOL: tl.constexpr, FROZEN: tl.constexpr, SHARED: tl.constexpr,
    TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Pools [TN TH TW, BN] to a quarter of the positions and stores. Offsets and slices: as in step.update."""
    BM: tl.constexpr = TN * TH * TW
    if BN > SLICE:
        left, right = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        store_pooled(
            left, base, shared, above, row, row_above, inside, c0, winners, drive, winners_out, state, unpooled,
            CO, WU, gain, POOL, FROZEN, SHARED, TN, TH, TW, BN // 2, SLICE,
        )  # fmt: skip
        store_pooled(
            right, base, shared, above, row, row_above, inside, c0 + BN // 2, winners, drive, winners_out, state,
            unpooled, CO, WU, gain, POOL, FROZEN, SHARED, TN, TH, TW, BN // 2, SLICE,
        )  # fmt: skip
    else:
        c = c0 + tl.arange(0, BN)
        mask = inside[:, None] & (c < CO)[None, :]
        at = row[:, None] + c[None, :]
        # two splits instead of a reduction: a reduction over the window moves everything through shared memory
        z = acc.reshape(TN, TH // 2, 2, TW // 2, 2, BN).permute(0, 1, 3, 5, 2, 4)
        west, east = tl.split(z)
        nw, sw = tl.split(west)
        ne, se = tl.split(east)
        nw, ne = nw.reshape(BM // 4, BN), ne.reshape(BM // 4, BN)
        sw, se = sw.reshape(BM // 4, BN), se.reshape(BM // 4, BN)
        if POOL == 2:
            pooled = (nw + ne + sw + se) * 0.25
        elif FROZEN:
            won = tl.load(winners + (shared if SHARED else base) + at, mask=mask, other=0)
            pooled = tl.where(won == 0, nw, tl.where(won == 1, ne, tl.where(won == 2, sw, se)))
        else:
            north, at_north = larger(nw, ne, 0, 1)
            south, at_south = larger(sw, se, 2, 3)
            pooled, index = larger(north, south, at_north, at_south)
            won = index.to(tl.uint8)
            tl.store(winners_out + base + at, won, mask=mask)
        tl.store(drive + base + at, gain * pooled, mask=mask)
        if unpooled is not None:
            U: tl.constexpr = unpooled.dtype.element_ty
            s = tl.load(state + base + at, mask=mask, other=0.0).to(tl.float32)
            up = unpooled + above + (row_above[:, None] + c[None, :])
            for q in tl.static_range(4):
                part = s * 0.25 if POOL == 2 else tl.where(won == q, s, 0.0)
                tl.store(up + (q // 2 * WU + q % 2) * CO, part.to(U), mask=mask)


@triton.jit
def drive(
    a, b, HA, WA, CA, OH, OW,  # the map [N, HA, WA, CA], the matrix [CO, TAPS CA]
    winners,  # frozen ones, uint8 [N or N / PHASES, HP, WP, CO]
    drive, winners_out,  # [N, HP, WP, CO]
    state, unpooled,  # the destination's state [N, HP, WP, CO], and P^-1 of it [N, HU, WU, CO]
    control, N, H, W, CO, HP, WP, HU, WU, gain,  # H, W: of the map before pooling
    TAPS: tl.constexpr, KW: tl.constexpr, FLIP: tl.constexpr,
    POOL: tl.constexpr, FROZEN: tl.constexpr, PHASES: tl.constexpr, SHARED: tl.constexpr, STOP: tl.constexpr,
    TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SLICE: tl.constexpr, TMA: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """``gain P(W * s)`` for a tile of the map before pooling, which itself is never stored.

    POOL 0 none, 1 max, 2 avg. FROZEN winners are gathered at; else the largest wins, the first among equals.
    """
    if STOP:
        if tl.load(control) != 0:
            return
    n0, h0, w0, c0, phase = place(tl.program_id(0), N, H, W, CO, PHASES, TN, TH, TW, BN)
    BM: tl.constexpr = TN * TH * TW
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    acc = convolve(acc, a, b, n0, h0, w0, c0, N, HA, WA, CA, OH, OW, CO,
                   TAPS, KW, FLIP, TN, TH, TW, BN, BK, TMA, PRODUCTS).T  # fmt: skip
    last = (phase + 1) * (N // PHASES)
    first = n0 - phase * (N // PHASES)
    if POOL == 0:
        m = tl.arange(0, BM)
        n, y, x = m // (TH * TW), m // TW % TH, m % TW
        inside = (n0 + n < last) & (h0 + y < H) & (w0 + x < W)
        c = c0 + tl.arange(0, BN)
        out = drive + ((n0 * H + h0).to(tl.int64) * W + w0) * CO
        at = (((n * H + y) * W + x) * CO)[:, None] + c[None, :]
        tl.store(out + at, gain * acc, mask=inside[:, None] & (c < CO)[None, :])
    else:
        m = tl.arange(0, BM // 4)
        n, y, x = m // (TH * TW // 4), m // (TW // 2) % (TH // 2), m % (TW // 2)
        hp, wp = h0 // 2, w0 // 2
        inside = (n0 + n < last) & (hp + y < HP) & (wp + x < WP)
        store_pooled(
            acc,
            ((n0 * HP + hp).to(tl.int64) * WP + wp) * CO,
            ((first * HP + hp).to(tl.int64) * WP + wp) * CO,
            ((n0 * HU + h0).to(tl.int64) * WU + w0) * CO,
            ((n * HP + y) * WP + x) * CO,
            ((n * HU + 2 * y) * WU + 2 * x) * CO,
            inside, c0, winners, drive, winners_out, state, unpooled, CO, WU, gain,
            POOL, FROZEN, SHARED, TN, TH, TW, BN, SLICE,
        )  # fmt: skip
