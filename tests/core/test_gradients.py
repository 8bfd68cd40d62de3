"""EP against the gradient of the loss at the equilibrium: finite differences, BPTT to convergence, every estimator.

The networks are small, in float64 and relaxed until nothing moves; tests/core/test_quality.py asks how good few sweeps
are.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ep_kernels import (
    Connection,
    Head,
    Network,
    Parameters,
    RelaxConfig,
    ep_gradients,
    free_phase,
    nudged_phase,
    reference,
    solver,
)
from ep_train.bptt import bptt_gradients, loss_at
from tests.core.nets import BACKENDS, NETWORKS, Problem, cosine, problem

CONVERGED = RelaxConfig(free_steps=400, nudged_steps=400, tol=1e-14, over_relaxation=1.0, beta=1e-3)
ESTIMATORS = ("symmetric", "positive", "negative", "tangent")


def random_skips(seed: int) -> Network:
    """A random graph of maps of one size: each node reads one or two earlier ones."""
    generator = torch.Generator().manual_seed(seed)
    connections = []
    for node in range(1, 6):
        sources = {node - 1 if node < 5 else int(torch.randint(1, node, (), generator=generator))}
        sources.add(int(torch.randint(0, node, (), generator=generator)))
        for source in sorted(sources):
            size = (3, 3) if len(connections) % 2 else (1, 3)
            connections.append(Connection(source, node, size, padding=(size[0] // 2, 1)))
    for node in range(1, 6):  # every node is read by something
        if not any(c.src == node for c in connections) and node < 5:
            connections.append(Connection(node, 5))
    local = (Head(2, 3, pool=2, weight=0.5),)
    return Network(((2, 5, 4), *(((3, 5, 4),) * 5)), tuple(connections), Head(5, 3, pool=2), local, 0.5)


# name: network, gain of the weights (small enough to converge), mean bias
CASES: dict[str, tuple[Network, float, float]] = {
    "k 1, none, mse": (NETWORKS["no pooling, mse"], 0.4, 0.3),
    "k 0.25, average": (NETWORKS["average, odd maps"], 1.0, 0.2),
    "k 0.8, skips, average, 4 heads": (NETWORKS["skips, average"], 0.4, 0.3),
    "k 0.6, slope 1/2, local heads": (
        Network.chain(
            (2, 8, 8),
            [3, 4, 4],
            ["avg", "none", "avg"],
            classes=3,
            hidden=[5],
            local_heads=[1, 3],
            local_weight=0.4,
            feedback_gain=0.6,
            slope=0.5,
        ),
        1.0,
        0.4,
    ),
    **{f"random skips {seed}": (random_skips(seed), 0.4, 0.4) for seed in range(3)},
}


def case(name: str) -> Problem:
    network, gain, bias = CASES[name]
    return problem(network, seed=7, batch=4, gain=gain, bias=bias, bias_spread=0.2)


def truth(p: Problem) -> tuple[Parameters, list[Tensor]]:
    """BPTT through the converged dynamics."""
    config = replace(CONVERGED, nudged_steps=1)
    gradients, states, _ = bptt_gradients(p.network, p.parameters, p.x, p.targets, config, steps=300, free_steps=400)
    return gradients, states


def loss_of(p: Problem, named: dict[str, Tensor], extra: dict[int, Tensor] | None = None) -> Tensor:
    parameters = Parameters.from_named(p.network, named)
    found = free_phase(p.network, parameters, p.x, CONVERGED, backend="cpu")
    assert found.converged
    total = loss_at(p.network, parameters, found.states, p.targets)
    for node, slope in (extra or {}).items():
        total = total + (slope * found.states[node]).flatten(1).sum(1).mean()
    return total


def finite_differences(p: Problem, extra: dict[int, Tensor] | None = None) -> dict[str, tuple[Tensor, float]]:
    """Per tensor, a random direction and the derivative of the equilibrium's loss along it."""
    generator = torch.Generator().manual_seed(11)
    named = p.parameters.named()
    out = {}
    for name, tensor in named.items():
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        step = 1e-5
        up, down = (loss_of(p, {**named, name: tensor + sign * step * direction}, extra) for sign in (1, -1))
        out[name] = direction, float(up - down) / (2 * step)
    return out


def assert_along(gradients: Parameters, slopes: dict[str, tuple[Tensor, float]], tolerance: float) -> None:
    """Every tensor's derivative along its direction, to ``tolerance`` of the gradient's norm times the direction's."""
    for name, gradient in gradients.named().items():
        direction, slope = slopes[name]
        size = float(gradient.norm() * direction.norm()) / math.sqrt(gradient.numel())
        assert size > 0
        assert abs(float((gradient * direction).sum()) - slope) <= tolerance * max(size, abs(slope)), name


