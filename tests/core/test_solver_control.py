"""The result object, what happens when a free phase does not converge, and free phases in stages."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ep_kernels import (
    ConvergenceError,
    Equilibrium,
    Network,
    RelaxConfig,
    ep_gradients,
    equilibrium,
    free_phase,
    holomorphic_gradients,
    nudged_gradients,
    reference,
)
from ep_kernels.config import ESTIMATORS, ON_FAILS, STARTS
from ep_kernels.plan import SCHEDULES
from ep_kernels.precision import OPERANDS, STORAGES
from ep_kernels.stages import plans_of
from tests.core.nets import BACKENDS, NETWORKS, VARIANTS, Problem, problem

# converges slowly and surely
SLOW = Network.chain((1, 6, 6), [4, 4, 4], ["none", "max", "none"], classes=3, feedback_gain=0.3)
TOL = RelaxConfig(free_steps=3, tol=1e-6)
EVERY = {**NETWORKS, **VARIANTS}
RUNS = [(name, "cpu") for name in EVERY] + [("skips, max", "reference"), ("average, odd maps", "reference")]


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    equilibrium._warned.clear()
    yield
    equilibrium._warned.clear()


def free(p: Problem, config: RelaxConfig, **options: Any) -> Equilibrium:
    return free_phase(p.network, p.parameters, p.x, config, **options)


# --- the result -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", BACKENDS)
def test_a_run_that_stops_early(on: str) -> None:
    p = problem(SLOW, gain=0.7)
    config = replace(TOL, free_steps=50)
    found = free(p, config, backend=on)
    whole = free(p, replace(config, tol=0.0), backend=on)
    assert 3 < found.steps < 50
    assert found.converged is True
    assert found.residuals.shape == (50, 3)
    assert (found.residuals[found.steps :] == -1).all()
    assert found.trace.shape == (found.steps, 3)
    torch.testing.assert_close(found.trace, whole.trace[: found.steps])
    assert torch.equal(found.residual, found.trace[-1])
    assert float(found.trace[-2].max()) > config.tol >= float(found.residual.max())
    assert found.message.startswith("converged: residual ")
    assert f"after {found.steps} sweeps (tol 1e-06)" in found.message
    assert (whole.steps, whole.converged) == (50, None)
    assert whole.message.startswith("not tested (tol is 0): residual ")
    assert "above 0.1" not in whole.message
    early = free(p, replace(config, tol=0.0, free_steps=1), backend=on).message
    assert early.startswith("not tested (tol is 0): residual ")
    assert "above 0.1 in " in early
    assert "to lower the residual: raise free_steps from 1 to " in early


def test_one_sample_that_moves_is_not_converged() -> None:
    p = problem(SLOW, gain=0.7)
    config = replace(TOL, free_steps=3, on_fail="ignore")
    trace = free(p, config).residual
    between = float(trace.sort().values[:2].mean())  # one sample is below
    found = free(p, replace(config, tol=between))
    assert found.converged is False
    assert "in 2 of 3 samples" in found.message


def test_no_samples_and_one_sweep() -> None:
    p = problem(SLOW)
    empty = free(replace(p, x=p.x[:0]), TOL)
    assert (empty.steps, empty.converged, empty.residual.shape) == (3, True, (0,))
    assert empty.message == "converged: there are no samples"
    once = free(p, replace(TOL, free_steps=1, on_fail="ignore"))
    assert (once.steps, once.converged, once.rate) == (1, False, None)
    assert "after 1 sweep (" in once.message
    assert "raise free_steps from 1 to 2" in once.message


def test_states_that_are_not_finite() -> None:
    p = problem(SLOW)
    p.x[1, 0, 0, 0] = float("nan")
    found = free(p, replace(TOL, free_steps=60, on_fail="ignore"))
    assert found.converged is False
    assert found.rate is None
    assert "not finite, in 1 of 3 samples after 60 sweeps" in found.message
    with pytest.raises(ConvergenceError, match="not finite"):
        free(p, replace(TOL, on_fail="raise"))


def test_the_sweeps_that_the_message_asks_for_are_enough() -> None:
    p = problem(SLOW, gain=0.7)
    config = replace(TOL, free_steps=8, on_fail="ignore")
    asked = re.search(r"raise free_steps from 8 to (\d+)", free(p, config).message)
    assert asked is not None
    needed = free(p, replace(config, free_steps=200)).steps
    assert 0.7 * needed <= int(asked[1]) <= 1.5 * needed


@pytest.mark.parametrize("gain", [1.5, 2.0, 3.0])
def test_the_gain_that_the_message_asks_for_converges(gain: float) -> None:
    """States that jump between the edges of the box, which no number of sweeps ends: followed twice at most."""
    p = problem(replace(SLOW, feedback_gain=1.0), gain=gain)
    config = RelaxConfig("sync", 20, tol=1e-4, on_fail="ignore")
    for _ in range(2):
        said = free(p, config).message
        assert "use schedule sweep (it cannot raise the energy)" in said
        if "raise free_steps" in said:
            break
        asked = re.search(r"lower feedback_gain from [\d.]+ \(try about ([\d.e-]+)\)", said)
        assert asked is not None, said
        p = replace(p, network=replace(p.network, feedback_gain=float(asked[1])))
    assert 0.02 < p.network.feedback_gain < 0.5
    assert free(p, replace(config, free_steps=100)).converged


# --- on_fail ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", BACKENDS)
def test_raise_carries_what_was_found(on: str) -> None:
    p = problem(SLOW)
    with pytest.raises(ConvergenceError) as caught:
        free(p, replace(TOL, on_fail="raise"), backend=on)
    found = free(p, replace(TOL, on_fail="ignore"), backend=on)
    assert all(torch.equal(a, b) for a, b in zip(caught.value.equilibrium.states, found.states, strict=True))
    assert str(caught.value) == found.message
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == found.message
    assert again.equilibrium.steps == 3
    assert free(p, replace(TOL, free_steps=200, on_fail="raise"), backend=on).converged


def test_every_way_to_a_free_phase_raises() -> None:
    p = problem(SLOW)
    config = replace(TOL, on_fail="raise")
    for call in (ep_gradients, holomorphic_gradients):
        with pytest.raises(ConvergenceError, match="raise free_steps from 3"):
            call(p.network, p.parameters, p.x, p.targets, config)


def test_a_warning_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    p = problem(SLOW)
    with caplog.at_level(logging.WARNING, "ep_kernels"):
        found = free(p, TOL)
        free(replace(p, x=p.x.flip(0)), TOL)
        assert [record.getMessage().partition(" (said once")[0] for record in caplog.records] == [found.message]
        free(p, replace(TOL, free_steps=2))
        assert len(caplog.records) == 2
        free(p, replace(TOL, on_fail="ignore"))
        free(p, replace(TOL, free_steps=200))
        free(p, RelaxConfig(free_steps=1))  # no tolerance
        assert len(caplog.records) == 2


class Waits(TorchDispatchMode):
    """Counts how often Python asks for a tensor's value."""

    asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.asked += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("on_fail", "waits"), [("ignore", False), ("warn", True), ("raise", True)])
