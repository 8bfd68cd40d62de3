"""Whole relaxations of small networks on the backend ``triton`` against the reference, in float32 and float16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from ep_kernels import (
    Connection,
    Head,
    Network,
    Parameters,
    RelaxConfig,
    backend,
    backends,
    ep_gradients,
    free_phase,
    nudged_phase,
)
from ep_kernels.plan import SCHEDULES
from ep_kernels.relaxation import Relaxation, relax_reference
from ep_kernels.solver import Equilibrium, Nudged, contrast_gradients
from ep_kernels.triton import arch as archs
from ep_kernels.triton import runner
from ep_kernels.triton.buffers import present
from ep_kernels.triton.tiling import Tile
from tests.core.nets import NETWORKS, VARIANTS, fitting
from tests.core.nets import problem as problem_in_float64
from tests.ops.test_relax import CLAMPED, WITH_OUTPUTS, check_zero_direction
from tests.triton.interpreted.tools import ARCHS, close, nan, use_tiles

# Four layers with poolings of both kinds, a pooled skip connection over two levels and a strided one, linear ends.
DEEP = Network(
    shapes=((2, 9, 7), (3, 9, 7), (4, 4, 3), (5, 4, 3), (4, 2, 1), (5,)),
    connections=(
        Connection(0, 1),
        Connection(1, 2, pool="max"),
        Connection(2, 3),
        Connection(1, 3, (1, 1), padding=(0, 0), pool="max"),
        Connection(3, 4, pool="avg"),
        Connection(2, 4, (3, 3), (2, 2), (1, 0)),
        Connection(4, 5, None),
    ),
    readout=Head(5, 3),
    local_heads=(Head(3, 3, pool=1, weight=0.3),),
    feedback_gain=0.5,
)
# Two poolings into a node, max-pooled connections with strides, which go through ATen, and a linear one to a map, whose
# feedback does not fuse.
STRIDED = Network(
    shapes=((2, 9, 8), (3, 5, 4), (4, 2, 2), (6,)),
    connections=(
        Connection(0, 1, (3, 3), (2, 2), (1, 1)),
        Connection(1, 2, (2, 2), (1, 1), (0, 1), "max"),
        Connection(0, 2, (3, 3), (2, 2), (1, 1), "max"),
        Connection(1, 2, (3, 3), (2, 2), (2, 3), "max"),
        Connection(1, 2, (1, 1), (1, 1), (0, 0), "avg"),
        Connection(1, 3, None),
        Connection(2, 3, None),
    ),
    readout=Head(3, 3, loss="mse"),
    feedback_gain=0.6,
)
TOP = Network(
    shapes=((2, 8, 8), (3, 8, 8), (4, 4, 4)),
    connections=(Connection(0, 1), Connection(1, 2, (3, 3), (1, 1), (1, 1), "max")),
    readout=Head(2, 3),
    feedback_gain=0.3,
)
ALL = {**NETWORKS, **VARIANTS, "deep": DEEP, "strided": STRIDED, "top": TOP}


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones: what an interpreted launch costs is its number of tiles. The kernels' own tests have small ones."""
    use_tiles(monkeypatch, Tile(256, 16, 256, 4, 1))


@dataclass(frozen=True)
class Problem:
    network: Network
    parameters: Parameters
    x: Tensor
    targets: list[Tensor]


def problem(network: str | Network, seed: int = 0, batch: int = 2) -> Problem:
    p = problem_in_float64(ALL[network] if isinstance(network, str) else network, seed, batch=batch)
    tensors = {key: t.float() for key, t in p.parameters.named().items()}
    parameters = Parameters.from_named(p.network, tensors)
    return Problem(p.network, parameters, p.x.float(), [t.float() for t in p.targets])


def all_close(what: str, got: Sequence[Tensor | None], expected: Sequence[Tensor | None], tolerance: float) -> None:
    assert len(got) == len(expected), what
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert (a is None) == (b is None), f"{what}[{i}]"
        if a is not None and b is not None:
            assert a.dtype == b.dtype, f"{what}[{i}]"
            close(f"{what}[{i}]", a, b, tolerance)


