"""``drive`` against the reference: values, winners, layouts, NaN and ties, gradients, opcheck."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile

from ep_kernels import backend, functional
from tests.ops.inputs import DTYPES, LAYOUTS, TOLERANCE, Maker, Sample, assert_same, sample_inputs

SAMPLES = [(dtype, s) for dtype in DTYPES for s in sample_inputs("drive", dtype, thorough=True)]
FEW = list(sample_inputs("drive"))


def ids(value: object) -> str:
    return value.name if isinstance(value, Sample) else str(value).removeprefix("torch.")


@pytest.mark.parametrize(("dtype", "sample"), SAMPLES, ids=ids)
def test_equals_reference(dtype: torch.dtype, sample: Sample) -> None:
    assert_same(sample.run("cpu"), sample.run("reference"), TOLERANCE[dtype])


@pytest.mark.parametrize("sample", FEW, ids=ids)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(sample: Sample, layout: str) -> None:
    assert_same(sample.change(LAYOUTS[layout]).run(), sample.run(), 1e-14)


def test_expanded_source_and_winners() -> None:
    new = Maker(torch.float64)
    source, weight, winners = new(1, 3, 7, 5).expand(4, -1, -1, -1), new(17, 1, 3, 3).expand(-1, 3, -1, -1), None
    for winners in (None, new.winners(1, 17, 1, 1).expand(4, -1, 3, 2)):
        got = functional.drive(source, weight, (1, 1), (1, 1), "max", winners)
        copy = None if winners is None else winners.contiguous()
        assert_same(got, functional.drive(source.contiguous(), weight.contiguous(), (1, 1), (1, 1), "max", copy), 1e-14)


def test_maps_are_channels_last() -> None:
    new = Maker(torch.float32)
    pooled, winners = functional.drive(new(2, 3, 7, 5), new(4, 3, 3, 3), (1, 1), (1, 1), "max")
    assert winners is not None
    for out in (pooled, winners):
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pools_as_torch_does(dtype: torch.dtype) -> None:
    new = Maker(dtype)
    source, weight = new(2, 3, 7, 5), new(17, 3, 3, 3)
    map_ = F.conv2d(source, weight, padding=1)
    pooled, winners = functional.drive(source, weight, (1, 1), (1, 1), "max")
    expected, flat = F.max_pool2d(map_, 2, return_indices=True)
    assert_same([pooled, winners], [expected, window_index(flat, 5)], TOLERANCE[dtype])
    average = functional.drive(source, weight, (1, 1), (1, 1), "avg")[0]
    assert_same([average], [F.avg_pool2d(map_, 2)], TOLERANCE[dtype])


def window_index(flat: torch.Tensor, width: int) -> torch.Tensor:
    """Indices of max_pool2d(return_indices=True), into the map, as 0..3 in the 2x2 window."""
    return (2 * (flat // width % 2) + flat % width % 2).to(torch.uint8)


def identity(values: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """A 1x1 connection over one 2x2 window of these values, in every one of 20 channels (vector and scalar code)."""
    return torch.tensor(values).view(1, 1, 2, 2).expand(1, 20, 2, 2), torch.eye(20).view(20, 20, 1, 1)


inf, nan = float("inf"), float("nan")
WINDOWS = [
    [1.0] * 4,
    [0.0, -0.0, 0.0, -0.0],
    [-1.0, 2.0, 2.0, 1.0],
    [1.0, 2.0, 3.0, 3.0],
    [-inf] * 4,
    [1.0, inf, inf, 2.0],
]


@pytest.mark.parametrize("values", WINDOWS)
def test_first_winner_takes_ties(values: list[float]) -> None:
    window = torch.tensor(values).view(1, 1, 2, 2)
    expected, flat = F.max_pool2d(window, 2, return_indices=True)
    channels = [functional.drive(window, torch.ones(1, 1, 1, 1), pool="max")]
    if all(map(torch.isfinite, window.flatten())):  # an infinity times the identity's zeros would be NaN
        channels.append(functional.drive(*identity(values), pool="max"))
    for pooled, winners in channels:
        assert winners is not None
        assert (pooled == expected).all()
        assert (winners == window_index(flat, 2)).all()


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("others", [1.0, inf, -inf])
def test_nan_wins_as_in_torch(at: int, others: float) -> None:
    window = torch.full((2, 1, 2, 2), others)
    window[0].view(-1)[at] = nan
    for pool, expected in (("max", F.max_pool2d(window, 2)), ("avg", F.avg_pool2d(window, 2))):
        pooled, winners = functional.drive(window, torch.ones(1, 1, 1, 1), pool=pool)
        torch.testing.assert_close(pooled, expected, equal_nan=True, rtol=0, atol=0)
        if winners is not None:
            assert winners.flatten().tolist() == [at, 0]


def test_winners_above_three_stay_inside_the_window() -> None:
    """They are no winners: what is read is unspecified, but it is of the window; nothing is sent back."""
    source, weight = identity([1.0, 2.0, 3.0, 4.0])
    winners = torch.full((1, 20, 1, 1), 255, dtype=torch.uint8)
    with backend("cpu"):
        pooled = functional.drive(source, weight, pool="max", winners=winners)[0]
        assert ((pooled >= 1) & (pooled <= 4)).all()
        above = functional.Neighbour(torch.ones(1, 20, 1, 1), weight, pool="max", winners=winners)
        state, _, _ = functional.relax_step(torch.zeros(1, 20, 2, 2), above=[above])
    assert (state == 0).all()


def test_does_not_touch_its_arguments() -> None:
    for sample in FEW:
        before = sample.change(torch.clone)
        sample.run()
        for a, b in zip(sample.args, before.args, strict=True):
            assert not isinstance(a, torch.Tensor) or torch.equal(a, b)


def test_fresh_memory_is_poisoned_in_the_compiled_ops_too() -> None:
    """The fixture reaches memory that the library allocates: each allocation is followed by a fill."""
    sample = next(s for s in FEW if s.args[4] == "avg")
    with profile() as run:
        sample.run()
    assert sum(event.count for event in run.key_averages() if event.key == "aten::fill_") > 0


GRADIENTS = [s for s in FEW if s.args[0].numel()]


@pytest.mark.parametrize("sample", GRADIENTS, ids=ids)
def test_gradients_by_finite_differences(sample: Sample) -> None:
    source, weight, *options = sample.args

    def run(source: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.drive(source, weight, *options)[0]

    inputs = (source.clone().requires_grad_(), weight.clone().requires_grad_())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("sample", GRADIENTS, ids=ids)
def test_gradients_equal_autograd_of_the_reference(sample: Sample) -> None:
    found = []
    for on in ("cpu", "reference"):
        source, weight = (t.clone().requires_grad_() for t in sample.args[:2])
        with backend(on):
            pooled = functional.drive(source, weight, *sample.args[2:])[0]
        found.append(torch.autograd.grad(pooled.sin().sum(), (source, weight)))
    assert_same(found[0], found[1], 1e-12)


def test_gradient_of_one_argument_only() -> None:
    new = Maker(torch.float64)
    source, weight = new(2, 3, 7, 5), new(4, 3, 3, 3)
    functional.drive(source, weight.requires_grad_(), (1, 1), (1, 1), "max")[0].sum().backward()
    assert source.grad is None
    assert weight.grad is not None


@pytest.mark.parametrize("sample", FEW, ids=ids)
def test_opcheck(sample: Sample) -> None:
    torch.library.opcheck(torch.ops.ep_kernels.drive, sample.raw())


@pytest.mark.parametrize("sample", [FEW[0], FEW[1], FEW[4], FEW[-1]], ids=ids)
def test_opcheck_with_gradients(sample: Sample) -> None:
    source, weight, *rest = sample.raw()
    torch.library.opcheck(torch.ops.ep_kernels.drive, (source.requires_grad_(), weight.requires_grad_(), *rest))
