"""The specification, in plain PyTorch: what every backend must compute.

Read top to bottom: drive and feedback of one connection, the energy, one update of one node in states and in delta
form, the gradients of heads, the contrast. Shapes: B samples; a state is [B, C, H, W] or [B, F]. Equations are those
of docs/concepts.md (Scellier & Bengio 2017; Laborieux et al. 2021 for pooling; Xie & Seung 2003 for the feedback gain).
Nothing here checks its arguments: the ops do (ep_kernels/functional.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from .network import Connection, Head, Network, Pool
from .plan import Form
from .precision import Operands, rounded

Pair = Sequence[int]
NO_DIRECTION = 1e-6  # of the cosine loss: a vector with at most this norm has none


# --- one connection ---------------------------------------------------------------------------------------------------


def convolve(source: Tensor, weight: Tensor, stride: Pair = (1, 1), padding: Pair = (0, 0)) -> Tensor:
    """``W * s``: [B, C_dst, H', W'], or [B, F_dst] when ``weight`` is a matrix (the source is flattened)."""
    if weight.dim() == 2:
        return source.flatten(1) @ weight.t()
    if _samples(weight.shape, stride, padding):
        source, stride = source[..., :: stride[0], :: stride[1]], (1, 1)
    out: Tensor = F.conv2d(source, weight, stride=tuple(stride), padding=tuple(padding))
    return out


def _samples(shape: Sequence[int], stride: Pair, padding: Pair) -> bool:
    """A strided 1x1 convolution, which reads some pixels and no others. They are taken out first: on the CPU torch's
    gradient of its weight writes out of bounds (torch 2.13.0, oneDNN 3.12: channels_last and few channels)."""
    return tuple(shape[2:]) == (1, 1) and tuple(padding) == (0, 0) and tuple(stride) != (1, 1)


def convolve_adjoint(above: Tensor, weight: Tensor, shape: Sequence[int], stride: Pair, padding: Pair) -> Tensor:
    """``W^T * above`` in the source's ``shape`` (C, H, W) or (F,): the exact adjoint of :func:`convolve`."""
    if weight.dim() == 2:
        flat: Tensor = above @ weight
        return flat.view(above.shape[0], *shape)
    if _samples(weight.shape, stride, padding):
        product = F.conv_transpose2d(above, weight)  # in the dtype and the memory format that autocast and it choose
        last = product.is_contiguous(memory_format=torch.channels_last) and not product.is_contiguous()
        layout = torch.channels_last if last else torch.contiguous_format
        full = torch.zeros((above.shape[0], *shape), dtype=product.dtype, device=product.device).contiguous(
            memory_format=layout
        )
        full[..., :: stride[0], :: stride[1]] = product
        return full
    # what the floor of the forward map leaves over: 0 to stride - 1 rows, as output_padding takes
    extra = [
        n + 2 * p - k - (m - 1) * s
        for n, m, k, s, p in zip(shape[1:], above.shape[2:], weight.shape[2:], stride, padding, strict=True)
    ]
    out: Tensor = F.conv_transpose2d(
        above, weight, stride=tuple(stride), padding=tuple(padding), output_padding=tuple(extra)
    )
    return out


def convolve_weight(above: Tensor, source: Tensor, shape: Sequence[int], stride: Pair, padding: Pair) -> Tensor:
    """Gradient of ``<above, W * source>`` with respect to W, in ``shape`` [C_dst, C_src, kh, kw]; sums the batch."""
    if _samples(shape, stride, padding):
        source, stride = source[..., :: stride[0], :: stride[1]], (1, 1)
    out: Tensor = conv2d_weight(source, list(shape), above, stride=tuple(stride), padding=tuple(padding))
    return out


