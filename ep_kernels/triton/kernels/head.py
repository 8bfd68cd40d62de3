"""Nudge of a head in one launch: outputs, loss gradient, and back to the state (reference: ``head_gradient``)."""

import triton
import triton.language as tl


@triton.jit
def head_gradient(
    state, free,  # [N, F] (None: zero) and, in the delta forms, [N / PHASES, F]
    weight, bias, target, total,  # [O, F], [O], [N / PHASES, O], [N, F]
    control, N, F, O, inverse_scale, factor, temperature,
    PHASES: tl.constexpr, SOFTMAX: tl.constexpr, ADD: tl.constexpr, STOP: tl.constexpr,
    BS: tl.constexpr, BF: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """``total (+)= V^T factor (softmax(z / tau) - target)`` or ``V^T factor (z - target)``, ``z = V s + c``.

    A program finds the outputs of BS samples from all features and sends the error back to BF of them: the first part
    is repeated by every program of the same samples, which is cheaper than another launch.
    """
    if STOP:
        if tl.load(control) != 0:
            return
    n = tl.program_id(0) * BS + tl.arange(0, BS)
    o = tl.arange(0, BO)
    samples = N // PHASES
    z = tl.zeros((BS, BO), dtype=tl.float32)
    for k in range(0, F, BF):
        f = k + tl.arange(0, BF)
        mask = (n < N)[:, None] & (f < F)[None, :]
        s = tl.zeros((BS, BF), dtype=tl.float32)
        if state is not None:
            s = tl.load(state + n.to(tl.int64)[:, None] * F + f[None, :], mask=mask, other=0.0).to(tl.float32)
        if free is not None:
            at = (n % samples).to(tl.int64)[:, None] * F + f[None, :]
            s = tl.load(free + at, mask=mask, other=0.0).to(tl.float32) + inverse_scale * s
        v = tl.load(weight + o[:, None] * F + f[None, :], mask=(o < O)[:, None] & (f < F)[None, :], other=0.0)
        z = tl.dot(s, v.T, z, input_precision="ieee")
    if bias is not None:
        z += tl.load(bias + o, mask=o < O, other=0.0)[None, :]
    mask = (n < N)[:, None] & (o < O)[None, :]
    aim = tl.load(target + (n % samples)[:, None] * O + o[None, :], mask=mask, other=0.0)
    if SOFTMAX:
        z = tl.where((o < O)[None, :], z / temperature, float("-inf"))
        e = tl.exp(z - tl.max(z, axis=1)[:, None])
        z = e / tl.sum(e, axis=1)[:, None]
    error = factor * (z - aim)  # zero for o >= O
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    v = tl.load(weight + o[:, None] * F + f[None, :], mask=(o < O)[:, None] & (f < F)[None, :], other=0.0)
    back = tl.dot(error, v, input_precision="ieee")
    to = n.to(tl.int64)[:, None] * F + f[None, :]
    mask = (n < N)[:, None] & (f < F)[None, :]
    if ADD:
        back += tl.load(total + to, mask=mask, other=0.0)
    tl.store(total + to, back, mask=mask)
