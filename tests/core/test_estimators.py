"""Estimators against their definitions: five phases, contrastive learning, coupled learning; in float64."""

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
    RelaxConfig,
    ep_gradients,
    free_phase,
    nudged_gradients,
    nudged_phase,
    reference,
)
from tests.core.nets import BACKENDS, NETWORKS, Problem, cosine, problem
from tests.core.test_gradients import CONVERGED, error, smooth, truth

# --- five phases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["delta", "states"])
def test_five_phases_have_an_error_of_beta_to_the_fourth(form: Any, backend: str) -> None:
    p = smooth()
    want, _ = truth(p)
    base = replace(CONVERGED, estimator="five_phase", form=form, tol=1e-13)
    errors = [error(p, want, replace(base, beta=beta), backend) for beta in (0.2, 0.1, 0.05)]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes == pytest.approx([4, 4], abs=0.2), (errors, slopes)
    symmetric = error(p, want, replace(base, estimator="symmetric", beta=0.2), backend)
    assert errors[0] < 0.1 * symmetric


def test_five_phases_are_two_symmetric_gradients() -> None:
    """``(4 g(beta) - g(2 beta)) / 3``, heads and biases too; the nudged phases returned are those at beta."""
    p = problem(NETWORKS["slope 1/2, local heads"])
    config = RelaxConfig(beta=0.1)
    found = free_phase(p.network, p.parameters, p.x, config, keep=True)
    one, two = (
        nudged_gradients(p.network, p.parameters, found, p.targets, replace(config, beta=b))[0].named()
        for b in (0.1, 0.2)
    )
    got, nudged = nudged_gradients(p.network, p.parameters, found, p.targets, replace(config, estimator="five_phase"))
    assert (nudged.beta, nudged.phases) == (0.1, 2)
    for key, ours in got.named().items():
        torch.testing.assert_close(ours, (4 * one[key] - two[key]) / 3)


# --- clamped output units ---------------------------------------------------------------------------------------------

MAX = Network.chain((2, 8, 8), [4, 5], ["max", "max"], classes=3, hidden=[6], readout="mse", feedback_gain=0.6)
CLAMPED: dict[str, tuple[Network, float]] = {
    "no pooling, k 1": (NETWORKS["no pooling, mse"], 0.4),
    "max": (MAX, 0.7),
    "linear output": (replace(MAX, linear_nodes=(4,)), 0.7),
    "local heads": (replace(NETWORKS["skips, average"], feedback_gain=0.5), 0.7),
}


def clamped_problem(name: str) -> Problem:
    network, gain = CLAMPED[name]
    p = problem(network, seed=6, batch=3, gain=gain, bias=0.3)
    generator = torch.Generator().manual_seed(0)
    p.targets[0] = torch.rand(3, 3 if network is not CLAMPED["local heads"][0] else 4, generator=generator).double()
    return p


def by_hand(p: Problem, eta: float, *, frozen: bool, steps: int = 60) -> dict[str, Tensor]:
    """``k^-N (dE/dW at the clamped equilibrium - dE/dW at the free one) / eta`` by autograd of the energy.

    The clamped equilibrium is found here, by block updates with autograd's slopes of E + eta k^N L(local heads).
    """
    net, top = p.network, p.network.readout.node
    named = {n: t.clone().requires_grad_() for n, t in p.parameters.named().items() if not n.startswith("heads")}
    weights = [named[f"connections.{c}.weight"] for c in range(len(net.connections))]
    biases = [p.x, *(named[f"nodes.{i}.bias"] for i in range(1, len(net.shapes)))]
    winners: dict[int, Tensor] = {}

    def energy(states: list[Tensor]) -> Tensor:
        total = p.x.new_zeros(())
        for i in range(1, len(states)):
            a = biases[i].view(-1, *[1] * (states[i].dim() - 2)).expand_as(states[i])
            for c in net.into[i]:
                conn = net.connections[c]
                a = (
                    a
                    + reference.drive(
                        states[conn.src], weights[c], conn.stride, conn.padding, conn.pool, winners.get(c)
                    )[0]
                )
            terms = states[i].square() / (2 * net.slope) - states[i] * a
            total = total + net.feedback_gain ** net.levels[i] * terms.sum()
        return total

    def relax(states: list[Tensor], strength: float, held: int | None) -> list[Tensor]:
        states = [s.detach() for s in states]
        for _ in range(steps):
            for i in range(1, len(states)):
                if i == held:
                    continue
                here = states[i].clone().requires_grad_()
                trial = [here if j == i else s for j, s in enumerate(states)]
                total = energy(trial)
                for h, head in enumerate(net.heads):
                    if head.node == i and h:
                        z = reference.head_output(head, here, p.parameters.head_weights[h], p.parameters.head_biases[h])
                        loss = reference.head_loss(head, z, p.targets[h]).sum()
                        total = total + strength * net.feedback_gain**net.top * loss
                (slope,) = torch.autograd.grad(total, here)
                a = states[i] / net.slope - slope / net.feedback_gain ** net.levels[i]
                states[i] = (net.slope * a).clamp(*net.box(i)).detach()
        return states

    config = RelaxConfig(free_steps=600, tol=1e-13, over_relaxation=1.0)
    free = free_phase(net, p.parameters, p.x, config).states  # that one of several equilibria with max pooling
    for a, b in zip(free, relax(free, 0.0, None), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)  # nothing moves
    if frozen:
        for c, conn in enumerate(net.connections):
            if conn.pool == "max":
                found = reference.drive(free[conn.src], p.parameters.weights[c], conn.stride, conn.padding, "max")[1]
                assert found is not None
                winners[c] = found
    start = list(free)
    start[top] = free[top] + eta * (p.targets[0] - free[top])
    clamped = relax(start, eta, top)
    at_free = torch.autograd.grad(energy(free), list(named.values()))
    at_clamped = torch.autograd.grad(energy(clamped), list(named.values()))
    scale = net.feedback_gain**net.top * eta * len(p.x)
    return {key: (b - a) / scale for key, a, b in zip(named, at_free, at_clamped, strict=True)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("form", "winners"), [("delta", "frozen"), ("states", "frozen"), ("states", "live")])