def windows(x: Tensor) -> Tensor:
    """The 2x2 windows of a map, [B, C, H//2, W//2, 4] in row-major order; an odd last row or column is dropped."""
    h, w = x.shape[-2] // 2 * 2, x.shape[-1] // 2 * 2
    split = x[..., :h, :w].unflatten(-1, (w // 2, 2)).unflatten(-3, (h // 2, 2))  # [B, C, h, 2, w, 2]
    return torch.flatten(split.transpose(-3, -2), -2)


def pool_map(z: Tensor, pool: Pool, winners: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """2x2 pooling. Returns the pooled map and, for ``max``, the winner 0..3 (row-major, first wins ties) as uint8.

    With ``winners`` (batch B, where ``z`` has n B samples) the given positions are gathered instead of compared.
    """
    if pool == "none":
        return z, None
    if pool == "avg":
        return F.avg_pool2d(z, 2), None
    if winners is None:
        winners = windows(z).detach().argmax(-1).to(torch.uint8)
    index = winners.repeat(z.shape[0] // max(winners.shape[0], 1), 1, 1, 1)
    return windows(z).gather(-1, index.long().unsqueeze(-1)).squeeze(-1), winners


def unpool_map(s: Tensor, pool: Pool, size: Sequence[int], winners: Tensor | None = None) -> Tensor:
    """``P^-1``, the adjoint of :func:`pool_map` at fixed winners, onto a map of ``size`` (H, W)."""
    if pool == "none":
        return s
    if pool == "avg":
        spread = (s / 4).unsqueeze(-1).expand(*s.shape, 4)
    else:
        assert winners is not None
        index = winners.repeat(s.shape[0] // max(winners.shape[0], 1), 1, 1, 1)
        spread = F.one_hot(index.long(), 4).to(s.dtype) * s.unsqueeze(-1)
    rows = spread.unflatten(-1, (2, 2)).transpose(-3, -2)  # [B, C, h, 2, w, 2]
    full = rows.flatten(-2).flatten(-3, -2)
    return F.pad(full, (0, size[1] - full.shape[-1], 0, size[0] - full.shape[-2]))


def drive(
    source: Tensor,
    weight: Tensor,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    pool: Pool = "none",
    winners: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``P(W * s)`` and its winners. See :func:`pool_map` for ``winners``."""
    return pool_map(convolve(source, weight, stride, padding), pool, winners)


def feedback(
    above: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    pool: Pool = "none",
    winners: Tensor | None = None,
) -> Tensor:
    """``W^T * P^-1(s^dst)`` in the source's ``shape``: the exact adjoint of :func:`drive` at fixed winners."""
    if weight.dim() == 4:
        size = [
            (n + 2 * p - k) // s + 1 for n, k, s, p in zip(shape[1:], weight.shape[2:], stride, padding, strict=True)
        ]
        above = unpool_map(above, pool, size, winners)
    return convolve_adjoint(above, weight, shape, stride, padding)


# --- energy -----------------------------------------------------------------------------------------------------------


def connection_drive(conn: Connection, source: Tensor, weight: Tensor) -> Tensor:
    """Drive of one connection with live winners, differentiable by autograd."""
    return drive(source, weight, conn.stride, conn.padding, conn.pool)[0]


def energy(net: Network, states: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """E(s) per sample, [B]: ``sum_l k^l [ |s^l|^2 / (2 gamma) - <s^l, b^l + sum_c drive_c> ]``.

    Args:
        states: per node, ``states[0]`` the clamped input.
        weights: per connection.
        biases: per node, [C] or [F]; ``biases[0]`` is not read.
    """
    total = states[0].new_zeros(states[0].shape[0])  # of tied feedback: with separate weights there is no energy
    for i in range(1, len(states)):
        s = states[i]
        a = biases[i].view(-1, *[1] * (s.dim() - 2)).expand_as(s)
        for c in net.into[i]:
            a = a + connection_drive(net.connections[c], states[net.connections[c].src], weights[c])
        terms = s * s / (2 * net.slope) - s * a
        total = total + net.feedback_gain ** net.levels[i] * terms.flatten(1).sum(1)
    return total


# --- one update -------------------------------------------------------------------------------------------------------


def update(state: Tensor, a: Tensor, damping: float, slope: float, lo: float, hi: float) -> Tensor:
    """``(1 - eta) s + eta clip(gamma a, lo, hi)``; eta is ``damping``. For eta > 1 it is clipped once more."""
    new = damp(state, (slope * a).clamp(lo, hi), damping)
    return new.clamp(lo, hi) if damping > 1 else new


def damp(state: Tensor, target: Tensor, damping: float) -> Tensor:
    """``(1 - eta) s + eta target``; at eta = 1 the target itself, whatever the state was."""
    return target if damping == 1 else (1 - damping) * state + damping * target


def delta_clip(pre: Tensor, increment: Tensor, lo: float, hi: float, scale: float = 1.0) -> Tensor:
    """``scale (clip(pre + increment / scale) - clip(pre))`` by cases: ``increment`` is never added to ``pre``.

    ``pre`` is gamma a at the free equilibrium, ``increment`` already carries the power-of-two ``scale``. Inside the
    box the result is the increment itself, cut at the two distances, so no digit of it is lost.
    """
    below, above, width = (lo - pre) * scale, (hi - pre) * scale, (hi - lo) * scale
    inside = torch.minimum(torch.maximum(increment, below), above)
    under = (increment - below).clamp(0, width)
    over = (increment - above).clamp(-width, 0)
    return torch.where(pre < lo, under, torch.where(pre > hi, over, inside))


def tangent_clip(pre: Tensor, increment: Tensor, lo: float, hi: float) -> Tensor:
    """Limit of :func:`delta_clip` for a small increment: it passes strictly inside the box and nowhere else."""
    return increment * ((pre > lo) & (pre < hi))


def step(
    state: Tensor,
    a: Tensor,
    form: Form,
    damping: float,
    slope: float,
    lo: float,
    hi: float,
    preactivation: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """One relaxation step of a node in any form; ``preactivation`` and ``scale`` are those of the delta forms."""
    if form == "states":
        return update(state, a, damping, slope, lo, hi)
    assert preactivation is not None
    if form == "delta":
        target = delta_clip(preactivation, slope * a, lo, hi, scale)
    else:
        target = tangent_clip(preactivation, slope * a, lo, hi)
    return damp(state, target, damping)


# --- heads ------------------------------------------------------------------------------------------------------------


def head_output(head: Head, state: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``z``, [B, outputs]: ``V pool(s) + c``, or the pooled state itself when the head is the identity."""
    feature = head_feature(head, state)
    if weight is None:
        return feature
    if head.pointwise:
        return F.conv2d(feature, weight, bias)
    return F.linear(feature.flatten(1), weight, bias)


def head_feature(head: Head, state: Tensor) -> Tensor:
    """What the head's map reads: the state, its map averaged to ``pool x pool``."""
    return F.adaptive_avg_pool2d(state, head.pool) if head.pool is not None and state.dim() == 4 else state


def head_loss(head: Head, z: Tensor, target: Tensor) -> Tensor:
    """Loss per sample, [B], of outputs ``z`` against probabilities or values ``target`` of the same shape."""
    if head.loss == "mse":
        return head.weight * 0.5 * (z - target).square().flatten(1).sum(1)
    if head.loss == "cosine":
        return head.weight * (1 - (directions(z) * directions(target)).sum(1, keepdim=True)).flatten(1).sum(1)
    tau = head.temperature
    return head.weight * tau**2 * -(target * F.log_softmax(z / tau, 1)).flatten(1).sum(1)


def head_error(head: Head, z: Tensor, target: Tensor) -> Tensor:
    """dL/dz per sample (not averaged over the batch), the shape of ``z``. Target probabilities sum to 1."""
    if head.loss == "mse":
        return head.weight * (z - target)
    if head.loss == "cosine":
        unit, wanted, norm = directions(z), directions(target), z.norm(dim=1, keepdim=True)
        along = (unit * wanted).sum(1, keepdim=True)
        error = head.weight * (unit * along - wanted) / norm.clamp_min(NO_DIRECTION)
        return torch.where(norm <= NO_DIRECTION, 0.0, error)
    return head.weight * head.temperature * (F.softmax(z / head.temperature, 1) - target)


def directions(z: Tensor) -> Tensor:
    """``z / |z|`` over dimension 1 (at every pixel of a map); zero where |z| is at most ``NO_DIRECTION``."""
    norm = z.norm(dim=1, keepdim=True)
    return torch.where(norm <= NO_DIRECTION, 0.0, z / norm.clamp_min(NO_DIRECTION))


def head_gradient(head: Head, state: Tensor, weight: Tensor | None, bias: Tensor | None, target: Tensor) -> Tensor:
    """dL/ds per sample: what the nudge multiplies by ``-beta k^(N-l)``."""
    error = head_error(head, head_output(head, state, weight, bias), target)
    if weight is None:
        back = error
    elif head.pointwise:
        back = F.conv_transpose2d(error, weight)
    else:
        back = (error @ weight).unflatten(1, head.feature_shape(tuple(state.shape[1:])))
    if back.shape == state.shape:
        return back
    out: Tensor = torch.ops.aten._adaptive_avg_pool2d_backward(back.contiguous(), state)
    return out


# --- contrast ---------------------------------------------------------------------------------------------------------


def contrast(
    source: Tensor,
    source_delta: Tensor | None,
    target: Tensor,
    target_delta: Tensor,
    weight_shape: Sequence[int],
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    pool: Pool = "none",
    winners: Tensor | None = None,
    *,
    source_gain: float = 1.0,
    target_gain: float = 1.0,
    centre: float = 0.5,
    scale: float = 1.0,
    operands: Operands = None,
) -> tuple[Tensor, Tensor]:
    """Contrastive gradients of one connection in the difference form (docs/concepts.md).

    ``scale ( <ds^dst, W * m^src> + <m^dst, W * ds^src> )`` differentiated by W, and ``scale sum ds^dst`` for the bias,
    where for two phases ``d = d+ - d-`` and ``m = s + centre (d+ + d-)``; for one phase ``d`` is the delta itself.

    Args:
        source, target: free states of the two ends, [B, ...].
        source_delta, target_delta: [B, ...] (one phase) or [2B, ...] (+beta, then -beta), times ``*_gain`` to be in
            the states' units. ``source_delta`` is None for the clamped input.
        centre: 1/2 for finite differences (exact), 0 for the tangent.
        winners: of the max pooling, [B, ...], the same in both phases (frozen); or [2B, ...], those of the +beta states
            and then those of the -beta (or free) states (live; ``centre`` must be 1/2).
        operands: what the products round ``d`` (in the deltas' units; live, in the states') and ``m`` to, accumulating
            in the tensors' dtype. The gains and the scale, which no short exponent holds, multiply the products.

    Returns:
        Gradient of the weight, in ``weight_shape``, and of the bias, [C] or [F]. Sums over the batch.
    """
    live = winners is not None and winners.shape[0] == 2 * target.shape[0]
    # What multiplies a difference before the products, and a product afterwards. Gains may be tiny and the scale huge:
    # their products are formed first, in double; and differences to be rounded get neither (live: the gain, which is
    # that to the states' units), as they have to fit a short exponent.
    if isinstance(operands, torch.dtype):
        unit, before_t, before_s = 1.0, target_gain if live else 1.0, 1.0
        after_t, after_s = scale if live else scale * target_gain, scale * source_gain
    else:
        unit, before_t, before_s = scale, scale * target_gain, scale * source_gain
        after_t = after_s = 1.0
    diff_t, mean_t = _difference_and_mean(target, target_delta, before_t, centre * target_gain)
    if source_delta is None:
        diff_s, mean_s = None, source
    else:
        diff_s, mean_s = _difference_and_mean(source, source_delta, before_s, centre * source_gain)
    bias = after_t * (diff_t.sum((0, 2, 3)) if diff_t.dim() == 4 else diff_t.sum(0))

    def product(above: Tensor, below: Tensor) -> Tensor:
        above, below = rounded(above, operands), rounded(below, operands)
        if len(weight_shape) == 2:
            return above.t() @ below.flatten(1)
        return convolve_weight(above, below, weight_shape, stride, padding)

    up_diff, up_mean = diff_t, mean_t
    if len(weight_shape) == 4:
        size = [
            (n + 2 * p - k) // s + 1
            for n, k, s, p in zip(source.shape[2:], weight_shape[2:], stride, padding, strict=True)
        ]
        if live and winners is not None:
            plus, minus = (
                unpool_map(mean_t + sign * diff_t / (2 * unit), pool, size, won)
                for sign, won in zip((1, -1), winners.chunk(2), strict=True)
            )
            up_diff, up_mean = unit * (plus - minus), (plus + minus) / 2
        else:
            up_diff, up_mean = (unpool_map(t, pool, size, winners) for t in (diff_t, mean_t))
    weight = after_t * product(up_diff, mean_s)
    if diff_s is not None:
        weight = weight + after_s * product(up_mean, diff_s)
    return weight, bias


def _difference_and_mean(free: Tensor, delta: Tensor, factor: float, centre: float) -> tuple[Tensor, Tensor]:
    """``factor d`` and ``m``, of which ``centre`` includes the gain."""
    if delta.shape[0] == free.shape[0]:
        return factor * delta, free + centre * delta
    plus, minus = delta.chunk(2)
    return factor * (plus - minus), free + centre * (plus + minus)