def test_who_waits_for_a_device(on_fail: Any, waits: bool) -> None:
    """With a tolerance nothing but ``on_fail`` reads a value back; a GPU stops by itself."""
    p = problem(SLOW, gain=0.5)
    config = RelaxConfig(free_steps=40, tol=1e-5, on_fail=on_fail)
    with Waits() as mode:
        _, found = ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend="cpu")
        residual = found.residual
        assert (mode.asked > 0) == waits
        assert found.converged
        assert mode.asked > 0
    assert float(residual.max()) <= 1e-5


# --- stages -----------------------------------------------------------------------------------------------------------


def same(found: Equilibrium, expected: Equilibrium) -> None:
    """Everything that the nudged phases read."""
    for name in ("states", "preactivations"):
        for a, b in zip(getattr(found, name), getattr(expected, name), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert found.drives.keys() == expected.drives.keys()
    assert found.winners.keys() == expected.winners.keys()
    for c, drive in expected.drives.items():
        torch.testing.assert_close(found.drives[c], drive, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(found.winners[c], won) for c, won in expected.winners.items())


def same_gradients(p: Problem, found: Equilibrium, expected: Equilibrium, config: RelaxConfig, on: str) -> None:
    ours, theirs = (
        nudged_gradients(p.network, p.parameters, e, p.targets, config, backend=on)[0].named()
        for e in (found, expected)
    )
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("schedule", ["sync", "even_odd"])
@pytest.mark.parametrize(("network", "on"), RUNS)
def test_feedforward_start(network: str, schedule: Any, on: str) -> None:
    """One bottom-up sweep from zero, then the sweeps of the schedule from there."""
    p = problem(EVERY[network])
    config = RelaxConfig(schedule, 3, start="feedforward")
    below = free(p, RelaxConfig("sweep", 1), backend=on).states
    expected = free(p, replace(config, start="zero"), states=below, keep=True, backend=on)
    found = free(p, config, keep=True, backend=on)
    assert found.steps == 3
    torch.testing.assert_close(found.trace, expected.trace)
    same(found, expected)
    same_gradients(p, found, expected, config, on)
    # what is given is where it starts
    warm = free(p, config, states=expected.states, keep=True, backend=on)
    same(warm, free(p, replace(config, start="zero"), states=expected.states, keep=True, backend=on))


def test_a_feedforward_start_is_the_network_without_feedback() -> None:
    p = problem(NETWORKS["skips, max"])
    state: list[Tensor] = [p.x]
    for node in range(1, len(p.network.shapes)):
        bias = p.parameters.biases[node]
        assert bias is not None
        a = bias.view(-1, *[1] * (len(p.network.shapes[node]) - 1))
        for c in p.network.into[node]:
            conn = p.network.connections[c]
            a = a + reference.connection_drive(conn, state[conn.src], p.parameters.weights[c])
        state.append(a.clamp(0, 1))
    moved = free(p, RelaxConfig("sync", 1, start="feedforward"), states=None).states
    at = free(p, RelaxConfig("sync", 1), states=state).states
    for found, expected in zip(moved, at, strict=True):
        torch.testing.assert_close(found, expected)


def test_of_a_sweep_the_feedforward_start_is_the_first_one() -> None:
    p = problem(NETWORKS["max"])
    config = RelaxConfig(free_steps=3)
    same(free(p, replace(config, start="feedforward"), keep=True), free(p, config, keep=True))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("network", "on"), RUNS)
