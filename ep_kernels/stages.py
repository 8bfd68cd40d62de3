"""The free phase in stages: a feed-forward start, sweeps in low precision, sweeps in full precision.

Each stage is a relaxation of its own that starts where the one before it ended, so every backend has them as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import backends
from .config import RelaxConfig
from .network import Network
from .parameters import Parameters
from .plan import Plan, Schedule, compile_plan
from .precision import Operands
from .relaxation import Relaxation, Relaxed


@dataclass(frozen=True)
class Stage:
    """Sweeps of one kind. ``counts``: they are of the ``free_steps``, and leave residuals."""

    schedule: Schedule
    steps: int
    damping: float
    tol: float
    operands: Operands
    counts: bool = True


def stages_of(network: Network, config: RelaxConfig, *, warm: bool) -> tuple[Stage, ...]:
    """What a free phase runs, in order. ``warm``: it is given states."""
    damping = config.free_damping(network.feedback_gain)
    early = min(config.early_steps, config.free_steps - 1)
    late = Stage(config.schedule, config.free_steps - early, damping, config.tol, config.operands)
    found = [late]
    if early:
        found.insert(0, replace(late, steps=early, operands=config.early_operands))
    if config.start == "feedforward" and config.schedule != "sweep" and not warm:
        # without a sweep before it, a bottom-up sweep has no feedback
        found.insert(0, Stage("sweep", 1, 1.0, 0.0, found[0].operands, counts=False))
    return tuple(found)


def plans_of(network: Network, config: RelaxConfig, *, warm: bool) -> tuple[tuple[Stage, Plan], ...]:
    """The stages with what each launches: for counting convolutions."""
    found: list[tuple[Stage, Plan]] = []
    before: Stage | None = None
    for stage in stages_of(network, config, warm=warm):
        # kept drives are pooled ones, and those of the clamped input
        candidates = [c for c, conn in enumerate(network.connections) if conn.src == 0 or conn.pool != "none"]
        kept = frozenset(c for c in candidates if before is not None and _carries(network, before, stage, c))
        given = warm or before is not None
        found.append((stage, compile_plan(network, stage.schedule, "free", warm=given, kept=kept, steps=stage.steps)))
        before = stage
    return tuple(found)


def run_stages(
    network: Network,
    parameters: Parameters,
    x: Tensor,
    config: RelaxConfig,
    states: Sequence[Tensor | None] | None,
    *,
    keep: bool,
    backend: str | None,
) -> Relaxed:
    """Run a free phase from ``states`` (None: from where ``config`` says).

    Returns:
        What the last stage left, and of the stages before it what is still valid: ``drives`` are those of the final
        states, ``residual`` has a row for each of the ``free_steps``.
    """
    nodes, count = len(network.shapes), len(network.connections)
    now = [x, *(stored(states[1:], x, config) if states is not None else [None] * (nodes - 1))]
    planned = plans_of(network, config, warm=states is not None)
    drives: dict[int, Tensor] = {}
    winners: dict[int, Tensor] = {}
    rows: list[Tensor] = []
    for number, (stage, plan) in enumerate(planned):
        relaxed = backends.relax(
            Relaxation(
                network,
                plan,
                stage.steps,
                parameters.weights,
                parameters.biases,
                now,
                x.shape[0],
                drive_gains=[1.0] * count,
                feedback_gains=[network.feedback_coefficient(c) for c in range(count)],
                nudge_gains=[0.0] * nodes,
                scales=[1.0] * nodes,
                drives=drives,
                winners=winners,
                damping=stage.damping,
                tol=stage.tol,
                operands=stage.operands,
                storage=config.storage,
                keep=keep and number == len(planned) - 1,
                feedback_weights=parameters.feedback_weights,
            ),
            backend,
        )
        drives, winners = {**drives, **relaxed.drives}, {**winners, **relaxed.winners}
        if stage.counts:
            rows.append(relaxed.residual)
        if number < len(planned) - 1:
            now = relaxed.states
            following = planned[number + 1][0]
            drives = {c: t for c, t in drives.items() if _carries(network, stage, following, c)}
            winners = {c: t for c, t in winners.items() if c in drives}
    valid = {c: t for c, t in drives.items() if config.keeps_drive(network.connections[c], refreshed=keep)}
    residual = rows[0] if len(rows) == 1 else torch.cat(rows)
    return replace(relaxed, drives=valid, winners=winners, residual=residual)


def stored(states: Sequence[Tensor | None], x: Tensor, config: RelaxConfig) -> list[Tensor]:
    """States (of a run that may have stored them otherwise) in the dtype that ``config`` stores them in."""
    return [s.to(config.storage or x.dtype) for s in states if s is not None]


def _carries(network: Network, stage: Stage, following: Stage, c: int) -> bool:
    """A drive that a stage leaves is that of its final states and can be used by the next one.

    The clamped input's would stay to the end, so it has to be of the next stage's precision. Another one is used for
    its winners until its source moves, which all of its sweeps do.
    """
    if network.connections[c].src == 0:
        return stage.operands == following.operands
    return stage.schedule == "sweep"
