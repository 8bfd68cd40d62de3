"""The reference against autograd of the energy, in float64: relaxation steps, winners, descent."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ep_kernels import Network, RelaxConfig, free_phase, nudged_phase, reference, relaxation
from ep_kernels.plan import Step
from tests.core.nets import BACKENDS, NETWORKS, POOLED, Problem, at, problem

WIDE = {"lo": -40.0, "hi": 40.0}  # a box that clips nothing: the state after a step is gamma a
ONE_SWEEP = RelaxConfig(
    "sync", 1, 1, beta=0.3, estimator="positive", form="states", winners="live", over_relaxation=1.0
)


def energy_gradient(p: Problem, states: list[Tensor], beta: float = 0.0) -> list[Tensor]:
    """dF/ds of every node by autograd, F = E + beta k^N L_aug."""
    net, w = p.network, p.parameters
    leaves = [s.detach().requires_grad_() for s in states]
    total = reference.energy(net, leaves, w.weights, [t if t is not None else p.x for t in w.biases]).sum()
    for h, head in enumerate(net.heads):
        z = reference.head_output(head, leaves[head.node], w.head_weights[h], w.head_biases[h])
        total = total + beta * net.feedback_gain**net.top * reference.head_loss(head, z, p.targets[h]).sum()
    return list(torch.autograd.grad(total, leaves[1:]))


def expected_step(p: Problem, states: list[Tensor], beta: float = 0.0) -> list[Tensor]:
    """gamma a of every node: ``a = s / gamma - k^-l dF/ds``."""
    net = p.network
    return [
        s - net.slope * net.feedback_gain ** -net.levels[i] * g
        for i, (s, g) in enumerate(zip(states[1:], energy_gradient(p, states, beta), strict=True), 1)
    ]


def close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    return got.shape == expected.shape and float((got - expected).abs().max()) <= tolerance * (
        1 + float(expected.abs().max())
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("slope", [1.0, 0.5])
def test_free_step_descends_the_energy(name: str, slope: float, backend: str) -> None:
    p = problem(replace(NETWORKS[name], slope=slope))
    states = p.states()
    after = free_phase(p.network, p.parameters, p.x, ONE_SWEEP, states=states, keep=True, backend=backend)
    for got, state, expected in zip(after.preactivations[1:], after.states[1:], expected_step(p, states), strict=True):
        assert got is not None
        assert close(got, expected, 1e-10)
        assert close(state, expected.clamp(p.network.lo, p.network.hi), 1e-10)


LINEAR = {
    "top": replace(NETWORKS["no pooling, mse"], linear_nodes=(4,)),
    "hidden": replace(NETWORKS["skips, max"], linear_nodes=(3, 5)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_node_goes_to_the_minimum_of_the_energy(name: str, backend: str) -> None:
    """No box cuts it: its new state is gamma a, where the energy's gradient with respect to it vanishes."""
    p = problem(LINEAR[name], gain=3.0)
    states = p.states()
    after = free_phase(p.network, p.parameters, p.x, ONE_SWEEP, states=states, keep=True, backend=backend)
    beyond = 0
    for i, expected in enumerate(expected_step(p, states), 1):
        got = after.states[i]
        lo, hi = p.network.box(i)
        assert close(got, expected.clamp(lo, hi), 1e-10)
        if i in p.network.linear_nodes:
            beyond += int(((got < p.network.lo) | (got > p.network.hi)).sum())
            moved = [got if j == i else s for j, s in enumerate(states)]
            gradient = energy_gradient(p, moved)[i - 1]
            assert float(gradient.abs().max()) <= 1e-10 * (1 + float(got.abs().max()))
    assert beyond > 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("sign", ["positive", "negative"])
def test_nudged_step_descends_the_nudged_energy(name: str, sign: str, backend: str) -> None:
    p = problem(replace(NETWORKS[name], **WIDE), seed=1)
    states = [p.x, *(s / 80 + 0.5 for s in p.states()[1:])]
    config = replace(ONE_SWEEP, estimator=sign)
    winners = free_winners(p.network, p, states)
    nudged = nudged_phase(p.network, p.parameters, at(states, winners), p.targets, config, backend=backend)
    beta = config.beta if sign == "positive" else -config.beta
    nudge_seen = False
    free = expected_step(p, states)
    for i, expected in enumerate(expected_step(p, states, beta), 1):
        delta = nudged.deltas[i]
        assert delta is not None
        assert close(states[i] + delta, expected, 1e-10)
        nudge_seen |= not close(free[i - 1], expected, 1e-4)
    assert nudge_seen


