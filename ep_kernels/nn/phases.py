"""The free phase as a function that can be differentiated, and its derivative: the nudged phases.

With dL/ds = G (of the whole batch's loss, so that a mean's 1/B is in it) the nudge of a sample is
``-beta k^(N - l) alpha G``, held constant, where the power of two alpha brings the largest entry of G to between 1/16
and 1/8, about that of a new readout's cross-entropy, for which betas are chosen. The gradients are divided by alpha: a
loss scaled by a power of two, as GradScaler's, scales them exactly.

    dL/dW_c = B / alpha times the contrast's batch mean
    dL/dx   = - 1 / alpha sum_{c out of 0} k^(level(dst) - N) W_c^T * P_c^-1(s^dst(+beta) - s^dst(-beta)) / (2 beta)

The second follows as the first does (Scellier & Bengio 2017): x is a parameter of the energy too.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..config import RelaxConfig
from ..contrasts import Nudged, contrast_gradients
from ..equilibrium import Equilibrium
from ..network import Connection, Head, Network
from ..parameters import Parameters
from ..precision import rounded
from ..solver import free_phase, nudged_phase

PEAK = 0.125  # bound of a normalised nudge
LARGEST = 120  # exponents of the nudge's scale: a float32 holds 2^-120 and 2^120 with PEAK to spare
KNOWN = 256  # networks and settings that are kept as objects; others are read from their keys again


@dataclass(frozen=True)
class Dynamics:
    """A network without its heads' losses, and how its phases are solved.

    Attributes:
        network: its one head, on the readout's node, has weight 0: dL/ds comes from outside.
        free: of the free phase.
        nudged: of the nudged phases, with the factor that each one's gradients enter with.
        winners: connections whose max pooling's winners the nudged phases need.
    """

    network: Network
    free: RelaxConfig
    nudged: tuple[tuple[float, RelaxConfig], ...]
    winners: tuple[int, ...]


def key_of(network: Network, config: RelaxConfig) -> str:
    """The key by which the ops know a network, without its heads' losses, and its settings: both of them as text.

    It says all by itself. So nothing is kept for graphs whose backward is still to come, nor for compiled or exported
    code, which holds keys as constants; and any process can read it.
    """
    body = replace(network, readout=Head(network.readout.node, None, "mse", weight=0.0), local_heads=())
    text = json.dumps([asdict(body), config.to_dict()], default=float, separators=(",", ":"))
    return base64.urlsafe_b64encode(zlib.compress(text.encode())).decode()  # no quotes: generated code quotes it


@lru_cache(maxsize=KNOWN)
def known(key: str) -> Dynamics:
    """What a key of :func:`key_of` says.

    Raises:
        RuntimeError: it is none.
    """
    try:
        body, settings = json.loads(zlib.decompress(base64.urlsafe_b64decode(key)))
        config = RelaxConfig.from_dict(settings)
        body["readout"] = Head(**body["readout"])
        body["connections"] = [Connection(**_hashable(values)) for values in body["connections"]]
        network = Network(**body)
    except (ValueError, TypeError, LookupError, AttributeError, zlib.error) as error:
        raise RuntimeError(
            f"ep_kernels::equilibrium: argument 'key': expected one that ep_kernels.nn.phases.key_of has made, got "
            f"{key[:80]!r}"
        ) from error
    nudge = replace(config, linear_nudge=True)
    phases: tuple[tuple[float, RelaxConfig], ...] = ((1.0, nudge),)
    if config.estimator == "five_phase":
        phases = ((4 / 3, nudge), (-1 / 3, replace(nudge, beta=2 * config.beta)))
    pooled = tuple(c for c, conn in enumerate(network.connections) if conn.pool == "max")
    return Dynamics(network, config, phases, pooled)


def _hashable(values: dict[str, Any]) -> dict[str, Any]:
    """With tuples for JSON's lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def free_states(
    x: Tensor,
    weights: list[Tensor],
    feedback: list[Tensor],
    biases: list[Tensor],
    key: str,
    backend: str,
    nodes: list[int],
    keep: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The free phase.

    Args:
        x: [B, ...], the clamped input, in the dtype of the weights.
        feedback: feedback weights of the connections that have their own.
        biases: of node 1 and up.
        key: of :func:`key_of`.
        nodes: whose states are returned, rising.
        keep: keep what :func:`state_gradients` needs.

    Returns:
        The states of ``nodes`` in x's dtype; what is kept: the states of the other nodes, the preactivations of all,
        the winners; and the residual of every sweep, [T, B], with -1 in those that an early stop left out.
    """
    dynamics = known(key)
    tensors = _parameters(dynamics.network, weights, feedback, biases)
    with torch.autocast(x.device.type, enabled=False):  # RelaxConfig.operands chooses the precision
        found = free_phase(dynamics.network, tensors, x, dynamics.free, keep=keep, backend=backend)
    outputs = [dense(found.states[i].to(x.dtype)) for i in nodes]
    saved: list[Tensor] = []
    if keep:
        saved += [dense(found.states[i]) for i in range(1, len(found.states)) if i not in nodes]
        saved += [dense(t) for t in found.preactivations[1:] if t is not None]
        saved += [dense(found.winners[c]) for c in dynamics.winners]
    return outputs, saved, found.residuals


def state_gradients(
    x: Tensor,
    weights: list[Tensor],
    feedback: list[Tensor],
    biases: list[Tensor],
    outputs: list[Tensor],
    saved: list[Tensor],
    gradients: list[Tensor],
    key: str,
    backend: str,
    nodes: list[int],
    nudged_nodes: list[int],
    for_input: bool,
    for_parameters: bool,
) -> list[Tensor]:
    """Gradients from nudged phases: of x (if asked for), then (if asked for) of the weights, the feedback weights and
    the biases.

    Args:
        outputs, saved: what :func:`free_states` returned.
        gradients: dL/ds of ``nudged_nodes``, in their shapes.
    """
    dynamics = known(key)
    net = dynamics.network
    tensors = _parameters(net, weights, feedback, biases)
    free = _restored(dynamics, x, nodes, outputs, saved)
    nudge, unit = _normalised(gradients)
    extra = dict(zip(nudged_nodes, nudge, strict=True))
    target = [free.states[net.readout.node].to(x.dtype)]
    of_input: Tensor | None = None
    of_parameters: list[Tensor] = []
    with torch.autocast(x.device.type, enabled=False):
        for factor, config in dynamics.nudged:
            nudged = nudged_phase(net, tensors, free, target, config, extra=extra, backend=backend)
            if for_input:
                part = factor * _input_gradient(net, tensors, free, nudged, config)
                of_input = part if of_input is None else of_input + part
            if for_parameters:
                found = contrast_gradients(
                    net, tensors, free, nudged, target, operands=config.operands, backend=backend
                )
                parts = _flat(found)
                if factor != 1:
                    torch._foreach_mul_(parts, factor)
                of_parameters = [a + b for a, b in zip(of_parameters, parts, strict=True)] if of_parameters else parts
    if of_parameters:
        torch._foreach_mul_(of_parameters, unit * max(x.shape[0], 1))
    out = [] if of_input is None else [of_input * unit]
    return [dense(t) for t in out + of_parameters]


def _parameters(
    net: Network, weights: Sequence[Tensor], feedback: Sequence[Tensor], biases: Sequence[Tensor]
) -> Parameters:
    own = iter(feedback)
    separate = [next(own) if net.has_feedback_weight(c) else None for c in range(len(net.connections))]
    return Parameters(weights, [None, *biases], [None], [None], separate if net.feedback == "separate" else ())


def _flat(found: Parameters) -> list[Tensor]:
    return [t for group in (found.weights, found.feedback_weights, found.biases) for t in group if t is not None]


def _restored(
    dynamics: Dynamics, x: Tensor, nodes: Sequence[int], outputs: Sequence[Tensor], saved: Sequence[Tensor]
) -> Equilibrium:
    """The free equilibrium that forward found."""
    inner = range(1, len(dynamics.network.shapes))
    kept, shown = iter(saved), dict(zip(nodes, outputs, strict=True))
    stored = dynamics.free.storage or x.dtype  # what was cast for the output casts back to the very numbers
    states = [x, *(shown[i].to(stored) if i in shown else next(kept) for i in inner)]
    preactivations: list[Tensor | None] = [None, *(next(kept) for _ in inner)]
    winners = {c: next(kept) for c in dynamics.winners}
    none = x.new_empty(0, x.shape[0])
    return Equilibrium(states, preactivations, {}, winners, none, dynamics.network, dynamics.free)


def _normalised(gradients: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The gradients over a power of two, on the device, that brings their largest entry to between ``PEAK / 2`` and
    ``PEAK``; and that power. Where one is not finite: zeros, and NaN, which a GradScaler sees in what it multiplies."""
    first = gradients[0]
    if first.numel() == 0:
        return list(gradients), first.new_ones(())
    peak = torch.stack([g.abs().amax() for g in gradients]).amax()
    peak = peak.to(torch.promote_types(peak.dtype, torch.float32))
    finite = peak.isfinite()
    size = torch.where(finite & (peak > 0), peak.clamp(2.0**-LARGEST, 2.0**LARGEST), 1.0)
    mantissa, _ = torch.frexp(size)
    alpha, unit = PEAK * mantissa / size, size / (PEAK * mantissa)  # powers of two: both quotients are exact
    scaled = [torch.where(finite, g * alpha, 0.0).to(g.dtype) for g in gradients]
    return scaled, torch.where(finite, unit, torch.nan).to(first.dtype)


