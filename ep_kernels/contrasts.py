"""Gradients from the contrast of two phases: of connections, of feedback weights of their own, and of heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import backends, reference
from .equilibrium import Equilibrium
from .network import Head, Network
from .parameters import Parameters
from .precision import Operands
from .relaxation import Contrast

Ready = Callable[[str, Tensor], object]  # name of a gradient, as of Parameters.named, and the gradient


@dataclass(frozen=True)
class Nudged:
    """Result of the nudged phases: ``deltas[i] / scales[i] = s^i - s_free^i``, [B, ...] or [2B, ...] (+beta first).

    Attributes:
        deltas: per node, None for the clamped input; in float16 if that is the ``storage`` of the delta form, else in
            the parameters' dtype.
        scales: per node, powers of two.
        phases: 2 where both signs of beta are one batch, else 1.
        beta: signed: -beta for the ``negative`` estimator.
        centre: weight of the deltas in the contrast's mean: 1/2, or 0 for the tangent.
        trace: [steps, n], the residual of every sweep, in the states' units.
        winners: those of the nudged states by connection, when they are live; else {}.
    """

    deltas: list[Tensor | None]
    scales: list[float]
    phases: int
    beta: float
    centre: float
    trace: Tensor
    winners: dict[int, Tensor]


@torch.no_grad()
def contrast_gradients(
    network: Network,
    parameters: Parameters,
    equilibrium: Equilibrium,
    nudged: Nudged,
    targets: Sequence[Tensor],
    *,
    operands: Operands = None,
    backend: str | None = None,
    ready: Ready | None = None,
) -> Parameters:
    """Gradients of the batch-mean loss from the two phases (Laborieux et al. 2021, with the feedback gain).

    ``dL/dW_c = -k^(level(dst)-N) ( d<s^dst, drive_c>/dW at +beta - the same at -beta ) / (2 beta)``; heads get the mean
    of their ordinary gradients at the contrasted states.

    They are computed heads first, then connection by connection from the top: upper layers have most of the weights,
    lower ones most of the work, so what is sent elsewhere as soon as it is ``ready`` travels while more is computed.

    Args:
        network: whose phases these are.
        parameters: the tensors that both phases used.
        equilibrium: of :func:`ep_kernels.free_phase` with ``keep=True``.
        nudged: of :func:`ep_kernels.nudged_phase` from it.
        targets: per head, [B, ...], those of the nudged phase.
        operands: precision of the operands of the two matrix products, as in :class:`ep_kernels.RelaxConfig`.
        backend: name of the backend; None: the current one.
        ready: called with the name (as in :meth:`Parameters.named`) and the tensor of each gradient once it is computed
            and before the next one is (on a GPU, where all contrasts are one graph, after that was launched). What it
            writes into the tensor is what is returned.

    Returns:
        Gradients in the structure and shapes of ``parameters``; None where it has None, and for tied heads.

    Raises:
        BackendError: a backend asked for by name cannot run, with the reason.
    """
    x = equilibrium.states[0]
    batch = max(x.shape[0], 1)
    span = nudged.beta * (2 if nudged.phases == 2 else 1)
    order = sorted(range(len(network.connections)), key=lambda c: (network.levels[network.connections[c].dst], c))[::-1]
    jobs: list[Contrast] = []
    for c in order:
        conn = network.connections[c]
        level_gain = network.nudge_coefficient(conn.dst)
        delta = nudged.deltas[conn.dst]
        assert delta is not None
        job = Contrast(
            conn,
            parameters.weights[c],
            equilibrium.states[conn.src],
            nudged.deltas[conn.src],
            equilibrium.states[conn.dst],
            delta,
            _contrast_winners(equilibrium, nudged, c) if conn.pool == "max" else None,
            source_gain=1 / nudged.scales[conn.src],
            target_gain=1 / nudged.scales[conn.dst],
            centre=nudged.centre,
            scale=-1 / (level_gain * span * batch),
            operands=operands,
        )
        jobs += _split(job) if network.has_feedback_weight(c) else [job]
    head_weights, head_biases = _head_gradients(network, parameters, equilibrium, nudged, targets)
    if ready is not None:
        for name, gradient in Parameters([], [], head_weights, head_biases).named().items():
            ready(name, gradient)
    weights: dict[int, Tensor] = {}
    feedback_weights: dict[int, Tensor] = {}
    biases: list[Tensor | None] = [None] * len(network.shapes)
    found = backends.each_contrast(jobs, backend)
    for c in order:
        dst = network.connections[c].dst
        weights[c], bias = next(found)
        new = {f"connections.{c}.weight": weights[c]}
        if biases[dst] is None:  # each connection into a node finds the same
            biases[dst] = new[f"nodes.{dst}.bias"] = bias
        if network.has_feedback_weight(c):
            feedback_weights[c] = new[f"connections.{c}.feedback"] = next(found)[0]
        if ready is not None:
            for name, gradient in new.items():
                ready(name, gradient)
    numbers = range(len(network.connections))
    separate = [feedback_weights.get(c) for c in numbers] if network.feedback == "separate" else ()
    return Parameters([weights[c] for c in numbers], biases, head_weights, head_biases, separate)


def contrasted_states(equilibrium: Equilibrium, nudged: Nudged, node: int) -> Tensor:
    """States of a node in the two phases that are contrasted.

    Args:
        equilibrium: of the free phase.
        nudged: of the nudged phases from it.
        node: from 1 on.

    Returns:
        [2B, ...] in float32 or wider, +beta before -beta (one-sided, the nudged phase before the free one); of the
        tangent, where both are the free equilibrium, [B, ...] as it is stored.

    Raises:
        ValueError: ``node`` is not one of the dynamics (the clamped input, 0, has one state in all phases).
    """
    if not 1 <= node < len(nudged.deltas):
        raise ValueError(f"contrasted_states: argument 'node': expected 1 to {len(nudged.deltas) - 1}, got {node}")
    free = equilibrium.states[node]
    delta = nudged.deltas[node]
    assert delta is not None
    if nudged.centre == 0.0:
        return free
    moved = delta.to(torch.promote_types(delta.dtype, torch.float32)) / nudged.scales[node]
    free = free.to(moved.dtype)
    return tile(free, 2) + moved if nudged.phases == 2 else torch.cat([free + moved, free])


def _contrast_winners(equilibrium: Equilibrium, nudged: Nudged, c: int) -> Tensor | None:
    """Winners of connection c in the contrasted states: the free ones, or live ones of both (reference.contrast)."""
    free, live = equilibrium.winners.get(c), nudged.winners.get(c)
    if live is None or free is None:
        return free
    return live if nudged.phases == 2 else torch.cat([live, free])


def _head_gradients(
    network: Network, parameters: Parameters, equilibrium: Equilibrium, nudged: Nudged, targets: Sequence[Tensor]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    weights: list[Tensor | None] = []
    biases: list[Tensor | None] = []
    for h, head in enumerate(network.heads):
        weight = parameters.head_weights[h]
        if weight is None:
            weights.append(None)
            biases.append(None)
            continue
        state = contrasted_states(equilibrium, nudged, head.node).to(weight.dtype)
        tiles = 1 if nudged.centre == 0.0 else 2
        z = reference.head_output(head, state, weight, parameters.head_biases[h])
        error = reference.head_error(head, z, tile(targets[h], tiles)) / max(state.shape[0], 1)
        weights.append(map_gradient(head, error, reference.head_feature(head, state)).view_as(weight))
        biases.append(error.movedim(1, -1).flatten(0, -2).sum(0))
    add_tied(network, weights, biases)
    return weights, biases


def map_gradient(head: Head, error: Tensor, feature: Tensor) -> Tensor:
    """Gradient of a head's map, [outputs, features], from dL/dz and what the map reads: sums over batch and pixels."""
    if head.pointwise:
        return error.movedim(1, -1).flatten(0, -2).t() @ feature.movedim(1, -1).flatten(0, -2)
    return error.t() @ feature.flatten(1)


