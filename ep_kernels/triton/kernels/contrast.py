"""Contrastive weight and bias gradients of one connection (reference: ep_kernels/reference.py, ``contrast``)."""

import triton
import triton.language as tl

from .tiles import block, patch


@triton.jit
def difference_and_mean(
    free, delta, winners,  # [P positions, C] (delta of both phases: twice as many), uint8 [P or 2 P, C]
    diff, mean, bias,  # [N, HU, WU, CP] (zero where no winner is), partial sums [programs, CP]
    second, P, H, W, C, CP, HU, WU, mean_gain, gain,  # second: P C, where the other phase begins
    PHASES: tl.constexpr, POOL: tl.constexpr, LIVE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Per position ``d = d+ - d-`` and ``m = s + mean_gain (d+ + d-)``, at the winners; sums d over positions.

    ``d`` keeps the deltas' scale. LIVE winners differ between the phases: each state ``m +- gain d / 2`` has its own.
    """
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    total = tl.zeros([BC], dtype=tl.float32)
    for start in range(tl.program_id(0) * BP, P, tl.num_programs(0) * BP):
        p = start + tl.arange(0, BP)
        mask = (p < P)[:, None] & (c < C)[None, :]
        at = p.to(tl.int64)[:, None] * C + c[None, :]
        s = tl.load(free + at, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(delta + at, mask=mask, other=0.0).to(tl.float32)
        both = d
        if PHASES == 2:
            minus = tl.load(delta + second + at, mask=mask, other=0.0).to(tl.float32)
            both = d + minus
            d -= minus
        m = s + mean_gain * both
        total += tl.sum(d, axis=0)
        inside = (p < P)[:, None] & (c < CP)[None, :]  # padding channels become zero
        if POOL == 0:
            to = p.to(tl.int64)[:, None] * CP + c[None, :]
            tl.store(diff + to, d.to(diff.dtype.element_ty), mask=inside)
            tl.store(mean + to, m.to(mean.dtype.element_ty), mask=inside)
        else:
            n, y, x = p // (H * W), p // W % H, p % W
            to = ((n * HU + 2 * y).to(tl.int64) * WU + 2 * x)[:, None] * CP + c[None, :]
            if POOL == 1:
                won = tl.load(winners + at, mask=mask, other=255)
                won_minus = won
                if LIVE:
                    won_minus = tl.load(winners + second + at, mask=mask, other=255)
            for q in tl.static_range(4):
                if POOL == 2:
                    dq, mq = d * 0.25, m * 0.25
                elif LIVE:
                    plus = tl.where(won == q, m + 0.5 * gain * d, 0.0)
                    less = tl.where(won_minus == q, m - 0.5 * gain * d, 0.0)
                    same = (won == q) & (won_minus == q)  # the difference itself: no digit of it is lost
                    dq, mq = tl.where(same, d, (plus - less) / gain), 0.5 * (plus + less)
                else:
                    dq, mq = tl.where(won == q, d, 0.0), tl.where(won == q, m, 0.0)
                window = (q // 2 * WU + q % 2) * CP
                tl.store(diff + to + window, dq.to(diff.dtype.element_ty), mask=inside)
                tl.store(mean + to + window, mq.to(mean.dtype.element_ty), mask=inside)
    tl.store(bias + tl.program_id(0) * CP + c, total, mask=c < CP)


@triton.jit
def correlate(
    acc, above, below, first, end, co, ci, r, s, N, H, W, CO, HB, WB, CI, OH, OW,
    FLAT: tl.constexpr, TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TMA: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN] += sum over positions of ``above`` [N, H, W, CO] times ``below`` shifted to tap (r, s).

    FLAT: every tile is a run of positions in memory, so ``above`` is a matrix [N H W, CO]: as the left operand it stays
    in shared memory then (tiles.py, ``convolve``).
    """
    columns = tl.cdiv(W, TW)
    rows = tl.cdiv(H, TH)
    for tile in tl.range(first, end):
        w = tile % columns * TW
        h = tile // columns % rows * TH
        n = tile // (columns * rows) * TN
        if FLAT:
            up = block(above, tile * (TN * TH * TW), co, N * H * W, CO, TN * TH * TW, BM, TMA)
        else:
            up = patch(above, n, h, w, co, N, H, W, CO, TN, TH, TW, BM, TMA)
        low = patch(below, n, h + r + OH, w + s + OW, ci, N, HB, WB, CI, TN, TH, TW, BN, TMA)
        acc = tl.dot(up.T, low, acc, input_precision=PRODUCTS)
    return acc


@triton.jit
def contrast(
    diff_above, mean_below, mean_above, diff_below,  # [N, H, W, CO], [N, HB, WB, CI]; the last two may be None
    partial,  # [splits, CO, TAPS, CI]
    N, H, W, CO, HB, WB, CI, OH, OW, tiles, share, ratio,
    TAPS: tl.constexpr, KW: tl.constexpr, FLAT: tl.constexpr,
    TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TMA: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """``ratio <d^dst, W * m^src> + <m^dst, W * d^src>`` by W: a block of one tap, over ``share`` position tiles."""
    pid = tl.program_id(0)
    across = tl.cdiv(CI, BN)
    ci = pid % across * BN
    tap = pid // across % TAPS
    down = tl.cdiv(CO, BM)
    co = pid // (across * TAPS) % down * BM
    split = pid // (across * TAPS * down)
    first = split * share
    end = tl.minimum(first + share, tiles)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    acc = correlate(acc, diff_above, mean_below, first, end, co, ci, tap // KW, tap % KW, N, H, W, CO, HB, WB, CI,
                    OH, OW, FLAT, TN, TH, TW, BM, BN, TMA, PRODUCTS) * ratio  # fmt: skip
    if mean_above is not None:
        acc = correlate(acc, mean_above, diff_below, first, end, co, ci, tap // KW, tap % KW, N, H, W, CO, HB, WB, CI,
                        OH, OW, FLAT, TN, TH, TW, BM, BN, TMA, PRODUCTS)  # fmt: skip
    o, i = co + tl.arange(0, BM), ci + tl.arange(0, BN)
    at = ((split * CO + o).to(tl.int64) * TAPS + tap)[:, None] * CI + i[None, :]
    tl.store(partial + at, acc, mask=(o < CO)[:, None] & (i < CI)[None, :])


@triton.jit
def add_up(partial, out, rows, size, stride, C, CP, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``out = scale * sum over rows of partial [rows, stride]`` in a fixed order; padding channels (CP) go."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    row = tl.arange(0, ROWS)
    at = row.to(tl.int64)[:, None] * stride + ((i // C).to(tl.int64) * CP + i % C)[None, :]
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for first in range(0, rows, ROWS):
        total += tl.load(partial + at, mask=(first + row < rows)[:, None] & mask[None, :], other=0.0)
        at += ROWS * stride
    tl.store(out + i, scale * tl.sum(total, axis=0), mask=mask)
