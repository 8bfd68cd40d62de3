"""Precision of operands and of stored states on the reference: what is rounded, what is not, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ep_kernels import (
    Equilibrium,
    Network,
    Parameters,
    RelaxConfig,
    backend,
    contrast_gradients,
    ep_gradients,
    free_phase,
    nudged_phase,
    readout,
    reference,
    targets_for,
)
from ep_kernels.precision import OPERANDS, rounded
from ep_kernels.solver import Nudged
from ep_train.models import build_network, initial_parameters
from tests.core.nets import NETWORKS, Problem, cosine, problem

HALF = torch.float16
SCHEDULES = ("sweep", "even_odd", "sync")


def single(p: Problem) -> Problem:
    """The problem in float32."""
    parameters = Parameters.from_named(p.network, {n: t.float() for n, t in p.parameters.named().items()})
    return Problem(p.network, parameters, p.x.float(), [t.float() for t in p.targets])


def free(p: Problem, config: RelaxConfig, **options: Any) -> Equilibrium:
    return free_phase(p.network, p.parameters, p.x, config, keep=True, backend="reference", **options)


def nudged(p: Problem, found: Equilibrium, config: RelaxConfig) -> Nudged:
    return nudged_phase(p.network, p.parameters, found, p.targets, config, backend="reference")


def test_operands_are_rounded_where_there_is_a_dtype_for_them() -> None:
    x = torch.tensor([1 + 2**-9, 1 + 2**-12, 1e-9])
    assert rounded(x, None) is rounded(x, "tf32") is x
    assert rounded(x, HALF).tolist() == [1 + 2**-9, 1.0, 0.0]
    assert rounded(x, torch.bfloat16).tolist()[:2] == [1.0, 1.0]
    assert all(rounded(x, o).dtype == torch.float32 for o in OPERANDS)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", NETWORKS)
def test_stored_states_are_close(name: str, schedule: Any) -> None:
    p = single(problem(replace(NETWORKS[name], feedback_gain=0.1)))
    full = RelaxConfig(schedule, 8, 4)
    low = replace(full, storage=HALF)
    exact, found = free(p, full), free(p, low)
    assert found.states[0] is p.x
    for s, t in zip(found.states[1:], exact.states[1:], strict=True):
        assert s.dtype == HALF
        assert float((s.float() - t).abs().max()) <= 1e-3
    kept = [*found.preactivations[1:], *found.drives.values(), found.residual, found.trace]
    assert all(t is not None and t.dtype == torch.float32 for t in kept)


@pytest.mark.parametrize("form", ["delta", "states"])
@pytest.mark.parametrize("estimator", ["symmetric", "positive", "tangent"])
def test_stored_deltas_are_close(estimator: Any, form: Any) -> None:
    p = single(problem(replace(NETWORKS["skips, max"], feedback_gain=0.1)))
    full = RelaxConfig(estimator=estimator, form=form, beta=0.1)
    low = replace(full, storage=HALF)
    equilibrium = free(p, full)
    exact, found = nudged(p, equilibrium, full), nudged(p, equilibrium, low)
    assert found.trace.dtype == torch.float32
    delta_form = full.nudge_form != "states"
    for s, t in zip(found.deltas[1:], exact.deltas[1:], strict=True):
        assert s is not None
        assert t is not None
        assert s.dtype == (HALF if delta_form else torch.float32)  # of the states form: computed after it
        bound = 2e-3 * float(t.abs().max()) if delta_form else 2e-3
        assert float((s.float() - t).abs().max()) <= bound


def test_the_residual_is_the_change_of_what_is_stored() -> None:
    p = single(problem(replace(NETWORKS["max"], feedback_gain=0.1)))
    config = RelaxConfig(free_steps=20, storage=HALF, over_relaxation=1.0)
    runs = [free(p, replace(config, free_steps=t)) for t in (1, 2, 20, 21)]
    for before, after in (runs[:2], runs[2:]):
        changes = [
            (b.float() - a.float()).abs().flatten(1).amax(1) for a, b in zip(before.states, after.states, strict=True)
        ]
        assert torch.equal(after.residual, torch.stack(changes).amax(0))
    assert float(runs[1].residual.min()) > 0
    assert float(runs[3].residual.max()) == 0  # what moves by less than half a digit stands still
    over_relaxed = free(p, replace(config, over_relaxation=None)).residual  # it goes to and fro by one
    assert float(over_relaxed.max()) <= 2**-11


@pytest.mark.parametrize("storage", [None, HALF])
def test_warm_starts_from_either_dtype(storage: torch.dtype | None) -> None:
    p = single(problem(NETWORKS["max"]))
    config = RelaxConfig(free_steps=3, storage=storage)
    start = [p.x, *(s.half() for s in free(p, RelaxConfig(free_steps=2)).states[1:])]
    runs = [free(p, config, states=states) for states in (start, [p.x, *(s.float() for s in start[1:])])]
    for a, b in zip(runs[0].states[1:], runs[1].states[1:], strict=True):
        assert a.dtype == (storage or torch.float32)
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"'states\[1\]': expected torch\.float32 or torch\.float16 on cpu.*bfloat16"):
        free(p, config, states=[p.x, *(s.bfloat16() for s in start[1:])])


@pytest.mark.parametrize("form", ["delta", "states"])
def test_an_equilibrium_of_either_dtype_can_be_nudged(form: Any) -> None:
    """Stored in float16 and nudged in float32, on the compiled kernels too; and the other way round."""
    p = single(problem(replace(NETWORKS["max"], feedback_gain=0.1)))
    full = RelaxConfig(form=form, beta=0.1)
    low = replace(full, storage=HALF)
    half = free(p, low)
    same = replace(half, states=[s.float() for s in half.states])
    want = nudged(p, same, full)
    for on in ("reference", "cpu"):
        got = nudged_phase(p.network, p.parameters, half, p.targets, full, backend=on)
        for a, b in zip(got.deltas[1:], want.deltas[1:], strict=True):
            assert a is not None
            assert b is not None
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(nudged(p, same, low).deltas[1:], nudged(p, half, low).deltas[1:], strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


@pytest.mark.parametrize("on", ["reference", "cpu"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_float16_states_are_those_of_the_same_values(name: str, on: str) -> None:
    p = single(problem(NETWORKS[name]))
    config = RelaxConfig(storage=HALF)
    found = free(p, config)
    moved = nudged(p, found, config)
    up = replace(found, states=[s.float() for s in found.states])
    moved_up = replace(moved, deltas=[None if d is None else d.float() for d in moved.deltas])
    got, want = (
        contrast_gradients(p.network, p.parameters, e, n, p.targets, backend=on)
        for e, n in ((found, moved), (up, moved_up))
    )
    for key, tensor in want.named().items():
        assert got.named()[key].dtype == torch.float32
        assert torch.equal(got.named()[key], tensor), key
    for h, head in enumerate(p.network.heads):
        z = readout(p.network, p.parameters, found, h)
        assert z.dtype == torch.float32
        weight, bias = p.parameters.head_weights[h], p.parameters.head_biases[h]
        assert torch.equal(z, reference.head_output(head, up.states[head.node], weight, bias))


def gradients(network: Network, seed: int, config: RelaxConfig) -> Parameters:
    parameters = Parameters.from_named(network, initial_parameters(network, seed=seed, dtype=torch.float32))
    x = torch.rand(8, *network.shapes[0], generator=torch.Generator().manual_seed(seed))
    targets = targets_for(network, torch.arange(8) % 10, 10, torch.float32)
    return ep_gradients(network, parameters, x, targets, config, backend="reference")[0]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("estimator", ["symmetric", "tangent"])
@pytest.mark.parametrize("gain", [0.1, 0.02])
def test_float16_gradients_of_four_layers(gain: float, estimator: Any, seed: int) -> None:
    """Operands and storage in float16 against float32, at default settings: seen 0.995 and more."""
    network = build_network("16-16p-32-32p", (3, 16, 16), 10, feedback_gain=gain)
    full = RelaxConfig(estimator=estimator)
    exact = gradients(network, seed, full)
    low = gradients(network, seed, replace(full, operands=HALF, storage=HALF))
    for c, (a, b) in enumerate(zip(low.weights, exact.weights, strict=True)):
        assert a.dtype == torch.float32
        assert cosine(a, b) >= 0.99, c
    tf32 = gradients(network, seed, replace(full, operands="tf32"))
    assert all(torch.equal(a, b) for a, b in zip(tf32.weights, exact.weights, strict=True))


# --- the contrast -----------------------------------------------------------------------------------------------------

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def arguments(kind: str, phases: int, *, gain: float = 1.0, scale: float = -0.3, size: float = 1.0) -> Arguments:
    """Of a contrast: free states of order 1, deltas of ``size`` in units of their own, ``gain`` to the states'."""
    generator = torch.Generator().manual_seed(3)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if kind == "linear":
        tensors = (new(6, 17), size * new(phases * 6, 17), new(6, 9), size * new(phases * 6, 9))
        return (*tensors, (9, 17)), {"source_gain": 2 * gain, "target_gain": gain, "scale": scale}
    pooled = (4, 3) if kind == "none" else (2, 1)
    winners = torch.randint(0, 4, (3, 5, *pooled), generator=generator).to(torch.uint8)
    tensors = (new(3, 2, 4, 3), size * new(phases * 3, 2, 4, 3), new(3, 5, *pooled), size * new(phases * 3, 5, *pooled))
    pool = "max" if kind == "live" else kind
    if kind == "live":
        winners = torch.cat([winners, winners.flip(0)])
    options = {"source_gain": 2 * gain, "target_gain": gain, "scale": scale}
    return (*tensors, (5, 2, 3, 3), (1, 1), (1, 1), pool, winners if pool == "max" else None), options


