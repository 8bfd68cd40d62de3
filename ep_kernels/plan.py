"""Compiles a network, a schedule and a phase into a flat list of launches. Every backend executes this list.

One sweep updates every node once. A launch is one of

* ``Drive(c)``: compute the pooled drive of connection c and its winners from the source's current state, and keep both;
* ``Nudge(i)``: evaluate the gradients of the heads on node i at its current state, and keep their sum;
* ``Step(i)``: one relaxation step of node i from finished drives, drives and feedbacks still to be convolved, and the
  nudge.

The compiler follows the relaxation symbolically: which states are still zero (they send nothing) and for which state
of its source each kept drive was computed. So a convolution is emitted only when its operand is nonzero and its result
is not at hand, and a max-pooled connection's winners are always those of the current drive (live) or of the free
equilibrium (frozen). Sweeps differ until that symbolic state repeats; the last one listed stands for all that follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from .network import Network

Schedule = Literal["sync", "even_odd", "sweep"]
Phase = Literal["free", "nudged"]
Form = Literal["states", "delta", "tangent"]
Winners = Literal["live", "frozen"]
SCHEDULES: tuple[Schedule, ...] = ("sync", "even_odd", "sweep")
FORMS: tuple[Form, ...] = ("states", "delta", "tangent")


@dataclass(frozen=True)
class Drive:
    """Compute and keep the drive of ``connection`` (and, live, its winners)."""

    connection: int


@dataclass(frozen=True)
class Nudge:
    """Evaluate and keep the summed gradients of the heads on ``node``."""

    node: int


@dataclass(frozen=True)
class Step:
    """Update ``node``: ``finished`` drives are kept ones, ``below`` and ``above`` are convolved here."""

    node: int
    finished: tuple[int, ...]
    below: tuple[int, ...]
    above: tuple[int, ...]
    nudged: bool


Launch = Drive | Nudge | Step


@dataclass(frozen=True)
class Plan:
    """A compiled relaxation.

    Attributes:
        prologue: launches before the first sweep.
        sweeps: one tuple of launches per sweep; the last repeats.
        refresh: ``Drive`` launches that bring every kept drive up to date after the last sweep, so that its winners
            are those of the equilibrium (empty for the ``sweep`` schedule, which leaves none stale).
        deferred: states written by a sweep become visible at its end (``sync``).
        order: nodes in the order of their updates.
    """

    prologue: tuple[Launch, ...]
    sweeps: tuple[tuple[Launch, ...], ...]
    refresh: tuple[Drive, ...]
    deferred: bool
    order: tuple[int, ...]

    def sweep(self, t: int) -> tuple[Launch, ...]:
        """Launches of sweep ``t``, counted from 0."""
        return self.sweeps[min(t, len(self.sweeps) - 1)]

    def convolutions(self, steps: int, *, refresh: bool = False) -> int:
        """Number of convolutions (and matrix products of linear connections) in ``steps`` sweeps."""
        launches = [*self.prologue, *(launch for t in range(steps) for launch in self.sweep(t))]
        if refresh:
            launches += self.refresh
        return sum(
            1 if isinstance(launch, Drive) else len(launch.below) + len(launch.above)
            for launch in launches
            if not isinstance(launch, Nudge)
        )


def update_order(network: Network, schedule: Schedule, phase: Phase) -> tuple[int, ...]:
    """Nodes in the order of their updates within a sweep."""
    nodes = range(1, len(network.shapes))
    if schedule == "even_odd":
        return tuple(sorted(nodes, key=lambda i: (network.levels[i] % 2, network.levels[i])))
    direction = -1 if schedule == "sweep" and phase == "nudged" else 1
    return tuple(sorted(nodes, key=lambda i: (direction * network.levels[i], i)))


@lru_cache(maxsize=256)
def compile_plan(
    network: Network,
    schedule: Schedule,
    phase: Phase,
    *,
    form: Form = "states",
    winners: Winners = "live",
    linear_nudge: bool = False,
    warm: bool = False,
    kept: frozenset[int] = frozenset(),
    extra: frozenset[int] = frozenset(),
    clamped: frozenset[int] = frozenset(),
    steps: int = 1 << 30,
) -> Plan:
    """Compile one phase.

    Args:
        network: the network.
        schedule: ``sync`` (all nodes from the same states), ``even_odd`` (even levels, then odd), ``sweep`` (bottom-up
            in the free phase, top-down in the nudged phase).
        phase: ``free`` (no nudge) or ``nudged``.
        form: ``states``; or ``delta`` and ``tangent``, where the unknown is ``d = s - s_free``, zero at first, the
            clamped input sends nothing and nodes that nothing reaches yet are left out.
        winners: of max pooling; ``frozen`` ones come from the free phase and are never recomputed.
        linear_nudge: evaluate the nudge once, before the first sweep, instead of at every update.
        warm: states are given (nonzero) at the start; in the delta forms they always start at zero.
        kept: connections whose kept drive is valid at the start (carried over from the free phase).
        extra: nodes that have an extra nudge besides their heads.
        clamped: nodes that keep the state (in the delta forms, the delta) that they are given at the start.
        steps: number of sweeps that will run: settles what ``refresh`` must bring up to date.

    Returns:
        The plan.

    Raises:
        ValueError: an unknown schedule, phase, form or winners, with the valid names.
    """
    for name, value, valid in (
        ("schedule", schedule, SCHEDULES),
        ("phase", phase, ("free", "nudged")),
        ("form", form, FORMS),
        ("winners", winners, ("live", "frozen")),
    ):
        if value not in valid:
            raise ValueError(f"compile_plan: argument '{name}': expected one of {', '.join(valid)}, got {value!r}")
    if form != "states" and (phase, winners) != ("nudged", "frozen"):
        raise ValueError(
            f"compile_plan: argument 'form': expected 'states' unless the phase is nudged with frozen winners, "
            f"got {form!r} with phase {phase!r} and winners {winners!r}"
        )
    trace = _Trace(network, schedule, phase, form, winners, linear_nudge, warm, kept, extra, clamped)
    prologue = trace.prologue()
    sweeps: list[tuple[Launch, ...]] = []
    seen = None
    while len(sweeps) < max(steps, 1):
        situation = trace.situation()
        if situation == seen:
            break
        seen = situation
        sweeps.append(trace.sweep())
    return Plan(prologue, tuple(sweeps), trace.refresh(), schedule == "sync", trace.order)


class _Trace:
    """The symbolic relaxation: versions of states and of kept drives."""

    def __init__(
        self,
        network: Network,
        schedule: Schedule,
        phase: Phase,
        form: Form,
        winners: Winners,
        linear_nudge: bool,
        warm: bool,
        kept: frozenset[int],
        extra: frozenset[int],
        clamped: frozenset[int],
    ):
        self.network, self.form, self.frozen = network, form, winners == "frozen"
        self.deferred = schedule == "sync"
        self.order = tuple(i for i in update_order(network, schedule, phase) if i not in clamped)
        self.nudged_nodes = ({h.node for h in network.heads} | extra) - clamped if phase == "nudged" else set()
        self.linear_nudge = linear_nudge or form == "tangent"
        nodes = len(network.shapes)
        # version 0 is the state at the start; zero states send nothing, and their winners are all "first"
        self.version = [0] * nodes
        self.zero = [(form != "states" or not warm) and i not in clamped for i in range(nodes)]
        self.zero[0] = form != "states"
        self.drive_version: dict[int, int] = dict.fromkeys(kept, 0)
        self.kept_winners = {c for c, conn in enumerate(network.connections) if self.zero[conn.src]}

    def prologue(self) -> tuple[Launch, ...]:
        """What never changes during the phase: drives of the clamped input, linear nudges."""
        launches: list[Launch] = []
        if not self.zero[0]:
            for c in self.network.out_of[0]:
                launches += self._drive_if_stale(c)
        if self.linear_nudge:
            launches += [Nudge(i) for i in sorted(self.nudged_nodes)]
        return tuple(launches)

    def situation(self) -> tuple[object, ...]:
        """All that the next sweep's launches depend on."""
        stale = tuple(self._stale(c) for c in range(len(self.network.connections)))
        return (tuple(self.zero), stale, tuple(sorted(self.kept_winners)))

    def sweep(self) -> tuple[Launch, ...]:
        launches: list[Launch] = []
        updated = []
        for node in self.order:
            emitted = self._update(node)
            if not emitted:
                continue
            launches += emitted
            if self.deferred:
                updated.append(node)
            else:
                self._touch(node)
        for node in updated:
            self._touch(node)
        return tuple(launches)

    def refresh(self) -> tuple[Drive, ...]:
        pooled = [c for c, conn in enumerate(self.network.connections) if conn.pool == "max"]
        return () if self.frozen else tuple(Drive(c) for c in pooled if self._winners_stale(c))

    def _update(self, node: int) -> list[Launch]:
        net = self.network
        launches: list[Launch] = []
        finished, below, above = [], [], []
        for c in net.into[node]:
            conn = net.connections[c]
            if self.zero[conn.src]:
                continue
            if conn.pool == "none" and conn.src != 0 and self._stale(c):
                below.append(c)  # its only use: convolved into the step
            else:
                launches += self._drive_if_stale(c)
                finished.append(c)
        for c in net.out_of[node]:
            if self.zero[net.connections[c].dst]:
                continue
            if not self.frozen and net.connections[c].pool == "max" and self._winners_stale(c):
                launches += self._drive_if_stale(c)
            above.append(c)
        nudged = node in self.nudged_nodes
        if self.form != "states" and not (finished or below or above or nudged):
            return []
        if nudged and not self.linear_nudge:
            launches.append(Nudge(node))
        launches.append(Step(node, tuple(finished), tuple(below), tuple(above), nudged))
        return launches

    def _touch(self, node: int) -> None:
        self.version[node] += 1
        self.zero[node] = False
        self.kept_winners -= set(self.network.out_of[node])

    def _stale(self, c: int) -> bool:
        return self.drive_version.get(c) != self.version[self.network.connections[c].src]

    def _winners_stale(self, c: int) -> bool:
        return c not in self.kept_winners and self._stale(c)

    def _drive_if_stale(self, c: int) -> list[Launch]:
        if not self._stale(c):
            return []
        self.drive_version[c] = self.version[self.network.connections[c].src]
        return [Drive(c)]
