"""Running programs: those that are kept, and how a relaxation is cut into CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from functools import lru_cache, partial

import torch

from ..graphs import Graphs, Kept, Turn, capturing, context
from ..plan import Plan, Step
from ..relaxation import Relaxation, Relaxed, relax_reference
from . import arch
from .lower import Launches, Lowered
from .program import Program

log = logging.getLogger("ep_kernels")

MAX_PROGRAMS = 16  # signatures kept: phases x batch sizes x settings in use at a time
BLOCK = 16  # steady sweeps in one graph; an even number, so that `sync` ends in the slot where it began


class Runner:
    """A program with its graphs. The first run launches its kernels one by one (and compiles them), others replay;
    without ``graphs`` all launch, into the user's own capture.

    A run of T sweeps is cut into graphs of [start ... sweep h), 0 or more of BLOCK steady sweeps, and the last sweep
    with what follows it: other T reuse the blocks.
    """

    def __init__(self, r: Relaxation, capacity: int, *, graphs: bool = True):
        self.program = Program(r, arch.arch_of(r.weights[0].device), capacity)
        self.captures = graphs
        self.cut: dict[int, list[int]] = {}  # by number of sweeps: its chunks
        self.chunks: list[tuple[Launches, ...]] = []
        self.graphs = Graphs()
        self.turn = Turn(r.weights[0].device, wait=graphs)

    def run(self, r: Relaxation) -> Relaxed:
        """One relaxation."""
        with self.turn.taken(r.weights[0]), self.program.loaded(r):
            for number, chunk in enumerate(self._cut(r.steps)):
                launch = partial(self._launch, chunk, begin=number == 0)
                if self.captures:
                    self.graphs.run(chunk, launch, r.weights[0].device)
                else:
                    launch()
            return self.program.results(r.steps)

    def _cut(self, steps: int) -> list[int]:
        """The chunks of a run, as indices: equal ones have the same."""
        if steps not in self.cut:
            pieces = chunks(self.program.lower(steps))
            self.chunks += [piece for piece in dict.fromkeys(pieces) if piece not in self.chunks]
            self.cut[steps] = [self.chunks.index(piece) for piece in pieces]
        return self.cut[steps]

    def _launch(self, chunk: int, *, begin: bool) -> None:
        actions = [action for launches in self.chunks[chunk] for action in self.program.actions(launches)]
        if begin:
            self.program.start()
        for action in actions:
            action()


def chunks(lowered: Lowered) -> list[tuple[Launches, ...]]:
    """Cut a run into pieces that are captured as one graph each (see :class:`Runner`)."""
    sweeps = lowered.sweeps
    if len(sweeps) <= BLOCK:
        return [(lowered.prologue, *sweeps, lowered.refresh)]
    blocks = (len(sweeps) - 3) // BLOCK  # the first two sweeps and the last differ from those between
    head = len(sweeps) - 1 - blocks * BLOCK
    middle = [sweeps[head + i * BLOCK : head + (i + 1) * BLOCK] for i in range(blocks)]
    return [(lowered.prologue, *sweeps[:head]), *middle, (sweeps[-1], lowered.refresh)]


_runners: Kept[Runner] = Kept(MAX_PROGRAMS)


def relax(r: Relaxation) -> Relaxed:
    """Run a relaxation with the Triton kernels: what :func:`ep_kernels.relaxation.relax_reference` computes."""
    if r.batch == 0 or not runs_every_sweep(r.plan, r.steps):
        return relax_reference(r)  # nothing to launch
    weight = r.weights[0]
    if weight.dtype != torch.float32:
        log_dtype(str(weight.dtype))
        return relax_reference(r)
    with context(weight):
        return _relax(r)


def _relax(r: Relaxation) -> Relaxed:
    if capturing(r.weights[0]):
        # the user's own graph: buffers come from its pool and live as long as it does
        return Runner(r, r.steps, graphs=False).run(r)
    capacity = max(64, 1 << (r.steps - 1).bit_length())
    key = signature(r, capacity)
    return _runners.get(key, lambda: Runner(r, capacity)).run(r)


@lru_cache(maxsize=8)
def log_dtype(dtype: str) -> None:
    """Once for each dtype."""
    log.info("backend triton: parameters of %s go through the reference", dtype)


def runs_every_sweep(plan: Plan, steps: int) -> bool:
    """Whether every sweep updates a node; without heads and extra nudges a delta phase has none to update."""
    return all(any(isinstance(launch, Step) for launch in plan.sweep(t)) for t in range(min(steps, len(plan.sweeps))))


def clear() -> None:
    """Forget every program, with its buffers and graphs."""
    _runners.clear()


def signature(r: Relaxation, capacity: int) -> Hashable:
    """Everything that buffers, launches and their constants depend on."""
    weight = r.weights[0]
    return (
        r.network,
        r.plan,
        capacity,
        str(weight.device),
        r.batch,
        r.phases,
        r.form,
        r.frozen,
        r.keep,
        str(r.operands),
        str(r.storage),
        (r.damping, r.tol),
        tuple(r.drive_gains),
        tuple(r.feedback_gains),
        tuple(r.nudge_gains),
        tuple(r.scales),
        tuple(s is None for s in r.states),
        tuple(b is None for b in r.biases),
        tuple((c, t.shape[0]) for c, t in sorted(r.drives.items())),
        tuple((c, t.shape[0]) for c, t in sorted(r.winners.items())),
        tuple(b is None for b in r.head_biases),
        tuple(sorted(r.extra)),
    )
