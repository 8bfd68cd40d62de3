"""``contrast`` against the reference: both forms of phases, pooling, layouts, cancellation, opcheck."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ep_kernels import backend, functional, ops
from tests.ops.inputs import DTYPES, LAYOUTS, TOLERANCE, Maker, Sample, assert_same, relative_error, sample_inputs

SAMPLES = [(dtype, s) for dtype in DTYPES for s in sample_inputs("contrast", dtype, thorough=True)]
FEW = list(sample_inputs("contrast"))


def ids(value: object) -> str:
    return value.name if isinstance(value, Sample) else str(value).removeprefix("torch.")


@pytest.mark.parametrize(("dtype", "sample"), SAMPLES, ids=ids)
def test_equals_reference(dtype: torch.dtype, sample: Sample) -> None:
    # sums of many terms that nearly cancel, as the bias of one channel, are compared on the scale of the terms
    scale = abs(sample.kwargs["scale"] * sample.kwargs["target_gain"]) * float(sample.args[3].double().norm())
    assert_same(sample.run("cpu"), sample.run("reference"), TOLERANCE[dtype], scale)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sample", FEW, ids=ids)
def test_any_memory_layout(sample: Sample, layout: str) -> None:
    assert_same(sample.change(LAYOUTS[layout]).run(), sample.run(), 1e-13)


@pytest.mark.parametrize("sample", FEW[::3], ids=ids)
def test_expanded_arguments(sample: Sample) -> None:
    flat = sample.change(lambda t: t[..., :1, :1].expand(t.shape) if t.dim() == 4 else t)
    assert_same(flat.run(), flat.change(lambda t: t.contiguous()).run(), 1e-13)


def test_does_not_touch_its_arguments() -> None:
    for sample in FEW:
        before = sample.change(torch.clone)
        sample.run()
        tensors = [(a, b) for a, b in zip(sample.args, before.args, strict=True) if isinstance(a, torch.Tensor)]
        assert all(torch.equal(a, b) for a, b in tensors)


def test_is_the_difference_of_two_ordinary_gradients() -> None:
    """``<s+^dst, drive(s+^src)> - <s-^dst, drive(s-^src)>`` differentiated by the weight, at fixed winners."""
    new = Maker(torch.float64)
    plus, minus, weight = (new(2, 3, 7, 5), new(2, 4, 3, 2)), (new(2, 3, 7, 5), new(2, 4, 3, 2)), new(4, 3, 3, 3)
    winners, scale = new.winners(2, 4, 3, 2), -1 / (2 * 0.05 * 2)
    weight.requires_grad_()
    with backend("reference"):
        up, down = (
            (s[1] * functional.drive(s[0], weight, (1, 1), (1, 1), "max", winners)[0]).sum() for s in (plus, minus)
        )
    expected = torch.autograd.grad(scale * (up - down), weight)[0]
    deltas = (plus[0] - minus[0], plus[1] - minus[1])
    options = ((1, 1), (1, 1), "max", winners)
    for free, centre in ((minus, 0.5), (plus, -0.5)):
        got = functional.contrast(
            free[0], deltas[0], free[1], deltas[1], weight.shape, *options, centre=centre, scale=scale
        )
        assert_same(got, [expected, scale * deltas[1].sum((0, 2, 3))], 1e-12)


def test_live_winners_are_those_of_each_phase() -> None:
    new = Maker(torch.float64)
    plus, minus, weight = (new(2, 3, 7, 5), new(2, 4, 3, 2)), (new(2, 3, 7, 5), new(2, 4, 3, 2)), new(4, 3, 3, 3)
    weight.requires_grad_()
    with backend("reference"):
        drives = [functional.drive(s[0], weight, (1, 1), (1, 1), "max") for s in (plus, minus)]
    up, down = ((s[1] * pooled).sum() for s, (pooled, _) in zip((plus, minus), drives, strict=True))
    expected = torch.autograd.grad(up - down, weight)[0]
    winners = torch.cat([won for _, won in drives if won is not None])
    deltas = (plus[0] - minus[0], plus[1] - minus[1])
    got = functional.contrast(minus[0], deltas[0], minus[1], deltas[1], weight.shape, (1, 1), (1, 1), "max", winners)
    assert_same(got, [expected, deltas[1].sum((0, 2, 3))], 1e-12)


def test_small_differences_lose_no_digits() -> None:
    """Deltas of 1e-9 beside states of order 1, in float32: the subtraction of two gradients would leave nothing."""
    new = Maker(torch.float64)
    free, delta, above, change = new(8, 64), 1e-9 * new(16, 64), new(8, 64), 1e-9 * new(16, 64)
    exact = functional.contrast(free, delta, above, change, (64, 64))
    single = functional.contrast(*(t.float() for t in (free, delta, above, change)), (64, 64))
    assert_same([t.double() for t in single], exact, 1e-5)


def test_bias_of_many_pixels() -> None:
    """The sum over samples and pixels that the kernel makes itself."""
    new = Maker(torch.float32)
    plus, minus = 1 + new(4, 3, 64, 64), new(4, 3, 64, 64) - 1
    arguments = (new(4, 1, 64, 64), None, new(4, 3, 64, 64))
    one = functional.contrast(*arguments, plus, (3, 1, 1, 1))[1]
    assert_same([one.double()], [plus.double().sum((0, 2, 3))], 1e-5)
    two = functional.contrast(*arguments, torch.cat([plus, minus]), (3, 1, 1, 1))[1]
    assert_same([two.double()], [(plus.double() - minus.double()).sum((0, 2, 3))], 1e-5)


@pytest.mark.parametrize("pool", ["none", "max", "avg"])
def test_nan_surfaces(pool: str) -> None:
    new = Maker(torch.float64)
    shape = (2, 4, 7, 5) if pool == "none" else (2, 4, 3, 2)
    winners = torch.zeros(shape, dtype=torch.uint8) if pool == "max" else None
    delta = new(*shape)
    delta[1, 2, 1, 1] = float("nan")
    weight, bias = functional.contrast(
        new(2, 3, 7, 5), new(2, 3, 7, 5), new(*shape), delta, (4, 3, 3, 3), (1, 1), (1, 1), pool, winners
    )
    assert bias.isnan().tolist() == [False, False, True, False]
    assert weight.isnan().flatten(1).all(1).tolist() == [False, False, True, False]


def test_gradient_is_channels_last_like_the_states() -> None:
    for sample in FEW:
        weight = sample.run()[0]
        assert weight is not None
        assert weight.dim() == 2 or weight.is_contiguous(memory_format=torch.channels_last)


def test_refuses_to_be_differentiated() -> None:
    source = torch.ones(2, 3, requires_grad=True)
    weight, _ = functional.contrast(source, None, torch.ones(2, 4), torch.ones(2, 4), (4, 3))
    with pytest.raises(RuntimeError, match=r"ep_kernels::contrast has no derivative.*ep_gradients.*bptt_gradients"):
        weight.sum().backward()


@pytest.mark.parametrize("sample", FEW[::3], ids=ids)
def test_operands_are_not_rounded(sample: Sample) -> None:
    """The CPU multiplies in the dtype of the tensors, whatever the precision; the reference rounds."""
    *raw, own = sample.raw()
    assert own == 0
    expected = ops.contrast(*raw, own)
    for code in (1, 2, 3):
        assert_same(ops.contrast(*raw, code), expected, 0)
    low = replace(sample, kwargs={**sample.kwargs, "operands": torch.bfloat16})
    assert low.raw()[-1] == 3
    assert_same(low.run(), sample.run(), 0)
    if expected[0].any():
        weight, full = low.run("reference")[0], sample.run("reference")[0]
        assert weight is not None
        assert full is not None
        assert 0 < relative_error(weight, full) < 0.03


@pytest.mark.parametrize("sample", FEW[::2], ids=ids)
def test_opcheck(sample: Sample) -> None:
    torch.library.opcheck(torch.ops.ep_kernels.contrast, sample.raw())
