"""Runs relaxations and contrasts through the compiled ops: a :class:`Relaxation` as flat lists, and back.

``flat`` and ``relaxed_of`` are on the side of the caller of ``torch.ops.ep_kernels.relax``; ``relaxation_of`` and
``flatten``, their inverses, make any executor of relaxations the body of the op.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import ops
from .network import LOSSES, POOLS, Connection, Feedback, Head, Network, Pool, Shape
from .plan import FORMS, Drive, Launch, Nudge, Plan, Step
from .precision import OPERANDS, STORAGES, Operands
from .relaxation import Relaxation, Relaxed

Outputs = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]
T = TypeVar("T")


def relax(r: Relaxation, *, triton: bool = False) -> Relaxed:
    """Execute a relaxation with ``torch.ops.ep_kernels.relax``, or with ``triton_relax``."""
    run = ops.triton_relax if triton else ops.relax
    return relaxed_of(r, run(*flat(r)))


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
    operands: Operands = None,
    triton: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`ep_kernels.reference.contrast` with ``torch.ops.ep_kernels.contrast``, or with ``triton_contrast``."""
    run = ops.triton_contrast if triton else ops.contrast
    return run(
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
        OPERANDS.index(operands),
    )


# --- the caller's side ------------------------------------------------------------------------------------------------


def flat(r: Relaxation) -> tuple[Any, ...]:
    """The op's arguments, in the order of its schema (csrc/schemas.h)."""
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
    return (
        [_or(s, none) for s in r.states],
        list(r.weights),
        [_or(w, none) for w in r.feedback_weights],
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
        list(net.linear_nodes),
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
        OPERANDS.index(r.operands),
        STORAGES.index(r.storage),
        r.keep,
        r.damping,
        net.slope,
        net.lo,
        net.hi,
        r.tol,
    )


