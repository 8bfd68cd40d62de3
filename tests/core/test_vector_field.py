"""Vector-field EP: feedback weights of their own, against the definition; Kolen-Pollack updates; in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ep_kernels import (
    Network,
    Parameters,
    RelaxConfig,
    backends,
    contrasts,
    ep_gradients,
    free_phase,
    kolen_pollack,
    nudged_gradients,
)
from ep_kernels.relaxation import Contrast
from tests.core.nets import BACKENDS, NETWORKS, Problem, cosine, problem

NAMES = ("max", "average, odd maps", "no pooling, mse", "skips, max")
ESTIMATORS = ("symmetric", "positive", "negative", "tangent")
CONFIG = RelaxConfig(free_steps=5, nudged_steps=4, beta=0.05)


def separate(name: str, *, tied: bool = False, gain: float = 1.0) -> Problem:
    """A network with feedback weights of its own; ``tied``: with the values of the weights."""
    p = problem(replace(NETWORKS[name], feedback="separate"), seed=3, gain=gain)
    if not tied:
        return p
    named = p.parameters.named()
    copies = {key: named[key.replace("feedback", "weight")] for key in named}
    return replace(p, parameters=Parameters.from_named(p.network, copies))


def products(p: Problem, c: int, source: Tensor, target: Tensor, winners: Tensor | None) -> Tensor:
    """d<target, P(W * source)>/dW, by autograd with the given winners."""
    conn = p.network.connections[c]
    weight = p.parameters.weights[c].clone().requires_grad_()
    if conn.kernel_size is None:
        z = torch.nn.functional.linear(source.flatten(1), weight)
    else:
        z = torch.nn.functional.conv2d(source, weight, stride=conn.stride, padding=conn.padding)
        if conn.pool == "avg":
            z = torch.nn.functional.avg_pool2d(z, 2)
        elif conn.pool == "max":
            assert winners is not None
            n, ch, h, w = z.shape
            cells = z[..., : h // 2 * 2, : w // 2 * 2].reshape(n, ch, h // 2, 2, w // 2, 2).movedim(3, 4).flatten(-2)
            index = winners.repeat(n // len(winners), 1, 1, 1).long()
            z = cells.gather(-1, index[..., None])[..., 0]
    (out,) = torch.autograd.grad((target * z).sum(), weight)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", NAMES)
def test_each_weight_learns_from_what_the_nudge_changes_at_the_end_that_it_drives(
    name: str, estimator: Any, backend: str
) -> None:
    """``g_W`` from (ds^dst, m^src), ``g_B`` from (m^dst, ds^src), over beta, m the mean of the two phases."""
    p = separate(name)
    net, config = p.network, replace(CONFIG, estimator=estimator)
    found = free_phase(net, p.parameters, p.x, config, keep=True, backend=backend)
    got, nudged = nudged_gradients(net, p.parameters, found, p.targets, config, backend=backend)

    def ends(node: int) -> tuple[Tensor, Tensor]:
        """Difference of the phases and their mean, of one node."""
        free, delta = found.states[node], nudged.deltas[node]
        if delta is None:
            return torch.zeros_like(free), free
        moved = delta / nudged.scales[node]
        if estimator == "tangent":
            return moved, free
        plus = free + moved[: len(free)]
        minus = free + moved[len(free) :] if estimator == "symmetric" else free
        return plus - minus, (plus + minus) / 2

    for c, conn in enumerate(net.connections):
        (ds, ms), (dt, mt) = ends(conn.src), ends(conn.dst)
        span = nudged.beta * (2 if estimator == "symmetric" else 1)
        scale = -1 / (net.nudge_coefficient(conn.dst) * span * len(p.x))
        winners = found.winners.get(c)
        torch.testing.assert_close(got.weights[c], scale * products(p, c, ms, dt, winners), rtol=1e-8, atol=1e-12)
        own = got.feedback_weights[c]
        if conn.src == 0:
            assert own is None
        else:
            torch.testing.assert_close(own, scale * products(p, c, ds, mt, winners), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", [*ESTIMATORS, "five_phase"])
@pytest.mark.parametrize("name", NAMES)
def test_with_equal_weights_the_two_gradients_add_up_to_the_tied_one(name: str, estimator: Any, backend: str) -> None:
    p = separate(name, tied=True)
    tied = replace(p.network, feedback="tied")
    parameters = replace(p.parameters, feedback_weights=())
    config = replace(CONFIG, estimator=estimator)
    want, free = ep_gradients(tied, parameters, p.x, p.targets, config, backend=backend)
    got, own = ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend=backend)
    for a, b in zip(free.states, own.states, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for key, theirs in want.named().items():
        ours = got.named()[key]
        if key.startswith("connections"):
            ours = ours + got.named().get(key.replace("weight", "feedback"), 0)
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("backend", BACKENDS)
def test_feedback_goes_through_the_feedback_weights(backend: str) -> None:
    """The free equilibrium is a fixed point of ``clip(b + W s + k B^T s)`` written out here."""
    net = replace(
        Network.chain((1, 2, 2), [3], ["none"], classes=2, hidden=[4, 5], feedback_gain=0.7), feedback="separate"
    )
    p = problem(net, seed=1, gain=0.5, bias=0.2)
    w, b, biases = p.parameters.weights, p.parameters.feedback_weights, p.parameters.biases
    found = free_phase(net, p.parameters, p.x, RelaxConfig(free_steps=200), backend=backend)
    low, middle, top = (s.flatten(1) for s in found.states[1:])
    assert b[1] is not None
    assert b[2] is not None
    assert biases[1] is not None
    drive = torch.nn.functional.conv2d(p.x, w[0], padding=1) + biases[1].view(-1, 1, 1)
    torch.testing.assert_close(low, (drive.flatten(1) + 0.7 * middle @ b[1]).clamp(0, 1), rtol=0, atol=1e-10)
    torch.testing.assert_close(middle, (biases[2] + low @ w[1].t() + 0.7 * top @ b[2]).clamp(0, 1), rtol=0, atol=1e-10)
    assert float((b[2] - w[2]).abs().max()) > 0.1


def test_kolen_pollack_gives_both_the_mean() -> None:
    p = separate("skips, max")
    got, _ = ep_gradients(p.network, p.parameters, p.x, p.targets, CONFIG)
    same = kolen_pollack(got)
    assert same.named().keys() == got.named().keys()
    for c, conn in enumerate(p.network.connections):
        own = got.feedback_weights[c]
        if conn.src == 0:
            assert same.weights[c] is got.weights[c]
            continue
        assert own is not None
        torch.testing.assert_close(same.weights[c], (got.weights[c] + own) / 2)
        torch.testing.assert_close(same.feedback_weights[c], same.weights[c])
    assert same.biases is got.biases
    q = problem(NETWORKS["max"])
    with pytest.raises(ValueError, match="kolen_pollack: argument 'gradients': expected those of a network with"):
        kolen_pollack(ep_gradients(q.network, q.parameters, q.x, q.targets, CONFIG)[0])


@pytest.mark.parametrize("averaged", [True, False])
def test_with_weight_decay_the_two_weights_meet(averaged: bool) -> None:
    """SGD: ``W - B`` shrinks by ``1 - lr decay`` a step, whatever the data; without the same update it does not."""
    p = separate("max", gain=0.8)
    net, lr, decay, steps = p.network, 0.05, 0.4, 40
    named = {key: t.clone() for key, t in p.parameters.named().items()}

    def apart() -> float:
        return math.sqrt(sum(float((named[key] - named[key.replace("feedback", "weight")]).square().sum())
                             for key in named if key.endswith("feedback")))  # fmt: skip

    before = apart()
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.rand(p.x.shape, generator=generator, dtype=torch.float64)
        found, _ = ep_gradients(net, Parameters.from_named(net, named), x, p.targets, CONFIG)
        gradients = (kolen_pollack(found) if averaged else found).named()
        named = {key: (1 - lr * decay) * t - lr * gradients[key] for key, t in named.items()}
    shrunk = apart() / before
    if averaged:
        assert shrunk == pytest.approx((1 - lr * decay) ** steps, rel=1e-9)
    else:
        assert shrunk != pytest.approx((1 - lr * decay) ** steps, rel=1e-6)


def test_live_winners_are_refused() -> None:
    p = separate("max")
    config = RelaxConfig(form="states", winners="live")
    with pytest.raises(ValueError, match="expected frozen winners with separate feedback weights"):
        ep_gradients(p.network, p.parameters, p.x, p.targets, config)


@pytest.mark.parametrize("operands", [None, torch.float16])
@pytest.mark.parametrize("estimator", ["symmetric", "positive", "tangent"])
def test_each_weight_costs_one_product(estimator: Any, operands: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gets what one half of the contrast's two products gave before."""
    p = separate("skips, max")
    seen = []
    monkeypatch.setattr(backends, "each_contrast", lambda jobs, name: seen.extend(jobs) or real(jobs, "reference"))
    config = replace(CONFIG, estimator=estimator, operands=operands)
    got, _ = ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend="reference")
    assert all(job.source_delta is None for job in seen)
    assert len(seen) == sum(1 if conn.src == 0 else 2 for conn in p.network.connections)
    monkeypatch.setattr(contrasts, "_split", halves)
    want, _ = ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend="reference")
    for key, ours in got.named().items():
        theirs = want.named()[key]
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12 * float(theirs.abs().max()), msg=key)


real = backends.each_contrast


def halves(job: Contrast) -> list[Contrast]:
    """By the contrast of both products, in which one difference is zero."""
    assert job.source_delta is not None
    still = replace(job, target_delta=torch.zeros_like(job.target_delta))
    means = []
    for free, delta, gain in (
        (job.source, job.source_delta, job.source_gain),
        (job.target, job.target_delta, job.target_gain),
    ):
        both = delta.unflatten(0, (-1, len(free))).sum(0)
        means.append(free + job.centre * gain * both)
    return [replace(job, source=means[0], source_delta=None), replace(still, target=means[1])]


def test_float16_storage_splits_the_same_gradients() -> None:
    p = separate("max")
    want, _ = ep_gradients(p.network, p.parameters, p.x, p.targets, CONFIG)
    config = replace(CONFIG, storage=torch.float16)
    got, _ = ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend="reference")
    assert min(cosine(got.named()[key], theirs) for key, theirs in want.named().items()) > 0.999