def test_low_precision_first(network: str, schedule: Any, on: str) -> None:
    """Two relaxations in a row; of the first nothing is left in the second but where it starts."""
    p = problem(EVERY[network])
    late = RelaxConfig(schedule, 3, damping=0.7)
    early = replace(late, free_steps=2, operands=torch.bfloat16)
    expected = free(p, late, states=free(p, early, backend=on).states, keep=True, backend=on)
    config = replace(late, free_steps=5, early_operands=torch.bfloat16, early_steps=2)
    found = free(p, config, keep=True, backend=on)
    assert found.steps == len(found.trace) == 5
    pooled = any(conn.pool == "max" and conn.src for conn in p.network.connections)
    if schedule == "sweep" and pooled:  # until a layer moves, its winners are those of the rounded drive
        assert all(torch.isfinite(s).all() for s in found.states)
        assert (found.residual - expected.residual).abs().max() < 0.1
    else:
        same(found, expected)
        same_gradients(p, found, expected, late, on)


def test_rounding_is_that_of_the_early_sweeps_alone() -> None:
    p = problem(SLOW, gain=0.7)
    exact = free(p, RelaxConfig(free_steps=40)).states[-1]

    def error(**change: Any) -> float:
        return float((free(p, RelaxConfig(free_steps=40, **change)).states[-1] - exact).abs().max())

    rounded = error(operands=torch.bfloat16)
    assert rounded > 1e-4
    assert error(early_operands=torch.bfloat16, early_steps=20) < 1e-6 * rounded
    assert error(early_operands=torch.bfloat16, early_steps=1000) > 1e-3 * rounded  # one sweep in full is the least


@pytest.mark.parametrize("on", BACKENDS)
def test_both_stages_stop_early(on: str) -> None:
    p = problem(SLOW, gain=0.5)
    config = RelaxConfig(free_steps=60, tol=1e-2, early_operands=torch.float16, early_steps=30)
    found = free(p, config, backend=on)
    assert found.converged
    ran = found.residuals[:, 0] != -1
    assert not ran[29]
    assert not ran[59]
    assert ran[[0, 1, 30, 31]].all()
    assert found.steps == len(found.trace) == int(ran.sum())
    assert torch.equal(found.trace[-1], found.residual)


