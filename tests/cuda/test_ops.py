"""``drive``, ``relax_step`` and ``contrast`` of the CUDA backend, run on the CPU, against the reference in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ep_kernels import functional
from tests.cuda.host import cuda_on_cpu
from tests.gpu.device import assert_close, assert_equal, moved
from tests.ops.inputs import LAYOUTS, Maker, Sample, sample_inputs

NAMES = ("drive", "relax_step", "contrast")
DTYPES = {"fp32": (torch.float32, 2e-5), "fp16": (torch.float16, 5e-3), "bf16": (torch.bfloat16, 4e-2)}


def run(sample: Sample) -> tuple[Any, ...]:
    """The sample through the CUDA backend."""
    with cuda_on_cpu():
        return sample.run()


def check(sample: Sample, dtype: str) -> None:
    """On tensors of a dtype, against the reference on the same numbers in float64."""
    kind, limit = DTYPES[dtype]
    typed = sample.change(lambda t: moved(t, kind, "cpu"))
    expected = typed.change(lambda t: moved(t, torch.float64, "cpu")).run("reference")
    found = run(typed)
    assert all(f.dtype == kind for f in found if f is not None and f.dtype != torch.uint8)
    if sample.op == "drive" and dtype != "fp32":  # a winner may fall the other way where two are almost equal
        found, expected = found[:1], expected[:1]
    if sample.op == "contrast":  # sums over positions may cancel
        limit = 5 * limit
    assert_close(found, expected, limit, sample.name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", NAMES)
def test_every_sample(op: str, dtype: str) -> None:
    """Every kernel size, stride, padding, pooling and form, with channels that do and do not fill a tile."""
    for sample in sample_inputs(op, thorough=dtype == "fp32"):
        check(sample, dtype)


@pytest.mark.parametrize("order", ["reverse", 1, 2])
@pytest.mark.parametrize("op", NAMES)
def test_the_order_of_threads_does_not_matter(op: str, order: str | int, device: Any) -> None:
    for sample in list(sample_inputs(op, torch.float32))[::3]:
        device.set_order("forward")
        expected = run(sample)
        device.set_order(order)
        assert_equal(run(sample), expected, sample.name)


TILES = {"128, 128": (1, 2, 128), "128, 64": (1, 3, 64), "64, 64": (132, 2, 120)}  # processors, batch, channels


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("op", NAMES)
def test_every_tile(op: str, tile: str, device: Any) -> None:
    """Few multiprocessors take large tiles and few parts of the positions, many take small ones and many parts."""
    processors, batch, channels = TILES[tile]
    device.set_device(processors=processors)
    new = Maker(torch.float32, processors)
    connection = ((1, 1), (1, 1))
    source, weight = new(batch, 40, 8, 16), new(channels, 40, 3, 3) / 19
    shape = (batch, channels, 8, 16)
    if op == "drive":
        samples = [Sample(op, pool, (source, weight, *connection, pool)) for pool in ("none", "max", "avg")]
    elif op == "relax_step":
        below, above = functional.Neighbour(source, weight, *connection), new(batch, 24, 8, 16)
        up = functional.Neighbour(above, new(24, channels, 3, 3) / 35, *connection, gain=0.1)
        samples = [Sample(op, "both", (new(*shape), new(channels)), {"below": [below], "above": [up]})]
    else:
        deltas = new(2 * batch, 40, 8, 16), new(2 * batch, *shape[1:])
        args = (source, deltas[0], new(*shape), deltas[1], (channels, 40, 3, 3), *connection)
        samples = [Sample(op, "both", args, {"scale": -0.3})]
    for dtype in DTYPES:
        for sample in samples:
            device.reset_statistics()
            check(sample, dtype)
            if op != "contrast":
                kernels = device.statistics()["kernels"]
                assert any(f", {tile}," in name for name in kernels), kernels


@pytest.mark.parametrize("operands", ["tf32", torch.float16, torch.bfloat16])
def test_contrast_rounds_its_operands(operands: Any) -> None:
    """As the reference does: the difference to it is that of the sums alone."""
    for sample in list(sample_inputs("contrast", torch.float32))[::2]:
        typed = replace(sample, kwargs={**sample.kwargs, "operands": operands})
        found, expected = run(typed), typed.run("reference")
        assert_close(found, expected, 5e-3 if operands == "tf32" else 2e-3, sample.name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", NAMES)
def test_any_memory_layout(op: str, layout: str) -> None:
    for sample in list(sample_inputs(op, torch.float32))[::2]:
        assert_equal(run(sample.change(LAYOUTS[layout])), run(sample), sample.name)


def test_ties_go_to_the_first() -> None:
    with cuda_on_cpu():
        pooled, winners = functional.drive(torch.ones(2, 3, 6, 6), torch.ones(4, 3, 1, 1), (1, 1), (0, 0), "max")
    assert winners is not None
    assert int(winners.max()) == 0
    assert_equal([pooled], [torch.full_like(pooled, 3.0)])


@pytest.mark.parametrize("op", NAMES)
def test_nan_surfaces_in_its_sample_only(op: str) -> None:
    new = Maker(torch.float32)
    source, weight = new(3, 3, 6, 6), new(4, 3, 3, 3)
    source[1, 2, 3, 3] = float("nan")
    with cuda_on_cpu():
        if op == "drive":
            out = functional.drive(source, weight, (1, 1), (1, 1), "max")[0]
        elif op == "relax_step":
            below = [functional.Neighbour(source, weight, (1, 1), (1, 1))]
            out, residual, _ = functional.relax_step(new(3, 4, 6, 6), below=below)
            assert residual.isnan().tolist() == [False, True, False]
        else:
            delta, target = new(3, 4, 6, 6), new(3, 4, 6, 6)
            grad, _ = functional.contrast(source, None, target, delta, (4, 3, 3, 3), (1, 1), (1, 1))
            assert bool(grad[:, 2].isnan().any())
            assert not bool(grad[:, :2].isnan().any())
            return
    assert [bool(s) for s in out.isnan().flatten(1).any(1)] == [False, True, False]


def test_many_neighbours() -> None:
    """More convolutions and finished drives than a launch takes."""
    new = Maker(torch.float32, 5)
    below = [functional.Neighbour(new(2, 3, 5, 5), new(4, 3, 3, 3) / 5, (1, 1), (1, 1), gain=g) for g in (1, 0.5, 2, 0)]
    above = [functional.Neighbour(new(2, 6, 5, 5), new(6, 4, 3, 3) / 7, (1, 1), (1, 1), gain=g) for g in (1e-3, 1e30)]
    drives = [new(2, 4, 5, 5) for _ in range(6)]
    kwargs = {"below": below * 2, "above": above, "drives": drives, "lo": -10.0, "hi": 10.0}
    check(Sample("relax_step", "many", (new(2, 4, 5, 5), new(4)), kwargs), "fp32")


@pytest.mark.parametrize("gain", [1e-33, 1e33])
def test_gains_far_apart(gain: float) -> None:
    """An accumulator that is scaled from one gain to the other between two convolutions would overflow, or vanish."""
    new = Maker(torch.float32, 6)
    source, weight = 1e4 * new(2, 3, 5, 5), 1e2 * new(4, 3, 3, 3)
    tiny = functional.Neighbour(new(2, 3, 5, 5) / gain, weight, (1, 1), (1, 1), gain=gain)
    plain = functional.Neighbour(source, weight, (1, 1), (1, 1))
    kwargs = {"below": [plain, tiny], "lo": -1e9, "hi": 1e9}
    check(Sample("relax_step", "far", (new(2, 4, 5, 5), new(4)), kwargs), "fp32")


@pytest.mark.parametrize("gain", [0.0, 2.0**-18, 1.0])
def test_live_contrasts_of_small_gains(gain: float) -> None:
    """Differences at other winners are of the size of the states: float16 must not see them in the deltas' units."""
    new = Maker(torch.float32, 7)
    winners = new.winners(4, 17, 3, 2)
    args = (new(2, 3, 7, 5), None, new(2, 17, 3, 2), new(4, 17, 3, 2), (17, 3, 3, 3), (1, 1), (1, 1), "max", winners)
    sample = Sample("contrast", "live", args, {"target_gain": gain, "operands": torch.float16})
    assert_close(run(sample), sample.run("reference"), 1e-3)
