"""A relaxation bound to buffers: what :func:`ep_kernels.triton.relax` replays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import reference
from ..network import POOLS
from ..plan import FORMS
from ..relaxation import Relaxation, Relaxed
from . import layout
from .arch import Arch
from .buffers import Buffers
from .launch import Addend, Call, Dynamics, Loop, drive_call, drive_loop, feedback_loop, step_call
from .lower import (
    DriveLaunch,
    Launch,
    Launches,
    Lowered,
    NudgeLaunch,
    OutsideLaunch,
    Segment,
    SettleLaunch,
    StepLaunch,
    UnpoolLaunch,
    lower,
)
from .nudges import bind_nudge

Action = Callable[[], None]


class Program:
    """Buffers and bound launches of one signature (network, plan, shapes, precision, constants; not the tensors, not
    the number of sweeps). ``capacity``: most sweeps that the residual has room for.

    :meth:`loaded` copies a relaxation's tensors in, :meth:`actions` binds lowered launches once, :meth:`results` copies
    out, so that nothing returned is overwritten by the next run.
    """

    def __init__(self, r: Relaxation, arch: Arch, capacity: int):
        self.arch = arch
        self.buffers = Buffers(r)
        self.r = self.buffers.r  # structure and constants, no tensors
        self.products = "tf32" if r.operands == "tf32" else "ieee"
        self.stops = r.tol > 0
        self.bound: dict[Launch, list[Action]] = {}
        self.lowered: dict[int, Lowered] = {}
        device = r.weights[0].device
        self.control = torch.zeros(3, dtype=torch.int32, device=device)
        self.residual = torch.zeros(capacity, r.batch, dtype=torch.int32, device=device)

    def lower(self, steps: int) -> Lowered:
        """The launches of a run of ``steps`` sweeps."""
        if steps not in self.lowered:
            r, given = self.r, self.buffers.given_states
            self.lowered[steps] = lower(
                r.network, r.plan, steps, r.form, given=given, frozen=r.frozen, keep=r.keep, every=self.stops
            )
        return self.lowered[steps]

    @contextmanager
    def loaded(self, r: Relaxation) -> Iterator[None]:
        """Within, the buffers hold copies of the relaxation's tensors, and new ones are filled when made."""
        try:
            self.buffers.load(r)
            yield
        finally:
            self.buffers.release()

    def actions(self, launches: Launches) -> list[Action]:
        """What to call for these launches, bound on first use."""
        out: list[Action] = []
        for launch in launches:
            if launch not in self.bound:
                self.bound[launch] = self.bind(launch)
            out += self.bound[launch]
        return out

    def start(self) -> None:
        """Before the first launch: no sweep done, no residual known."""
        self.control.zero_()
        self.residual.view(torch.float32).fill_(-1.0)
        self.buffers.start()
        if self.stops and self.r.form != "states":  # it may stop before a node's first update
            for name in ("state 0", "state 1"):
                for i in self.buffers.nodes.keys() - self.buffers.given_states:
                    if name in self.buffers.shelves:
                        self.buffers.piece(self.buffers.shelves[name], i, self.buffers.nodes).zero_()

    def results(self, steps: int) -> Relaxed:
        """Copies of what the last run left."""
        r, buffers, lowered = self.r, self.buffers, self.lower(steps)
        shelves = buffers.shelves
        updated = [i for i in buffers.nodes if lowered.slots[i] is not None]
        copies = {slot: shelves[f"state {slot}"].clone() for slot in {lowered.slots[i] for i in updated}}
        by_slot = {slot: buffers.results(copy, buffers.nodes) for slot, copy in copies.items()}
        assert buffers.inputs is not None
        states: list[Tensor | None] = [buffers.inputs.states[0]]
        states += [by_slot[lowered.slots[i]][i] if i in updated else self.unmoved(i) for i in buffers.nodes]
        pre: list[Tensor | None] = []
        if r.keep:
            kept = buffers.results(shelves["pre"].clone(), buffers.nodes)
            pre = [None, *(kept[i] if i in updated else None for i in buffers.nodes)]
        drives, winners = {}, {}
        if lowered.driven:
            drives = buffers.results(shelves["drives"].clone(), buffers.driven)
        if "winners" in shelves and not r.frozen:
            winners = buffers.results(shelves["winners"].clone(), buffers.driven)
        maxima = {c for c in lowered.driven if r.network.connections[c].pool == "max"}
        return Relaxed(
            states,
            pre,
            {c: t for c, t in drives.items() if c in lowered.driven},
            {c: t for c, t in winners.items() if c in maxima},
            self.residual.view(torch.float32)[:steps].clone(),
        )

    def unmoved(self, i: int) -> Tensor:
        """The state of a node that no launch updated."""
        assert self.buffers.inputs is not None
        given = self.buffers.inputs.states[i]
        if given is not None:
            return given.to(self.buffers.storage)
        shape = (self.r.batch, *self.buffers.nodes[i])
        return torch.zeros(shape, dtype=self.buffers.storage, device=self.buffers.device)

    # --- binding ------------------------------------------------------------------------------------------------------

    def bind(self, launch: Launch) -> list[Action]:
        if isinstance(launch, StepLaunch):
            return self.bind_step(launch)
        if isinstance(launch, DriveLaunch):
            return [self.bind_drive(launch)]
        if isinstance(launch, NudgeLaunch):
            return bind_nudge(self.buffers, launch, self.control, stop=self.stops)
        if isinstance(launch, UnpoolLaunch):
            return [self.unpool_action(launch.connection, launch.slot, launch.given_winners)]
        if isinstance(launch, SettleLaunch):
            return [self.settle_action(launch)]
        return [self.bind_outside(launch)]

    def loop(self, segment: Segment, gain: float) -> Loop:
        """The K loop of a drive or feedback; linear connections are 1x1 convolutions of flat maps."""
        net, c = self.r.network, segment.connection
        conn = net.connections[c]
        kernel = conn.kernel_size or (1, 1)
        padding = conn.padding if conn.kernel_size else (0, 0)
        if segment.feedback:
            above = self.buffers.unpooled(c) if conn.pool != "none" else self.buffers.operand_of(conn.dst, segment.slot)
            return feedback_loop(above, self.buffers.matrix(c, feedback=True), kernel, padding, gain)
        source = self.buffers.operand_of(conn.src, segment.slot)
        if conn.kernel_size is None:
            source = source.view(source.shape[0], 1, 1, -1)
        return drive_loop(source, self.buffers.matrix(c, feedback=False), kernel, padding, gain)

    def gain(self, segment: Segment) -> float:
        gains = self.r.feedback_gains if segment.feedback else self.r.drive_gains
        return gains[segment.connection]

    def bind_step(self, launch: StepLaunch) -> list[Action]:
        r, i = self.r, launch.node
        addends = []
        for c, given in launch.finished:
            dst = r.network.connections[c].dst
            if not given:
                tensor = self.buffers.drive(c)
            else:
                tensor = self.buffers.given("given drive", c, torch.float32, lambda r, c=c: r.drives[c], dst)  # type: ignore[misc]
            addends.append(Addend(tensor, r.drive_gains[c], tensor.shape[0] != r.batch))
        addends += [Addend(self.outside(s), self.gain(s), False) for s in launch.outside]
        before, addends = self.merged(i, addends)
        fused = next(iter(launch.unpool), None)
        unpooled = winners = None
        shared = False
        if fused is not None:
            unpooled = self.buffers.unpooled(fused[0])
            if r.network.connections[fused[0]].pool == "max":
                winners, shared = self.buffers.winners_of(*fused)
        delta = r.form != "states"
        new = self.buffers.state(i, launch.new)
        operand = self.buffers.operand_of(i, launch.new)
        call = step_call(
            self.arch,
            self.products,
            Dynamics(
                FORMS.index(r.form),
                min(r.damping, 1.0) if launch.first and not delta else r.damping,
                r.network.slope,
                *r.network.box(i),
                r.scales[i],
            ),
            [self.loop(s, self.gain(s)) for s in launch.segments],
            addends,
            channels=r.network.shapes[i][0],
            phases=r.phases,
            new=new,
            residual=self.residual,
            control=self.control,
            old=None if launch.old is None else self.buffers.state(i, launch.old),
            operand=operand if operand is not new else None,
            bias=self.buffers.bias(i),
            nudge=self.buffers.map("nudge", i, torch.float32) if launch.nudged else None,
            nudge_gain=r.nudge_gains[i],
            pre=self.buffers.given("preactivation", i, torch.float32, lambda r: r.preactivations[i], i)
            if delta
            else None,
            pre_out=self.buffers.pre(i) if launch.keep else None,
            unpooled=unpooled,
            winners=winners,
            winners_shared=shared,
            stop=self.stops,
            finish=launch.finish,
            tol=r.tol,
        )
        after = [self.unpool_action(c, launch.new, given) for c, given in launch.unpool[1:]]
        return [*before, call, *after]

    def merged(self, i: int, addends: list[Addend]) -> tuple[list[Action], list[Addend]]:
        """At most two addends for the kernel; more are summed before it."""
        if len(addends) <= 2:
            return [], addends
        total = self.buffers.map("sum", i, torch.float32)

        def add() -> None:
            total.zero_()
            for a in addends:
                parts = total.view(-1, *a.tensor.shape) if a.shared else total.unsqueeze(0)
                parts.add_(a.tensor, alpha=a.gain)

        return [add], [Addend(total, 1.0, False)]

    def bind_drive(self, launch: DriveLaunch) -> Call:
        r, c = self.r, launch.connection
        conn = r.network.connections[c]
        size = conn.map_size(*r.network.shapes[conn.src][1:]) if conn.kernel_size else (1, 1)
        live = conn.pool == "max" and not r.frozen
        winners, shared = self.buffers.winners_of(c, True) if conn.pool == "max" and r.frozen else (None, False)
        return drive_call(
            self.arch,
            self.products,
            self.loop(Segment(c, False, launch.slot), 1.0),
            size=size,
            pool=POOLS.index(conn.pool),
            phases=r.phases,
            drive=self.buffers.drive(c),
            control=self.control,
            winners=winners,
            winners_shared=shared,
            winners_out=self.buffers.winners(c) if live else None,
            state=None if launch.unpool is None else self.buffers.state(conn.dst, launch.unpool),
            unpooled=None if launch.unpool is None else self.buffers.unpooled(c),
            stop=self.stops and launch.stoppable,
        )

    def unpool_action(self, c: int, slot: int, given: bool) -> Action:
        conn = self.r.network.connections[c]
        shape = self.r.network.shapes[conn.dst]
        state, out = self.buffers.state(conn.dst, slot), self.buffers.unpooled(c)
        winners = self.buffers.winners_of(c, given)[0] if conn.pool == "max" else None

        def unpool() -> None:
            won = None if winners is None else layout.as_tensor(winners, shape)
            size = out.shape[1:3]
            layout.fill(out, reference.unpool_map(layout.as_tensor(state, shape), conn.pool, size, won))

        return unpool

    def settle_action(self, launch: SettleLaunch) -> Action:
        buffers = self.buffers
        pairs = []
        for i, slot in enumerate(launch.slots):
            if i and slot is not None:
                pairs.append((buffers.state(i, slot), buffers.state(i, 1 - slot)))
                if buffers.operand != buffers.storage:
                    pairs.append((buffers.operand_of(i, slot), buffers.operand_of(i, 1 - slot)))

        def settle() -> None:
            here = (self.control[1] % 2 == 0) == launch.even
            for end, other in pairs:
                end.copy_(torch.where(here, end, other))

        return settle

    def outside(self, segment: Segment) -> Tensor:
        """Where a drive or feedback that does not fuse is left, float32."""
        conn = self.r.network.connections[segment.connection]
        if segment.connection in self.buffers.driven and not segment.feedback:
            return self.buffers.drive(segment.connection)
        shape = self.r.network.shapes[conn.src if segment.feedback else conn.dst]
        key = ("feedback" if segment.feedback else "drive", segment.connection)
        return self.buffers.buffer(key, lambda: layout.new_map(self.r.batch, shape, torch.float32, self.buffers.device))

    def bind_outside(self, launch: OutsideLaunch) -> Action:
        r, segment = self.r, launch.segment
        c, out = segment.connection, self.outside(segment)
        conn = r.network.connections[c]
        below, above = r.network.shapes[conn.src], r.network.shapes[conn.dst]
        if conn.kernel_size is None:
            # a feedback to a map, position by position with weights of its own: one flat product
            flat = out.view(out.shape[0], 1, 1, -1)
            loop = self.loop(segment, 1.0)
            return drive_call(
                self.arch, self.products, loop, size=(1, 1), pool=0, phases=r.phases, drive=flat, control=self.control,
                stop=self.stops,
            )  # fmt: skip
        if segment.feedback:
            weight = self.buffers.copied("feedback weight", c, lambda r: r.feedback_weight(c), self.buffers.operand)
        else:
            weight = self.buffers.copied("weight", c, lambda r: r.weights[c], self.buffers.operand)
        frozen = conn.pool == "max" and r.frozen
        winners = self.buffers.winners_of(c, launch.given_winners)[0] if conn.pool == "max" else None
        won = None if winners is None else layout.as_tensor(winners, above)

        def drive() -> None:
            source = layout.as_tensor(self.buffers.operand_of(conn.src, segment.slot), below)
            z = reference.convolve(source, weight, conn.stride, conn.padding).float()
            pooled, found = reference.pool_map(z, conn.pool, won if frozen else None)
            layout.fill(out, pooled)
            if found is not None and not frozen:
                layout.fill(self.buffers.winners(c), found)

        def feedback() -> None:
            source = layout.as_tensor(self.buffers.operand_of(conn.dst, segment.slot), above)
            back = reference.feedback(source, weight, below, conn.stride, conn.padding, conn.pool, won)
            layout.fill(out, back)

        return feedback if segment.feedback else drive
