"""Relaxations against classical EP written out, winners of the equilibrium, zero states, warm starts and the stop."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ep_kernels import (
    Network,
    Parameters,
    RelaxConfig,
    compile_plan,
    contrast_gradients,
    ep_gradients,
    free_phase,
    nudged_phase,
    reference,
    solver,
)
from ep_kernels.plan import SCHEDULES
from tests.core.nets import BACKENDS, NETWORKS, POOLED, VARIANTS, Problem, fitting, problem

# --- classical EP, in plain PyTorch -----------------------------------------------------------------------------------


def primitive(net: Network, states: list[Tensor], named: dict[str, Tensor]) -> Tensor:
    """Phi of the published codes, summed over the batch: what each layer is told by the layers below."""
    total = states[0].new_zeros(())
    for c, conn in enumerate(net.connections):
        weight, source, target = named[f"connections.{c}.weight"], states[conn.src], states[conn.dst]
        if conn.kernel_size is None:
            z = F.linear(source.flatten(1), weight)
        else:
            z = F.conv2d(source, weight, stride=conn.stride, padding=conn.padding)
            z = {"none": lambda z: z, "max": lambda z: F.max_pool2d(z, 2), "avg": lambda z: F.avg_pool2d(z, 2)}[
                conn.pool
            ](z)
        total = total + (target * z).sum()
    for i, s in enumerate(states[1:], 1):
        total = total + (s * named[f"nodes.{i}.bias"].view(-1, *[1] * (s.dim() - 2))).sum()
    return total


def losses(p: Problem, states: list[Tensor]) -> Tensor:
    total = states[0].new_zeros(())
    for h, head in enumerate(p.network.heads):
        feature = states[head.node]
        if head.pool is not None:
            feature = F.adaptive_avg_pool2d(feature, head.pool)
        weight, bias = p.parameters.head_weights[h], p.parameters.head_biases[h]
        if weight is not None:
            feature = F.conv2d(feature, weight, bias) if head.pointwise else F.linear(feature.flatten(1), weight, bias)
        if head.loss == "mse":
            total = total + head.weight * 0.5 * ((feature - p.targets[h]) ** 2).sum()
        else:
            log_p = F.log_softmax(feature / head.temperature, 1)
            total = total - head.weight * head.temperature**2 * (p.targets[h] * log_p).sum()
    return total


def classical(p: Problem, states: list[Tensor], steps: int, beta: float) -> list[Tensor]:
    """``s <- clip(gamma d(Phi - beta L)/ds)``, every layer at once."""
    named = p.parameters.named()
    for _ in range(steps):
        leaves = [s.detach().requires_grad_() for s in states]
        value = primitive(p.network, leaves, named) - beta * losses(p, leaves)
        rise = torch.autograd.grad(value, leaves[1:])
        states = [states[0], *((p.network.slope * g).clamp(0, 1) for g in rise)]
    return states


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_classical_form_is_classical_ep(name: str, backend: str) -> None:
    """The same trajectories, and the same gradients although winners flip between the phases."""
    p = problem(replace(NETWORKS[name], feedback_gain=1.0), gain=1.5)
    zero = [p.x, *(p.x.new_zeros(len(p.x), *shape) for shape in p.network.shapes[1:])]
    for free_steps, nudged_steps in ((1, 1), (2, 3), (7, 5)):
        config = RelaxConfig.classical(free_steps=free_steps, nudged_steps=nudged_steps, beta=0.5)
        equilibrium = free_phase(p.network, p.parameters, p.x, config, keep=True, backend=backend)
        free = classical(p, zero, free_steps, 0.0)
        for ours, theirs in zip(equilibrium.states, free, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
        nudged = nudged_phase(p.network, p.parameters, equilibrium, p.targets, config, backend=backend)
        plus, minus = (classical(p, free, nudged_steps, beta) for beta in (0.5, -0.5))
        for i in range(1, len(free)):
            delta = nudged.deltas[i]
            assert delta is not None
            torch.testing.assert_close(free[i] + delta.chunk(2)[0], plus[i], rtol=0, atol=1e-10)
            torch.testing.assert_close(free[i] + delta.chunk(2)[1], minus[i], rtol=0, atol=1e-10)
        got = contrast_gradients(p.network, p.parameters, equilibrium, nudged, p.targets, backend=backend).named()
        named = {n: t.clone().requires_grad_() for n, t in p.parameters.named().items() if not n.startswith("heads")}
        phi = primitive(p.network, plus, named) - primitive(p.network, minus, named)
        for key, g in zip(named, torch.autograd.grad(phi, list(named.values())), strict=True):
            torch.testing.assert_close(got[key], -g / (2 * 0.5 * len(p.x)), rtol=1e-9, atol=1e-10, msg=key)


# --- both backends ---------------------------------------------------------------------------------------------------

ALL = {**NETWORKS, **VARIANTS}
SETTINGS: list[dict[str, Any]] = [
    {"schedule": schedule, **options}
    for schedule in SCHEDULES
    for options in (
        {},
        {"estimator": "tangent"},
        {"estimator": "negative", "linear_nudge": True},
        {"form": "states", "estimator": "positive"},
        {"form": "states", "winners": "live", "damping": 0.7},
        {"tol": 0.05, "over_relaxation": 1.3, "beta": 0.5},
    )
]


@pytest.mark.parametrize("name", ALL)
def test_backends_agree(name: str) -> None:
    for settings in SETTINGS:
        config = RelaxConfig(**{"free_steps": 5, "nudged_steps": 4, "beta": 0.1} | settings)
        net = fitting(ALL[name], config)
        p = problem(replace(net, feedback_gain=max(net.feedback_gain, 0.25)), seed=8)  # its powers multiply rounding
        extra = {1: torch.full_like(p.states()[1], 0.01)}
        found, nudged, gradients = [], [], []
        for backend in BACKENDS:
            found.append(free_phase(p.network, p.parameters, p.x, config, keep=True, backend=backend))
            nudged.append(
                nudged_phase(p.network, p.parameters, found[-1], p.targets, config, extra=extra, backend=backend)
            )
            gradients.append(
                contrast_gradients(p.network, p.parameters, found[-1], nudged[-1], p.targets, backend=backend).named()
            )
        close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11, msg=f"{settings}")
        close(found[0].states, found[1].states)
        close(found[0].trace, found[1].trace)
        close(found[0].preactivations[1:], found[1].preactivations[1:])
        assert found[0].winners.keys() == found[1].winners.keys()
        assert all(torch.equal(found[0].winners[c], found[1].winners[c]) for c in found[0].winners)
        close(nudged[0].deltas[1:], nudged[1].deltas[1:])
        close(nudged[0].trace, nudged[1].trace)
        assert nudged[0].winners.keys() == nudged[1].winners.keys()
        close(gradients[0], gradients[1])
        assert all(bool(g.any()) for g in gradients[0].values()) or settings["schedule"] == "sync"


# --- winners ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", POOLED)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_winners_are_those_of_the_final_states(name: str, schedule: Any, backend: str) -> None:
    p = problem(POOLED[name], gain=1.5)
    moved = 0
    for steps, tol in ((1, 0.0), (2, 0.0), (5, 0.0), (40, 0.05)):
        config = RelaxConfig(schedule, steps, tol=tol)
        for start in (None, p.states()):
            found = free_phase(p.network, p.parameters, p.x, config, states=start, keep=True, backend=backend)
            assert tol == 0 or found.steps < steps or schedule == "sync"
            pooled = [c for c, conn in enumerate(p.network.connections) if conn.pool == "max"]
            assert sorted(found.winners) == pooled
            for c in pooled:
                conn = p.network.connections[c]
                source = found.states[conn.src]
                drive, winners = reference.drive(source, p.parameters.weights[c], conn.stride, conn.padding, "max")
                assert torch.equal(found.winners[c], winners)
                torch.testing.assert_close(found.drives[c], drive, rtol=0, atol=1e-12)
                if start is not None and conn.src:
                    _, before = reference.drive(
                        start[conn.src], p.parameters.weights[c], conn.stride, conn.padding, "max"
                    )
                    moved += int((before != winners).sum())
    assert moved > 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_frozen_winners_are_those_of_the_equilibrium(schedule: Any, backend: str) -> None:
    """A nudge so strong that live winners flip: frozen, the nudged energy keeps pooling where the equilibrium did."""
    p = problem(POOLED["skips, max"], gain=1.5)
    config = RelaxConfig(schedule, 4, 3, beta=5.0, form="states", estimator="positive")
    found = free_phase(p.network, p.parameters, p.x, config, keep=True, backend=backend)
    frozen = nudged_phase(p.network, p.parameters, found, p.targets, config, backend=backend)
    live = nudged_phase(p.network, p.parameters, found, p.targets, replace(config, winners="live"), backend=backend)
    states = list(found.states)
    sweep = compile_plan(p.network, schedule, "nudged", winners="frozen", warm=True).order
    for _ in range(config.nudged_steps):
        new = list(states)
        for node in sweep:
            new[node] = _frozen_update(p, found.winners, states if schedule == "sync" else new, node, config.beta)
        states = new
    different = False
    for i in range(1, len(states)):
        ours, other = frozen.deltas[i], live.deltas[i]
        assert ours is not None
        assert other is not None
        torch.testing.assert_close(found.states[i] + ours, states[i], rtol=0, atol=1e-11)
        different |= not torch.allclose(ours, other, rtol=0, atol=1e-3)
    assert different
    assert frozen.winners == {}
    assert sorted(live.winners) == sorted(found.winners)


def _frozen_update(p: Problem, winners: dict[int, Tensor], read: list[Tensor], node: int, beta: float) -> Tensor:
    """One node by autograd: the maps are gathered at the given winners."""
    net, w = p.network, p.parameters
    leaves = [s.detach().requires_grad_() for s in read]
    total = p.x.new_zeros(())
    for c, conn in enumerate(net.connections):
        up, _ = reference.drive(leaves[conn.src], w.weights[c], conn.stride, conn.padding, conn.pool, winners.get(c))
        total = total + net.feedback_gain ** net.levels[conn.dst] * (leaves[conn.dst] * up).sum()
    for i, s in enumerate(leaves[1:], 1):
        bias = w.biases[i]
        assert bias is not None
        total = total + net.feedback_gain ** net.levels[i] * (s * bias.view(-1, *[1] * (s.dim() - 2))).sum()
    total = total - beta * net.feedback_gain**net.top * losses(p, leaves)
    (a,) = torch.autograd.grad(total, leaves[node])
    return (net.slope * a / net.feedback_gain ** net.levels[node]).clamp(net.lo, net.hi)


# --- zeros, warm starts, the stop -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ["symmetric", "tangent"])
def test_a_nudge_comes_down_one_node_a_sweep_in_sync(estimator: Any, backend: str) -> None:
    net = Network.chain((2, 8, 8), [3] * 5, ["none", "max", "none", "none", "none"], classes=3, feedback_gain=0.5)
    p = problem(net, bias=0.5, gain=0.7, bias_spread=0.05)  # most units inside the box
    for steps in range(1, 8):
        config = RelaxConfig("sync", 3, steps, estimator=estimator)
        found = free_phase(net, p.parameters, p.x, config, keep=True, backend=backend)
        nudged = nudged_phase(net, p.parameters, found, p.targets, config, backend=backend)
        reached = [i for i in range(1, 6) if bool(nudged.deltas[i].any())]
        assert reached == list(range(max(1, 6 - steps), 6))
        assert (len(nudged.trace), len(nudged.deltas[1])) == (steps, 6 if estimator == "symmetric" else 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_warm_start_continues_a_relaxation(schedule: Any, backend: str) -> None:
    p = problem(NETWORKS["skips, max"])

    def run(steps: int, states: list[Tensor] | None = None) -> list[Tensor]:
        config = RelaxConfig(schedule, steps, over_relaxation=1.0)
        return free_phase(p.network, p.parameters, p.x, config, states=states, backend=backend).states

    for ours, theirs in zip(run(3, run(4)), run(7), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_and_early_stop(backend: str) -> None:
    p = problem(replace(NETWORKS["max"], feedback_gain=0.2))
    long = free_phase(p.network, p.parameters, p.x, RelaxConfig(free_steps=30), backend=backend)
    assert long.trace.shape == (30, len(p.x))
    assert torch.equal(long.residual, long.trace[-1])
    assert not long.converged
    assert float(long.residual.max()) < 1e-6
    tol = 1e-3
    short = free_phase(p.network, p.parameters, p.x, RelaxConfig(free_steps=30, tol=tol), backend=backend)
    assert short.converged
    assert 2 <= short.steps < 20
    assert short.trace.shape == (short.steps, len(p.x))
    torch.testing.assert_close(short.trace, long.trace[: short.steps])
    worst = short.trace.amax(1)
    assert float(worst[-1]) <= tol < float(worst[:-1].min())
    before, after = (
        free_phase(p.network, p.parameters, p.x, RelaxConfig(free_steps=n), backend=backend).states for n in (4, 5)
    )
    change = torch.stack([(a - b).abs().flatten(1).amax(1) for a, b in zip(after[1:], before[1:], strict=True)])
    torch.testing.assert_close(long.trace[4], change.amax(0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_over_relaxation_and_damping_by_hand(backend: str) -> None:
    """The first sweep goes to the target; later ones omega times as far, within the box."""
    net = Network.chain((2, 4, 4), [3, 3], ["none"] * 2, classes=2, feedback_gain=0.8)
    p = problem(net, bias=0.4)

    def run(steps: int, start: list[Tensor] | None = None, **options: Any) -> list[Tensor]:
        config = RelaxConfig(free_steps=steps, **options)
        return free_phase(net, p.parameters, p.x, config, states=start, backend=backend).states

    plain = run(1, over_relaxation=1.0)
    assert all(torch.equal(a, b) for a, b in zip(run(1, over_relaxation=1.4), plain, strict=True))
    first = plain[1]
    target = run(1, plain, over_relaxation=1.0)[1]
    torch.testing.assert_close(run(2, over_relaxation=1.4)[1], (first + 1.4 * (target - first)).clamp(0, 1))
    torch.testing.assert_close(run(1, plain, damping=0.3)[1], first + 0.3 * (target - first))
    assert float((target - first).abs().max()) > 0.1


def test_over_relaxation_is_for_sweeps_at_full_step_only() -> None:
    assert RelaxConfig(over_relaxation=1.3).free_damping(0.1) == 1.3
    assert RelaxConfig("sync", over_relaxation=1.3).free_damping(0.1) == 1.0
    assert RelaxConfig(damping=0.5, over_relaxation=1.3).free_damping(0.1) == 0.5
    assert RelaxConfig.classical().free_damping(1.0) == 1.0


def test_over_relaxation_follows_the_gain() -> None:
    """Young's optimum 2 / (1 + sqrt(1 - rho^2)) with rho^2 = 5 k, and a ceiling."""
    omegas = [RelaxConfig().free_damping(k) for k in (0.001, 0.02, 0.05, 0.1, 0.12, 1.0)]
    assert omegas == sorted(omegas)
    assert omegas[0] == pytest.approx(1.0, abs=2e-3)
    assert omegas[3] == pytest.approx(2 / (1 + 0.5**0.5))
    assert omegas[-1] == 1.25