def add_tied(network: Network, *groups: list[Tensor | None]) -> None:
    """Move the gradients of tied heads, per head in each group, to the heads that they are tied to."""
    for h, head in enumerate(network.heads):
        for group in groups:
            if head.tied is not None:
                own, other = group[head.tied], group[h]
                assert own is not None
                assert other is not None
                group[head.tied], group[h] = own + other, None


def _split(job: Contrast) -> list[Contrast]:
    """The two products of a contrast, one job each: for the weight (what the nudge changes at the destination, times
    the source), and for the feedback weight (the destination, times what it changes at the source).

    The second has the destination's mean in place of a difference. Its factors are those of the source: gain and scale
    multiply here, in double, and what is rounded to ``operands`` is the difference in the deltas' units, as ever.
    """
    assert job.source_delta is not None
    moved, source = _ends(job.source, job.source_delta, job.weight.dtype, job.centre * job.source_gain)
    _, target = _ends(job.target, job.target_delta, job.weight.dtype, job.centre * job.target_gain)
    up = replace(job, source=source, source_delta=None)
    gain = job.scale * job.source_gain
    return [up, replace(up, source=moved, target_delta=target, target_gain=1.0, scale=gain)]


def _ends(free: Tensor, delta: Tensor, dtype: torch.dtype, centre: float) -> tuple[Tensor, Tensor]:
    """Difference of the phases, in the delta's units, and their mean; ``centre`` includes the gain."""
    free, delta = free.to(dtype), delta.to(dtype)
    if delta.shape[0] == free.shape[0]:
        return delta, free + centre * delta
    plus, minus = delta[: free.shape[0]], delta[free.shape[0] :]
    return plus - minus, free + centre * (plus + minus)


def kolen_pollack(gradients: Parameters) -> Parameters:
    """One update for weights and feedback weights: both get the mean ``(g_W + g_B) / 2`` of their gradients.

    ``W - B`` then changes by weight decay alone, which shrinks it by one factor per step (Kolen & Pollack 1994,
    "Backpropagation without weight transport"; in vector-field EP Laborieux et al. 2021). That holds for SGD and AdamW,
    whose decay is of the weights themselves; Adam divides its decay, a part of the gradient, by the gradient's size.

    Args:
        gradients: of a network with ``feedback="separate"``; connections without feedback weights keep their own.

    Returns:
        The same gradients with those means; both weights of a connection share one tensor.

    Raises:
        ValueError: there are no feedback weights.
    """
    if not any(g is not None for g in gradients.feedback_weights):
        raise ValueError(
            "kolen_pollack: argument 'gradients': expected those of a network with feedback='separate', "
            "got none of feedback weights"
        )
    weights, feedback_weights = list(gradients.weights), list(gradients.feedback_weights)
    for c, own in enumerate(feedback_weights):
        if own is not None:
            weights[c] = feedback_weights[c] = (weights[c] + own) / 2
    return replace(gradients, weights=weights, feedback_weights=feedback_weights)


def tile(x: Tensor, times: int) -> Tensor:
    """``times`` copies along the batch."""
    return x if times == 1 else torch.cat([x] * times)
