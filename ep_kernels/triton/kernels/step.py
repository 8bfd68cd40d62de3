"""One relaxation step of one node in one launch (reference: ep_kernels/reference.py, ``step``)."""

import triton
import triton.language as tl

from .numbers import clip, delta_clip, magnitude, tangent_clip
from .tiles import convolve, place


@triton.jit
def finish_sweep(control, residual, t, N, tol, STOP: tl.constexpr):
    """Run by every program of a sweep's last launch: the last one to arrive counts the sweep and decides to stop."""
    tl.debug_barrier()  # this program's residuals are out before its ticket
    if tl.atomic_add(control + 2, 1) == tl.num_programs(0) - 1:
        tl.store(control + 1, t + 1)
        tl.store(control + 2, 0)
        if STOP:
            lanes = tl.arange(0, 128)
            worst = tl.zeros([128], dtype=tl.int32)
            for i in range(0, N, 128):
                row = tl.load(residual + t.to(tl.int64) * N + i + lanes, mask=i + lanes < N, other=0, volatile=True)
                worst = tl.maximum(worst, row)
            still = tl.max(worst, axis=0).to(tl.float32, bitcast=True) <= tol  # false for NaN
            tl.store(control, (still & (t > 0)).to(tl.int32))


@triton.jit
def update(
    acc, base, shared, above, row, row_above, inside, c0, bias, finished0, finished1, f0, f1, nudge, nudge_gain,
    old, pre, winners, new, operand, unpooled, pre_out, CO, C, WU, damping, slope, lo, hi, scale,
    FORM: tl.constexpr, ETA: tl.constexpr,
    SHARED0: tl.constexpr, SHARED1: tl.constexpr, NUDGE_SHARED: tl.constexpr, WINNERS_SHARED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """The epilogue: reads what is not convolved, updates, stores. Returns the largest changes, [BM, SLICE].

    Element offsets are 64-bit for the tile (``base``; ``shared`` in the first phase; ``above`` in the unpooled map) and
    32-bit within it (``row`` and ``row_above``, [BM]). Slices of SLICE channels go one after the other, so that the
    registers hold the operands of one only.
    """
    if BN > SLICE:
        left, right = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        first = update(
            left, base, shared, above, row, row_above, inside, c0, bias, finished0, finished1, f0, f1, nudge,
            nudge_gain, old, pre, winners, new, operand, unpooled, pre_out, CO, C, WU, damping, slope, lo, hi, scale,
            FORM, ETA, SHARED0, SHARED1, NUDGE_SHARED, WINNERS_SHARED, BM, BN // 2, SLICE,
        )  # fmt: skip
        second = update(
            right, base, shared, above, row, row_above, inside, c0 + BN // 2, bias, finished0, finished1, f0, f1, nudge,
            nudge_gain, old, pre, winners, new, operand, unpooled, pre_out, CO, C, WU, damping, slope, lo, hi, scale,
            FORM, ETA, SHARED0, SHARED1, NUDGE_SHARED, WINNERS_SHARED, BM, BN // 2, SLICE,
        )  # fmt: skip
        return tl.maximum(first, second)
    else:
        c = c0 + tl.arange(0, BN)
        mask = inside[:, None] & (c < CO)[None, :]
        at = row[:, None] + c[None, :]
        if bias is not None:
            acc += tl.load(bias + c, mask=c < CO, other=0.0)[None, :]
        if finished0 is not None:
            acc += f0 * tl.load(finished0 + (shared if SHARED0 else base) + at, mask=mask, other=0.0)
        if finished1 is not None:
            acc += f1 * tl.load(finished1 + (shared if SHARED1 else base) + at, mask=mask, other=0.0)
        if nudge is not None:
            acc += nudge_gain * tl.load(nudge + (shared if NUDGE_SHARED else base) + at, mask=mask, other=0.0)
        acc *= slope
        if pre_out is not None:
            tl.store(pre_out + base + at, acc, mask=mask)

        was = tl.zeros((BM, BN), dtype=tl.float32)
        if old is not None:
            was = tl.load(old + base + at, mask=mask, other=0.0).to(tl.float32)
        if FORM == 0:
            target = clip(acc, lo, hi)
        else:
            free = tl.load(pre + shared + at, mask=mask, other=0.0)
            target = delta_clip(free, acc, lo, hi, scale) if FORM == 1 else tangent_clip(free, acc, lo, hi)
        if ETA != 1:
            target = (1 - damping) * was + damping * target
        if ETA == 2:
            target = clip(target, lo, hi)
        stored = tl.where((c < C)[None, :], target, 0.0).to(new.dtype.element_ty)
        state = stored.to(tl.float32)
        if old is not None:
            tl.debug_barrier()  # it may be the same memory as `new`, read by other threads than write it
        tl.store(new + base + at, stored, mask=mask)
        if operand is not None:
            tl.store(operand + base + at, state.to(operand.dtype.element_ty), mask=mask)
        if unpooled is not None:
            U: tl.constexpr = unpooled.dtype.element_ty
            up = unpooled + above + (row_above[:, None] + c[None, :])
            if winners is not None:
                won = tl.load(winners + (shared if WINNERS_SHARED else base) + at, mask=mask, other=255)
                for q in tl.static_range(4):
                    tl.store(up + (q // 2 * WU + q % 2) * CO, tl.where(won == q, state, 0.0).to(U), mask=mask)
            else:
                for q in tl.static_range(4):
                    tl.store(up + (q // 2 * WU + q % 2) * CO, (state * 0.25).to(U), mask=mask)
        return magnitude((state - was) / scale)


@triton.jit
def relax_step(
    # K loops: maps [N, HA, WA, CA] and matrices [CO, taps CA] (descriptors or pointers), absent ones None
    a0, b0, a1, b1, a2, b2, a3, b3,
    H0, W0, C0, OH0, OW0, H1, W1, C1, OH1, OW1, H2, W2, C2, OH2, OW2, H3, W3, C3, OH3, OW3,
    m0, m1, m2, m3,  # the accumulator is multiplied by m_i after loop i
    # epilogue inputs, [N or N / PHASES, H, W, CO]; bias [CO]
    bias, finished0, finished1, f0, f1, nudge, nudge_gain, old, pre, winners,
    # outputs
    new, operand, unpooled, pre_out, residual,
    control,  # int32: stop, sweeps done, ticket
    N, H, W, CO, C, HU, WU,
    damping, slope, lo, hi, scale, tol,
    TAPS0: tl.constexpr, KW0: tl.constexpr, FLIP0: tl.constexpr,
    TAPS1: tl.constexpr, KW1: tl.constexpr, FLIP1: tl.constexpr,
    TAPS2: tl.constexpr, KW2: tl.constexpr, FLIP2: tl.constexpr,
    TAPS3: tl.constexpr, KW3: tl.constexpr, FLIP3: tl.constexpr,
    FORM: tl.constexpr, PHASES: tl.constexpr, ETA: tl.constexpr,
    SHARED0: tl.constexpr, SHARED1: tl.constexpr, NUDGE_SHARED: tl.constexpr, WINNERS_SHARED: tl.constexpr,
    STOP: tl.constexpr, FINISH: tl.constexpr,
    TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SLICE: tl.constexpr, TMA: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """``s <- (1 - eta) s + eta clip(slope a)`` for a tile of positions and channels.

    FORM 0 states, 1 delta, 2 tangent; ETA 1 when eta = 1, 2 when eta > 1 (clipped once more), else 0.
    *_SHARED: the tensor holds N / PHASES samples and is read modulo that.
    """
    if STOP:
        if tl.load(control) != 0:
            return
    n0, h0, w0, c0, phase = place(tl.program_id(0), N, H, W, CO, PHASES, TN, TH, TW, BN)
    BM: tl.constexpr = TN * TH * TW
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    if a0 is not None:
        acc = convolve(acc, a0, b0, n0, h0, w0, c0, N, H0, W0, C0, OH0, OW0, CO,
                       TAPS0, KW0, FLIP0, TN, TH, TW, BN, BK, TMA, PRODUCTS) * m0  # fmt: skip
    if a1 is not None:
        acc = convolve(acc, a1, b1, n0, h0, w0, c0, N, H1, W1, C1, OH1, OW1, CO,
                       TAPS1, KW1, FLIP1, TN, TH, TW, BN, BK, TMA, PRODUCTS) * m1  # fmt: skip
    if a2 is not None:
        acc = convolve(acc, a2, b2, n0, h0, w0, c0, N, H2, W2, C2, OH2, OW2, CO,
                       TAPS2, KW2, FLIP2, TN, TH, TW, BN, BK, TMA, PRODUCTS) * m2  # fmt: skip
    if a3 is not None:
        acc = convolve(acc, a3, b3, n0, h0, w0, c0, N, H3, W3, C3, OH3, OW3, CO,
                       TAPS3, KW3, FLIP3, TN, TH, TW, BN, BK, TMA, PRODUCTS) * m3  # fmt: skip

    m = tl.arange(0, BM)
    n, y, x = m // (TH * TW), m // TW % TH, m % TW
    last = (phase + 1) * (N // PHASES)
    inside = (n0 + n < last) & (h0 + y < H) & (w0 + x < W)
    first = n0 - phase * (N // PHASES)  # the same sample in the first phase
    change = update(
        acc.T,
        ((n0 * H + h0).to(tl.int64) * W + w0) * CO,
        ((first * H + h0).to(tl.int64) * W + w0) * CO,
        ((n0 * HU + 2 * h0).to(tl.int64) * WU + 2 * w0) * CO,
        ((n * H + y) * W + x) * CO,
        ((n * HU + 2 * y) * WU + 2 * x) * CO,
        inside, c0, bias, finished0, finished1, f0, f1, nudge, nudge_gain if phase == 0 else -nudge_gain,
        old, pre, winners, new, operand, unpooled, pre_out, CO, C, WU, damping, slope, lo, hi, scale,
        FORM, ETA, SHARED0, SHARED1, NUDGE_SHARED, WINNERS_SHARED, BM, BN, SLICE,
    )  # fmt: skip

    t = tl.load(control + 1)
    change = tl.where(inside, tl.max(change, axis=1), 0)
    change = tl.max(change.reshape(TN, TH * TW), axis=1)
    sample = n0 + tl.arange(0, TN)
    tl.atomic_max(residual + t.to(tl.int64) * N + sample, change, mask=sample < last, sem="relaxed")
    if FINISH:
        finish_sweep(control, residual, t, N, tol, STOP)
