"""The tiling problems that a training batch of a network asks for, from its plans alone: nothing is allocated or run.

A test compares them with what :func:`~ep_kernels.triton.tiling.choose_tile` is asked while a batch runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..config import RelaxConfig
from ..network import Connection, Network, Shape
from ..plan import Form, compile_plan
from .layout import map_shape, padded
from .lower import DriveLaunch, Launch, Lowered, OutsideLaunch, Segment, StepLaunch, fuses, lower
from .tiling import Problem


def training_problems(network: Network, config: RelaxConfig, batch: int) -> list[Problem]:
    """Problems of the free phase, the nudged phase and the contrast of ``batch`` samples, each once, in that order."""
    size = config.operands.itemsize if isinstance(config.operands, torch.dtype) else 4
    products = "tf32" if config.operands == "tf32" else "ieee"
    found: dict[Problem, None] = {}
    for lowered, n in ((_free(network, config), batch), (_nudged(network, config), config.phases * batch)):
        for launches in (lowered.prologue, *lowered.sweeps, lowered.refresh):
            for launch in launches:
                found |= dict.fromkeys(_of_launch(network, launch, n, size))
    for conn in network.connections:
        found |= dict.fromkeys(_of_contrast(network, conn, batch, size))
    return [replace(p, products=products) if p.depth else p for p in found]


def _free(network: Network, config: RelaxConfig) -> Lowered:
    plan = compile_plan(network, config.schedule, "free", steps=config.free_steps)
    return lower(network, plan, config.free_steps, "states", frozen=False, keep=True)


def _nudged(network: Network, config: RelaxConfig) -> Lowered:
    form: Form = config.nudge_form
    warm, frozen = form == "states", config.winners == "frozen"
    clamped = config.clamped_nodes(network)
    plan = compile_plan(
        network,
        config.schedule,
        "nudged",
        form=form,
        winners=config.winners,
        linear_nudge=config.linear_nudge,
        warm=warm,
        kept=_kept(network, config) if warm else frozenset(),
        clamped=clamped,
        steps=config.nudged_steps,
    )
    given = frozenset(range(1, len(network.shapes))) if warm else clamped
    return lower(network, plan, config.nudged_steps, form, given=given, frozen=frozen, keep=not frozen)


def _kept(network: Network, config: RelaxConfig) -> frozenset[int]:
    """Connections whose drives the free phase leaves valid."""
    driven = _free(network, config).driven
    return frozenset(c for c in driven if config.keeps_drive(network.connections[c]))


def _of_launch(network: Network, launch: Launch, n: int, size: int) -> Iterator[Problem]:
    if isinstance(launch, StepLaunch):
        h, w, c = _map(network.shapes[launch.node])
        depth = sum(_depth(network, segment) for segment in launch.segments)
        yield Problem("step", n, h, w, c, depth, size if launch.segments else 4)
    elif isinstance(launch, DriveLaunch):
        conn = network.connections[launch.connection]
        h, w, c = _map(network.shapes[conn.dst])
        pooled = conn.pool != "none"
        depth = _drive_depth(network, conn)
        yield Problem("drive", n, 2 * h if pooled else h, 2 * w if pooled else w, c, depth, size, pooled)
    elif isinstance(launch, OutsideLaunch):
        segment = launch.segment
        conn = network.connections[segment.connection]
        if conn.kernel_size is None:  # one flat product; others go through ATen
            h, w, c = _map(network.shapes[conn.src if segment.feedback else conn.dst])
            yield Problem("drive", n, 1, 1, h * w * c, _depth(network, segment), size)


def _of_contrast(network: Network, conn: Connection, n: int, size: int) -> Iterator[Problem]:
    if fuses(conn, len(network.shapes[conn.src]) == 3, feedback=False):
        h, w = conn.map_size(*network.shapes[conn.src][1:]) if conn.kernel_size else (1, 1)
        yield Problem("contrast", n, h, w, padded(network.shapes[conn.dst][0]), _drive_depth(network, conn), size)


def _depth(network: Network, segment: Segment) -> int:
    """Length of one K loop: columns of its packed weight."""
    conn = network.connections[segment.connection]
    if not segment.feedback:
        return _drive_depth(network, conn)
    kh, kw = conn.kernel_size or (1, 1)
    return kh * kw * padded(network.shapes[conn.dst][0])


def _drive_depth(network: Network, conn: Connection) -> int:
    h, w, c = _map(network.shapes[conn.src])
    kh, kw = conn.kernel_size or (h, w)
    return kh * kw * c


def _map(shape: Shape) -> tuple[int, int, int]:
    """(H, W, padded C) of a node's buffer."""
    h, w, c = map_shape(shape)
    return h, w, padded(c)
