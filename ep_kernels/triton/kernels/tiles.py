"""Tiles of maps and matrices: where they lie, and loading them by TMA or by pointers."""

import triton
import triton.language as tl


@triton.jit
def place(
    pid, N, H, W, CO, PHASES: tl.constexpr,
    TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """First sample, row, column and channel of a program's tile, and its phase (N holds PHASES times as many samples).

    Channels vary fastest, so that neighbours share positions. No tile stores into two phases.
    """
    blocks = tl.cdiv(CO, BN)
    columns = tl.cdiv(W, TW)
    rows = tl.cdiv(H, TH)
    samples = N // PHASES
    tile = pid // blocks
    c0 = pid % blocks * BN
    w0 = tile % columns * TW
    h0 = tile // columns % rows * TH
    part = tile // (columns * rows)
    phase = part // tl.cdiv(samples, TN)
    n0 = phase * samples + part % tl.cdiv(samples, TN) * TN
    return n0, h0, w0, c0, phase


@triton.jit
def patch(
    a, n, h, w, c, N, H, W, C,
    TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[TN TH TW, BC] of the map ``a`` [N, H, W, C] at (n, h, w, c); what lies outside it is zero."""
    BM: tl.constexpr = TN * TH * TW
    if TMA:
        box = a.load([n, h, w, c]).reshape(BM, BC)
    else:
        m = tl.arange(0, BM)
        i, y, x = n + m // (TH * TW), h + m // TW % TH, w + m % TW
        inside = (i < N) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        cols = c + tl.arange(0, BC)
        at = ((i * H + y) * W + x).to(tl.int64) * C
        box = tl.load(a + at[:, None] + cols[None, :], mask=inside[:, None] & (cols < C)[None, :], other=0.0)
    return box


@triton.jit
def block(b, row, col, R, K, BR: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """[BR, BK] of the matrix ``b`` [R, K] at (row, col); what lies outside it is zero."""
    if TMA:
        box = b.load([row, col])
    else:
        rows = row + tl.arange(0, BR)
        cols = col + tl.arange(0, BK)
        at = rows.to(tl.int64)[:, None] * K + cols[None, :]
        box = tl.load(b + at, mask=(rows < R)[:, None] & (cols < K)[None, :], other=0.0)
    return box


@triton.jit
def convolve(
    acc, a, b, n0, h0, w0, c0, N, HA, WA, CA, OH, OW, CO,
    TAPS: tl.constexpr, KW: tl.constexpr, FLIP: tl.constexpr,
    TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TMA: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """One K loop of the implicit GEMM: acc [BN, TN TH TW] += ``b`` times patches of ``a``, transposed.

    Channels are the rows: a patch is reshaped from four dimensions to two, and Triton feeds such a left operand to
    Hopper's tensor cores through registers; a right operand it leaves in shared memory, where TMA put it.

    The output position (h, w) reads ``a`` at (h + r + OH, w + s + OW) for tap (r, s) of KH x KW = TAPS. A drive has
    OH = -padding; a feedback takes the kernel's taps in reverse (FLIP) and OH = padding - (KH - 1): one loop for both.
    Taps vary fastest: nine consecutive patches overlap and come from the L2 cache.
    """
    for k in tl.range(0, TAPS * tl.cdiv(CA, BK)):
        tap = k % TAPS
        c = k // TAPS * BK
        x = patch(a, n0, h0 + tap // KW + OH, w0 + tap % KW + OW, c, N, HA, WA, CA, TN, TH, TW, BK, TMA)
        column = (TAPS - 1 - tap if FLIP else tap) * CA + c
        y = block(b, c0, column, CO, TAPS * CA, BN, BK, TMA)
        acc = tl.dot(y, x.T, acc, input_precision=PRODUCTS)
    return acc
