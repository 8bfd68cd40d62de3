"""Whole relaxations and gradients on the device, by both backends, against the reference in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ep_kernels import Network, RelaxConfig, backends, ep_gradients, free_phase, nudged_phase
from ep_kernels.relaxation import Relaxation
from tests.core.nets import NETWORKS, POOLED, VARIANTS, fitting
from tests.gpu.device import (
    INTERPRETED,
    LOW_GAIN,
    PRECISIONS,
    Problem,
    assert_close,
    assert_equal,
    moved,
    on_device,
    random_problem,
)

SMALL = NETWORKS["max everywhere, odd maps"]
SETTINGS = {
    "sweep": RelaxConfig(free_steps=4, nudged_steps=3),
    "even_odd": RelaxConfig("even_odd", free_steps=4, nudged_steps=4),
    "sync": RelaxConfig("sync", free_steps=6, nudged_steps=5, damping=0.8),
    "tangent": RelaxConfig(free_steps=3, nudged_steps=2, estimator="tangent"),
    "positive": RelaxConfig(free_steps=3, nudged_steps=2, estimator="positive"),
    "states": RelaxConfig(free_steps=4, nudged_steps=3, form="states", beta=0.3),
    "live": RelaxConfig(free_steps=4, nudged_steps=3, form="states", winners="live", beta=0.3),
    "linear nudge": RelaxConfig(free_steps=4, nudged_steps=3, linear_nudge=True),
    "one sweep": RelaxConfig(free_steps=1, nudged_steps=1),
}


def compare_phases(p: Problem, config: RelaxConfig, states: float, deltas: float, on: str) -> None:
    """Both phases and the gradients, against float64 with the same operands and storage.

    The nudged phase starts from the same equilibrium, so that no error adds up.
    """
    exact, here = on_device(p, torch.float64), on_device(p)
    true = free_phase(exact.network, exact.parameters, exact.x, config, keep=True, backend="reference")
    there = nudged_phase(exact.network, exact.parameters, true, exact.targets, config, backend="reference")
    expected, _ = ep_gradients(exact.network, exact.parameters, exact.x, exact.targets, config, backend="reference")
    found = free_phase(here.network, here.parameters, here.x, config, keep=True, backend=on)
    assert_close(found.states, true.states, states, "state")
    if config.operands is None:
        assert_close(found.preactivations, true.preactivations, 10 * states, "preactivation")
        assert_close([found.trace], [true.trace], 100 * states, "residual")
        assert found.winners.keys() == true.winners.keys()
        assert all(torch.equal(found.winners[c], true.winners[c]) for c in true.winners)
    given = replace(
        true,
        states=[here.x, *moved(true.states[1:], config.storage or torch.float32)],
        preactivations=moved(true.preactivations),
        drives=moved(true.drives),
        residual=moved(true.residual),
        trace=moved(true.trace),
    )
    ours = nudged_phase(here.network, here.parameters, given, here.targets, config, backend=on)
    assert_close(ours.deltas, there.deltas, deltas, "delta")
    backends.release()  # launches one by one again, and no capture: what the sanitizer reads most easily
    gradients, _ = ep_gradients(here.network, here.parameters, here.x, here.targets, config, backend=on)
    limit = 10 * deltas if config.nudge_form != "states" else 100 * deltas  # a difference of states loses digits
    assert_close(list(gradients.named().values()), list(expected.named().values()), limit, "gradient")


def low_gain(network: Network) -> Network:
    return replace(network, feedback_gain=LOW_GAIN)


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("name", [*NETWORKS, *VARIANTS])
def test_every_network_in_float32(name: str, setting: str, on: str) -> None:
    if INTERPRETED and (setting not in ("sweep", "live") or name not in ("max", "slope 1/2, local heads")):
        pytest.skip("takes minutes in the interpreter")
    network = fitting({**NETWORKS, **VARIANTS}[name], SETTINGS[setting])
    compare_phases(random_problem(network), SETTINGS[setting], 1e-5, 1e-4, on)


@pytest.mark.parametrize("name", ["max", "no pooling, mse", "skips, average"])
@pytest.mark.parametrize("setting", ["sweep", "tangent", "even_odd"])
def test_precisions(name: str, setting: str, precision: str, on: str) -> None:
    if INTERPRETED and setting != "sweep":
        pytest.skip("takes minutes in the interpreter")
    of = PRECISIONS[precision]
    config = replace(SETTINGS[setting], operands=of.operands, storage=of.storage)
    compare_phases(random_problem(low_gain(NETWORKS[name])), config, of.states, of.deltas, on)


@pytest.mark.parametrize("batch", [1, 2, 7, 33])
def test_batches(batch: int, on: str) -> None:
    if INTERPRETED and batch > 2:
        pytest.skip("takes minutes in the interpreter")
    compare_phases(random_problem(SMALL, batch=batch), SETTINGS["sweep"], 1e-5, 1e-4, on)


@pytest.mark.parametrize("widths", [(64, 64, 128), (17, 3, 33), (512, 64, 512)])
def test_widths(widths: tuple[int, ...], precision: str, on: str) -> None:
    if INTERPRETED:
        pytest.skip("takes minutes in the interpreter")
    network = Network.chain((3, 16, 16), widths, ["max", "none", "max"], classes=10, feedback_gain=LOW_GAIN)
    of = PRECISIONS[precision]
    config = of.config(free_steps=3, nudged_steps=2)
    compare_phases(random_problem(network, batch=5), config, of.states, of.deltas, on)


def test_small_relaxation(on: str) -> None:
    """Both forms once each: for compute-sanitizer, so no launch is replayed."""
    for setting in ("tangent", "sweep"):
        compare_phases(random_problem(SMALL, batch=2), SETTINGS[setting], 1e-5, 1e-4, on)


def test_small_half_precision(on: str) -> None:
    of = PRECISIONS["fp16"]
    network = low_gain(NETWORKS["max"])
    compare_phases(random_problem(network, batch=2), of.config(free_steps=2, nudged_steps=1), of.states, of.deltas, on)


def test_small_skips(on: str) -> None:
    compare_phases(random_problem(NETWORKS["skips, max"], batch=1), SETTINGS["one sweep"], 1e-5, 1e-4, on)


@pytest.mark.parametrize("schedule", ["sweep", "even_odd", "sync"])
def test_early_stop(schedule: str, on: str) -> None:
    """Stops in the sweep in which the reference stops, and returns what that sweep left."""
    p = random_problem(NETWORKS["max"], gain=0.5)
    here, exact = on_device(p), on_device(p, torch.float64)
    config = RelaxConfig(schedule, free_steps=30, tol=1e-3, damping=0.9)  # type: ignore[arg-type]
    found = free_phase(here.network, here.parameters, here.x, config, keep=True, backend=on)
    true = free_phase(exact.network, exact.parameters, exact.x, config, keep=True, backend="reference")
    assert found.steps == true.steps < 30
    assert found.converged
    assert float(found.residual.max()) <= 1e-3
    assert_close(found.states, true.states, 1e-5, "state")
    assert_close(found.preactivations, true.preactivations, 1e-4, "preactivation")
    again = free_phase(here.network, here.parameters, here.x, config, keep=True, backend=on)
    assert again.steps == found.steps
    assert_equal(again.states, found.states, "state")


def test_no_early_stop_without_convergence(on: str) -> None:
    here = on_device(random_problem(NETWORKS["max"]))
    config = RelaxConfig(free_steps=3, tol=1e-12)
    found = free_phase(here.network, here.parameters, here.x, config, backend=on)
    assert found.steps == 3
    assert found.converged is False


@pytest.mark.parametrize("name", list(POOLED))
def test_warm_start(name: str, on: str) -> None:
    p = random_problem(NETWORKS[name])
    start = p.states()
    here, exact = on_device(p), on_device(p, torch.float64)
    config = RelaxConfig(free_steps=3)
    found = free_phase(here.network, here.parameters, here.x, config, states=moved(start), backend=on)
    true = free_phase(
        exact.network, exact.parameters, exact.x, config, states=moved(start, torch.float64), backend="reference"
    )
    assert_close(found.states, true.states, 1e-5, "state")


@pytest.mark.parametrize("steps", [1, 2, 16, 17, 40])
def test_numbers_of_sweeps(steps: int, on: str) -> None:
    """One program for all of them; twice each, so that graphs are replayed."""
    if INTERPRETED and steps > 2:
        pytest.skip("takes minutes in the interpreter")
    p = random_problem(NETWORKS["max"])
    here, exact = on_device(p), on_device(p, torch.float64)
    for schedule in ("sweep", "sync"):
        config = RelaxConfig(schedule, free_steps=steps, damping=0.8)  # type: ignore[arg-type]
        true = free_phase(exact.network, exact.parameters, exact.x, config, backend="reference")
        for _ in range(3):
            found = free_phase(here.network, here.parameters, here.x, config, backend=on)
            assert_close(found.states, true.states, 1e-5, f"{schedule}: state")


def test_extra_nudges(on: str) -> None:
    p = random_problem(NETWORKS["max"])
    extra = {1: torch.rand(3, *p.network.shapes[1], dtype=torch.float64), 3: 0.1 * torch.rand(3, *p.network.shapes[3])}
    here, exact = on_device(p), on_device(p, torch.float64)
    config = SETTINGS["sweep"]
    found, _ = ep_gradients(here.network, here.parameters, here.x, here.targets, config, extra=moved(extra), backend=on)
    true, _ = ep_gradients(
        exact.network,
        exact.parameters,
        exact.x,
        exact.targets,
        config,
        extra=moved(extra, torch.float64),
        backend="reference",
    )
    assert_close(list(found.named().values()), list(true.named().values()), 1e-3, "gradient")


def test_gradients_keep_their_direction(precision: str, on: str) -> None:
    """Gradients of every precision point where those of float64 point, in every layer."""
    network = Network.chain((3, 8, 8), (16, 16, 32, 32), ["none", "max", "none", "max"], classes=5, feedback_gain=0.1)
    p = random_problem(network, batch=4 if INTERPRETED else 16)
    here, exact = on_device(p), on_device(p, torch.float64)
    config = PRECISIONS[precision].config(free_steps=4, nudged_steps=3)
    found, _ = ep_gradients(here.network, here.parameters, here.x, here.targets, config, backend=on)
    plain = replace(config, operands=None, storage=None)
    true, _ = ep_gradients(exact.network, exact.parameters, exact.x, exact.targets, plain, backend="reference")
    for name, a in found.named().items():
        u, v = a.cpu().double().flatten(), true.named()[name].cpu().flatten()
        cosine = float(u @ v / (u.norm() * v.norm()))
        assert math.isfinite(cosine), name
        assert cosine >= 0.98, f"{name}: {cosine:.4f}"


def test_an_empty_batch(on: str) -> None:
    p = random_problem(NETWORKS["max"])
    here = on_device(p)
    x, targets = here.x[:0], [t[:0] for t in here.targets]
    found, equilibrium = ep_gradients(here.network, here.parameters, x, targets, SETTINGS["sweep"], backend=on)
    assert all(s.shape == (0, *shape) for s, shape in zip(equilibrium.states, p.network.shapes, strict=True))
    assert all(float(t.abs().sum()) == 0 for t in found.named().values())


def test_a_phase_without_a_step(on: str) -> None:
    """Without heads and extra nudges a delta phase moves nothing."""
    here = on_device(random_problem(NETWORKS["max"]))
    with backends.recorded() as jobs:
        ep_gradients(here.network, here.parameters, here.x, here.targets, SETTINGS["tangent"], backend=on)
    nudged = jobs[1]
    assert isinstance(nudged, Relaxation)
    sweeps = tuple(() for _ in nudged.plan.sweeps)
    idle = replace(nudged, plan=replace(nudged.plan, prologue=(), sweeps=sweeps, refresh=()))
    found, true = backends.relax(idle, on), backends.relax(idle, "reference")
    assert_equal(found.states[1:], true.states[1:], "state")
    assert_equal([found.residual], [true.residual], "residual")