def relaxed_of(r: Relaxation, outputs: Outputs) -> Relaxed:
    """The op's outputs, by name."""
    states, pre, drives, winners, residual = outputs
    return Relaxed(
        [r.states[0], *states],
        [None, *pre] if r.keep else [],
        _present_by_index(drives),
        _present_by_index(winners),
        residual,
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
    """The plan as integers (csrc/common/program.h), with the sweeps that will run."""
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


# --- the op's side ----------------------------------------------------------------------------------------------------


def relaxation_of(
    states: list[Tensor],
    weights: list[Tensor],
    feedback_weights: list[Tensor],
    biases: list[Tensor],
    drives: list[Tensor],
    winners: list[Tensor],
    free: list[Tensor],
    preactivations: list[Tensor],
    heads: list[Tensor],
    extra: list[Tensor],
    shapes: list[int],
    connections: list[int],
    head_spec: list[int],
    program: list[int],
    linear_nodes: list[int],
    drive_gains: list[float],
    feedback_gains: list[float],
    nudge_gains: list[float],
    scales: list[float],
    head_scalars: list[float],
    batch: int,
    phases: int,
    steps: int,
    form: int,
    frozen: bool,
    deferred: bool,
    operands: int,
    storage: int,
    keep: bool,
    damping: float,
    slope: float,
    lo: float,
    hi: float,
    tol: float,
) -> Relaxation:
    """The relaxation that the op's arguments describe, the inverse of :func:`flat`.

    Equal lists give the same ``network`` and ``plan`` objects. They are those that were encoded but for what no
    executor reads: the network's feedback gain (its powers are in the relaxation's gains), what its heads are tied to,
    the plan's order.

    Raises:
        ValueError, IndexError: lists that describe no relaxation.
    """
    maps, map_biases, targets = heads[0::3], heads[1::3], heads[2::3]
    network = _network(
        tuple(shapes),
        tuple(connections),
        tuple(tuple(w.shape[2:]) for w in weights),
        tuple(head_spec),
        tuple(head_scalars),
        tuple(v.shape[0] if _present(v) else None for v in maps),
        slope,
        lo,
        hi,
        tuple(linear_nodes),
        "separate" if feedback_weights else "tied",
    )
    return Relaxation(
        network,
        _plan(tuple(program), deferred),
        steps,
        weights,
        _or_none(biases),
        _or_none(states),
        batch,
        drive_gains,
        feedback_gains,
        nudge_gains,
        scales,
        free,
        preactivations,
        _present_by_index(drives),
        _present_by_index(winners),
        _or_none(maps),
        _or_none(map_biases),
        targets,
        _present_by_index(extra),
        damping,
        tol,
        _named("form", FORMS, form),
        frozen,
        phases,
        _named("operands", OPERANDS, operands),
        _named("storage", STORAGES, storage),
        keep,
        _or_none(feedback_weights),
    )


def flatten(relaxed: Relaxed, r: Relaxation) -> Outputs:
    """What the op returns for a relaxation, the inverse of :func:`relaxed_of`: no two tensors share memory, nor does
    one with an argument."""
    weight = r.weights[0]
    given = {id(s) for s in r.states}  # a state that nothing moved may be the one that was given
    pre = relaxed.preactivations or [None] * len(r.network.shapes)
    connections = range(len(r.network.connections))
    return (
        [_dense(s.clone() if id(s) in given else s) for s in relaxed.states[1:] if s is not None],
        [_or(t if t is None else _dense(t), weight.new_empty(0)) for t in pre[1:]],
        [_dense(relaxed.drives[c]) if c in relaxed.drives else weight.new_empty(0) for c in connections],
        [
            _dense(relaxed.winners[c]) if c in relaxed.winners else weight.new_empty(0, dtype=torch.uint8)
            for c in connections
        ],
        relaxed.residual,
    )


def _dense(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.contiguous_format)


def _present(t: Tensor) -> bool:
    """An empty 1-d tensor stands for an absent one."""
    return t.dim() != 1 or t.numel() > 0


def _or_none(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [t if _present(t) else None for t in tensors]


def _present_by_index(tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    return {i: t for i, t in enumerate(tensors) if _present(t)}


def _named(argument: str, values: Sequence[T], code: int) -> T:
    if not 0 <= code < len(values):
        names = ", ".join(f"{i} ({value})" for i, value in enumerate(values))
        raise ValueError(f"relax: argument '{argument}': expected one of {names}, got {code}")
    return values[code]


@lru_cache(maxsize=64)
def _network(
    shapes: tuple[int, ...],
    geometry: tuple[int, ...],
    kernels: tuple[tuple[int, ...], ...],
    head_spec: tuple[int, ...],
    head_scalars: tuple[float, ...],
    outputs: tuple[int | None, ...],
    slope: float,
    lo: float,
    hi: float,
    linear_nodes: tuple[int, ...],
    feedback: Feedback,
) -> Network:
    """The inverse of :func:`_constants`; ``kernels`` are the weights' (none: linear), ``outputs`` the heads'."""
    nodes: list[Shape] = [shape if shape[1] else shape[:1] for shape in zip(*[iter(shapes)] * 3, strict=True)]
    connections = [
        Connection(
            src, dst, (kernel[0], kernel[1]) if kernel else None, (sh, sw), (ph, pw), _named("pool", POOLS, pool)
        )
        for (src, dst, sh, sw, ph, pw, pool), kernel in zip(
            zip(*[iter(geometry)] * 7, strict=True), kernels, strict=True
        )
    ]
    heads = [
        Head(node, rows, _named("loss", LOSSES, loss), pool or None, bool(pointwise), weight, temperature)
        for (node, loss, pool, pointwise), (weight, temperature), rows in zip(
            zip(*[iter(head_spec)] * 4, strict=True), zip(*[iter(head_scalars)] * 2, strict=True), outputs, strict=True
        )
    ]
    if not heads:  # a free phase: a network has a readout all the same, which no launch evaluates
        heads = [Head(1, None, "mse")]
    # the gain is not among the op's arguments: 1 is valid for any number of levels
    return Network(
        tuple(nodes), tuple(connections), heads[0], tuple(heads[1:]), 1.0, slope, lo, hi, linear_nodes, feedback
    )


@lru_cache(maxsize=256)
def _plan(program: tuple[int, ...], deferred: bool) -> Plan:
    """The inverse of :func:`_program`."""
    integers = iter(program)

    def group() -> tuple[int, ...]:
        return tuple(next(integers) for _ in range(next(integers)))

    def launch() -> Launch:
        op, index = next(integers), next(integers)
        if op == 0:
            return Drive(index)
        if op == 1:
            return Nudge(index)
        nudged = bool(next(integers))
        return Step(index, group(), group(), group(), nudged)

    def section() -> tuple[Launch, ...]:
        return tuple(launch() for _ in range(next(integers)))

    prologue = section()
    sweeps = tuple(section() for _ in range(next(integers)))
    refresh = tuple(launch for launch in section() if isinstance(launch, Drive))
    return Plan(prologue, sweeps, refresh, deferred, order=())
