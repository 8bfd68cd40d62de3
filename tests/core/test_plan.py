"""The plan: which convolutions it launches, none twice or on zeros, and that both backends run just those."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ep_kernels import Network, RelaxConfig, compile_plan, contrast_gradients, ep_gradients, free_phase, nudged_phase
from ep_kernels.plan import FORMS, SCHEDULES, Drive, Nudge, Step, update_order
from tests.core.nets import BACKENDS, NETWORKS, problem

CONVOLUTIONS = ("aten::convolution", "aten::convolution_backward")


def chain(layers: int, pool: str) -> Network:
    """Convolutions only, so that every product is one; pooled where a 8x8 input still allows it."""
    pools = ["none", "max", "none", "max"] if pool == "some" else [pool] * 3
    return Network.chain(
        (2, 8, 8), [3] * layers, [*pools[:layers], *["none"] * (layers - len(pools))], classes=3, feedback_gain=0.3
    )


def expected(network: Network, schedule: str, phase: str, form: str, steps: int) -> int:
    """Convolutions by the rule of DESIGN.md, fact 6: a node's update needs one per neighbour that is not zero, and the
    clamped input's drive is needed once. Written as a walk over the graph, without drives, winners or launches."""
    nodes = range(1, len(network.shapes))
    nonzero = set() if form != "states" or phase == "free" else set(nodes)
    heads = {h.node for h in network.heads} if phase == "nudged" else set()
    total = len(network.out_of[0]) if form == "states" and phase == "free" else 0
    for _ in range(steps):
        seen = set(nonzero)
        for node in update_order(network, schedule, phase):
            known = seen if schedule == "sync" else nonzero
            below = [network.connections[c].src for c in network.into[node]]
            above = [network.connections[c].dst for c in network.out_of[node]]
            cost = sum(n in known for n in (*below, *above))
            total += cost
            if form == "states" or cost or node in heads:
                nonzero.add(node)
    return total


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pool", ["none", "max", "some", "avg"])
@pytest.mark.parametrize("layers", [1, 2, 3, 4, 7])
def test_free_phase_of_a_chain(layers: int, pool: str, schedule: Any) -> None:
    net = chain(layers, pool)
    hidden = layers - 1  # connections between two nodes of the dynamics
    plan = compile_plan(net, schedule, "free")
    for steps in (1, 2, 3, 9):
        assert plan.convolutions(steps) == expected(net, schedule, "free", "states", steps)
        if schedule == "sync":  # the first sweep sees the input alone
            assert plan.convolutions(steps) == 1 + 2 * hidden * (steps - 1)
        else:  # in turn, it sees each neighbour once: no feedback bottom-up
            assert plan.convolutions(steps) == 1 + hidden + 2 * hidden * (steps - 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("form", ["delta", "tangent"])
@pytest.mark.parametrize("pool", ["none", "max", "some"])
@pytest.mark.parametrize("layers", [1, 2, 3, 4, 7])
def test_delta_phase_of_a_chain(layers: int, pool: str, form: Any, schedule: Any) -> None:
    net = chain(layers, pool)
    hidden = layers - 1
    plan = compile_plan(net, schedule, "nudged", form=form, winners="frozen")
    for steps in (1, 2, 3, 12):
        assert plan.convolutions(steps) == expected(net, schedule, "nudged", form, steps)
    if schedule == "sweep":  # top-down: the first sweep is feedback only, and reaches every node
        for steps in (1, 2, 3, 12):
            assert plan.convolutions(steps) == hidden + 2 * hidden * (steps - 1)
    if schedule == "sync":  # one node further down in each sweep
        assert plan.convolutions(1) == 0
        assert plan.convolutions(2) == min(1, hidden)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", NETWORKS)
def test_phases_of_any_network(name: str, schedule: Any) -> None:
    net = NETWORKS[name]
    for steps in (1, 2, 5):
        free = compile_plan(net, schedule, "free")
        assert free.convolutions(steps) == expected(net, schedule, "free", "states", steps)
        delta = compile_plan(net, schedule, "nudged", form="delta", winners="frozen")
        assert delta.convolutions(steps) == expected(net, schedule, "nudged", "delta", steps)


@pytest.mark.parametrize("winners", ["live", "frozen"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nudged_states_start_from_the_kept_drives(schedule: Any, winners: Any) -> None:
    """Everything pooled: the first nudged sweep finds every drive of the equilibrium at hand."""
    net = chain(3, "max")
    everything = frozenset(range(3))
    plan = compile_plan(net, schedule, "nudged", winners=winners, warm=True, kept=everything)
    without = compile_plan(net, schedule, "nudged", winners=winners, warm=True)
    full = expected(net, schedule, "nudged", "states", 1)
    assert full == 2 * 2  # two hidden connections, up and down
    if schedule == "even_odd":  # node 2 moves first; node 3 then needs its drive again
        assert plan.convolutions(1) == full - 1
    else:  # sync: nothing has moved yet; sweep: top-down, no source has
        assert plan.convolutions(1) == full - 2
    stale = schedule == "even_odd" and winners == "live"  # node 2 needs its winners before it moves
    assert without.convolutions(1) == full + 1 + stale  # and the input's
    assert plan.convolutions(2) - plan.convolutions(1) == full
    assert not any(isinstance(launch, Drive) for launch in plan.prologue)
    assert without.prologue == (Drive(0),)


@pytest.mark.parametrize("pool", ["none", "max"])
def test_refresh_brings_the_stale_drives_up_to_date(pool: str) -> None:
    net = chain(3, pool)
    pooled = pool == "max"
    for schedule, stale in (("sweep", ()), ("even_odd", (1,)), ("sync", (1, 2))):
        plan = compile_plan(net, schedule, "free")
        assert plan.refresh == (tuple(Drive(c) for c in stale) if pooled else ())
        assert plan.convolutions(2, refresh=True) == plan.convolutions(2) + (len(stale) if pooled else 0)
        nudged = compile_plan(net, schedule, "nudged", form="delta", winners="frozen")
        assert nudged.refresh == ()


def test_first_sweeps_launch_by_launch() -> None:
    net = chain(3, "max")
    free = compile_plan(net, "sweep", "free")
    assert free.prologue == (Drive(0),)
    assert free.sweep(0) == (
        Step(1, (0,), (), (), False),
        Drive(1),
        Step(2, (1,), (), (), False),
        Drive(2),
        Step(3, (2,), (), (), False),
    )
    assert free.sweep(50) == free.sweep(1)
    assert free.sweep(1) == (
        Step(1, (0,), (), (1,), False),
        Drive(1),
        Step(2, (1,), (), (2,), False),
        Drive(2),
        Step(3, (2,), (), (), False),
    )
    nudged = compile_plan(net, "sweep", "nudged", form="tangent", winners="frozen")
    assert nudged.prologue == (Nudge(3),)
    assert nudged.sweep(0) == (
        Step(3, (), (), (), True),
        Step(2, (), (), (2,), False),
        Step(1, (), (), (1,), False),
    )
    delta = compile_plan(net, "sweep", "nudged", form="delta", winners="frozen")
    assert delta.prologue == ()
    assert delta.sweep(1)[:3] == (Drive(2), Nudge(3), Step(3, (2,), (), (), True))
    linear = compile_plan(net, "sweep", "nudged", form="delta", winners="frozen", linear_nudge=True)
    assert linear.prologue == (Nudge(3),)
    assert not any(isinstance(launch, Nudge) for launch in linear.sweep(1))


def test_an_unpooled_drive_is_convolved_into_its_step() -> None:
    free = compile_plan(chain(3, "none"), "sweep", "free")
    assert free.sweep(1) == (
        Step(1, (0,), (), (1,), False),
        Step(2, (), (1,), (2,), False),
        Step(3, (), (2,), (), False),
    )


# --- what really runs -------------------------------------------------------------------------------------------------


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        batch = args[0].shape[0] if args and isinstance(args[0], torch.Tensor) and args[0].dim() else 0
        self.calls.append((func.name().split(".")[0], batch))
        return func(*args, **(kwargs or {}))


def calls(backend: str, run: Callable[[], object]) -> list[tuple[str, int]]:
    """Name and batch of every ATen operator that ran."""
    if backend == "reference":
        with _Record() as record:
            run()
        return record.calls
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        run()
    return [(e.name, e.input_shapes[0][0] if e.input_shapes and e.input_shapes[0] else 0) for e in profile.events()]


def convolutions(backend: str, run: Callable[[], object], batch: int = 3) -> float:
    """How many convolutions of ``batch`` samples ran: one of twice as many samples counts twice."""
    return sum(samples for name, samples in calls(backend, run) if name in CONVOLUTIONS) / batch


def sizes(layers: int, free: int, nudged: int) -> tuple[int, int, int]:
    """Free phase, nudged phase and contrast of a chain in ``sweep``: DESIGN.md, fact 6. The contrast is two products
    (a difference and a mean at each end), of which the clamped input, that has no difference, needs one."""
    hidden = layers - 1
    return 1 + hidden + 2 * hidden * (free - 1), hidden + 2 * hidden * (nudged - 1), 2 * hidden + 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", ["none", "max", "some"])
@pytest.mark.parametrize(("free", "nudged"), [(2, 1), (4, 3)])
@pytest.mark.parametrize("estimator", ["tangent", "symmetric"])
def test_a_training_batch_runs_just_these_convolutions(
    estimator: Any, free: int, nudged: int, pool: str, backend: str
) -> None:
    layers = 3
    p = problem(chain(layers, pool))
    config = RelaxConfig(free_steps=free, nudged_steps=nudged, estimator=estimator)
    counts = sizes(layers, free, nudged)
    assert compile_plan(p.network, "sweep", "free").convolutions(free, refresh=True) == counts[0]
    form = config.nudge_form
    assert compile_plan(p.network, "sweep", "nudged", form=form, winners="frozen").convolutions(nudged) == counts[1]
    equilibrium = free_phase(p.network, p.parameters, p.x, config, keep=True, backend=backend)
    phases = nudged_phase(p.network, p.parameters, equilibrium, p.targets, config, backend=backend)
    runs: tuple[Callable[[], object], ...] = (
        lambda: free_phase(p.network, p.parameters, p.x, config, keep=True, backend=backend),
        lambda: nudged_phase(p.network, p.parameters, equilibrium, p.targets, config, backend=backend),
        lambda: contrast_gradients(p.network, p.parameters, equilibrium, phases, p.targets, backend=backend),
        lambda: ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend=backend),
    )
    both = 2 if estimator == "symmetric" else 1  # +beta and -beta are one batch of twice the size
    want = (counts[0], both * counts[1], counts[2])
    assert tuple(convolutions(backend, run) for run in runs) == (*want, sum(want))


def test_two_sweeps_and_one_cost_about_two_backprop_steps() -> None:
    for layers in (4, 8):
        backprop = layers + 2 * layers - 1  # forward, gradients of weights, and of inputs but the first
        total = sum(sizes(layers, 2, 1))
        assert total == 6 * layers - 4
        assert 1.8 < total / backprop < 2.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_other_schedules_run_what_their_plan_says(schedule: Any, backend: str) -> None:
    p = problem(chain(3, "max"))
    for steps in (1, 3):
        plan = compile_plan(p.network, schedule, "free", steps=steps)
        config = RelaxConfig(schedule, steps)
        for keep in (False, True):
            run = partial(free_phase, p.network, p.parameters, p.x, config, keep=keep, backend=backend)
            assert convolutions(backend, run) == plan.convolutions(steps, refresh=keep)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("form", ["states", "delta"])
def test_frozen_winners_are_never_recomputed(form: Any, schedule: Any) -> None:
    """No comparison runs in the nudged phases of the reference: its winners are gathered."""
    p = problem(NETWORKS["skips, max"])
    config = RelaxConfig(schedule, 3, 3, form=form)
    equilibrium = free_phase(p.network, p.parameters, p.x, config, keep=True, backend="reference")

    def run(c: RelaxConfig) -> list[str]:
        ran = calls(
            "reference",
            lambda: nudged_phase(p.network, p.parameters, equilibrium, p.targets, c, backend="reference"),
        )
        return [name for name, _ in ran]

    assert "aten::argmax" not in run(config)
    assert "aten::gather" in run(config)
    assert "aten::argmax" in run(replace(config, form="states", winners="live"))


# --- compilation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "random"}, "argument 'schedule': expected one of sync, even_odd, sweep, got 'random'"),
        ({"phase": "both"}, "argument 'phase': expected one of free, nudged, got 'both'"),
        ({"form": "log"}, "argument 'form': expected one of states, delta, tangent, got 'log'"),
        ({"winners": "thawed"}, "argument 'winners': expected one of live, frozen, got 'thawed'"),
        ({"form": "delta", "winners": "live"}, "expected 'states' unless the phase is nudged with frozen winners"),
        ({"form": "tangent", "phase": "free"}, "got 'tangent' with phase 'free' and winners 'frozen'"),
    ],
)
def test_unknown_names_are_refused_with_the_valid_ones(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"schedule": "sweep", "phase": "nudged", "form": "states", "winners": "frozen"}
    with pytest.raises(ValueError, match="compile_plan: ") as caught:
        compile_plan(chain(2, "max"), **(arguments | change))
    assert message in str(caught.value)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_clamped_nodes_are_read_and_never_updated(schedule: Any, form: Any) -> None:
    net, clamped = NETWORKS["no pooling, mse"], frozenset({4})
    plan = compile_plan(
        net, schedule, "nudged", form=form, winners="frozen", warm=form == "states", extra=frozenset({1}),
        clamped=clamped, steps=9,
    )  # fmt: skip
    launches = [*plan.prologue, *(launch for sweep in plan.sweeps for launch in sweep), *plan.refresh]
    steps = [launch for launch in launches if isinstance(launch, Step)]
    assert {step.node for step in steps} == {1, 2, 3}
    assert {launch.node for launch in launches if isinstance(launch, Nudge)} == {1}
    assert all(net.out_of[3][0] in step.above for step in steps if step.node == 3)  # from the first sweep on
    (top,) = net.into[4]
    assert Drive(top) not in launches


def test_order_of_the_updates() -> None:
    net = NETWORKS["skips, max"]
    assert net.levels == (0, 1, 2, 3, 4, 5, 6)
    assert update_order(net, "sync", "free") == (1, 2, 3, 4, 5, 6)
    assert update_order(net, "even_odd", "free") == update_order(net, "even_odd", "nudged") == (2, 4, 6, 1, 3, 5)
    assert update_order(net, "sweep", "free") == (1, 2, 3, 4, 5, 6)
    assert update_order(net, "sweep", "nudged") == (6, 5, 4, 3, 2, 1)


def test_a_plan_is_compiled_once() -> None:
    net = chain(3, "max")
    assert compile_plan(net, "sweep", "free") is compile_plan(replace(net), "sweep", "free")
    other = compile_plan(replace(net, feedback_gain=0.2), "sweep", "free")
    assert other == compile_plan(net, "sweep", "free")


def test_sweeps_of_a_long_relaxation_are_few() -> None:
    for schedule in SCHEDULES:
        assert len(compile_plan(chain(7, "some"), schedule, "free", steps=10_000).sweeps) <= 8
        assert len(compile_plan(chain(7, "some"), schedule, "free", steps=2).sweeps) <= 2