def free_winners(net: Network, p: Problem, states: list[Tensor]) -> dict[int, Tensor]:
    out = {}
    for c, conn in enumerate(net.connections):
        _, winners = reference.drive(states[conn.src], p.parameters.weights[c], conn.stride, conn.padding, conn.pool)
        if winners is not None:
            out[c] = winners
    return out


GEOMETRIES = [
    (pool, kernel, stride, padding, size)
    for pool, kernel, stride, padding, size in itertools.product(
        ("none", "max", "avg"),
        ((1, 1), (3, 3), (5, 2)),
        ((1, 1), (2, 1), (3, 2)),
        ((0, 0), (1, 1), (2, 0)),
        ((9, 7), (12, 11)),
    )
    if min((n + 2 * q - k) // s + 1 for n, q, k, s in zip(size, padding, kernel, stride, strict=True)) >= 2
]


def test_feedback_is_the_adjoint_of_the_drive() -> None:
    generator = torch.Generator().manual_seed(0)
    assert len(GEOMETRIES) > 100
    for pool, kernel, stride, padding, size in GEOMETRIES:
        weight = torch.randn(4, 3, *kernel, generator=generator, dtype=torch.float64)
        here, other, source = torch.randn(3, 2, 3, *size, generator=generator, dtype=torch.float64)
        _, winners = reference.drive(other, weight, stride, padding, pool)  # fixed ones, not the source's
        up, _ = reference.drive(source, weight, stride, padding, pool, winners)
        above = torch.randn(up.shape, generator=generator, dtype=torch.float64)
        down = reference.feedback(above, weight, (3, *size), stride, padding, pool, winners)
        assert down.shape == here.shape
        left, right = (up * above).sum(), (source * down).sum()
        assert abs(left - right) <= 1e-12 * float(up.norm() * above.norm()), (pool, kernel, stride, padding, size)


def test_feedback_of_a_linear_connection_is_its_adjoint() -> None:
    source, weight = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(7, 60, dtype=torch.float64)
    above = torch.randn(2, 7, dtype=torch.float64)
    up, _ = reference.drive(source, weight)
    assert torch.equal(up, F.linear(source.flatten(1), weight))
    down = reference.feedback(above, weight, (3, 4, 5))
    torch.testing.assert_close((up * above).sum(), (source * down).sum(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", [(2, 2), (8, 6), (7, 5), (3, 2)])
@pytest.mark.parametrize("kind", ["random", "ties", "constant"])
def test_winners_are_those_of_max_pool2d(size: tuple[int, int], kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(4, 5, *size, generator=generator, dtype=torch.float64)
    if kind != "random":
        z = (z > 0).double() if kind == "ties" else torch.zeros_like(z)
    pooled, flat = F.max_pool2d(z, 2, return_indices=True)
    rows, columns = flat // size[1], flat % size[1]
    i, j = torch.meshgrid(torch.arange(size[0] // 2), torch.arange(size[1] // 2), indexing="ij")
    expected = (rows - 2 * i) * 2 + (columns - 2 * j)
    assert kind == "constant" or len(expected.unique()) == 4
    ours, winners = reference.pool_map(z, "max")
    assert winners is not None
    assert winners.dtype == torch.uint8
    assert torch.equal(winners.long(), expected)
    assert torch.equal(ours, pooled)
    spread = reference.unpool_map(pooled, "max", size, winners)
    assert torch.equal(spread, F.max_unpool2d(pooled, flat, 2, output_size=size))


def test_average_pooling_is_that_of_torch_and_spreads_evenly() -> None:
    z = torch.randn(2, 3, 7, 5, dtype=torch.float64, requires_grad=True)
    pooled, winners = reference.pool_map(z, "avg")
    assert winners is None
    above = torch.randn_like(pooled)
    expected = F.avg_pool2d(z, 2)
    (gradient,) = torch.autograd.grad(expected, z, above)
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(reference.unpool_map(above, "avg", (7, 5)), gradient)


# --- descent ----------------------------------------------------------------------------------------------------------


def energies(p: Problem, config: RelaxConfig, monkeypatch: pytest.MonkeyPatch, start: list[Tensor] | None) -> Tensor:
    """E of every sample after every update of a node, [updates + 1, B] (``sync``: after every sweep)."""
    net = p.network
    biases = [b if b is not None else p.x for b in p.parameters.biases]
    zero = [p.x, *(p.x.new_zeros(len(p.x), *shape) for shape in net.shapes[1:])]
    trace = [reference.energy(net, start or zero, p.parameters.weights, biases)]
    original = relaxation._Run.step

    def step(self: relaxation._Run, launch: Step) -> None:
        original(self, launch)
        now = {**dict(enumerate(self.states)), **self.pending}
        if len(self.pending) in (0, len(net.shapes) - 1):
            states = [now[i] if now[i] is not None else zero[i] for i in range(len(zero))]
            trace.append(reference.energy(net, states, p.parameters.weights, biases))

    with monkeypatch.context() as patch:
        patch.setattr(relaxation._Run, "step", step)
        free_phase(net, p.parameters, p.x, config, states=start, backend="reference")
    return torch.stack(trace)


def largest_rise(trace: Tensor) -> float:
    return float((trace[1:] - trace[:-1]).max()) / float(trace.abs().max())


@pytest.mark.parametrize("omega", [1.0, 1.15, 1.5])
@pytest.mark.parametrize("schedule", ["even_odd", "sweep"])
def test_energy_never_rises_in_turn(schedule: str, omega: float, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RelaxConfig(schedule, 8, over_relaxation=omega)
    for i, ((name, net), gain) in enumerate(itertools.product(NETWORKS.items(), (0.25, 0.6, 1.0))):
        p = problem(replace(net, feedback_gain=gain), seed=i, gain=1.0 + i % 3)
        trace = energies(p, config, monkeypatch, p.states(i) if i % 2 else None)
        assert len(trace) == 1 + 8 * (len(net.shapes) - 1)
        assert largest_rise(trace) <= 1e-13, (name, gain)
        assert float((trace[0] - trace[-1]).min()) > 0.1  # it did move


def test_energy_never_rises_with_linear_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them above a max pooling: there, only positive states make a majoriser of the current winners."""
    for net in LINEAR.values():
        for omega in (1.0, 1.5):
            config = RelaxConfig("sweep", 8, over_relaxation=omega)
            trace = energies(problem(replace(net, feedback_gain=0.25)), config, monkeypatch, None)
            assert largest_rise(trace) <= 1e-13


def test_energy_never_rises_with_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(NETWORKS["skips, max"], gain=2.0)
    assert largest_rise(energies(p, RelaxConfig("sweep", 8, damping=0.4), monkeypatch, p.states())) <= 1e-13


def test_energy_rises_in_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, the guarantee is gone: what the tests above measure does depend on the order of the updates."""
    config = RelaxConfig("sync", 8)
    rises = [
        largest_rise(energies(problem(replace(net, feedback_gain=1.0), gain=3.0), config, monkeypatch, None))
        for net in NETWORKS.values()
    ]
    assert max(rises) > 1e-3


def test_energy_rises_beyond_over_relaxation_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """omega 2 is the limit: a state that moves more than twice as far climbs. RelaxConfig refuses it."""
    p = problem(NETWORKS["no pooling, mse"], bias=0.5, gain=0.5, bias_spread=0.0)
    config = RelaxConfig("sweep", 6, over_relaxation=1.9)
    assert largest_rise(energies(p, config, monkeypatch, None)) <= 1e-13
    object.__setattr__(config, "over_relaxation", 2.2)
    assert largest_rise(energies(p, config, monkeypatch, None)) > 1e-6


@pytest.mark.parametrize("name", POOLED)
def test_live_winners_are_the_best(name: str) -> None:
    """Other winners give a lower drive: why feedback through the current ones minimises a majoriser of the energy."""
    p = problem(POOLED[name])
    states, lost = p.states(0), 0
    for c, winners in free_winners(p.network, p, p.states(1)).items():
        conn = p.network.connections[c]
        source, weight = states[conn.src], p.parameters.weights[c]
        live = reference.connection_drive(conn, source, weight)
        fixed, _ = reference.drive(source, weight, conn.stride, conn.padding, conn.pool, winners)
        assert bool((live >= fixed).all())
        lost += int((live > fixed).sum())
    assert lost > 10


@pytest.mark.parametrize("last", [False, True])
def test_a_sampling_adjoint_is_in_the_dtype_and_the_format_of_its_product(last: bool) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    above, weight = (t.contiguous(memory_format=layout) for t in (torch.rand(2, 3, 4, 4), torch.rand(3, 5, 1, 1)))
    got = reference.convolve_adjoint(above, weight, (5, 7, 8), (2, 2), (0, 0))
    assert got.is_contiguous(memory_format=layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = reference.convolve_adjoint(above, weight, (5, 7, 8), (2, 2), (0, 0))
    assert cast.dtype == torch.bfloat16
    torch.testing.assert_close(cast.float(), got, rtol=2e-2, atol=2e-2)
