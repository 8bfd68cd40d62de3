"""From a plan to kernel launches: which convolutions fuse, which buffers they read, who unpools, who ends a sweep.

Everything here is symbolic and hashable; the same tuple of launches is bound to buffers once and captured in a CUDA
graph once. Words: a *slot* is one of a node's two state buffers (only ``sync`` uses the second); a tensor is *given*
when it came with the relaxation (B samples, read modulo B) and not from one of its own launches (n samples).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ..network import Connection, Network
from ..plan import Drive, Form, Nudge, Plan, Step

MAX_SEGMENTS = 4  # K loops of one launch (kernels/step.py)


@dataclass(frozen=True)
class Segment:
    """One K loop: a drive from, or a feedback of, the state in ``slot`` at the other end of ``connection``."""

    connection: int
    feedback: bool
    slot: int


@dataclass(frozen=True)
class DriveLaunch:
    """Pooled drive of a connection. ``unpool``: the destination's slot, when its unpooled state is written too."""

    connection: int
    slot: int
    given_winners: bool
    unpool: int | None = None
    stoppable: bool = True


@dataclass(frozen=True)
class OutsideLaunch:
    """A drive or feedback that does not fuse (strides; a linear feedback to a map), into a buffer of its own."""

    segment: Segment
    given_winners: bool


@dataclass(frozen=True)
class NudgeLaunch:
    """Gradient of the heads on ``node`` at ``slot`` (None: the state is zero)."""

    node: int
    slot: int | None


@dataclass(frozen=True)
class StepLaunch:
    """One relaxation step.

    Attributes:
        old, new: slots read (None: zero) and written.
        segments: K loops. outside: those that were convolved before.
        finished: connections whose drives are read, and whether they are given.
        unpool: connections for which P^-1 of the new state is written; the first in this launch, others after it.
        keep: store the pre-activation. first: first sweep (never over-relaxed). finish: last step of its sweep.
    """

    node: int
    old: int | None
    new: int
    segments: tuple[Segment, ...]
    outside: tuple[Segment, ...]
    finished: tuple[tuple[int, bool], ...]
    nudged: bool
    unpool: tuple[tuple[int, bool], ...]
    keep: bool
    first: bool
    finish: bool


@dataclass(frozen=True)
class UnpoolLaunch:
    """P^-1 of a given state, where a feedback reads it before any launch writes it."""

    connection: int
    slot: int
    given_winners: bool


@dataclass(frozen=True)
class SettleLaunch:
    """Before the refresh of a `sync` run that may have stopped early: its states may be in the other of their slots,
    and are moved to ``slots``, where a run of all its sweeps (``even``: an even number of them) has them."""

    slots: tuple[int | None, ...]
    even: bool


Launch = DriveLaunch | OutsideLaunch | NudgeLaunch | StepLaunch | UnpoolLaunch | SettleLaunch
Launches = tuple[Launch, ...]


@dataclass(frozen=True)
class Lowered:
    """A relaxation as launches; ``slots`` is each node's slot at the end (None: never updated).

    ``driven``: connections whose drives and winners are computed by the relaxation itself.
    """

    prologue: Launches
    sweeps: tuple[Launches, ...]
    refresh: Launches
    slots: tuple[int | None, ...]
    driven: frozenset[int]


def fuses(conn: Connection, source_is_map: bool, *, feedback: bool) -> bool:
    """Whether the kernels convolve this connection: every stride-1 convolution and linear connection does, except the
    feedback of a linear connection to a map, whose positions have a weight each."""
    if conn.kernel_size is None:
        return not (feedback and source_is_map)
    return conn.stride == (1, 1)


def lower(
    network: Network,
    plan: Plan,
    steps: int,
    form: Form,
    *,
    given: frozenset[int] = frozenset(),
    frozen: bool,
    keep: bool,
    every: bool = False,
) -> Lowered:
    """Lower a plan for ``steps`` sweeps. ``given``: nodes whose state (or delta) comes with the relaxation; the others
    begin at zero. ``every``: keep the pre-activations of every sweep, not of the last only (a relaxation that may stop
    early)."""
    return _Lowering(network, plan, steps, form, given, frozen, keep, every).run()


