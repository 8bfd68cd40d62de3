"""``relax`` of the CUDA backend, run on the CPU: whole relaxations and gradients against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ep_kernels import Network, Parameters, RelaxConfig, backend, free_phase, nudged_phase
from ep_kernels.solver import Equilibrium, Nudged, contrast_gradients, ep_gradients
from tests.core.nets import VARIANTS, fitting
from tests.cuda.host import cuda_on_cpu
from tests.gpu.device import assert_close, assert_equal, moved
from tests.ops.inputs import LAYOUTS
from tests.ops.networks import CHAIN, HEADS, MSE, NETWORKS, SKIP, extra_nudges, problem
from tests.ops.test_relax import CLAMPED, CONFIGS, DEFAULTS, WITH_OUTPUTS, check_zero_direction, name

Run = tuple[Equilibrium, Nudged, Parameters]
FP32 = torch.float32
LIMIT = 1e-4  # of float32 against float64, relative to the largest value


def close(what: str, got: Tensor | None, expected: Tensor | None, scale: float = 0.0, limit: float = LIMIT) -> None:
    """Relative to the largest expected magnitude, or to ``scale`` where that is larger."""
    assert (got is None) == (expected is None), what
    if got is None or expected is None or not expected.numel():
        return
    assert got.shape == expected.shape, what
    error, largest = float((got.double() - expected.double()).abs().max()), float(expected.abs().max())
    assert error <= limit * max(largest, scale), f"{what}: error {error:.2e}, largest {largest:.2e}"


def run(network: Network, config: RelaxConfig, batch: int, dtype: torch.dtype, **what: bool) -> Run:
    """Both phases and the gradients: float64 in the reference, else by the CUDA backend, from the same numbers."""
    params, x, targets = moved(moved(problem(network, batch), FP32, "cpu"), dtype, "cpu")
    nudges = moved(moved(extra_nudges(network, batch), FP32, "cpu"), dtype, "cpu") if what.get("extra") else None
    start = None
    if what.get("warm"):
        start = free_phase(network, params, x.flip(0), RelaxConfig(free_steps=2), backend="reference").states
        start = moved(moved(start, FP32, "cpu"), dtype, "cpu")
    with cuda_on_cpu() if dtype == FP32 else backend("reference"):
        free = free_phase(network, params, x, config, states=start, keep=True)
        nudged = nudged_phase(network, params, free, targets, config, extra=nudges)
        return free, nudged, contrast_gradients(network, params, free, nudged, targets)


def compare(network: Network, config: RelaxConfig, batch: int = 3, **what: bool) -> None:
    network = fitting(network, config)
    free, nudged, gradients = run(network, config, batch, FP32, **what)
    free_, nudged_, gradients_ = run(network, config, batch, torch.float64, **what)
    for kind in ("states", "preactivations"):
        for i, (got, expected) in enumerate(zip(getattr(free, kind), getattr(free_, kind), strict=True)):
            close(f"{kind}[{i}]", got, expected)
    assert free.drives.keys() == free_.drives.keys()
    assert free.winners.keys() == free_.winners.keys()
    for c in free.drives:
        close(f"drives[{c}]", free.drives[c], free_.drives[c])
    for c in free.winners:
        assert torch.equal(free.winners[c], free_.winners[c]), f"winners[{c}]"
    close("trace", free.trace, free_.trace, 1.0)
    # deltas of the states form are differences of states of order 1 over a small beta; a delta is scaled to order 1
    by_states = config.nudge_form == "states"
    close("nudged trace", nudged.trace, nudged_.trace, 1.0)
    for i, (got, expected) in enumerate(zip(nudged.deltas, nudged_.deltas, strict=True)):
        close(f"deltas[{i}]", got, expected, 1.0 if by_states else 0.0)
    if by_states:
        return  # gradients are differences of rounded states: their noise is the form's, not the kernels'
    largest = max([float(g.abs().max()) for g in gradients_.named().values()]) if batch else 0.0
    for key, expected in gradients_.named().items():
        close(key, gradients.named()[key], expected, 0.1 * largest, 5 * LIMIT)


@pytest.mark.parametrize("index", range(len(CONFIGS)), ids=[name(c) for c in CONFIGS])
def test_every_configuration(index: int) -> None:
    """On one network in turn, half of them with extra nudges."""
    compare(list(NETWORKS.values())[index % len(NETWORKS)], CONFIGS[index], extra=index % 3 == 0)


@pytest.mark.parametrize("batch", [0, 1, 4])
@pytest.mark.parametrize("config", DEFAULTS)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_network(network: str, config: str, batch: int) -> None:
    compare(NETWORKS[network], DEFAULTS[config], batch, extra=True)


@pytest.mark.parametrize("config", DEFAULTS)
@pytest.mark.parametrize("network", NETWORKS)
def test_warm_start(network: str, config: str) -> None:
    compare(NETWORKS[network], DEFAULTS[config], warm=True)


@pytest.mark.parametrize("config", CLAMPED)
@pytest.mark.parametrize("network", WITH_OUTPUTS)
def test_clamped_outputs(network: str, config: str) -> None:
    compare(WITH_OUTPUTS[network], CLAMPED[config])


@pytest.mark.parametrize("schedule", ["sweep", "even_odd", "sync"])
@pytest.mark.parametrize("network", NETWORKS)
def test_early_stop(network: str, schedule: Any) -> None:
    net = NETWORKS[network]
    params, x, targets = moved(problem(net), FP32, "cpu")
    config = RelaxConfig(schedule, 60, 60, tol=1e-4)
    runs = []
    for cuda in (True, False):
        with cuda_on_cpu() if cuda else backend("reference"):
            free = free_phase(net, params, x, config, keep=True)
            runs.append((free, nudged_phase(net, params, free, targets, config)))
    (free, nudged), (free_, nudged_) = runs
    assert free.converged
    assert 2 < free.steps < 60
    assert abs(free.steps - free_.steps) <= 1  # a residual may lie on either side of the tolerance
    if free.steps == free_.steps:
        close("trace", free.trace, free_.trace, 1.0)
        for i, (got, expected) in enumerate(zip(free.preactivations, free_.preactivations, strict=True)):
            close(f"preactivations[{i}]", got, expected)
        for i, (got, expected) in enumerate(zip(nudged.deltas, nudged_.deltas, strict=True)):
            close(f"deltas[{i}]", got, expected, limit=1e-3)


@pytest.mark.parametrize("operands", ["tf32", torch.float16, torch.bfloat16])
@pytest.mark.parametrize("storage", [None, torch.float16])
@pytest.mark.parametrize("network", NETWORKS)
def test_precisions(network: str, operands: Any, storage: Any) -> None:
    """Operands and states are rounded as the reference rounds them (tf32 it leaves exact); a winner near a tie may
    still flip."""
    net = NETWORKS[network]
    params, x, targets = moved(problem(net), FP32, "cpu")
    config = RelaxConfig(operands=operands, storage=storage)
    runs = []
    for cuda in (True, False):
        with cuda_on_cpu() if cuda else backend("reference"):
            free = free_phase(net, params, x, config, keep=True)
            runs.append((free, nudged_phase(net, params, free, targets, config)))
    (free, nudged), (free_, nudged_) = runs
    limit = {"tf32": 1e-2, torch.float16: 2e-3, torch.bfloat16: 2e-2}[operands]
    assert all(s.dtype == (storage or FP32) for s in free.states[1:])
    assert_close(free.states, free_.states, limit, "states")
    assert_close(nudged.deltas, nudged_.deltas, 5 * limit, "deltas")


def test_one_graph_for_a_signature(device: Any) -> None:
    """A signature's second call captures its graph, later ones replay it; each reads and writes what is its own."""
    params, x, targets = moved(problem(CHAIN), FP32, "cpu")
    config = RelaxConfig(estimator="tangent")
    device.reset_statistics()
    with cuda_on_cpu():
        found = [ep_gradients(CHAIN, params, x + shift, targets, config)[0] for shift in (0.0, 0.1, 0.0)]
    assert device.statistics()["graph_launches"] == 4  # a free and a nudged phase, in two of three calls
    assert_equal(list(found[2].named().values()), list(found[0].named().values()))
    assert not torch.equal(found[1].weights[0], found[0].weights[0])