def test_skip_connections_count_the_longest_path() -> None:
    net = NETWORKS["skips, max"]
    assert net.levels == (0, 1, 2, 3, 4, 5, 6)
    k = net.feedback_gain
    spans = [net.levels[c.dst] - net.levels[c.src] for c in net.connections]
    assert spans == [1, 1, 2, 1, 2, 1, 3, 1, 3, 1]
    assert [net.feedback_coefficient(c) for c in range(10)] == [k**span for span in spans]
    assert [net.nudge_coefficient(i) for i in range(7)] == [k ** (6 - i) for i in range(7)]
    diamond = Network(
        ((2, 4, 4),) + ((3, 4, 4),) * 4,
        tuple(
            replace(net.connections[0], src=a, dst=b)
            for a, b in ((0, 1), (0, 2), (1, 3), (2, 3), (0, 4), (2, 4), (3, 4))
        ),
        replace(net.readout, node=4, outputs=3, loss="cross_entropy"),
    )
    assert diamond.levels == (0, 1, 1, 2, 3)
    assert diamond.top == 3


def test_unreached_nodes_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Three synchronous sweeps carry a nudge through three layers of four: the lowest one gets a warning."""
    net = Network.chain((2, 8, 8), [3, 4, 5, 6], ["none"] * 4, classes=3, feedback_gain=0.37)
    p = problem(net)
    for config, expected in ((RelaxConfig("sync", 5, 3), "nodes [1]"), (RelaxConfig("sweep", 5, 1), "")):
        caplog.clear()
        gradients, _ = ep_gradients(net, p.parameters, p.x, p.targets, config)
        assert expected in caplog.text
        assert bool(gradients.weights[0].any()) == (not expected)
        assert bool(caplog.text) == bool(expected)


@pytest.mark.parametrize(
    ("k", "beta", "change", "said"),
    [  # four layers; cosines of the lowest one's gradient to that in float64
        (0.1, 0.2, {}, ""),  # 0.998
        (0.1, 0.01, {}, ""),  # 0.999
        (0.1, 1e-3, {}, "or beta of 0.004 and more"),  # 0.89
        (0.1, 0.2, {"estimator": "positive"}, ""),  # 0.986
        (0.1, 0.01, {"estimator": "positive"}, "or beta of 0.06 and more"),  # 0.26
        (0.1, 0.2, {"storage": torch.float16}, "Use form='delta'"),  # 0.07
        (0.02, 0.01, {}, "or beta of 0.5 and more"),  # 0.33
        (1.0, 1e-3, {}, ""),  # 0.999
        (0.1, 1e-3, {"estimator": "five_phase"}, "or beta of 0.004 and more"),
        (0.1, 1e-6, {"form": "delta"}, ""),
        (0.1, 1e-3, {"dtype": torch.float64}, ""),
    ],
)
def test_a_beta_too_small_for_states_is_reported(
    k: float, beta: float, change: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    solver._warn_small_beta.cache_clear()
    options = {"form": "states", "dtype": torch.float32} | change
    dtype = options.pop("dtype")
    p = problem(replace(NETWORKS["max"], feedback_gain=k))
    parameters = Parameters.from_named(p.network, {name: t.to(dtype) for name, t in p.parameters.named().items()})
    targets = [t.to(dtype) for t in p.targets]
    config = RelaxConfig(beta=beta, nudged_steps=4, **options)
    with caplog.at_level("WARNING", "ep_kernels"):
        for _ in range(2):
            ep_gradients(p.network, parameters, p.x.to(dtype), targets, config)
    assert len(caplog.records) == bool(said)
    assert said in caplog.text
    assert ("or beta" in caplog.text) == ("or beta" in said)