class _Lowering:
    def __init__(
        self,
        network: Network,
        plan: Plan,
        steps: int,
        form: Form,
        given: frozenset[int],
        frozen: bool,
        keep: bool,
        every: bool,
    ):
        self.network, self.plan, self.steps = network, plan, steps
        self.frozen, self.keep, self.every = frozen, keep, every
        self.slot: list[int | None] = [0 if i in given else None for i in range(len(network.shapes))]
        self.slot[0] = 0 if form == "states" else None
        self.stepped: set[int] = set()
        self.driven: set[int] = set()

    def run(self) -> Lowered:
        prologue = (*self.launches(self.plan.prologue, None), *self.unpool_start())
        sweeps = tuple(self.sweep(t) for t in range(self.steps))
        refresh: Launches = ()
        if self.every and self.plan.deferred and self.steps > 2:
            refresh = (SettleLaunch(self.ends(), self.steps % 2 == 0),)
        if self.keep:
            refresh += tuple(
                replace(launch, stoppable=False) if isinstance(launch, DriveLaunch) else launch
                for launch in self.launches(self.plan.refresh, None)
            )
        return Lowered(prologue, sweeps, refresh, self.ends(), frozenset(self.driven))

    def ends(self) -> tuple[int | None, ...]:
        return tuple(slot if i in self.stepped else None for i, slot in enumerate(self.slot))

    def unpool_start(self) -> Iterator[UnpoolLaunch]:
        for c, conn in enumerate(self.network.connections):
            slot = self.slot[conn.dst]
            pooled = conn.pool != "none" and self.fuses(c, feedback=True)
            if pooled and slot is not None and self.reads_unpooled(c, 0, -1):
                yield UnpoolLaunch(c, slot, self.winners_given(c))

    def sweep(self, t: int) -> Launches:
        self.pending: dict[int, int] = {}
        launches = list(self.launches(self.plan.sweep(t), t))
        for node, slot in self.pending.items():
            self.slot[node] = slot
        last = max((i for i, launch in enumerate(launches) if isinstance(launch, StepLaunch)), default=None)
        if last is not None:
            step = launches[last]
            assert isinstance(step, StepLaunch)
            launches[last] = replace(step, finish=True)
        return tuple(launches)

    def launches(self, source: tuple[Drive | Nudge | Step, ...], t: int | None) -> Iterator[Launch]:
        for at, launch in enumerate(source):
            if isinstance(launch, Drive):
                yield from self.drive(launch.connection, t, at)
            elif isinstance(launch, Nudge):
                yield NudgeLaunch(launch.node, self.slot[launch.node])
            else:
                assert t is not None
                yield from self.step(launch, t, at)

    def drive(self, c: int, t: int | None, at: int) -> Iterator[Launch]:
        conn = self.network.connections[c]
        slot = self.slot[conn.src]
        assert slot is not None
        given = self.winners_given(c)
        self.driven.add(c)
        if not self.fuses(c, feedback=False):
            yield OutsideLaunch(Segment(c, False, slot), given)
            return
        live = conn.pool == "max" and not self.frozen
        up = self.slot[conn.dst] if live and t is not None and self.reads_unpooled(c, t, at) else None
        yield DriveLaunch(c, slot, given, up)

    def step(self, step: Step, t: int, at: int) -> Iterator[Launch]:
        node = step.node
        self.stepped.add(node)
        finished = tuple((c, c not in self.driven) for c in step.finished)
        wanted = [Segment(c, True, self.slot_of(c, "dst")) for c in step.above]
        wanted += [Segment(c, False, self.slot_of(c, "src")) for c in step.below]
        fused = [s for s in wanted if self.fuses(s.connection, feedback=s.feedback)][:MAX_SEGMENTS]
        outside = tuple(s for s in wanted if s not in fused)
        for segment in outside:
            yield OutsideLaunch(segment, self.winners_given(segment.connection))
        old = self.slot[node]
        new = 1 - old if self.plan.deferred and old is not None else 0
        pooled = tuple(
            (c, self.winners_given(c))
            for c in self.network.into[node]
            if self.network.connections[c].pool != "none"
            and self.fuses(c, feedback=True)
            and self.reads_unpooled(c, t, at)
        )
        keep = self.keep and (self.every or t == self.steps - 1)
        yield StepLaunch(
            node, old, new, tuple(fused), outside, finished, step.nudged, pooled, keep, first=t == 0, finish=False
        )
        if self.plan.deferred:
            self.pending[node] = new
        else:
            self.slot[node] = new

    def reads_unpooled(self, c: int, t: int, at: int) -> bool:
        """Whether a feedback of c comes after launch ``at`` of sweep t, before its state or winners change again."""
        conn = self.network.connections[c]
        for later in range(t, min(t + 2, self.steps)):
            for launch in self.plan.sweep(later)[at + 1 if later == t else 0 :]:
                if isinstance(launch, Step) and launch.node == conn.src and c in launch.above:
                    return True
                if isinstance(launch, Step) and launch.node == conn.dst:
                    return False
                if launch == Drive(c) and conn.pool == "max" and not self.frozen:
                    return False
        return False

    def winners_given(self, c: int) -> bool:
        return self.frozen or c not in self.driven

    def fuses(self, c: int, *, feedback: bool) -> bool:
        conn = self.network.connections[c]
        return fuses(conn, len(self.network.shapes[conn.src]) == 3, feedback=feedback)

    def slot_of(self, c: int, end: Literal["src", "dst"]) -> int:
        conn = self.network.connections[c]
        slot = self.slot[conn.src if end == "src" else conn.dst]
        assert slot is not None
        return slot
