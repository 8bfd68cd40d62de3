"""The contrast against autograd of the energy at both phases' states, in float64; its bias and head gradients too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ep_kernels import Network, Nudged, Parameters, contrast_gradients, reference
from tests.core.nets import BACKENDS, NETWORKS, POOLED, Problem, at, problem
from tests.core.test_energy import free_winners

ESTIMATORS = ("symmetric", "positive", "negative", "tangent")
BETA = 0.125


def random_nudged(p: Problem, states: list[Tensor], estimator: str, size: float = 1e-4) -> Nudged:
    """Deltas of any values (by default so small that no winner flips), each node with a scale of its own."""
    generator = torch.Generator().manual_seed(5)
    phases = 2 if estimator == "symmetric" else 1
    scales = [1.0, *(2.0 ** (i % 5) for i in range(1, len(states)))]
    deltas: list[Tensor | None] = [None]
    for s, scale in zip(states[1:], scales[1:], strict=True):
        noise = torch.randn(phases * len(s), *s.shape[1:], generator=generator, dtype=s.dtype)
        deltas.append(size * scale * noise)
    beta = -BETA if estimator == "negative" else BETA
    centre = 0.0 if estimator == "tangent" else 0.5
    return Nudged(deltas, scales, phases, beta, centre, torch.zeros(1, len(p.x)), {})


def shifted(states: list[Tensor], nudged: Nudged, phase: int) -> list[Tensor]:
    """The states of phase +beta (0) or -beta (1)."""
    out = [states[0]]
    for s, delta, scale in zip(states[1:], nudged.deltas[1:], nudged.scales[1:], strict=True):
        assert delta is not None
        out.append(s + delta.chunk(nudged.phases)[phase] / scale)
    return out


def energy_gradients(p: Problem, states: list[Tensor], tangent: Nudged | None = None) -> dict[str, Tensor]:
    """d/dW and d/db of the summed energy at ``states``; of its derivative along the deltas if ``tangent``."""
    net = p.network
    named = {n: t.clone().requires_grad_() for n, t in p.parameters.named().items() if not n.startswith("heads")}
    weights = [named[f"connections.{c}.weight"] for c in range(len(net.connections))]
    biases = [p.x, *(named[f"nodes.{i}.bias"] for i in range(1, len(net.shapes)))]
    leaves = [states[0], *(s.clone().requires_grad_() for s in states[1:])]
    total = reference.energy(net, leaves, weights, biases).sum()
    if tangent is not None:
        slopes = torch.autograd.grad(total, leaves[1:], create_graph=True)
        moves = [d / a for d, a in zip(tangent.deltas[1:], tangent.scales[1:], strict=True) if d is not None]
        total = sum((g * move).sum() for g, move in zip(slopes, moves, strict=True))
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


def head_gradients(p: Problem, many: list[list[Tensor]]) -> dict[str, Tensor]:
    """Ordinary gradients of the batch-mean loss, averaged over the given states."""
    named = {n: t.clone().requires_grad_() for n, t in p.parameters.named().items() if n.startswith("heads")}
    if not named:
        return {}
    total = p.x.new_zeros(())
    for states in many:
        for h, head in enumerate(p.network.heads):
            weight, bias = named.get(f"heads.{h}.weight"), named.get(f"heads.{h}.bias")
            z = reference.head_output(head, states[head.node], weight, bias)
            total = total + reference.head_loss(head, z, p.targets[h]).mean() / len(many)
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


def expected(p: Problem, states: list[Tensor], nudged: Nudged, estimator: str) -> dict[str, Tensor]:
    """``k^-N (dE/dW at s(+beta) - dE/dW at s(-beta)) / (2 beta)``, batch mean."""
    if estimator == "tangent":
        difference, span, contrasted = energy_gradients(p, states, nudged), nudged.beta, [states]
    else:
        first = shifted(states, nudged, 0)
        second = shifted(states, nudged, 1) if estimator == "symmetric" else states
        plus, minus = energy_gradients(p, first), energy_gradients(p, second)
        difference = {name: plus[name] - minus[name] for name in plus}
        span = (2 if estimator == "symmetric" else 1) * nudged.beta
        contrasted = [first, second]
    top = p.network.feedback_gain**p.network.top
    out = {name: g / (top * span * len(p.x)) for name, g in difference.items()}
    return out | head_gradients(p, contrasted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", NETWORKS)
def test_contrast_is_the_difference_of_energy_gradients(name: str, estimator: str, backend: str) -> None:
    p = problem(NETWORKS[name], seed=2)
    states = p.states()
    winners = free_winners(p.network, p, states)
    nudged = random_nudged(p, states, estimator)
    for phase in range(nudged.phases):  # autograd pools live, the contrast at the free winners
        moved = free_winners(p.network, p, shifted(states, nudged, phase))
        assert all(torch.equal(moved[c], winners[c]) for c in winners)
    got = contrast_gradients(p.network, p.parameters, at(states, winners), nudged, p.targets, backend=backend)
    want = expected(p, states, nudged, estimator)
    assert got.named().keys() == want.keys() == p.parameters.named().keys()
    for key, ours in got.named().items():
        scale = float(want[key].abs().max())
        assert scale > 0
        assert float((ours - want[key]).abs().max()) <= 1e-10 * scale, key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ["symmetric", "positive", "negative"])
@pytest.mark.parametrize("name", POOLED)
def test_contrast_with_live_winners(name: str, estimator: str, backend: str) -> None:
    """Classical EP pools each phase by its own winners: autograd of the energy where winners flip."""
    p = problem(POOLED[name], seed=3)
    states = p.states()
    free = free_winners(p.network, p, states)
    nudged = random_nudged(p, states, estimator, size=0.3)
    moved = [free_winners(p.network, p, shifted(states, nudged, phase)) for phase in range(nudged.phases)]
    flips = sum(int((one[c] != free[c]).sum()) for one in moved for c in free)
    assert flips > 10
    nudged = replace(nudged, winners={c: torch.cat([one[c] for one in moved]) for c in free})
    got = contrast_gradients(p.network, p.parameters, at(states, free), nudged, p.targets, backend=backend)
    for key, want in expected(p, states, nudged, estimator).items():
        scale = float(want.abs().max())
        assert float((got.named()[key] - want).abs().max()) <= 1e-10 * scale, key


def test_two_connections_into_a_node_share_its_bias_gradient() -> None:
    net = NETWORKS["skips, max"]
    assert max(len(c) for c in net.into) > 1
    p = problem(net)
    states = p.states()
    nudged = random_nudged(p, states, "positive")
    got = contrast_gradients(net, p.parameters, at(states, free_winners(net, p, states)), nudged, p.targets)
    delta = nudged.deltas[3]
    bias = got.biases[3]
    assert delta is not None
    assert bias is not None
    want = -(net.feedback_gain ** (net.levels[3] - net.top)) * delta.sum((0, 2, 3)) / nudged.scales[3] / BETA / 3
    torch.testing.assert_close(bias, want)


def test_difference_form_keeps_a_small_difference() -> None:
    """In float32, states that differ by 1e-6: the product of differences and means against the naive two products."""
    generator = torch.Generator().manual_seed(0)
    exact = [torch.rand(512, 24, generator=generator, dtype=torch.float64) for _ in range(2)]
    moves = [1e-6 * torch.randn(1024, 24, generator=generator, dtype=torch.float64) for _ in range(2)]

    def two_phases(source: Tensor, target: Tensor, ds: Tensor, dt: Tensor) -> Tensor:
        (sp, sm), (tp, tm) = ((s + d.chunk(2)[0], s + d.chunk(2)[1]) for s, d in ((source, ds), (target, dt)))
        return tp.t() @ sp - tm.t() @ sm

    want = two_phases(*exact, *moves)
    source, target, ds, dt = (t.float() for t in (*exact, *moves))
    ours, _ = reference.contrast(source, ds, target, dt, (24, 24))
    naive = two_phases(source, target, ds, dt)

    def error(got: Tensor) -> float:
        return float((got.double() - want).norm() / want.norm())

    assert error(ours) < 1e-5
    assert error(naive) > 1e-2


def test_an_empty_batch_gives_zero_gradients() -> None:
    net = Network.chain((2, 8, 8), [3, 4], ["max", "none"], classes=3)
    p = problem(net, batch=0)
    states = p.states()
    nudged = random_nudged(p, states, "symmetric")
    got = contrast_gradients(net, p.parameters, at(states, free_winners(net, p, states)), nudged, p.targets)
    for key, ours in got.named().items():
        assert tuple(ours.shape) == tuple(Parameters.shapes(net)[key])
        assert not bool(ours.any()), key
