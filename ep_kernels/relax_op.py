"""Runs relaxations and contrasts through the compiled ops: encodes a :class:`Relaxation` as flat lists."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import ops
from .network import LOSSES, POOLS, Network, Pool
from .plan import FORMS, Drive, Launch, Nudge, Plan
from .relaxation import Relaxation, Relaxed


def relax(r: Relaxation) -> Relaxed:
    """Execute a relaxation with ``torch.ops.ep_kernels.relax``."""
    net = r.network
    weight = r.weights[0]
    none = weight.new_empty(0)
    no_winners = weight.new_empty(0, dtype=torch.uint8)
    connections = range(len(net.connections))
    nodes = range(len(net.shapes))
    heads: list[Tensor] = []
    if r.targets:
        for h in range(len(net.heads)):
            heads += [_or(r.head_weights[h], none), _or(r.head_biases[h], none), r.targets[h]]
    shapes, geometry, head_spec, head_scalars = _constants(net)
    delta = r.form != "states"
    states, pre, drives, winners, residual = ops.relax(
        [_or(s, none) for s in r.states],
        list(r.weights),
        [_or(b, none) for b in r.biases],
        [r.drives.get(c, none) for c in connections],
        [r.winners.get(c, no_winners) for c in connections],
        list(r.free) if delta else [],
        list(r.preactivations) if delta else [],
        heads,
        [r.extra.get(i, none) for i in nodes],
        shapes,
        geometry,
        head_spec if heads else [],
        _program(r.plan, min(r.steps, len(r.plan.sweeps))),
        list(r.drive_gains),
        list(r.feedback_gains),
        list(r.nudge_gains),
        list(r.scales),
        head_scalars if heads else [],
        r.batch,
        r.phases,
        r.steps,
        FORMS.index(r.form),
        r.frozen,
        r.plan.deferred,
        r.operands == torch.bfloat16,
        r.keep,
        r.damping,
        net.slope,
        net.lo,
        net.hi,
        r.tol,
    )
    return Relaxed(
        [r.states[0], *states],
        [None, *pre] if r.keep else [],
        {c: t for c, t in enumerate(drives) if t.dim() > 1},
        {c: t for c, t in enumerate(winners) if t.dim() > 1},
        residual,
    )


def contrast(
    source: Tensor,
    source_delta: Tensor | None,
    target: Tensor,
    target_delta: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    pool: Pool = "none",
    winners: Tensor | None = None,
    *,
    source_gain: float = 1.0,
    target_gain: float = 1.0,
    centre: float = 0.5,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """:func:`ep_kernels.reference.contrast` with ``torch.ops.ep_kernels.contrast``."""
    return ops.contrast(
        source,
        source_delta,
        target,
        target_delta,
        list(weight_shape),
        list(stride),
        list(padding),
        POOLS.index(pool),
        winners,
        source_gain,
        target_gain,
        centre,
        scale,
    )


def _or(tensor: Tensor | None, none: Tensor) -> Tensor:
    return none if tensor is None else tensor


@lru_cache(maxsize=64)
def _constants(net: Network) -> tuple[list[int], list[int], list[int], list[float]]:
    """Node shapes, connection geometries and heads of a network as the op's flat lists."""
    shapes = [n for shape in net.shapes for n in (*shape, 0, 0)[:3]]
    geometry = [
        n for conn in net.connections for n in (conn.src, conn.dst, *conn.stride, *conn.padding, POOLS.index(conn.pool))
    ]
    heads = [n for head in net.heads for n in (head.node, LOSSES.index(head.loss), head.pool or 0, int(head.pointwise))]
    scalars = [v for head in net.heads for v in (head.weight, head.temperature)]
    return shapes, geometry, heads, scalars


@lru_cache(maxsize=256)
def _program(plan: Plan, sweeps: int) -> list[int]:
    """The plan as integers (csrc/cpu/program.h), with the sweeps that will run."""
    out = _launches(plan.prologue)
    out.append(sweeps)
    for launches in plan.sweeps[:sweeps]:
        out += _launches(launches)
    return out + _launches(plan.refresh)


def _launches(launches: Sequence[Launch]) -> list[int]:
    out = [len(launches)]
    for launch in launches:
        if isinstance(launch, Drive):
            out += [0, launch.connection]
        elif isinstance(launch, Nudge):
            out += [1, launch.node]
        else:
            out += [2, launch.node, int(launch.nudged)]
            for group in (launch.finished, launch.below, launch.above):
                out += [len(group), *group]
    return out
