"""Residuals, saturation and spectral radius against what they are said to be, and advice that works when followed."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ep_kernels import Connection, Head, Network, RelaxConfig, free_phase
from ep_train.bptt import free_sweep
from ep_train.stability import Stability, advice, diagnose
from tests.core.nets import Problem, problem
from tests.core.threads import one_thread  # noqa: F401  (autouse)

TINY = Network(
    ((1, 4, 4), (2, 4, 4), (3, 2, 2), (3,)),
    (Connection(0, 1), Connection(1, 2, pool="max"), Connection(2, 3, None), Connection(1, 3, None)),
    Head(3, 2),
    feedback_gain=0.5,
)


def settled(network: Network = TINY, *, gain: float = 0.6, batch: int = 3) -> Problem:
    return problem(network, seed=4, batch=batch, gain=gain, bias=0.2)


def dense_radii(p: Problem, config: RelaxConfig) -> list[float]:
    """Per sample, the largest eigenvalue of the Jacobian of one sweep, as it is used after the first, by autograd."""
    net = p.network
    damping = config.free_damping(net.feedback_gain)
    found = free_phase(net, p.parameters, p.x, config)
    out = []
    for b in range(len(p.x)):
        states = [s[b : b + 1] for s in found.states]
        sizes = [s.numel() for s in states[1:]]

        def sweep(flat: Tensor, states: list[Tensor] = states, sizes: list[int] = sizes) -> Tensor:
            parts = [part.view(s.shape) for part, s in zip(flat.split(sizes), states[1:], strict=True)]
            new = free_sweep(net, p.parameters, [states[0], *parts], config, damping, {})
            return torch.cat([s.flatten() for s in new[1:]])

        flat = torch.cat([s.flatten() for s in states[1:]])
        jacobian = torch.autograd.functional.jacobian(sweep, flat)
        out.append(float(torch.linalg.eigvals(jacobian).abs().max()))
    return out


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        ({"schedule": "sync"}, 1e-2),
        ({"schedule": "sync", "damping": 0.6}, 1e-2),
        ({"schedule": "sweep", "damping": 0.3}, 2e-2),
        ({"schedule": "sweep", "over_relaxation": 1.0}, 1e-2),
        ({"schedule": "even_odd", "over_relaxation": 1.0}, 1e-2),
        ({"schedule": "sweep", "over_relaxation": 1.1}, 3e-2),  # complex eigenvalues may lead
    ],
)
def test_spectral_radius_is_that_of_the_dense_jacobian(
    change: dict[str, Any], tolerance: float, separate: bool
) -> None:
    p = settled(replace(TINY, feedback="separate" if separate else "tied"))
    config = RelaxConfig(free_steps=400, **change)
    assert float(free_phase(p.network, p.parameters, p.x, config).residual.max()) < 1e-10
    got = diagnose(p.network, p.parameters, p.x, config, iterations=120).spectral_radius
    want = max(dense_radii(p, config))
    assert 0.05 < want < 1
    assert got == pytest.approx(want, rel=tolerance)


@pytest.mark.parametrize("schedule", ["sync", "sweep"])
@pytest.mark.parametrize("bias", [0.2, 50.0])
def test_saturated_units_keep_what_damping_leaves(schedule: Any, bias: float) -> None:
    """In part of the units and in all of them: those have the eigenvalue 1 - eta."""
    p = problem(TINY, seed=4, gain=1.5 if bias < 1 else 0.6, bias=bias)
    config = RelaxConfig(schedule=schedule, free_steps=1000, damping=0.1)
    found = diagnose(TINY, p.parameters, p.x, config, iterations=120)
    assert found.spectral_radius == pytest.approx(max(dense_radii(p, config)), rel=1e-2)
    if bias > 1:
        assert found.spectral_radius == pytest.approx(0.9, rel=1e-6)


@pytest.mark.parametrize("schedule", ["sync", "sweep"])
def test_a_weight_that_is_nan_has_no_radius(schedule: Any) -> None:
    for name in ("connections.0.weight", "connections.2.weight", "nodes.3.bias"):
        p = settled()
        p.parameters.named()[name].view(-1)[0] = float("nan")
        config = RelaxConfig(schedule=schedule)
        found = diagnose(TINY, p.parameters, p.x, config)
        assert math.isnan(found.spectral_radius), name
        assert found.row()["spectral_radius"] is None
        assert "not finite" in str(advice(replace(found, residual=1.0), config, TINY))


def test_spectral_radius_where_the_relaxation_cannot_converge() -> None:
    net = Network.chain((1, 6, 6), [4, 4], ["none", "none"], classes=2, hidden=[6], feedback_gain=1.0)
    net = replace(net, lo=-1e6, hi=1e6)  # nothing saturates
    p = problem(net, seed=1, batch=2, gain=1.2)
    config = RelaxConfig(schedule="sync", free_steps=8, damping=1.0)
    got = diagnose(net, p.parameters, p.x, config, iterations=80).spectral_radius
    assert got == pytest.approx(max(dense_radii(p, config)), rel=1e-2)
    assert got > 1


def test_twenty_iterations_are_near() -> None:
    p = settled()
    for schedule in ("sync", "sweep"):
        config = RelaxConfig(schedule=schedule, free_steps=200, over_relaxation=1.0)
        got = diagnose(p.network, p.parameters, p.x, config).spectral_radius
        assert got == pytest.approx(max(dense_radii(p, config)), rel=0.1)


def test_residual_and_saturation_per_layer() -> None:
    p = settled(gain=1.5)
    config = RelaxConfig(free_steps=3)
    got = diagnose(p.network, p.parameters, p.x, config)
    found = free_phase(p.network, p.parameters, p.x, config)
    plain = replace(config, free_steps=1)
    after = free_phase(p.network, p.parameters, p.x, plain, states=found.states)
    assert got.steps == 3
    for i in range(1, 4):
        before, new = found.states[i], after.states[i]
        assert got.layer_residual[i - 1] == pytest.approx(float((new - before).abs().max()), rel=1e-9)
        assert got.at_lo[i - 1] == pytest.approx(float((new == 0).double().mean()))
        assert got.at_hi[i - 1] == pytest.approx(float((new == 1).double().mean()))
    assert got.residual == max(got.layer_residual) == pytest.approx(float(after.residual.max()), rel=1e-9)
    assert max(got.at_lo) > 0.1
    assert max(got.at_hi) > 0
    assert json.loads(json.dumps(got.row(), allow_nan=False))["spectral_radius"] == got.spectral_radius


def test_saturated_everywhere_means_no_radius() -> None:
    p = problem(TINY, seed=4, bias=50.0)
    got = diagnose(TINY, p.parameters, p.x, RelaxConfig())
    assert got.at_hi == [1.0, 1.0, 1.0]
    assert (got.spectral_radius, got.residual) == (0.0, 0.0)


def test_warm_states_and_an_empty_batch() -> None:
    p = settled()
    config = RelaxConfig(free_steps=1)
    cold = diagnose(TINY, p.parameters, p.x, config)
    start = free_phase(TINY, p.parameters, p.x, RelaxConfig(free_steps=100)).states
    warm = diagnose(TINY, p.parameters, p.x, config, states=start)
    assert warm.residual < 1e-3 * cold.residual
    empty = diagnose(TINY, p.parameters, p.x[:0], config)
    assert (empty.residual, empty.spectral_radius) == (0.0, 0.0)
    with pytest.raises(ValueError, match="argument 'iterations': expected an even number >= 2, got 5"):
        diagnose(TINY, p.parameters, p.x, config, iterations=5)


# --- advice -----------------------------------------------------------------------------------------------------------

SLOW = Network.chain((1, 8, 8), [6, 6, 6], ["none"] * 3, classes=3, feedback_gain=0.6)
CONFIG = RelaxConfig(free_steps=3, tol=1e-5, over_relaxation=1.0)


def test_a_converged_phase_needs_no_advice() -> None:
    p = settled(SLOW, gain=0.5)
    config = replace(CONFIG, free_steps=200)
    assert advice(diagnose(SLOW, p.parameters, p.x, config), config, SLOW) is None
    loose = replace(CONFIG, tol=0.0)
    got = diagnose(SLOW, p.parameters, p.x, loose)
    assert advice(replace(got, residual=0.099), loose, SLOW) is None
    assert advice(replace(got, residual=0.101), loose, SLOW) is not None


def test_the_sweeps_that_it_proposes_are_enough() -> None:
    p = settled(SLOW, gain=0.5)
    stability = diagnose(SLOW, p.parameters, p.x, CONFIG, iterations=40)
    said = advice(stability, CONFIG, SLOW)
    assert said is not None
    match = re.search(r"raise --free-steps from 3 to (\d+)", said)
    assert match is not None, said
    sweeps = int(match[1])
    trace = free_phase(SLOW, p.parameters, p.x, replace(CONFIG, free_steps=3 * sweeps, tol=0.0)).trace.amax(1)
    needed = 1 + int((trace > CONFIG.tol).sum())
    assert 0.6 * needed <= sweeps <= 1.6 * needed, (needed, said)


@pytest.mark.parametrize("schedule", ["sweep", "sync"])
def test_the_gain_that_it_proposes_contracts(schedule: Any) -> None:
    net = replace(SLOW, feedback_gain=1.0, lo=-1e6, hi=1e6)
    p = problem(net, seed=4, batch=3, gain=1.0)
    config = replace(CONFIG, schedule=schedule, free_steps=4)
    stability = diagnose(net, p.parameters, p.x, config, iterations=40)
    assert stability.spectral_radius > 1
    said = advice(stability, config, net)
    assert said is not None
    assert ("--schedule sweep" in said) == (schedule == "sync")
    assert "--free-steps" not in said  # more sweeps would only run away further
    match = re.search(r"lower --feedback-gain from 1 \(try about ([\d.e-]+)\)", said)
    assert match is not None, said
    gentler = replace(net, feedback_gain=float(match[1]))
    after = diagnose(gentler, p.parameters, p.x, config, iterations=40)
    assert 0.25 < after.spectral_radius < 0.8


def test_other_advice() -> None:
    def of(residual: float, radius: float, **change: Any) -> str:
        found = advice(Stability(residual, [residual / 2, residual], [0, 0], [0, 0], radius, 4),
                       replace(CONFIG, free_steps=4, **change), SLOW)  # fmt: skip
        assert found is not None
        return found

    assert "not finite: lower --lr" in of(float("nan"), 0.3)
    assert "raise --tol to 0.002" in of(1e-3, 0.3, storage=torch.float16)
    assert "largest in layer 2; spectral radius 0.30" in of(1e-3, 0.3)
    assert "raise --free-steps from 4 to 8" in of(1e-3, 0.3)  # log(1e-5 / 1e-3) / log 0.3 = 3.8
    both = of(0.5, 0.7)  # 31 more
    assert "raise --free-steps from 4 to 35; lower --feedback-gain from 0.6 (try about 0.43); or start again" in both
    assert "--free-steps" not in of(0.5, 0.99)  # more than a hundred
    assert "raise --free-steps from 4 to 5" in of(1e-3, 0.0)
    assert "from 0.6" not in of(0.5, 0.502)  # 0.598: no change in two digits
    assert "not finite" in of(0.5, float("nan"))


@pytest.mark.parametrize(
    ("change", "descends"),
    [
        ({}, True),
        ({"feedback": "separate"}, False),
        ({"lo": -1.0}, False),
        ({"linear_nodes": (2,)}, False),  # above max pooling
        ({"linear_nodes": (3,)}, True),
    ],
)
def test_what_is_said_of_the_energy(change: dict[str, Any], descends: bool) -> None:
    config = RelaxConfig(schedule="sync", over_relaxation=1.0)
    found = advice(Stability(0.5, [0.5], [0], [0], 0.9, 4), config, replace(TINY, **change))
    assert found is not None
    assert "use --schedule sweep" in found
    assert ("cannot raise the energy" in found) == descends


def test_advice_for_a_damped_relaxation() -> None:
    """Its eigenvalues are ``1 - eta + eta rho``: where rho is small, damping is what limits: no gain is proposed."""

    def of(damping: float, radius: float) -> str:
        config = RelaxConfig(schedule="sync", free_steps=4, damping=damping)
        found = advice(Stability(0.5, [0.5], [0], [0], radius, 4), config, SLOW)
        assert found is not None
        return found

    said = of(0.1, 0.92)
    assert "raise --damping from 0.1 to 1 (the spectral radius is then about 0.2)" in said
    assert "--feedback-gain" not in said
    said = of(0.1, 0.98)  # 0.8 undamped: both
    assert "raise --damping from 0.1 to 1 (the spectral radius is then about 0.8); lower --feedback-gain" in said
    said = of(0.5, 1.5)  # 2 undamped, which damping cannot be blamed for
    assert "--damping" not in said
    assert "lower --feedback-gain from 0.6 (try about 0.037)" in said


def test_rows_have_no_numbers_that_json_lacks() -> None:
    row = Stability(float("nan"), [float("nan"), 0.1], [0.0, 0.0], [0.0, 0.0], float("inf"), 4).row()
    assert row["layer_residual"] == [None, 0.1]
    assert row["spectral_radius"] is None
    json.dumps(row, allow_nan=False)