@pytest.mark.parametrize("name", CASES)
def test_bptt_and_ep_are_the_derivative_of_the_loss(name: str) -> None:
    p = case(name)
    slopes = finite_differences(p)
    assert_along(truth(p)[0], slopes, 1e-6)
    got, equilibrium = ep_gradients(p.network, p.parameters, p.x, p.targets, replace(CONVERGED, estimator="tangent"))
    assert equilibrium.converged
    inside = [float(((s > 0) & (s < 1)).double().mean()) for s in equilibrium.states[1:]]
    assert min(inside) > 0.1  # the dynamics are not saturated away
    assert_along(got, slopes, 1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("name", "backend"), [*((name, "cpu") for name in CASES), ("random skips 0", "reference")])
def test_ep_is_the_true_gradient(name: str, estimator: Any, backend: str) -> None:
    p = case(name)
    want, states = truth(p)
    config = replace(CONVERGED, estimator=estimator)
    got, equilibrium = ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend=backend)
    for ours, theirs in zip(equilibrium.states, states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    assert got.named().keys() == want.named().keys()
    for key, theirs in want.named().items():
        ours = got.named()[key]
        assert cosine(ours, theirs) > 0.9999, key
        assert float(ours.norm() / theirs.norm()) == pytest.approx(1, abs=1e-2), key
        if estimator == "tangent":  # no finite beta: as exact as the convergence
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-8, key


def smooth() -> Problem:
    """Every unit inside the box, so that only the curvature of the loss separates EP from the gradient."""
    net = Network.chain((2, 6, 6), [4, 4, 4], ["avg", "none", "none"], classes=3, local_heads=[2], feedback_gain=0.5)
    return problem(net, batch=4, gain=0.4, bias=0.4, bias_spread=0.02)


def error(p: Problem, want: Parameters, config: RelaxConfig, backend: str) -> float:
    got, equilibrium = ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend=backend)
    assert all(bool(((s > 0) & (s < 1)).all()) for s in equilibrium.states[1:])
    pairs = zip(got.named().values(), want.named().values(), strict=True)
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["delta", "states"])
@pytest.mark.parametrize(("estimator", "order"), [("symmetric", 2), ("positive", 1), ("negative", 1)])
def test_order_of_the_error_in_beta(estimator: Any, order: int, form: Any, backend: str) -> None:
    p = smooth()
    want, _ = truth(p)
    base = replace(CONVERGED, estimator=estimator, form=form, tol=1e-12)
    errors = [error(p, want, replace(base, beta=beta), backend) for beta in (0.4, 0.2, 0.1)]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes == pytest.approx([order] * 2, abs=0.15), (errors, slopes)
    assert errors[-1] > 1e-7


def test_a_linear_nudge_makes_every_beta_the_tangent() -> None:
    """In the box with a nudge that does not change, the nudged phase is linear in beta."""
    p = smooth()
    want, _ = truth(p)
    config = replace(CONVERGED, linear_nudge=True, estimator="positive")
    got = [ep_gradients(p.network, p.parameters, p.x, p.targets, replace(config, beta=b))[0] for b in (0.2, 0.4)]
    for c in range(3):
        assert cosine(got[0].weights[c], want.weights[c]) > 0.99
        torch.testing.assert_close(
            _without_quadratic(got[0].weights[c], got[1].weights[c]), want.weights[c], rtol=1e-6, atol=1e-9
        )


def _without_quadratic(half: Tensor, full: Tensor) -> Tensor:
    """The contrast is quadratic in the deltas: Richardson extrapolation to beta 0."""
    return 2 * half - full


@pytest.mark.parametrize("schedule", ["sync", "even_odd", "sweep"])
@pytest.mark.parametrize("name", ["k 1, none, mse", "k 0.8, skips, average, 4 heads"])
def test_forms_and_schedules_find_the_same_gradient(name: str, schedule: Any) -> None:
    p = case(name)
    base = replace(CONVERGED, beta=0.05)
    want, _ = ep_gradients(p.network, p.parameters, p.x, p.targets, base)
    for form in ("delta", "states"):
        config = replace(base, schedule=schedule, form=form)
        got, equilibrium = ep_gradients(p.network, p.parameters, p.x, p.targets, config)
        assert equilibrium.converged
        for key, theirs in want.named().items():
            assert float((got.named()[key] - theirs).norm()) <= 1e-8 * float(theirs.norm()), (key, form)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ["symmetric", "tangent"])