def _input_gradient(
    net: Network, tensors: Parameters, free: Equilibrium, nudged: Nudged, config: RelaxConfig
) -> Tensor:
    """dL/dx per sample: what the connections out of the clamped input would feed back to it."""
    x = free.states[0]
    batch, total = x.shape[0], torch.zeros_like(x)
    for c in net.out_of[0]:
        conn, weight = net.connections[c], rounded(tensors.weights[c], config.operands)
        delta, live, won = nudged.deltas[conn.dst], nudged.winners.get(c), free.winners.get(c)
        assert delta is not None
        delta = delta.to(x.dtype)

        def back(above: Tensor, winners: Tensor | None, conn: Connection = conn, weight: Tensor = weight) -> Tensor:
            above = rounded(above, config.operands)
            return reference.feedback(above, weight, x.shape[1:], conn.stride, conn.padding, conn.pool, winners)

        scale = nudged.scales[conn.dst]
        if conn.pool == "max" and live is not None:  # each phase through its own winners: of the states themselves
            state = free.states[conn.dst].to(x.dtype)
            plus = back(state + delta[:batch] / scale, live[:batch])
            minus = back(state + delta[batch:] / scale, live[batch:]) if nudged.phases == 2 else back(state, won)
            moved, scale = plus - minus, 1.0
        else:
            moved = back(delta[:batch] - delta[batch:] if nudged.phases == 2 else delta, won)
        total = total - moved / (nudged.phases * nudged.beta * scale * net.nudge_coefficient(conn.dst))
    return total


def dense(t: Tensor) -> Tensor:
    """The tensor in the memory layout that the ops promise: channels_last maps."""
    return t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.contiguous_format)
