"""Holomorphic EP against autograd through the same smooth dynamics at their equilibrium, in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ep_kernels import Connection, Head, Network, Parameters, RelaxConfig, holomorphic, holomorphic_gradients
from tests.core.nets import NETWORKS, Problem, cosine, problem
from tests.core.threads import one_thread  # noqa: F401  (autouse)

CONFIG = RelaxConfig(free_steps=80, nudged_steps=80)

NETS: dict[str, Network] = {
    "max, local and tied heads": Network(
        ((2, 8, 8), (3, 4, 4), (4, 4, 4), (5,)),
        (*NETWORKS["slope 1/2, local heads"].connections[:2], Connection(2, 3, None)),
        Head(3, 3),
        (Head(1, 3, pool=2, weight=0.3), Head(3, 3, temperature=2.0, weight=0.5, tied=0),
         Head(2, 2, loss="mse", pointwise=True, weight=0.1)),
        feedback_gain=0.6,
    ),
    "average, mse, k 1": Network.chain(
        (2, 7, 6), [3, 4], ["avg", "none"], classes=3, hidden=[5], readout="mse", feedback_gain=1.0
    ),
    "skips, linear output": replace(NETWORKS["skips, average"], linear_nodes=(6,), feedback_gain=0.5),
}  # fmt: skip
ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}


def small(name: str) -> Problem:
    return problem(NETS[name], seed=3, batch=2, gain=0.45)


def energy(p: Problem, states: list[Tensor], named: dict[str, Tensor]) -> Tensor:
    """``sum_l k^l <s^l, b^l + drives>``, with torch's own pooling."""
    net = p.network
    total = p.x.new_zeros(())
    for i in range(1, len(net.shapes)):
        total = (
            total
            + net.feedback_gain ** net.levels[i]
            * (states[i] * named[f"nodes.{i}.bias"].view(-1, *[1] * (states[i].dim() - 2))).sum()
        )
    for c, conn in enumerate(net.connections):
        weight, source = named[f"connections.{c}.weight"], states[conn.src]
        if conn.kernel_size is None:
            z = F.linear(source.flatten(1), weight)
        else:
            z = F.conv2d(source, weight, stride=conn.stride, padding=conn.padding)
            if conn.pool != "none":
                z = (F.max_pool2d if conn.pool == "max" else F.avg_pool2d)(z, 2)
        total = total + net.feedback_gain ** net.levels[conn.dst] * (states[conn.dst] * z).sum()
    return total


def loss(p: Problem, states: list[Tensor], named: dict[str, Tensor]) -> Tensor:
    total = p.x.new_zeros(())
    for h, head in enumerate(p.network.heads):
        own = h if head.tied is None else head.tied
        z = states[head.node]
        if head.pool is not None:
            z = F.adaptive_avg_pool2d(z, head.pool)
        if head.pointwise:
            z = F.conv2d(z, named[f"heads.{own}.weight"], named[f"heads.{own}.bias"])
        elif head.outputs is not None:
            z = F.linear(z.flatten(1), named[f"heads.{own}.weight"], named[f"heads.{own}.bias"])
        if head.loss == "mse":
            one = 0.5 * (z - p.targets[h]).square().flatten(1).sum(1)
        else:
            tau = head.temperature
            one = -(tau**2) * (p.targets[h] * F.log_softmax(z / tau, 1)).sum(1)
        total = total + head.weight * one.mean()
    return total


def activated(p: Problem, activation: str, states: list[Tensor], slopes: tuple[Tensor, ...]) -> list[Tensor]:
    """One synchronous update from the energy's slopes."""
    net, out = p.network, [p.x]
    for i, slope in enumerate(slopes, 1):
        a = net.slope * slope / net.feedback_gain ** net.levels[i]
        out.append(a if i in net.linear_nodes else ACTIVATIONS[activation](a))
    return out