def test_scales_change_nothing(estimator: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Powers of two are exact; float64 has room enough to do without."""
    p = problem(NETWORKS["skips, max"])
    config = RelaxConfig(free_steps=3, nudged_steps=4, estimator=estimator)
    want, _ = ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend=backend)
    found = free_phase(p.network, p.parameters, p.x, config, keep=True, backend=backend)
    before = nudged_phase(p.network, p.parameters, found, p.targets, config, backend=backend)
    assert before.scales == solver.delta_scales(p.network, 1.0 if estimator == "tangent" else config.beta)
    monkeypatch.setattr(solver, "delta_scales", lambda network, beta: [1.0] * len(network.shapes))
    got, _ = ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend=backend)
    after = nudged_phase(p.network, p.parameters, found, p.targets, config, backend=backend)
    torch.testing.assert_close(before.trace, after.trace, rtol=1e-9, atol=0)  # in the states' units
    for key, theirs in want.named().items():
        torch.testing.assert_close(got.named()[key], theirs, rtol=1e-9, atol=1e-12 * float(theirs.abs().max()))


def test_scales_bring_every_delta_to_order_one() -> None:
    net = Network.chain((3, 16, 16), [8] * 8, ["none"] * 8, classes=10, feedback_gain=0.02)
    p = problem(net, batch=2)
    config = RelaxConfig(free_steps=4, nudged_steps=2, beta=1e-4)
    found = free_phase(net, p.parameters, p.x, config, keep=True)
    nudged = nudged_phase(net, p.parameters, found, p.targets, config)
    for node in range(1, 9):
        scale, delta = nudged.scales[node], nudged.deltas[node]
        assert math.frexp(scale)[0] == 0.5  # a power of two
        assert 0.5 < scale * config.beta * net.nudge_coefficient(node) < 2
        assert delta is not None
        assert 1e-3 < float(delta.abs().max()) < 1e2


# --- further losses ---------------------------------------------------------------------------------------------------


def test_an_extra_nudge_adds_a_linear_loss() -> None:
    """``extra`` is dL/ds per sample: for L = mean <g, s^l>, the loss gains just that."""
    p = case("k 0.8, skips, average, 4 heads")
    generator = torch.Generator().manual_seed(2)
    extra = {
        node: 0.1 * torch.randn(4, *p.network.shapes[node], generator=generator, dtype=torch.float64) for node in (2, 5)
    }
    config = replace(CONVERGED, estimator="tangent")
    got, _ = ep_gradients(p.network, p.parameters, p.x, p.targets, config, extra=extra)
    slopes = finite_differences(p, extra)
    assert_along(got, slopes, 1e-6)
    without, _ = ep_gradients(p.network, p.parameters, p.x, p.targets, config)
    with pytest.raises(AssertionError):
        assert_along(without, slopes, 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_extra_nudge_equals_the_head_that_it_stands_for(estimator: Any, backend: str) -> None:
    """With linear nudges, a local head and its gradient at the equilibrium given as ``extra`` are the same."""
    full = NETWORKS["slope 1/2, local heads"]
    p = problem(full)
    bare = replace(full, local_heads=())
    config = RelaxConfig(free_steps=6, nudged_steps=5, linear_nudge=True, estimator=estimator)
    want, equilibrium = ep_gradients(full, p.parameters, p.x, p.targets, config, backend=backend)
    extra: dict[int, Tensor] = {}
    for h, head in enumerate(full.local_heads, 1):
        weight, bias = p.parameters.head_weights[h], p.parameters.head_biases[h]
        extra[head.node] = reference.head_gradient(head, equilibrium.states[head.node], weight, bias, p.targets[h])
    less = Parameters(
        p.parameters.weights, p.parameters.biases, p.parameters.head_weights[:1], p.parameters.head_biases[:1]
    )
    got, _ = ep_gradients(bare, less, p.x, p.targets[:1], config, extra=extra, backend=backend)
    for key, ours in got.named().items():
        torch.testing.assert_close(ours, want.named()[key], rtol=1e-10, atol=1e-13, msg=key)


def test_gradients_are_batch_means() -> None:
    """Twice the same batch has the same gradients; a batch is the mean of its samples."""
    p = problem(NETWORKS["skips, max"], batch=3)
    config = RelaxConfig(free_steps=3, nudged_steps=3)

    def run(rows: list[int]) -> dict[str, Tensor]:
        targets = [t[rows] for t in p.targets]
        return ep_gradients(p.network, p.parameters, p.x[rows], targets, config)[0].named()

    whole, twice, singles = run([0, 1, 2]), run([0, 1, 2, 0, 1, 2]), [run([i]) for i in range(3)]
    for key, gradient in whole.items():
        torch.testing.assert_close(twice[key], gradient, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(sum(s[key] for s in singles) / 3, gradient, rtol=1e-9, atol=1e-13)
