"""One relaxation as data: what a backend gets, what it returns, and the reference backend that executes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import reference
from .network import Connection, Network
from .plan import Drive, Form, Launch, Nudge, Plan, Step
from .precision import Operands, rounded


@dataclass(frozen=True)
class Relaxation:
    """A phase, ready to run: the plan, the tensors and every constant, resolved to numbers.

    Shapes: B samples in the free phase; a nudged phase of both signs holds n = 2B (+beta first), others n = B. Tensors
    of the free phase keep B samples and are read modulo B. In the delta forms node l holds ``d^l * scale[l]``.

    Attributes:
        network, plan, steps: what runs, and for how many sweeps.
        weights: per connection. biases: per node (index 0 and nodes without a bias: None).
        states: per node, the states at the start (None: zero); index 0 is the clamped input, None in the delta forms
            (where a plan may clamp a node at a delta that is given here).
            These and ``free`` may be in ``storage`` or in the weights' dtype.
        free: per node, states of the free equilibrium (delta forms only): the nudge is evaluated at ``free + d``.
        preactivations: per node, gamma a of the free equilibrium (delta forms only).
        drives, winners: kept ones by connection: of the clamped input, and of the free equilibrium.
        head_weights, head_biases, targets: per head; extra: by node, dL/ds of further losses, held constant.
        drive_gains, feedback_gains: per connection. nudge_gains, scales: per node.
        damping: eta; up to 2 in states form, where the first sweep is never over-relaxed.
        tol: stop when every sample's residual is at most this (0: never).
        form: ``states``, ``delta`` or ``tangent``. frozen: the given winners are gathered, never recomputed.
        phases: 2 when the batch holds both signs, else 1.
        operands: precision of the convolutions' operands; None is the weights' own dtype.
        storage: dtype that new states (but not the clamped input) are rounded to, None is the weights'. All else is
            computed and returned in the weights' dtype; the residual is the change of the rounded states.
        keep: return the preactivations of the last sweep and refresh the winners.
        feedback_weights: per connection, what its feedback goes through (None for one from the clamped input); empty:
            the weights themselves.
    """

    network: Network
    plan: Plan
    steps: int
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    states: Sequence[Tensor | None]
    batch: int
    drive_gains: Sequence[float]
    feedback_gains: Sequence[float]
    nudge_gains: Sequence[float]
    scales: Sequence[float]
    free: Sequence[Tensor] = ()
    preactivations: Sequence[Tensor] = ()
    drives: Mapping[int, Tensor] = field(default_factory=dict)
    winners: Mapping[int, Tensor] = field(default_factory=dict)
    head_weights: Sequence[Tensor | None] = ()
    head_biases: Sequence[Tensor | None] = ()
    targets: Sequence[Tensor] = ()
    extra: Mapping[int, Tensor] = field(default_factory=dict)
    damping: float = 1.0
    tol: float = 0.0
    form: Form = "states"
    frozen: bool = False
    phases: int = 1
    operands: Operands = None
    storage: torch.dtype | None = None
    keep: bool = False
    feedback_weights: Sequence[Tensor | None] = ()

    def feedback_weight(self, c: int) -> Tensor:
        """What the feedback of connection c goes through."""
        own = self.feedback_weights[c] if self.feedback_weights else None
        return self.weights[c] if own is None else own


@dataclass(frozen=True)
class Contrast:
    """The contrast of one connection, ready to run: arguments of :func:`ep_kernels.reference.contrast`.

    States and deltas may be stored in another dtype than ``weight``, of which only the shape and the dtype (that of the
    gradients) are read.
    """

    connection: Connection
    weight: Tensor
    source: Tensor
    source_delta: Tensor | None
    target: Tensor
    target_delta: Tensor
    winners: Tensor | None
    source_gain: float
    target_gain: float
    centre: float
    scale: float
    operands: Operands


@dataclass(frozen=True)
class Relaxed:
    """What a relaxation leaves.

    Attributes:
        states: per node (index 0: the clamped input or None), [n, ...]; in the delta forms the scaled deltas. In the
            dtype of the relaxation's ``storage``.
        preactivations: per node, gamma a of each node's last update; empty unless ``keep``.
        drives, winners: computed in this phase, by connection.
        residual: max over units of |s_{t+1} - s_t| per sweep and sample, [steps, n], in the states' units; -1 in the
            rows of sweeps that an early stop left out.
    """

    states: list[Tensor | None]
    preactivations: list[Tensor | None]
    drives: dict[int, Tensor]
    winners: dict[int, Tensor]
    residual: Tensor


def relax_reference(r: Relaxation) -> Relaxed:
    """The reference backend: executes the plan launch by launch in plain PyTorch."""
    return _Run(r).run()


class _Run:
    def __init__(self, r: Relaxation):
        self.r = r
        weight = r.weights[0]
        self.new = weight.new_empty
        self.dtype, self.storage = weight.dtype, r.storage or weight.dtype
        self.states = [s.to(self.storage) if i and s is not None else s for i, s in enumerate(r.states)]
        self.pending: dict[int, Tensor] = {}
        self.pre: list[Tensor | None] = [None] * len(r.network.shapes)
        self.drives, self.winners = dict(r.drives), dict(r.winners)
        self.computed: set[int] = set()
        self.nudges: dict[int, Tensor] = {}
        half = r.batch // r.phases
        sign = torch.ones(r.batch, dtype=self.dtype, device=weight.device)
        sign[half:] = -1
        self.sign = sign

    def run(self) -> Relaxed:
        r = self.r
        residual = self.new((r.steps, r.batch)).fill_(-1.0)
        for launch in r.plan.prologue:
            self.launch(launch)
        for t in range(r.steps):
            self.change = self.new(r.batch).zero_()
            self.damping = min(r.damping, 1.0) if t == 0 else r.damping
            for launch in r.plan.sweep(t):
                self.launch(launch)
            for node, state in self.pending.items():
                self.states[node] = state
            self.pending.clear()
            residual[t] = self.change
            if r.tol > 0 and t > 0 and bool((self.change <= r.tol).all()):
                break
        if r.keep:
            for refresh in r.plan.refresh:
                self.launch(refresh)
        for i, shape in enumerate(r.network.shapes):
            if i and self.states[i] is None:  # nothing reached it in so few sweeps
                self.states[i] = self.new((r.batch, *shape), dtype=self.storage).zero_()
        kept = {c: self.drives[c] for c in self.computed}
        winners = {} if r.frozen else {c: self.winners[c] for c in self.computed if c in self.winners}
        return Relaxed(self.states, self.pre if r.keep else [], kept, winners, residual)

    def launch(self, launch: Launch) -> None:
        if isinstance(launch, Drive):
            self.drive(launch.connection)
        elif isinstance(launch, Nudge):
            self.nudge(launch.node)
        else:
            self.step(launch)

    def state(self, node: int) -> Tensor | None:
        """The node's current state in the dtype that is computed in."""
        state = self.states[node]
        return None if state is None else state.to(self.dtype)

    def convolve(self, c: int) -> Tensor:
        """The pooled drive of connection c from its source's current state, and its winners if they are live."""
        r, conn = self.r, self.r.network.connections[c]
        source, weight = self.state(conn.src), r.weights[c]
        assert source is not None
        z = reference.convolve(rounded(source, r.operands), rounded(weight, r.operands), conn.stride, conn.padding)
        frozen = self.winners[c] if r.frozen and conn.pool == "max" else None
        pooled, winners = reference.pool_map(z, conn.pool, frozen)
        if winners is not None:
            self.winners[c] = winners
        return pooled

    def feedback(self, c: int) -> Tensor:
        r, conn = self.r, self.r.network.connections[c]
        above, weight, shape = self.state(conn.dst), r.feedback_weight(c), r.network.shapes[conn.src]
        assert above is not None
        winners = self.winners.get(c)
        if winners is None and conn.pool == "max":  # the source is still zero: every tie goes to the first
            winners = torch.zeros_like(above, dtype=torch.uint8)
        return reference.feedback(
            rounded(above, r.operands),
            rounded(weight, r.operands),
            shape,
            conn.stride,
            conn.padding,
            conn.pool,
            winners,
        )

    def drive(self, c: int) -> None:
        self.drives[c] = self.convolve(c)
        self.computed.add(c)

    def nudge(self, node: int) -> None:
        r = self.r
        state = self.state(node)
        if r.form != "states":
            # the tangent is taken at the free equilibrium itself
            free = r.free[node].to(self.dtype).repeat(r.phases, *[1] * (r.free[node].dim() - 1))
            state = free if state is None or r.form == "tangent" else free + state / r.scales[node]
        elif state is None:
            state = self.new((r.batch, *r.network.shapes[node])).zero_()
        total = torch.zeros_like(state)
        for h, target in enumerate(r.targets):
            head = r.network.heads[h]
            if head.node == node:
                tiled = target.repeat(r.phases, *[1] * (target.dim() - 1))
                total = total + reference.head_gradient(head, state, r.head_weights[h], r.head_biases[h], tiled)
        if node in r.extra:
            total = total + r.extra[node].repeat(r.phases, *[1] * (state.dim() - 1))
        self.nudges[node] = total

    def step(self, step: Step) -> None:
        r, node = self.r, step.node
        net = r.network
        shape = (r.batch, *net.shapes[node])
        trailing = [1] * (len(shape) - 1)
        old = self.state(node)
        if old is None:
            old = self.new(shape).zero_()
        a = torch.zeros_like(old)
        bias = r.biases[node]
        if r.form == "states" and bias is not None:
            a = a + bias.view(-1, *[1] * (len(shape) - 2))
        for c in step.finished:
            drive = self.drives[c]
            a = a + r.drive_gains[c] * drive.repeat(r.batch // max(drive.shape[0], 1), *trailing)
        for c in step.below:
            a = a + r.drive_gains[c] * self.convolve(c)
        for c in step.above:
            a = a + r.feedback_gains[c] * self.feedback(c)
        if step.nudged:
            a = a + r.nudge_gains[node] * self.sign.view(-1, *trailing) * self.nudges[node]
        pre = r.preactivations[node].repeat(r.phases, *trailing) if r.form != "states" else None
        damping = self.damping if r.form == "states" else r.damping
        lo, hi = net.box(node)
        new = reference.step(old, a, r.form, damping, net.slope, lo, hi, pre, r.scales[node]).to(self.storage)
        self.pre[node] = net.slope * a
        change = (new.to(self.dtype) - old).abs().flatten(1).amax(1) / r.scales[node]
        self.change = torch.maximum(self.change, change)
        if r.plan.deferred:
            self.pending[node] = new
        else:
            self.states[node] = new
