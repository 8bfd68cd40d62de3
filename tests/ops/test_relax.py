"""``relax`` against the reference over whole small networks: every schedule, estimator, form and kind of head."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ep_kernels import Connection, Head, Network, RelaxConfig, ep_gradients, free_phase, nudged_phase, ops
from ep_kernels.solver import contrast_gradients
from tests.core.nets import VARIANTS, fitting
from tests.ops.inputs import LAYOUTS, RELAX, TENSOR_LISTS, assert_same, capture, relative_error
from tests.ops.networks import CHAIN, HEADS, MAP, MSE, NETWORKS, SKIP, extra_nudges, problem

BACKENDS = ("cpu", "reference")


def configs() -> list[RelaxConfig]:
    """Every valid combination; pairs of damping and over-relaxation, and steps, in turn."""
    motion = itertools.cycle([(1.0, 1.15), (0.7, 1.0), (1.0, 1.0)])
    steps = itertools.cycle([(4, 3), (6, 4), (1, 1), (2, 5), (5, 1)])
    out = []
    for schedule, estimator, (form, winners), linear in itertools.product(
        ("sweep", "even_odd", "sync"),
        ("symmetric", "positive", "negative", "tangent"),
        (("delta", "frozen"), ("states", "frozen"), ("states", "live")),
        (False, True),
    ):
        if estimator == "tangent" and winners == "live":
            continue
        (damping, over), (free, nudged) = next(motion), next(steps)
        config = RelaxConfig(
            schedule, free, nudged, 0.1, estimator, form, winners, linear, damping, over_relaxation=over
        )
        out.append(config)
    return out


CONFIGS = configs()


def name(config: RelaxConfig) -> str:
    nudge = "linear" if config.linear_nudge else "each"
    return (
        f"{config.schedule}-{config.estimator}-{config.form}-{config.winners}-{nudge}-{config.damping}"
        f"-{config.over_relaxation}-{config.free_steps}+{config.nudged_steps}"
    )


def close(what: str, got: Tensor, expected: Tensor, scale: float = 0.0, tolerance: float = 1e-9) -> None:
    """Relative to the largest expected magnitude, or to ``scale`` where that is larger."""
    assert got.shape == expected.shape, what
    assert got.dtype == expected.dtype, what
    if expected.numel():
        error = float((got - expected).abs().max())
        bound = tolerance * max(float(expected.abs().max()), scale)
        assert error <= bound, f"{what}: error {error:.2e}, bound {bound:.2e}"


def all_close(what: str, got: Sequence[Tensor | None], expected: Sequence[Tensor | None], **bounds: float) -> None:
    assert len(got) == len(expected), what
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert (a is None) == (b is None), f"{what}[{i}]"
        if a is not None and b is not None:
            close(f"{what}[{i}]", a, b, **bounds)


def compare(network: Network, config: RelaxConfig, batch: int = 3, *, extra: bool = False, warm: bool = False) -> None:
    """Both phases and the gradients of the compiled ops against those of the reference."""
    network = fitting(network, config)
    params, x, targets = problem(network, batch)
    nudges = extra_nudges(network, batch) if extra else None
    start = None
    if warm:
        start = free_phase(network, params, x.flip(0), RelaxConfig(free_steps=2), backend="reference").states
    runs = []
    for on in BACKENDS:
        free = free_phase(network, params, x, config, states=start, keep=True, backend=on)
        nudged = nudged_phase(network, params, free, targets, config, extra=nudges, backend=on)
        runs.append((free, nudged, contrast_gradients(network, params, free, nudged, targets, backend=on)))
    (free, nudged, gradients), (free_, nudged_, gradients_) = runs
    all_close("states", free.states, free_.states)
    all_close("preactivations", free.preactivations, free_.preactivations)
    assert free.drives.keys() == free_.drives.keys()
    assert free.winners.keys() == free_.winners.keys()
    for c in free.drives:
        close(f"drives[{c}]", free.drives[c], free_.drives[c])
    for c in free.winners:
        assert torch.equal(free.winners[c], free_.winners[c]), f"winners[{c}]"
    assert free.steps == free_.steps
    # residuals and deltas of the states form are differences of states of order 1; a delta is scaled to order 1
    close("trace", free.trace, free_.trace, 1.0)
    close("nudged trace", nudged.trace, nudged_.trace, 1.0)
    all_close("deltas", nudged.deltas, nudged_.deltas, scale=1.0 if config.nudge_form == "states" else 0.0)
    # what the nudge has not reached yet has a gradient of round-off only
    largest = max([float(g.abs().max()) for g in gradients_.named().values()]) if batch else 0.0
    for key, expected in gradients_.named().items():
        close(key, gradients.named()[key], expected, largest if config.nudge_form == "states" else 0.0)


@pytest.mark.parametrize("index", range(len(CONFIGS)), ids=[name(c) for c in CONFIGS])
def test_every_configuration(index: int) -> None:
    """On one network in turn, half of them with extra nudges."""
    network = list(NETWORKS.values())[index % len(NETWORKS)]
    compare(network, CONFIGS[index], extra=index % 3 == 0)


DEFAULTS = {
    "default": RelaxConfig(),
    "tangent": RelaxConfig(estimator="tangent", free_steps=2, nudged_steps=1),
    "classical": RelaxConfig.classical(free_steps=8, nudged_steps=6),
    "even_odd": RelaxConfig("even_odd", 6, 4),
}


@pytest.mark.parametrize("batch", [0, 1, 4])
@pytest.mark.parametrize("config", DEFAULTS)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_network(network: str, config: str, batch: int) -> None:
    compare(NETWORKS[network], DEFAULTS[config], batch, extra=True)


@pytest.mark.parametrize("gain", [1.0, 0.5])
@pytest.mark.parametrize("config", DEFAULTS)
@pytest.mark.parametrize("network", NETWORKS)
def test_warm_start(network: str, config: str, gain: float) -> None:
    compare(replace(NETWORKS[network], feedback_gain=gain), DEFAULTS[config], warm=True)


CLAMPED = {
    "coupled": RelaxConfig("sweep", 3, 3, 0.3, "coupled"),
    "coupled states": RelaxConfig("even_odd", 3, 2, 0.3, "coupled", "states", damping=0.7),
    "contrastive": RelaxConfig("sync", 3, 4, estimator="contrastive", over_relaxation=1.2),
    "contrastive states": RelaxConfig("sweep", 3, 2, estimator="contrastive", form="states", linear_nudge=True),
    "five_phase": RelaxConfig("sweep", 3, 2, 0.1, "five_phase"),
}
WITH_OUTPUTS = {"mse": MSE, **{name: VARIANTS[name] for name in ("separate, linear top", "cosine")}, "map": MAP}


@pytest.mark.parametrize("config", CLAMPED)
@pytest.mark.parametrize("network", WITH_OUTPUTS)
def test_clamped_outputs(network: str, config: str) -> None:
    compare(WITH_OUTPUTS[network], CLAMPED[config])


@pytest.mark.parametrize("schedule", ["sweep", "even_odd", "sync"])
@pytest.mark.parametrize("network", NETWORKS)
def test_early_stop(network: str, schedule: str) -> None:
    net = NETWORKS[network]
    params, x, targets = problem(net)
    config = RelaxConfig(schedule, 60, 60, tol=1e-5)
    runs = []
    for on in BACKENDS:
        free = free_phase(net, params, x, config, keep=True, backend=on)
        runs.append((free, nudged_phase(net, params, free, targets, config, backend=on)))
    (free, nudged), (free_, nudged_) = runs
    assert free.converged
    assert 2 < free.steps == free_.steps < 60
    assert free.trace.shape == (free.steps, 3)
    assert (free.trace >= 0).all()
    assert (free.residual <= 1e-5).all()
    assert nudged.trace.shape == nudged_.trace.shape == (60, 6)  # a tolerance is for the free phase alone
    assert (nudged.trace >= 0).all()
    close("trace", free.trace, free_.trace, 1.0)
    all_close("preactivations", free.preactivations, free_.preactivations)
    all_close("deltas", nudged.deltas, nudged_.deltas)


@pytest.mark.parametrize("on", BACKENDS)
def test_the_first_sweep_never_stops(on: str) -> None:
    params, x, _ = problem(CHAIN)
    free = free_phase(CHAIN, params, x, RelaxConfig(free_steps=9, tol=100.0), backend=on)
    assert (free.steps, len(free.trace), free.converged) == (2, 2, True)


def test_a_tolerance_of_zero_never_stops() -> None:
    params, x, _ = problem(CHAIN)
    free = free_phase(CHAIN, params, x, RelaxConfig(free_steps=200), backend="cpu")
    assert free.steps == len(free.trace) == 200
    assert not free.converged


@pytest.mark.parametrize("network", NETWORKS)
def test_single_precision(network: str) -> None:
    net = NETWORKS[network]
    params, x, targets = problem(net, dtype=torch.float32)
    found, _ = ep_gradients(net, params, x, targets, backend="cpu")
    expected, _ = ep_gradients(net, params, x, targets, backend="reference")
    for key, value in expected.named().items():
        assert relative_error(found.named()[key], value) <= 2e-4, key


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("operands", "error"), [(torch.bfloat16, 0.02), (torch.float16, 0.0025)])
def test_low_precision_operands(network: str, dtype: torch.dtype, operands: torch.dtype, error: float) -> None:
    """8 or 11 bits of mantissa: states within 2 or 0.25 % (root mean square; a winner close to a tie may flip),
    gradients of all weights together at cosine 0.99 to those in full precision."""
    net = NETWORKS[network]
    params, x, targets = problem(net, dtype=dtype)
    full, low = RelaxConfig(), RelaxConfig(operands=operands)
    found, free = ep_gradients(net, params, x, targets, low, backend="cpu")
    expected, free_ = ep_gradients(net, params, x, targets, full, backend="cpu")
    for got, wanted in zip(free.states, free_.states, strict=True):
        assert float((got - wanted).norm() / wanted.norm()) <= error
    assert any(not torch.equal(a, b) for a, b in zip(free.states, free_.states, strict=True))
    assert all(g.dtype == dtype for g in found.named().values())
    flat, flat_ = (torch.cat([g.flatten() for g in p.weights]) for p in (found, expected))
    assert torch.nn.functional.cosine_similarity(flat, flat_, 0) > 0.99
    reference = free_phase(net, params, x, low, backend="reference").states
    for got, wanted in zip(free.states, reference, strict=True):
        assert float((got - wanted).norm() / wanted.norm()) <= error / 4


def test_tf32_computes_in_the_dtype_of_the_tensors() -> None:
    for arguments in calls(HEADS, RelaxConfig(operands="tf32")):
        assert arguments[CODES] == (1, 0)
        for got, expected in zip(ops.relax(*arguments), ops.relax(*with_codes(arguments, 0, 0)), strict=True):
            assert_same(*(g if isinstance(g, list) else [g] for g in (got, expected)), 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout: str) -> None:
    change = LAYOUTS[layout]
    for net in (SKIP, HEADS, VARIANTS["separate, linear top"]):
        params, x, targets = problem(net)
        extra = extra_nudges(net)

        def many(tensors: Sequence[Tensor | None]) -> list[Any]:
            return [None if t is None else change(t) for t in tensors]

        moved = replace(
            params,
            weights=many(params.weights),
            biases=many(params.biases),
            head_weights=many(params.head_weights),
            head_biases=many(params.head_biases),
            feedback_weights=many(params.feedback_weights),
        )
        start = [torch.rand_like(x)] + [torch.rand(3, *shape, dtype=x.dtype) for shape in net.shapes[1:]]
        config = RelaxConfig("even_odd", form="states")
        moved_extra = {i: change(t) for i, t in extra.items()}
        got, _ = ep_gradients(
            net, moved, change(x), many(targets), config, states=many(start), extra=moved_extra, backend="cpu"
        )
        expected, _ = ep_gradients(net, params, x, targets, config, states=start, extra=extra, backend="cpu")
        for key, value in expected.named().items():
            close(key, got.named()[key], value)


def test_feedback_weights_may_share_the_memory_of_the_weights() -> None:
    net = Network(
        ((4,), (5,), (5,)), (Connection(0, 1, None), Connection(1, 2, None)), Head(2, None, "mse"), feedback="separate"
    )
    params, x, targets = problem(net)
    found, expected = (
        ep_gradients(net, replace(params, feedback_weights=[None, own]), x, targets, backend="cpu")[0]
        for own in (params.weights[1].t(), params.weights[1].t().clone())
    )
    assert_same(list(found.named().values()), list(expected.named().values()), 1e-12)


@pytest.mark.parametrize("schedule", ["sweep", "sync"])
def test_does_not_touch_its_arguments(schedule: str) -> None:
    config = RelaxConfig(schedule, form="states", winners="live")
    for net in (fitting(net, config) for net in NETWORKS.values()):
        params, x, targets = problem(net)
        start = [x, *(torch.rand(3, *shape, dtype=x.dtype) for shape in net.shapes[1:])]
        kept = [t.clone() for t in (*params.named().values(), x, *targets, *start)]
        ep_gradients(net, params, x, targets, config, states=start, extra=extra_nudges(net), backend="cpu")
        now = [*params.named().values(), x, *targets, *start]
        assert all(torch.equal(a, b) for a, b in zip(now, kept, strict=True))


def test_nan_in_the_input_surfaces_in_its_sample_only() -> None:
    for net in NETWORKS.values():
        params, x, _ = problem(net)
        x[1, 0, 2, 2] = float("nan")
        free = free_phase(net, params, x, RelaxConfig(free_steps=3, tol=1e-3), backend="cpu")
        assert free.residual.isnan().tolist() == [False, True, False]
        assert [bool(s) for s in free.states[-1].isnan().flatten(1).any(1)] == [False, True, False]
        assert free.steps == 3
        assert not free.converged


ON_A_MAP = Network(
    ((2, 4, 3), (3, 4, 3)),
    (Connection(0, 1),),
    Head(1, None, loss="cosine"),
    (Head(1, 4, loss="cosine"), Head(1, 4, loss="cosine", pointwise=True)),
)


def check_zero_direction(on: str | None) -> None:
    """Pixels whose channels are all zero, states that are, and targets that are get no gradient; NaN comes out."""
    params, x, targets = problem(ON_A_MAP, 4, torch.float32)
    params = replace(params, head_biases=[None if b is None else torch.zeros_like(b) for b in params.head_biases])
    free = free_phase(ON_A_MAP, params, x, RelaxConfig(free_steps=1), keep=True, backend="reference")
    free.states[1][1] = 0
    free.states[1][2, :, 1, 1] = 0
    free.states[1][3, 0, 0, 0] = float("nan")
    free.preactivations[1].fill_(0.5)
    config = RelaxConfig(nudged_steps=1, estimator="tangent")
    found, expected = (nudged_phase(ON_A_MAP, params, free, targets, config, backend=b) for b in (on, "reference"))
    delta = found.deltas[1]
    assert not delta[:2].any()
    assert delta[2].abs().amax(0)[1, 1] < delta[2].abs().max()
    torch.testing.assert_close(delta, expected.deltas[1], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert [bool(d.isnan().any()) for d in delta] == [False, False, False, True]


def test_a_zero_vector_has_no_direction() -> None:
    check_zero_direction("cpu")


# --- the op itself ----------------------------------------------------------------------------------------------------

CALLS = {
    "chain": (CHAIN, RelaxConfig()),
    "mse-states-sync": (MSE, RelaxConfig("sync", 3, 2, form="states", winners="live")),
    "skip-even_odd-tangent": (SKIP, RelaxConfig("even_odd", estimator="tangent")),
    "heads-bfloat16": (HEADS, RelaxConfig(operands=torch.bfloat16)),
    "separate": (VARIANTS["separate, linear top"], RelaxConfig()),
    "cosine-clamped": (VARIANTS["cosine"], RelaxConfig(estimator="coupled")),
    "skip-float16": (SKIP, RelaxConfig(operands=torch.float16)),
    "chain-one-sweep": (CHAIN, RelaxConfig(free_steps=1, nudged_steps=1)),
    "skip-early-stop": (SKIP, RelaxConfig(free_steps=50, nudged_steps=50, tol=1e-3)),
}


CODES = slice(RELAX["operands"], RELAX["storage"] + 1)


def with_codes(arguments: tuple[Any, ...], operands: int, storage: int) -> tuple[Any, ...]:
    return (*arguments[: CODES.start], operands, storage, *arguments[CODES.stop :])


def calls(network: Network, config: RelaxConfig, batch: int = 2) -> list[tuple[Any, ...]]:
    """Arguments of the op in the free and the nudged phase."""
    params, x, targets = problem(network, batch, torch.float32)
    extra = None if config.clamps else extra_nudges(network, batch, torch.float32)
    return capture("relax", lambda: ep_gradients(network, params, x, targets, config, extra=extra, backend="cpu"))


@pytest.mark.parametrize("case", CALLS)
def test_opcheck(case: str) -> None:
    free, nudged = calls(*CALLS[case])
    for arguments in (free, nudged):
        torch.library.opcheck(torch.ops.ep_kernels.relax, arguments)


def test_fake_states_have_the_dtype_of_the_storage() -> None:
    """What torch.compile is told of a device that stores in float16; the CPU refuses."""
    for arguments in calls(SKIP, RelaxConfig()):
        with FakeTensorMode(allow_non_fake_inputs=True):
            states, pre, drives, _, residual = ops.relax(*with_codes(arguments, 2, 1))
        assert {t.dtype for t in states} == {torch.float16}
        assert {t.dtype for t in (*pre, *drives, residual)} == {torch.float32}


def test_outputs_own_their_memory() -> None:
    """No output shares memory with another one or with an argument."""
    for network, config in CALLS.values():
        for arguments in calls(network, config):
            outputs = [t for group in ops.relax(*arguments) for t in (group if isinstance(group, list) else [group])]
            given = [t for group in arguments[: len(TENSOR_LISTS)] for t in group]
            places = [t.data_ptr() for t in outputs if t.numel()]
            assert len(set(places)) == len(places)
            assert not set(places) & {t.data_ptr() for t in given if t.numel()}


def test_refuses_to_be_differentiated() -> None:
    free, _ = calls(*CALLS["chain"])
    weights = [w.requires_grad_() for w in free[RELAX["weights"]]]
    states, *_ = ops.relax(free[0], weights, *free[2:])
    with pytest.raises(RuntimeError, match=r"ep_kernels::relax has no derivative.*ep_gradients.*bptt_gradients"):
        states[-1].sum().backward()
