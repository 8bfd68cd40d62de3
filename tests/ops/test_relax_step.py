"""``relax_step`` against the reference: every form, phase and neighbour, layouts, NaN and infinities, opcheck."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ep_kernels import functional, ops
from ep_kernels.functional import Neighbour
from tests.ops.inputs import DTYPES, LAYOUTS, TOLERANCE, Maker, Sample, assert_same, sample_inputs

SAMPLES = [(dtype, s) for dtype in DTYPES for s in sample_inputs("relax_step", dtype, thorough=True)]
FEW = list(sample_inputs("relax_step"))
inf, nan = float("inf"), float("nan")


def ids(value: object) -> str:
    return value.name if isinstance(value, Sample) else str(value).removeprefix("torch.")


@pytest.mark.parametrize(("dtype", "sample"), SAMPLES, ids=ids)
def test_equals_reference(dtype: torch.dtype, sample: Sample) -> None:
    assert_same(sample.run("cpu"), sample.run("reference"), TOLERANCE[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sample", FEW, ids=ids)
def test_any_memory_layout(sample: Sample, layout: str) -> None:
    assert_same(sample.change(LAYOUTS[layout]).run(), sample.run(), 1e-14)


@pytest.mark.parametrize("sample", FEW, ids=ids)
def test_expanded_arguments(sample: Sample) -> None:
    """One value per sample and channel, expanded over the map."""
    flat = sample.change(lambda t: t[..., :1, :1].expand(t.shape) if t.dim() == 4 else t)
    assert_same(flat.run(), flat.change(lambda t: t.contiguous()).run(), 1e-14)


def test_does_not_touch_its_arguments() -> None:
    for sample in FEW:
        before = sample.change(torch.clone)
        sample.run()
        assert_same(sample.raw()[:1], before.raw()[:1], 0)
        assert_same(sample.raw()[2], before.raw()[2], 0)


def test_keep_returns_the_preactivation_and_nothing_else() -> None:
    for sample in FEW:
        raw = sample.raw()
        kept, dropped = ops.relax_step(*raw), ops.relax_step(*raw[:-1], False)
        assert_same(kept[:2], dropped[:2], 0)
        assert dropped[2].shape == (0,)


def with_drive(form: str, drive: list[float], **changes: Any) -> Sample:
    """Units of one sample, each with its own value; more copies of them than one vector register holds."""
    units = torch.tensor([drive], dtype=torch.float64).repeat(1, 9)
    kwargs = {"drives": [units], "form": form, "preactivation": torch.full_like(units, 0.5)}
    return Sample("relax_step", form, (torch.zeros_like(units), None), {**kwargs, **changes})


NAN_IN = [(form, where) for form in ("states", "delta", "tangent") for where in ("state", "drives", "nudge")]


# a preactivation is not read in states form; in tangent form a NaN lies outside the box
@pytest.mark.parametrize(("form", "where"), [*NAN_IN, ("delta", "preactivation")])
def test_nan_surfaces(form: str, where: str) -> None:
    """It is in the new state of its unit, and in the residual of its sample alone."""
    new = Maker(torch.float64)
    tensors = {name: new(2, 3, 7, 5) for name in ("state", "drives", "nudge", "preactivation")}
    tensors[where][1, 2, 3, 4] = nan
    kwargs = {"nudge_gain": 1.0, "form": form, "damping": 0.7, "lo": -9.0, "hi": 9.0}
    got = Sample(
        "relax_step",
        where,
        (tensors["state"], None),
        {"drives": [tensors["drives"]], "nudge": tensors["nudge"], "preactivation": tensors["preactivation"], **kwargs},
    )
    state, residual, _ = got.run()
    assert state is not None
    assert residual is not None
    assert state.isnan().nonzero().tolist() == [[1, 2, 3, 4]]
    assert residual.isnan().tolist() == [False, True]
    expected = got.run("reference")[0]
    assert expected is not None
    assert torch.equal(state.isnan(), expected.isnan())


def test_nan_of_the_old_state_is_in_the_residual_without_damping() -> None:
    """With eta = 1 the old state is not part of the new one, so the state recovers; the residual still tells."""
    state = torch.tensor([[nan, 0.0]])
    new, residual, _ = functional.relax_step(state, drives=[torch.full((1, 2), 0.5)])
    assert new.tolist() == [[0.5, 0.5]]
    assert residual.isnan().all()


@pytest.mark.parametrize("pre", [-inf, -0.5, 0.0, 0.5, 1.0, 1.5, inf, nan])
@pytest.mark.parametrize("form", ["states", "delta", "tangent"])
def test_special_values_as_in_the_reference(form: str, pre: float) -> None:
    values = [inf, -inf, nan, 0.0, -0.0, 1e300, -1e300, 0.3, -0.3, 5.0, -5.0]
    sample = with_drive(form, values)
    sample = replace(
        sample, kwargs={**sample.kwargs, "preactivation": torch.full_like(sample.args[0], pre), "scale": 2.0}
    )
    for got, expected in zip(sample.run("cpu"), sample.run("reference"), strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_increments_keep_their_digits(dtype: torch.dtype) -> None:
    """The delta is the increment itself inside the box: nothing is rounded against the free preactivation."""
    increment = torch.tensor([[1e-9, -3e-12, 7e-20]], dtype=dtype)
    pre = torch.full_like(increment, 0.7)
    new, _, _ = functional.relax_step(torch.zeros_like(pre), drives=[increment], preactivation=pre, form="delta")
    assert torch.equal(new, increment)


def test_power_of_two_scales_change_no_digit() -> None:
    new = Maker(torch.float32)
    increment, pre = new(4, 50), new(4, 50)
    plain = functional.relax_step(0 * pre, drives=[increment], preactivation=pre, form="delta")
    scale = 2.0**40
    scaled = functional.relax_step(0 * pre, drives=[scale * increment], preactivation=pre, form="delta", scale=scale)
    assert torch.equal(scaled[0] / scale, plain[0])
    assert torch.equal(scaled[1], plain[1])


def test_empty_maps_and_no_channels() -> None:
    """Nothing to update is no error, with and without a bias; the residual is zero."""
    for shape in ((2, 0), (2, 0, 3, 3), (2, 3, 0, 5), (0, 3), (0, 0)):
        for bias in (None, torch.zeros(shape[1])):
            new, residual, a = functional.relax_step(torch.zeros(shape), bias, drives=[torch.zeros(shape)])
            assert new.shape == a.shape == shape
            assert residual.tolist() == [0.0] * shape[0]


def test_average_pooling_ignores_winners() -> None:
    new = Maker(torch.float64)
    state, above, weight = new(2, 3, 7, 5), new(2, 4, 3, 2), new(4, 3, 3, 3)
    outs = []
    for winners in (None, new.winners(2, 4, 3, 2)):
        neighbour = Neighbour(above, weight, (1, 1), (1, 1), "avg", winners)
        outs.append(functional.relax_step(state, above=[neighbour]))
    assert_same(outs[0], outs[1], 0)


def test_refuses_to_be_differentiated() -> None:
    state = torch.zeros(2, 3, requires_grad=True)
    new, _, _ = functional.relax_step(state, drives=[torch.full((2, 3), 0.5)])
    with pytest.raises(RuntimeError, match=r"ep_kernels::relax_step has no derivative.*ep_gradients.*bptt_gradients"):
        new.sum().backward()


@pytest.mark.parametrize("sample", FEW[::5], ids=ids)
def test_opcheck(sample: Sample) -> None:
    torch.library.opcheck(torch.ops.ep_kernels.relax_step, sample.raw())


def test_opcheck_without_preactivation() -> None:
    torch.library.opcheck(torch.ops.ep_kernels.relax_step, (*FEW[0].raw()[:-1], False))
