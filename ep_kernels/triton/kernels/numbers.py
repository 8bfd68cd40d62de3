"""Elementwise arithmetic of the kernels: the equations of ep_kernels/reference.py, with NaN passed on as torch does."""

import triton
import triton.language as tl


@triton.jit
def least(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def most(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clip(x, lo, hi):
    return least(most(x, lo), hi)


@triton.jit
def delta_clip(pre, increment, lo, hi, scale):
    """``scale (clip(pre + increment / scale) - clip(pre))`` by cases: ``increment`` is never added to ``pre``."""
    below = (lo - pre) * scale
    above = (hi - pre) * scale
    width = (hi - lo) * scale
    inside = clip(increment, below, above)
    under = clip(increment - below, 0.0, width)
    over = clip(increment - above, -width, 0.0)
    return tl.where(pre < lo, under, tl.where(pre > hi, over, inside))


@triton.jit
def tangent_clip(pre, increment, lo, hi):
    """Limit of :func:`delta_clip` for a small increment: it passes strictly inside the box and nowhere else."""
    return increment * ((pre > lo) & (pre < hi)).to(tl.float32)


@triton.jit
def magnitude(x):
    """|x| as an integer of the same order, NaN above everything: maxima of it need no care and have no rounding."""
    return tl.abs(x).to(tl.int32, bitcast=True)