def test_feedback_weights_are_read_at_every_run(device: Any) -> None:
    """Launched, captured and replayed with feedback weights of changing values; tied ones have a program of their
    own."""
    net = VARIANTS["separate, linear top"]
    params, x, targets = moved(problem(net), FP32, "cpu")
    device.reset_statistics()
    for turn in range(4):
        own = [None if w is None else w * (1 + turn) for w in params.feedback_weights]
        with cuda_on_cpu():
            found, _ = ep_gradients(net, replace(params, feedback_weights=own), x, targets)
        expected, _ = ep_gradients(net, replace(params, feedback_weights=own), x, targets, backend="reference")
        assert_close(list(found.named().values()), list(expected.named().values()), 1e-3)
    assert device.statistics()["graph_launches"] == 6
    tied = replace(net, feedback="tied")
    with cuda_on_cpu():
        found, _ = ep_gradients(tied, replace(params, feedback_weights=()), x, targets)
    expected, _ = ep_gradients(tied, replace(params, feedback_weights=()), x, targets, backend="reference")
    assert_close(list(found.named().values()), list(expected.named().values()), 1e-3)


def test_a_zero_vector_has_no_direction() -> None:
    with cuda_on_cpu():
        check_zero_direction(None)


def test_programs_are_forgotten_in_turn(device: Any) -> None:
    """More signatures than are kept, and then the first again: its results are its own."""
    params, x, _ = moved(problem(MSE), FP32, "cpu")
    with cuda_on_cpu():
        first = free_phase(MSE, params, x, RelaxConfig(free_steps=1))
        for steps in range(2, 24):
            free_phase(MSE, params, x, RelaxConfig(free_steps=steps))
        again = free_phase(MSE, params, x, RelaxConfig(free_steps=1))
    assert_equal(again.states, first.states)
    live = device.statistics()["live"]
    assert live["graphs"] <= 40, live


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout: str) -> None:
    change = LAYOUTS[layout]
    for net in (SKIP, HEADS, VARIANTS["separate, linear top"]):
        params, x, targets = moved(problem(net), FP32, "cpu")
        extra = moved(extra_nudges(net), FP32, "cpu")

        def many(tensors: Sequence[Tensor | None]) -> list[Any]:
            return [None if t is None else change(t) for t in tensors]

        fields = ("weights", "biases", "head_weights", "head_biases", "feedback_weights")
        other = replace(params, **{f: many(getattr(params, f)) for f in fields})
        with cuda_on_cpu():
            got, _ = ep_gradients(
                net, other, change(x), many(targets), RelaxConfig(), extra={i: change(t) for i, t in extra.items()}
            )
            expected, _ = ep_gradients(net, params, x, targets, RelaxConfig(), extra=extra)
        # heads' own gradients go through ATen, which sums in another order
        assert_close(list(got.named().values()), list(expected.named().values()), 1e-6)