def close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], tolerance: float) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).norm()) <= tolerance * float(b.norm())


KINDS = ("none", "max", "avg", "live", "linear")


@pytest.mark.parametrize(("operands", "tolerance"), [(HALF, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("phases", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_contrast_with_rounded_operands(kind: str, phases: int, operands: torch.dtype, tolerance: float) -> None:
    args, options = arguments(kind, phases)
    exact = reference.contrast(*args, **options)
    low = reference.contrast(*args, **options, operands=operands)
    close(low, exact, tolerance)
    assert not torch.equal(low[0], exact[0])
    torch.testing.assert_close(low[1], exact[1])  # a sum, not a product
    for other in (None, "tf32"):
        same = reference.contrast(*args, **options, operands=other)
        assert all(torch.equal(a, b) for a, b in zip(same, exact, strict=True))


@pytest.mark.parametrize("gain", [1e-12, 1e-3, 100.0])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "live"])
def test_gains_and_scales_are_not_rounded(kind: str, gain: float) -> None:
    """A gain of 1e-12 would leave nothing of a difference in float16, and a scale of 1e12 would overflow."""
    args, options = arguments(kind, 2, gain=gain, scale=-0.3 / gain)
    exact = reference.contrast(*args, **options)
    close(reference.contrast(*args, **options, operands=HALF), exact, 1e-3)
    assert 0.01 < float(exact[0].abs().max()) < 1e9


def test_live_differences_are_rounded_in_the_states_units() -> None:
    args, options = arguments("live", 2, gain=0.25, scale=1e9, size=1e-2)
    close(reference.contrast(*args, **options, operands=HALF), reference.contrast(*args, **options), 2e-3)


def test_products_of_rounded_operands_accumulate_in_full() -> None:
    """``scale gain_t <r(d_t), r(m_s)> + scale gain_s <r(m_t), r(d_s)>``, in float64 so that it can be told."""
    args, options = arguments("linear", 2)
    source, ds, target, dt = (t.double() for t in args[:4])
    got, _ = reference.contrast(source, ds, target, dt, args[4], **options, operands=HALF)
    gs, gt, scale = options["source_gain"], options["target_gain"], options["scale"]
    (sp, sm), (tp, tm) = ds.chunk(2), dt.chunk(2)

    def r(t: Tensor) -> Tensor:
        return t.half().double()

    m_s, m_t = source + gs * (sp + sm) / 2, target + gt * (tp + tm) / 2
    want = scale * gt * r(tp - tm).t() @ r(m_s) + scale * gs * r(m_t).t() @ r(sp - sm)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_solver_passes_the_operands_to_the_contrast(monkeypatch: pytest.MonkeyPatch) -> None:
    p = single(problem(NETWORKS["max"]))
    seen: list[object] = []
    original: Callable[..., tuple[Tensor, Tensor]] = reference.contrast

    def record(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        seen.append(options["operands"])
        return original(*args, **options)

    monkeypatch.setattr(reference, "contrast", record)
    with backend("reference"):
        for operands in OPERANDS:
            ep_gradients(p.network, p.parameters, p.x, p.targets, RelaxConfig(operands=operands))
    assert seen == [o for o in OPERANDS for _ in p.network.connections]