@pytest.mark.parametrize(("estimator", "eta"), [("contrastive", 1.0), ("coupled", 1.0), ("coupled", 0.1)])
@pytest.mark.parametrize("name", CLAMPED)
def test_clamped_phases_are_the_difference_of_energy_gradients(
    name: str, estimator: Any, eta: float, form: Any, winners: Any, backend: str
) -> None:
    p = clamped_problem(name)
    key_of = (name, eta, winners)
    if key_of not in FOUND:
        FOUND[key_of] = by_hand(p, eta, frozen=winners == "frozen")
    config = RelaxConfig(
        free_steps=600, nudged_steps=60, tol=1e-13, over_relaxation=1.0, estimator=estimator, form=form,
        winners=winners, beta=eta if estimator == "coupled" else 0.3,
    )  # fmt: skip
    got, _ = ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend=backend)
    for key, want in FOUND[key_of].items():
        assert float(want.norm()) > 0
        assert float((got.named()[key] - want).norm()) <= 1e-7 * float(want.norm()), key


FOUND: dict[tuple[str, float, str], dict[str, Tensor]] = {}  # of networks relaxed by hand, which takes a second each


@pytest.mark.parametrize("schedule", ["sync", "even_odd", "sweep"])
def test_the_output_units_stay_where_they_are_clamped(schedule: Any) -> None:
    p = clamped_problem("max")
    config = RelaxConfig(schedule=schedule, estimator="coupled", beta=0.25)
    found = free_phase(p.network, p.parameters, p.x, config, keep=True)
    for form in ("delta", "states"):
        for steps in (1, 2, 5):
            run = replace(config, form=form, nudged_steps=steps)
            nudged = nudged_phase(p.network, p.parameters, found, p.targets, run)
            delta = nudged.deltas[4]
            assert delta is not None
            want = 0.25 * (p.targets[0] - found.states[4])
            torch.testing.assert_close(delta / nudged.scales[4], want, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(
                found.states[4] + delta / nudged.scales[4], 0.75 * found.states[4] + 0.25 * p.targets[0]
            )


def test_float16_storage_clamps_too() -> None:
    p = clamped_problem("max")
    exact = RelaxConfig(estimator="coupled", beta=0.01)
    want, _ = ep_gradients(p.network, p.parameters, p.x, p.targets, exact)
    got, _ = ep_gradients(
        p.network, p.parameters, p.x, p.targets, replace(exact, storage=torch.float16), backend="reference"
    )
    assert min(cosine(got.named()[key], theirs) for key, theirs in want.named().items()) > 0.999


@pytest.mark.parametrize("form", ["delta", "states"])
def test_drives_out_of_clamped_units_are_computed_again(form: Any) -> None:
    """A readout in the middle: what is above it must see the clamped states, not the kept drives of the free ones."""
    net = Network(
        ((2, 4, 4), (3, 4, 4), (4, 2, 2), (5, 2, 2)),
        (Connection(0, 1), Connection(1, 2, pool="max"), Connection(2, 3)),
        Head(2, None, loss="mse"),
        feedback_gain=0.5,
    )
    for pool in ("none", "avg", "max"):
        size = (5, 2, 2) if pool == "none" else (5, 1, 1)
        shaped = replace(
            net, shapes=(*net.shapes[:3], size), connections=(*net.connections[:2], Connection(2, 3, pool=pool))
        )
        p = problem(shaped, seed=1, gain=0.6, bias=0.3)
        p.targets[0] = p.targets[0].abs().clamp(0, 1)
        config = RelaxConfig(
            free_steps=600, nudged_steps=60, tol=1e-13, over_relaxation=1.0, estimator="contrastive", form=form
        )
        want = by_hand(p, 1.0, frozen=True)
        got, _ = ep_gradients(shaped, p.parameters, p.x, p.targets, config)
        for key, theirs in want.items():
            assert float((got.named()[key] - theirs).norm()) <= 1e-7 * float(theirs.norm()), (pool, key)


def test_coupled_learning_tends_to_the_gradient_as_the_feedback_gain_falls() -> None:
    """A clamp moves the output units by ``eta (y - s)``; a nudge moves them against what holds them, which feedback
    makes another direction. Without feedback the two are the same."""
    cosines = []
    for k in (0.3, 0.1, 0.01, 1e-4):
        net = replace(
            NETWORKS["no pooling, mse"], feedback_gain=k, linear_nodes=(4,)
        )  # no unit that a nudge cannot move
        p = problem(net, seed=7, batch=4, gain=0.6, bias=0.3, bias_spread=0.2)
        p.targets[0] = p.targets[0].softmax(1)
        base = replace(CONVERGED, beta=1e-5)
        positive, _ = ep_gradients(net, p.parameters, p.x, p.targets, replace(base, estimator="positive"))
        coupled, _ = ep_gradients(net, p.parameters, p.x, p.targets, replace(base, estimator="coupled"))
        pairs = zip(coupled.named().values(), positive.named().values(), strict=True)
        cosines.append(min(cosine(a, b) for a, b in pairs))
    assert all(a < b for a, b in pairwise(cosines)), cosines
    assert cosines[-1] > 1 - 1e-6


def test_coupled_learning_is_the_nudge_that_moves_the_output_units_as_far() -> None:
    """For small eta: EP whose nudge on the output units, given as ``extra``, moves them by just ``eta (y - s)``."""
    p = clamped_problem("no pooling, k 1")
    net, top = p.network, p.network.readout.node
    config = replace(CONVERGED, estimator="coupled", beta=1e-5)
    found = free_phase(net, p.parameters, p.x, config, keep=True)
    coupled, nudged = nudged_gradients(net, p.parameters, found, p.targets, config)
    # the force that holds the clamped units: their own change less what drives would change them by
    below = net.into[top][0]
    conn, delta = net.connections[below], nudged.deltas[net.connections[below].src]
    held = nudged.deltas[top]
    assert delta is not None
    assert held is not None
    moved = reference.drive(delta / nudged.scales[conn.src], p.parameters.weights[below])[0]
    force = (held / nudged.scales[top] - moved) / config.beta
    inside = (found.states[top] > 0) & (found.states[top] < 1)
    assert bool(inside.all())
    silent = replace(p.network, readout=replace(net.readout, weight=0.0))
    by_nudge, _ = ep_gradients(
        silent, p.parameters, p.x, p.targets, replace(config, estimator="positive"), extra={top: -force}
    )
    for key, ours in coupled.named().items():
        theirs = by_nudge.named()[key]
        assert float((ours - theirs).norm()) <= 1e-4 * float(theirs.norm()), key


@pytest.mark.parametrize("estimator", ["contrastive", "coupled"])
def test_what_clamping_needs(estimator: Any) -> None:
    config = RelaxConfig(estimator=estimator)
    p = problem(NETWORKS["max"])
    message = f"^ep_gradients: argument 'config': expected an mse readout .* '{estimator}', got a cross_entropy"
    with pytest.raises(ValueError, match=message):
        ep_gradients(p.network, p.parameters, p.x, p.targets, config)
    net = replace(NETWORKS["no pooling, mse"], local_heads=(Head(4, 3),))
    q = problem(net)
    with pytest.raises(ValueError, match=r"expected no other loss on the output units \(node 4\)"):
        ep_gradients(net, q.parameters, q.x, q.targets, config)
    for head in (Head(2, None, loss="mse", pool=1), Head(2, None, loss="mse", weight=2.0)):
        shaped = Network(((2, 4, 4), (3, 4, 4), (3, 4, 4)), (Connection(0, 1), Connection(1, 2)), head)
        s = problem(shaped)
        message = "ep_gradients: argument 'config': expected a readout without pool and of weight 1 .* got pool="
        with pytest.raises(ValueError, match=message):
            ep_gradients(shaped, s.parameters, s.x, s.targets, config)
    r = problem(NETWORKS["no pooling, mse"])
    with pytest.raises(ValueError, match=r"expected no other loss on the output units \(node 4\)"):
        ep_gradients(r.network, r.parameters, r.x, r.targets, config, extra={4: torch.zeros(3, 3).double()})


def test_coupled_learning_goes_at_most_to_the_target() -> None:
    with pytest.raises(ValueError, match="argument 'beta': expected at most 1 with estimator='coupled'"):
        RelaxConfig(estimator="coupled", beta=1.5)
    assert RelaxConfig(estimator="contrastive", beta=1.5).clamps