def test_nan_in_the_input_surfaces_in_its_sample_only() -> None:
    for net in NETWORKS.values():
        params, x, _ = moved(problem(net), FP32, "cpu")
        x[1, 0, 2, 2] = float("nan")
        with cuda_on_cpu():
            free = free_phase(net, params, x, RelaxConfig(free_steps=3, tol=1e-3))
        assert free.residual.isnan().tolist() == [False, True, False]
        assert [bool(s) for s in free.states[-1].isnan().flatten(1).any(1)] == [False, True, False]
        assert free.steps == 3
        assert not free.converged


@pytest.mark.parametrize("order", ["reverse", 3])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_order_of_threads_does_not_matter(network: str, order: Any, device: Any) -> None:
    net = NETWORKS[network]
    params, x, targets = moved(problem(net), FP32, "cpu")
    found = []
    for turn in ("forward", order):
        device.set_order(turn)
        with cuda_on_cpu():
            found.append(ep_gradients(net, params, x, targets, RelaxConfig(operands=torch.float16))[0])
    assert_equal(list(found[1].named().values()), list(found[0].named().values()))


@pytest.mark.parametrize("schedule", ["sweep", "sync"])
@pytest.mark.parametrize("steps", [32, 41, 54])
def test_long_runs(schedule: Any, steps: int) -> None:
    """Steady sweeps are one graph of sixteen, replayed; runs that stop within it leave the rest out."""
    params, x, _ = moved(problem(CHAIN), FP32, "cpu")
    for tol in (0.0, 1e-5):
        config = RelaxConfig(schedule, steps, tol=tol)
        expected = free_phase(CHAIN, params, x, config, backend="cpu")
        for _ in range(3):  # launched, captured, replayed
            with cuda_on_cpu():
                found = free_phase(CHAIN, params, x, config)
            assert found.steps == expected.steps
            for i, (got, want) in enumerate(zip(found.states, expected.states, strict=True)):
                close(f"states[{i}]", got, want)
            close("trace", found.trace, expected.trace, 1.0)


def test_a_launch_that_fails_says_what_it_was(device: Any) -> None:
    """And leaves nothing behind: the same relaxation then runs."""
    net = Network.chain((2, 8, 8), [128, 130], ["none", "max"], classes=3, feedback_gain=0.5)
    params, x, _ = moved(problem(net, 40), FP32, "cpu")
    device.set_device(processors=1, shared_memory=1000)
    with cuda_on_cpu():
        with pytest.raises(RuntimeError, match=r"relax: .* of \w+ \d+ \[40, 128, 8, 8\]: ep_kernels: cudaFunc"):
            free_phase(net, params, x, RelaxConfig())
        device.set_device()
        found = free_phase(net, params, x, RelaxConfig())
    expected = free_phase(net, params, x, RelaxConfig(), backend="reference")
    assert_close(found.states, expected.states, 1e-5)


def test_release_forgets_every_program(device: Any) -> None:
    params, x, _ = moved(problem(MSE), FP32, "cpu")
    with cuda_on_cpu():
        for _ in range(2):
            first = free_phase(MSE, params, x, RelaxConfig())
        torch.ops.ep_kernels_host.release()
        live = device.statistics()["live"]
        assert not any(live.values()), live
        assert_equal(free_phase(MSE, params, x, RelaxConfig()).states, first.states)