def test_convolutions_of_the_stages() -> None:
    """A chain of max poolings: what a stage takes over is not computed again."""
    net = NETWORKS["max everywhere, odd maps"]

    def count(config: RelaxConfig) -> list[int]:
        return [plan.convolutions(stage.steps) for stage, plan in plans_of(net, config, warm=False)]

    assert count(RelaxConfig(free_steps=4)) == [3 + 3 * 4]  # L, then L - 1 drives and L - 1 feedbacks a sweep
    early = RelaxConfig(free_steps=4, early_operands="tf32", early_steps=2)
    assert count(early) == [3 + 4, 1 + 2 * 4]  # the input's drive again
    assert count(RelaxConfig("sync", 4, start="feedforward")) == [3, 2 + 3 * 4]


# --- names and fuzz ---------------------------------------------------------------------------------------------------


def test_unknown_names_are_rejected_with_the_valid_ones() -> None:
    for make in (RelaxConfig.from_dict, lambda values: RelaxConfig.classical(**values)):
        with pytest.raises(ValueError, match=r"expected names among schedule, free_steps, .*early_steps; got 'gain'"):
            make({"gain": 1.0, "tol": 0.0})
    with pytest.raises(ValueError, match="argument 'values': expected a mapping"):
        RelaxConfig.from_dict([("tol", 0.0)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"argument 'operands': expected one of None, tf32, .*, got 'fp16'"):
        RelaxConfig.from_dict({"operands": "fp16"})


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 12), st.integers(), st.floats(), st.text(max_size=6),
    st.sampled_from([10**400, torch.float16, torch.int8, torch.ones(2), torch.ones(()), [], {}, object(), 1j, float]),
)  # fmt: skip
SENSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "schedule": st.sampled_from(SCHEDULES),
    "free_steps": st.integers(1, 4),
    "nudged_steps": st.integers(1, 4),
    "beta": st.floats(1e-4, 1.0),
    "estimator": st.sampled_from(ESTIMATORS),
    "form": st.sampled_from(["states", "delta"]),
    "winners": st.sampled_from(["live", "frozen"]),
    "linear_nudge": st.booleans(),
    "damping": st.floats(0.1, 1.0),
    "over_relaxation": st.none() | st.floats(1.0, 1.9),
    "tol": st.sampled_from([0.0, 1e-8, 1e-2, 1]),
    "operands": st.sampled_from(OPERANDS),
    "storage": st.sampled_from(STORAGES),
    "on_fail": st.sampled_from(ON_FAILS),
    "start": st.sampled_from(STARTS),
    "early_operands": st.sampled_from(OPERANDS),
    "early_steps": st.integers(0, 5),
}
FEW = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def test_every_field_is_tried() -> None:
    assert list(SENSIBLE) == list(RelaxConfig.__dataclass_fields__)


@FEW
@given(st.dictionaries(st.sampled_from(list(SENSIBLE)) | st.text(max_size=4), ODD, max_size=5))
def test_odd_values_are_value_errors(values: dict[str, Any]) -> None:
    try:
        config = RelaxConfig.from_dict(values)
    except ValueError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert said.startswith("RelaxConfig")
        return
    assert hash(config) == hash(RelaxConfig.from_dict(config.to_dict()))
    for name, value in values.items():
        ours = getattr(config, name)
        assert ours is value or ours == value or str(ours) == f"torch.{value}"


@FEW
@given(st.fixed_dictionaries({}, optional=SENSIBLE))
def test_what_is_taken_runs(values: dict[str, Any]) -> None:
    """A setting is refused by name, or it gives finite gradients; and it survives a JSON file."""
    p = problem(Network.chain((1, 4, 4), [2, 2], ["max", "none"], classes=2, feedback_gain=0.5), batch=2)
    try:
        config = RelaxConfig(**values)
        gradients, found = ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend="reference")
        refused = ""
    except ConvergenceError as error:
        found, gradients, refused = error.equilibrium, None, ""
    except ValueError as error:
        refused = str(error)
    if refused:
        assert re.match(r"(RelaxConfig|ep_gradients): argument '\w+': expected ", refused), refused
        return
    if gradients is None:
        assert values["on_fail"] == "raise"
    else:
        assert all(bool(g.isfinite().all()) for g in gradients.named().values())
    assert RelaxConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert 1 <= found.steps <= config.free_steps
    assert (found.converged is None) == (config.tol == 0)
    assert found.message