def same_winners(got: Mapping[int, Tensor], expected: Mapping[int, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for c in expected:
        assert torch.equal(got[c], expected[c]), f"winners[{c}]"


def same_free(got: Equilibrium, expected: Equilibrium, tolerance: float = 1e-5) -> None:
    all_close("states", got.states, expected.states, tolerance)
    all_close("preactivations", got.preactivations, expected.preactivations, tolerance)
    assert got.drives.keys() == expected.drives.keys()
    for c in expected.drives:
        close(f"drives[{c}]", got.drives[c], expected.drives[c], tolerance)
    same_winners(got.winners, expected.winners)
    assert (got.steps, got.converged) == (expected.steps, expected.converged)
    close("trace", got.trace, expected.trace, tolerance)
    close("residual", got.residual, expected.residual, tolerance)


def same_nudged(got: Nudged, expected: Nudged, tolerance: float = 1e-5) -> None:
    assert (got.scales, got.phases, got.beta, got.centre) == (
        expected.scales,
        expected.phases,
        expected.beta,
        expected.centre,
    )
    all_close("deltas", got.deltas, expected.deltas, tolerance)
    same_winners(got.winners, expected.winners)
    close("nudged trace", got.trace, expected.trace, tolerance)


def same_gradients(got: Parameters, expected: Parameters, form: str = "delta") -> None:
    """Each relative to its own largest entry, or to a part of the largest of all: what the nudge has hardly reached,
    and, in the states form, what is left of the difference of two states."""
    largest = max(float(g.abs().max()) for g in expected.named().values())
    for name, g in expected.named().items():
        close(name, got.named()[name], g, 1e-4, scale=largest * (0.3 if form == "states" else 0.01))


def compare(p: Problem, config: RelaxConfig, states: list[Tensor] | None = None, *, extra: bool = False) -> None:
    """Both phases and the contrast, each from what the reference left before it."""
    generator = torch.Generator().manual_seed(5)
    nudges = {}
    if extra:
        nudges = {
            i: 0.1 * torch.randn(len(p.x), *p.network.shapes[i], generator=generator)
            for i in (1, len(p.network.shapes) - 1)
        }
    free_ = free_phase(p.network, p.parameters, p.x, config, states=states, keep=True, backend="reference")
    nudged_ = nudged_phase(p.network, p.parameters, free_, p.targets, config, extra=nudges, backend="reference")
    same_free(free_phase(p.network, p.parameters, p.x, config, states=states, keep=True, backend="triton"), free_)
    same_nudged(
        nudged_phase(p.network, p.parameters, free_, p.targets, config, extra=nudges, backend="triton"), nudged_
    )
    found, expected = (
        contrast_gradients(p.network, p.parameters, free_, nudged_, p.targets, backend=on)
        for on in ("triton", "reference")
    )
    same_gradients(found, expected, config.nudge_form)


SWEEP = RelaxConfig("sweep", 3, 2, 0.1)
EVEN_ODD = RelaxConfig("even_odd", 3, 2, 0.1)
SYNC = RelaxConfig("sync", 3, 3, 0.1)
LIVE = {"form": "states", "winners": "live"}
CONFIGS = {
    "sweep delta": replace(SWEEP, over_relaxation=1.3),
    "sweep states live": replace(SWEEP, **LIVE, damping=0.7),  # type: ignore[arg-type]
    "sweep states frozen, negative": replace(SWEEP, form="states", estimator="negative", linear_nudge=True),
    "sweep tangent": replace(SWEEP, estimator="tangent"),
    "even_odd delta damped": replace(EVEN_ODD, damping=0.7, linear_nudge=True),
    "even_odd states live, positive": replace(EVEN_ODD, **LIVE, estimator="positive", over_relaxation=1.2),  # type: ignore[arg-type]
    "even_odd tangent": replace(EVEN_ODD, estimator="tangent", damping=0.7),
    "sync states live": replace(SYNC, **LIVE),  # type: ignore[arg-type]
    "sync delta, positive": replace(SYNC, estimator="positive", damping=0.7),
    "sync tangent": replace(SYNC, estimator="tangent"),
    "sync states frozen": replace(SYNC, form="states", damping=0.7),
}
# every network in two or three settings, every setting in "max" and two or three others
PAIRS = [
    (network, config)
    for i, network in enumerate(ALL)
    for j, config in enumerate(CONFIGS)
    if network == "max" or (i + j) % 5 == 0
]


@pytest.mark.parametrize(("network", "config"), PAIRS)
def test_equals_reference(network: str, config: str) -> None:
    index = PAIRS.index((network, config))
    net = fitting(ALL[network], CONFIGS[config])
    net = replace(net, feedback_gain=max(net.feedback_gain, 0.25))  # its powers multiply rounding
    compare(problem(net, batch=1 + index % 3), CONFIGS[config], extra=index % 3 == 0)


@pytest.mark.parametrize("config", ["sweep delta", "sync states live"])
def test_pointers(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles loaded without descriptors, as before compute capability 9."""
    monkeypatch.setattr(archs, "arch_of", lambda device: ARCHS["pointers"])
    compare(problem("top"), CONFIGS[config])


@pytest.mark.parametrize(
    ("network", "config"),
    [("deep", "sweep states live"), ("strided", "sync delta, positive"), ("max", "even_odd tangent")],
)
def test_warm_start(network: str, config: str) -> None:
    p = problem(network)
    generator = torch.Generator().manual_seed(3)
    states = [torch.rand(2, *shape, generator=generator) for shape in p.network.shapes]
    compare(p, CONFIGS[config], states)


@pytest.mark.parametrize("config", CLAMPED)
@pytest.mark.parametrize("network", WITH_OUTPUTS)
def test_clamped_outputs(network: str, config: str) -> None:
    compare(problem(WITH_OUTPUTS[network]), CLAMPED[config])


@pytest.mark.parametrize("storage", [None, torch.float16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_clamped_deltas_survive_an_early_stop(schedule: str, storage: torch.dtype | None) -> None:
    """What is given at the start stays, whichever buffers the stop leaves the others in."""
    p = problem("cosine", batch=1)
    config = RelaxConfig(schedule, 2, 9, 0.3, "coupled", storage=storage)  # type: ignore[arg-type]
    with backends.recorded() as jobs:
        free = free_phase(p.network, p.parameters, p.x, config, keep=True, backend="reference")
        trace = nudged_phase(p.network, p.parameters, free, p.targets, config, backend="reference").trace.amax(1)
    (job,) = (j for j in jobs if isinstance(j, Relaxation) and j.form == "delta")
    for stop in (2, 3):
        job = replace(job, tol=float(trace[stop - 1]) * 1.01)
        expected, found = relax_reference(job), runner.relax(job)
        assert int((expected.residual[:, 0] >= 0).sum()) <= stop
        all_close("states", found.states, expected.states, 2e-3 if storage else 1e-5)
        assert torch.equal(present(found.states[4]), present(job.states[4]))


def test_feedback_weights_are_read_at_every_run() -> None:
    """A kept program takes new values; tied ones have a program of their own, and neither keeps the tensors."""
    p = problem("separate, tied head")
    networks = (p.network, p.network, replace(p.network, feedback="tied"))
    for turn, network in enumerate(networks):
        own = [None if w is None else w * (1 + turn) for w in p.parameters.feedback_weights]
        parameters = replace(p.parameters, feedback_weights=own if network.feedback == "separate" else ())
        compare(replace(p, network=network, parameters=parameters), CONFIGS["sweep delta"])
    kept = [r.program.r for r in runner._runners.items.values()]
    assert len(kept) == 4
    assert all(w is None or w.is_meta for r in kept for w in r.feedback_weights)


def test_a_zero_vector_has_no_direction() -> None:
    check_zero_direction("triton")


def tolerances(p: Problem, config: RelaxConfig, stops: Sequence[int]) -> list[float]:
    """Tolerances that end the free phase after so many sweeps: between the residuals of the last two."""
    trace = free_phase(p.network, p.parameters, p.x, config, backend="reference").trace.amax(1)
    out = []
    for stop in stops:
        before, last = trace[1 : stop - 1].min() if stop > 2 else trace[0], trace[stop - 1]
        assert last < 0.99 * before, "the residual of this sweep is not the smallest so far: take another seed"
        out.append(float((last * before).sqrt()))
    return out


@pytest.mark.parametrize("schedule", ["sync", "sweep", "even_odd"])
@pytest.mark.parametrize("network", ["top", "strided"])
def test_early_stop(network: str, schedule: str) -> None:
    """After an even and an odd number of sweeps: `sync` ends in either of its buffers, and everything that is
    returned is of the last sweep."""
    p = problem(network)
    p = replace(p, network=replace(p.network, feedback_gain=0.2))
    config = RelaxConfig(schedule, 7, 2, damping=0.7)  # type: ignore[arg-type]
    for stop, tol in zip((4, 5), tolerances(p, config, (4, 5)), strict=True):
        at = replace(config, tol=tol)
        expected = free_phase(p.network, p.parameters, p.x, at, keep=True, backend="reference")
        assert expected.steps == stop
        assert expected.converged
        same_free(free_phase(p.network, p.parameters, p.x, at, keep=True, backend="triton"), expected)


def test_no_early_stop_where_one_sample_moves_or_is_nan() -> None:
    p = problem("top")
    config = RelaxConfig(free_steps=4, tol=1e-30)
    runs = [free_phase(p.network, p.parameters, p.x, config, keep=True, backend=on) for on in ("triton", "reference")]
    same_free(*runs)
    p.x[1, 0, 2, 2] = nan
    free = free_phase(p.network, p.parameters, p.x, replace(config, tol=100.0), keep=True, backend="triton")
    assert free.residual.isnan().tolist() == [False, True]
    assert [bool(s) for s in free.states[-1].isnan().flatten(1).any(1)] == [False, True]
    assert free.steps == 4
    assert not free.converged


@pytest.mark.parametrize("schedule", ["sync", "sweep"])
def test_more_sweeps_than_one_piece(schedule: str) -> None:
    """20 sweeps are cut into three pieces (runner.chunks); with and without a stop in the second."""
    p = problem("top", batch=1)
    config = RelaxConfig(schedule, 20, 1, damping=0.8)  # type: ignore[arg-type]
    assert len(runner.chunks(lowered(p, config))) == 3
    for tol in (0.0, tolerances(p, config, (6,))[0]):
        at = replace(config, tol=tol)
        runs = [free_phase(p.network, p.parameters, p.x, at, keep=True, backend=on) for on in ("triton", "reference")]
        assert runs[1].steps == (6 if tol else 20)
        same_free(*runs)


def lowered(p: Problem, config: RelaxConfig) -> runner.Lowered:
    from ep_kernels.plan import compile_plan
    from ep_kernels.triton.lower import lower

    plan = compile_plan(p.network, config.schedule, "free", steps=config.free_steps)
    return lower(p.network, plan, config.free_steps, "states", frozen=False, keep=True)


def test_both_phases_and_the_contrast_in_a_row() -> None:
    p = problem("deep")
    with backend("triton"):
        found, free = ep_gradients(p.network, p.parameters, p.x, p.targets)
    expected, free_ = ep_gradients(p.network, p.parameters, p.x, p.targets, backend="reference")
    same_free(free, free_)
    same_gradients(found, expected)


def test_does_not_touch_its_arguments() -> None:
    p = problem("strided")
    states = [p.x, *(torch.rand(2, *shape) for shape in p.network.shapes[1:])]
    tensors = [*p.parameters.named().values(), p.x, *p.targets, *states]
    kept = [t.clone() for t in tensors]
    config = replace(CONFIGS["sync states live"], free_steps=2, nudged_steps=2)
    ep_gradients(p.network, p.parameters, p.x, p.targets, config, states=states, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))


# --- float16 ------------------------------------------------------------------------------------------------------


def distance(got: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """Largest over the nodes of |a - b| / |b|, root mean square."""
    found = [0.0]
    for a, b in zip(got[1:], expected[1:], strict=True):
        if a is not None and b is not None:
            found.append(float((a.double() - b.double()).norm() / b.double().norm()))
    return max(found)


# An operand has 11 bits, a rounding error of 2^-12 (rms 1.4e-4) of itself; a state stored so the same once more. The
# reference rounds its convolutions' results, too, which adds as much. Three sweeps of contractions add up less than
# three such errors: 1e-3 leaves a factor of two. Gradients sum terms of both signs: 5e-3 of their norm.
@pytest.mark.parametrize(
    ("network", "config", "storage"),
    [
        ("max", "sweep delta", torch.float16),
        ("deep", "sweep delta", torch.float16),
        ("strided", "sync tangent", torch.float16),
        ("skips, average", "even_odd delta damped", None),
        ("top", "sweep states live", None),
    ],
)
def test_float16(network: str, config: str, storage: torch.dtype | None) -> None:
    p = problem(network)
    low = replace(CONFIGS[config], operands=torch.float16, storage=storage)
    full = replace(low, operands=None, storage=None)
    free, free_ = (
        free_phase(p.network, p.parameters, p.x, low, keep=True, backend=on) for on in ("triton", "reference")
    )
    assert [s.dtype for s in free.states[1:]] == [storage or torch.float32] * (len(free.states) - 1)
    assert distance(free.states, free_.states) < 1e-3
    assert distance(free.preactivations, free_.preactivations) < 1e-3
    exact = free_phase(p.network, p.parameters, p.x, full, keep=True, backend="reference")
    assert distance(free.states, exact.states) > 1e-5
    nudged, nudged_ = (
        nudged_phase(p.network, p.parameters, free_, p.targets, low, backend=on) for on in ("triton", "reference")
    )
    assert distance(nudged.deltas, nudged_.deltas) < (2e-3 if low.nudge_form != "states" else 2e-2)
    for operands in (None, torch.float16):
        found, expected = (
            contrast_gradients(p.network, p.parameters, free_, nudged_, p.targets, operands=o, backend=on)
            for o, on in ((operands, "triton"), (None, "reference"))
        )
        bound = 5e-3 if operands else 1e-4
        for name, g in expected.named().items():
            assert float((found.named()[name] - g).norm()) <= bound * float(g.norm()), name


def test_float32_as_tf32_is_computed_in_full_here() -> None:
    """The interpreter has no tensor cores: what is tested is that the setting reaches the launches, and no more."""
    p = problem("top")
    config = RelaxConfig(operands="tf32", free_steps=2, nudged_steps=1)
    found, free = ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend="triton")
    (program,) = {r.program.products for r in runner._runners.items.values()}
    assert program == "tf32"
    expected, free_ = ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend="reference")
    same_free(free, free_)
    same_gradients(found, expected)


def test_an_empty_batch_launches_nothing() -> None:
    p = problem("deep", batch=1)
    targets = [t[:0] for t in p.targets]
    found, free = ep_gradients(p.network, p.parameters, p.x[:0], targets, backend="triton")
    assert not runner._runners.items
    assert free.states[1].shape == (0, 3, 9, 7)
    assert all((g == 0).all() for g in found.named().values())


@pytest.mark.parametrize("schedule", ["sweep", "even_odd"])
def test_stages(schedule: str) -> None:
    """A feed-forward start, a sweep with rounded operands, another from there; with what they take over."""
    p = problem("top")
    config = RelaxConfig(schedule, 2, start="feedforward", early_operands=torch.float16, early_steps=1)  # type: ignore[arg-type]
    runs = [free_phase(p.network, p.parameters, p.x, config, keep=True, backend=on) for on in ("triton", "reference")]
    same_free(*runs, tolerance=1e-3)