def truth(p: Problem, activation: str = "sigmoid", steps: int = 80) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Autograd through synchronous sweeps that have converged."""
    named = {name: t.clone().requires_grad_() for name, t in p.parameters.named().items()}
    now = [p.x, *(p.x.new_zeros(len(p.x), *shape) for shape in p.network.shapes[1:])]
    for t in range(2 * steps):
        if t == steps:
            now = [s.detach() for s in now]
        leaves = [s if s.requires_grad else s.detach().requires_grad_() for s in now[1:]]
        total = energy(p, [p.x, *leaves], named)
        slopes = torch.autograd.grad(total, leaves, create_graph=t >= steps)
        before, now = now, activated(p, activation, now, slopes)
        if t < steps:
            now = [s.detach() for s in now]
    assert max(float((a - b).detach().abs().max()) for a, b in zip(now[1:], before[1:], strict=True)) < 1e-12
    found = torch.autograd.grad(loss(p, now, named), list(named.values()))
    return dict(zip(named, found, strict=True)), [s.detach() for s in now]


def error(got: Parameters, want: dict[str, Tensor]) -> float:
    assert got.named().keys() == want.keys()
    return max(float((g - want[name]).norm() / want[name].norm()) for name, g in got.named().items())


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
@pytest.mark.parametrize("name", NETS)
def test_many_points_are_the_true_gradient(name: str, activation: Any) -> None:
    p = small(name)
    want, states = truth(p, activation)
    got, free = holomorphic_gradients(
        p.network, p.parameters, p.x, p.targets, CONFIG, points=12, radius=0.1, activation=activation
    )
    for ours, theirs in zip(free.states, states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    assert error(got, want) < 1e-7
    assert (
        error(
            holomorphic_gradients(
                p.network, p.parameters, p.x, p.targets, CONFIG, points=2, radius=0.1, activation=activation
            )[0],
            want,
        )
        > 1e-5
    )


@pytest.mark.parametrize("name", NETS)
def test_the_error_falls_exponentially_with_the_points(name: str) -> None:
    """Error of order radius^N: every two points divide it by about the same factor, at a finite radius."""
    p = small(name)
    want, _ = truth(p)
    errors = [
        error(holomorphic_gradients(p.network, p.parameters, p.x, p.targets, CONFIG, points=n, radius=0.2)[0], want)
        for n in (2, 4, 6, 8)
    ]
    print(name, errors)
    assert errors[0] > 1e-4  # symmetric EP is biased there
    factors = [b / a for a, b in pairwise(errors)]
    assert max(factors) < 0.25, errors
    assert errors[-1] < 1e-2 * errors[0]


@pytest.mark.parametrize("points", [2, 3, 4])
def test_order_of_the_error_in_the_radius(points: int) -> None:
    p = small("average, mse, k 1")
    want, _ = truth(p)
    errors = [
        error(holomorphic_gradients(p.network, p.parameters, p.x, p.targets, CONFIG, points=points, radius=r)[0], want)
        for r in (0.1, 0.05, 0.025)
    ]
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([points] * 2, abs=0.2), errors


@pytest.mark.parametrize("schedule", ["sync", "even_odd", "sweep"])
@pytest.mark.parametrize("name", NETS)
def test_two_points_are_the_symmetric_estimator(name: str, schedule: Any) -> None:
    """``(dF/dW at +r - dF/dW at -r) / (2 r)`` of the smooth network, relaxed and differentiated here."""
    p = small(name)
    config = replace(CONFIG, schedule=schedule, free_steps=100, nudged_steps=100)
    net, radius = p.network, 0.3
    got, free = holomorphic_gradients(net, p.parameters, p.x, p.targets, config, points=2, radius=radius)
    named = {key: t.clone().requires_grad_() for key, t in p.parameters.named().items()}
    batch, gradients = len(p.x), {}
    for sign in (1, -1):
        now = free.states
        for _ in range(100):
            leaves = [s.detach().requires_grad_() for s in now[1:]]
            total = energy(p, [p.x, *leaves], named)
            nudge = radius * sign * batch * net.feedback_gain**net.top * loss(p, [p.x, *leaves], named)
            now = activated(p, "sigmoid", now, torch.autograd.grad(total - nudge, leaves))
        assert max(float((a - b).detach().abs().max()) for a, b in zip(now[1:], leaves, strict=True)) < 1e-12
        total = -energy(p, now, named) / (batch * net.feedback_gain**net.top) + radius * sign * loss(p, now, named)
        gradients[sign] = torch.autograd.grad(total, list(named.values()))
    for key, plus, minus in zip(named, gradients[1], gradients[-1], strict=True):
        want = (plus - minus) / (2 * radius)
        assert float((got.named()[key] - want).norm()) <= 1e-8 * float(want.norm()), key


def test_what_the_equilibrium_says() -> None:
    p = small("max, local and tied heads")
    _, free = holomorphic_gradients(p.network, p.parameters, p.x, p.targets, replace(CONFIG, tol=1e-9))
    assert free.converged
    assert free.steps < 80
    assert free.trace.shape == (free.steps, 2)
    assert float(free.residual.max()) <= 1e-9 < float(free.trace[-2].max())
    _, short = holomorphic_gradients(p.network, p.parameters, p.x, p.targets, replace(CONFIG, free_steps=3))
    assert (short.steps, short.converged) == (3, None)
    assert [tuple(s.shape) for s in short.states] == [(2, *shape) for shape in p.network.shapes]


def test_an_empty_batch_gives_zero_gradients() -> None:
    p = problem(NETS["max, local and tied heads"], batch=0)
    config = replace(CONFIG, free_steps=2, tol=1e-3)
    got, _ = holomorphic_gradients(p.network, p.parameters, p.x, p.targets, config)
    assert {k: tuple(t.shape) for k, t in got.named().items()} == Parameters.shapes(p.network)
    assert not any(bool(t.any()) for t in got.named().values())


def test_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    """What the nudge does not change is left out of the sum, so float32 has digits for the lowest layer (0.67 if not);
    where it has none, a warning asks for float64."""
    holomorphic._warn_rounding.cache_clear()
    for k, said in ((0.3, False), (0.1, True)):
        net = Network.chain((2, 8, 8), [4] * 4, ["none"] * 4, classes=3, feedback_gain=k)
        p = problem(net, seed=3, batch=4)
        single = Parameters.from_named(net, {key: t.float() for key, t in p.parameters.named().items()})
        targets = [t.float() for t in p.targets]
        config = RelaxConfig(free_steps=20, nudged_steps=20)
        want, _ = holomorphic_gradients(net, p.parameters, p.x, p.targets, config)
        assert not caplog.records
        for _ in range(2):
            got, _ = holomorphic_gradients(net, single, p.x.float(), targets, config)
        assert min(cosine(t, want.named()[key]) for key, t in got.named().items()) > (0.95 if said else 0.999)
        assert ("Use float64" in caplog.text) == said
        assert len(caplog.records) == said


def test_phases_that_do_not_converge_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    holomorphic._warn_unsettled.cache_clear()
    p = small("average, mse, k 1")
    for change, radius, said in (({}, 0.2, False), ({}, 10.0, True), ({"nudged_steps": 1}, 0.2, True)):
        caplog.clear()
        got, _ = holomorphic_gradients(
            p.network, p.parameters, p.x, p.targets, replace(CONFIG, **change), radius=radius
        )
        assert all(bool(t.isfinite().all()) for t in got.named().values())
        assert ("had not converged" in caplog.text) == said


def test_tensors_are_checked() -> None:
    p = small("average, mse, k 1")
    net, named = p.network, p.parameters.named()
    half = Parameters.from_named(net, {key: t.float() for key, t in named.items()})
    for parameters, x, targets, message in (
        (p.parameters, p.x[:, :1], p.targets, "argument 'x': expected shape"),
        (half, p.x, p.targets, "argument 'parameters: connections.0.weight': expected torch.float64"),
        (p.parameters, p.x, [], r"argument 'targets': expected 1 \(one per head\), got 0"),
        (p.parameters, p.x, [p.targets[0][:1]], r"argument 'targets\[0\]': expected shape \[2, 3\]"),
    ):
        with pytest.raises(ValueError, match=f"holomorphic_gradients: {message}"):
            holomorphic_gradients(net, parameters, x, targets, CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": 1}, "argument 'points': expected an integer >= 2, got 1"),
        ({"radius": 0.0}, "argument 'radius': expected a finite number > 0, got 0.0"),
        ({"activation": "relu"}, "argument 'activation': expected one of sigmoid, tanh, got 'relu'"),
        ({"config": RelaxConfig(operands="tf32")}, "argument 'config': expected operands=None"),
        ({"config": RelaxConfig(storage=torch.float16)}, "argument 'config': expected storage=None"),
    ],
)
def test_arguments(change: dict[str, Any], message: str) -> None:
    p = small("average, mse, k 1")
    arguments = {"config": CONFIG} | change
    with pytest.raises(ValueError, match=message):
        holomorphic_gradients(p.network, p.parameters, p.x, p.targets, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feedback": "separate"}, "expected tied feedback"),
        ({"readout": Head(4, None, loss="cosine")}, "expected heads of cross_entropy or mse"),
    ],
)
def test_networks_without_a_holomorphic_energy(change: dict[str, Any], message: str) -> None:
    p = small("average, mse, k 1")
    with pytest.raises(ValueError, match=message):
        holomorphic_gradients(replace(p.network, **change), p.parameters, p.x, p.targets, CONFIG)
