"""``drive``, ``relax_step`` and ``contrast`` on the backend ``triton``, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ep_kernels import backend, functional
from ep_kernels.functional import Neighbour
from ep_kernels.triton import ops
from ep_kernels.triton.tiling import Tile
from tests.ops.inputs import BASE, LAYOUTS, Geometry, Maker, Sample, assert_same, sample_inputs
from tests.triton.interpreted.tools import close, nan, use_tiles

# float16 tensors are the operands, and outputs and differences are rounded to it: 11 bits of a sum of terms up to ten
# times as large as their result
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
NAMES = ("drive", "relax_step", "contrast")


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, Tile(128, 32, 128, 4, 1))


def name(value: object) -> str:
    return value.name if isinstance(value, Sample) else str(value).removeprefix("torch.")


def in_double(t: Tensor) -> Tensor:
    return t.double() if t.dtype.is_floating_point else t


def check(sample: Sample, dtype: torch.dtype, layout: Callable[[Tensor], Tensor] = lambda t: t) -> None:
    """Values of ``dtype`` against the same values in float64."""
    exact = sample.change(in_double)
    expected = exact.run("reference")
    got = sample.change(layout).run("triton")
    assert len(got) == len(expected)
    # sums of many terms that nearly cancel, as the bias of one channel, are compared on the scale of the terms
    scale = 1.0
    if sample.op == "contrast":
        scale = abs(sample.kwargs["scale"] * sample.kwargs["target_gain"]) * float(exact.args[3].norm())
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert (a is None) == (b is None), f"output {i}"
        if a is not None and b is not None:
            assert a.dtype == (dtype if b.dtype.is_floating_point else b.dtype)
            close(f"output {i}", a, b, TOLERANCE[dtype] if b.dtype.is_floating_point else 0, scale)


def few(op: str, dtype: torch.dtype) -> list[Sample]:
    """The base ones; of the thorough ones every kind of kernel, stride and padding with one pooling in turn."""
    samples = list(sample_inputs(op, dtype))
    if dtype == torch.float32:
        base = {s.name for s in samples}
        more = [s for s in sample_inputs(op, dtype, thorough=True) if s.name not in base]
        small = [s for s in more if "(41,43)" not in s.name and "_large" not in s.name]
        samples += small[:: {"drive": 4, "relax_step": 7, "contrast": 6}[op]]
    return samples


SAMPLES = [(dtype, s) for op in NAMES for dtype in TOLERANCE for s in few(op, dtype)]


@pytest.mark.parametrize(("dtype", "sample"), SAMPLES, ids=name)
def test_equals_reference(dtype: torch.dtype, sample: Sample) -> None:
    check(sample, dtype)


@pytest.mark.parametrize("layout", [key for key in LAYOUTS if key != "nchw"])
@pytest.mark.parametrize("op", NAMES)
def test_any_memory_layout(op: str, layout: str) -> None:
    for sample in list(sample_inputs(op, torch.float32))[:2]:
        check(sample, torch.float32, LAYOUTS[layout])


def test_expanded_arguments() -> None:
    for op in NAMES:
        sample = next(sample_inputs(op, torch.float32))
        flat = sample.change(lambda t: t[..., :1, :1].expand(t.shape) if t.dim() == 4 else t)
        check(flat, torch.float32)


def test_does_not_touch_its_arguments() -> None:
    """Maps of 16 channels in channels_last memory are read in place."""
    new = Maker(torch.float32)
    source, weight = new(2, 16, 4, 4).contiguous(memory_format=torch.channels_last), new(16, 16, 3, 3)
    state, top = (new(2, 16, 4, 4).contiguous(memory_format=torch.channels_last) for _ in range(2))
    tensors = [source, weight, state, top]
    kept = [t.clone() for t in tensors]
    neighbours = ([Neighbour(source, weight, padding=(1, 1))], [Neighbour(top, weight, padding=(1, 1))])
    with backend("triton"):
        functional.drive(source, weight, padding=(1, 1), pool="max")
        functional.relax_step(state, drives=[top], below=neighbours[0], above=neighbours[1], nudge=source)
        functional.contrast(source, None, state, top, weight.shape, padding=(1, 1))
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))


def outputs(run: Callable[[], Any], on: str) -> Any:
    with backend(on):
        return run()


GEOMETRIES = (
    Geometry((3, 4), (3, 3), (3, 3), (2, 2), size=(8, 7)),
    Geometry((3, 4), (3, 3), (2, 3), (0, 1), "max", size=(9, 11)),
    Geometry((3, 4), (1, 1), (1, 1), (2, 1), "avg", size=(3, 2)),
    Geometry((3, 4), (2, 4), (1, 1), (1, 3), size=(5, 4)),
    Geometry((3, 4), (7, 7), (1, 1), (3, 3), "max", batch=1, size=(3, 4)),
    Geometry((3, 4), (5, 5), (1, 1), (1, 1), batch=1, size=(3, 3)),
    Geometry((1, 1), (1, 1), (1, 1), (0, 0), batch=1, size=(1, 1)),
    Geometry((33, 2), (1, 3), (1, 1), (0, 1), batch=1, size=(2, 3)),
    Geometry((3, 2), None, size=(2, 3)),
)


@pytest.mark.parametrize("g", GEOMETRIES, ids=str)
def test_what_conv2d_takes(g: Geometry) -> None:
    """Drive, feedback and contrast of every kind of geometry."""
    new = Maker(torch.float32)
    source, weight = g.source(new), g.weight(new)
    pooled, won = outputs(lambda: functional.drive(source, weight, *g.options()), "reference")
    top, delta = new(*pooled.shape), new(2 * len(pooled), *pooled.shape[1:])
    above = [Neighbour(top, weight, *g.options(), won, gain=0.5)]
    runs: tuple[Callable[[], Sequence[Tensor | None]], ...] = (
        lambda: functional.drive(source, weight, *g.options()),
        lambda: functional.relax_step(source, above=above, lo=-9.0, hi=9.0),
        lambda: functional.contrast(source, None, top, delta, weight.shape, *g.options(), won),
    )
    for run in runs:
        assert_same(outputs(run, "triton"), outputs(run, "reference"), 1e-5, scale=1.0)


IMPOSSIBLE: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "kernel larger than the map": ((2, 3, 3, 3), (4, 3, 5, 5), {}),
    "kernel larger than the padded map": ((2, 3, 2, 9), (4, 3, 5, 5), {"padding": (1, 1)}),
    "one position to pool": ((2, 3, 3, 3), (4, 3, 3, 3), {"pool": "max"}),
    "channels": ((2, 3, 5, 5), (4, 2, 3, 3), {}),
    "features": ((2, 3, 5, 5), (4, 74), {}),
    "stride": ((2, 3, 5, 5), (4, 3, 3, 3), {"stride": (0, 1)}),
    "padding": ((2, 3, 5, 5), (4, 3, 3, 3), {"padding": (-1, 0)}),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_errors_are_those_of_the_other_backends(case: str) -> None:
    source, weight, options = IMPOSSIBLE[case]
    messages = []
    for on in ("cpu", "reference", "triton"):
        with pytest.raises(ValueError, match=r"^drive: argument") as caught:
            outputs(lambda: functional.drive(torch.zeros(source), torch.zeros(weight), **options), on)
        messages.append(str(caught.value))
    assert len(set(messages)) == 1


def test_float64_goes_through_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    sample = next(sample_inputs("drive", torch.float64))
    assert_same(sample.run("triton"), sample.run("reference"), 0)
    assert_same(ops.drive(*sample.args[:4], 1), sample.run("reference"), 0)


@pytest.mark.parametrize("op", NAMES)
def test_empty_batches(op: str) -> None:
    samples = [s for s in sample_inputs(op, torch.float32) if s.args[0].shape[0] == 0]
    assert samples
    for sample in samples:
        got, expected = sample.run("triton"), sample.run("reference")
        assert [None if t is None else t.shape for t in got] == [None if t is None else t.shape for t in expected]


def test_no_channels_and_empty_maps() -> None:
    for shape in ((2, 0), (2, 0, 3, 3), (2, 3, 0, 5), (0, 3), (0, 0)):
        with backend("triton"):
            state, bias = torch.zeros(shape), torch.zeros(shape[1])
            new, residual, a = functional.relax_step(state, bias, drives=[state])
        assert new.shape == a.shape == shape
        assert residual.tolist() == [0.0] * shape[0]


def test_more_neighbours_than_one_launch_takes() -> None:
    """Six K loops and four addends, some of the samples of one phase or of fewer."""
    new = Maker(torch.float32)
    line = {"padding": (0, 0)}
    below = [Neighbour(new(4, 3, 2, 2), new(5, 3, 1, 1), **line, gain=0.1 * i) for i in range(1, 5)]  # type: ignore[arg-type]
    below.append(Neighbour(new(2, 3, 2, 2), new(5, 3, 1, 1), **line))  # type: ignore[arg-type]
    above = [Neighbour(new(4, 2, 2, 2), new(2, 5, 1, 1), **line, gain=0.3) for _ in range(2)]  # type: ignore[arg-type]
    drives = [new(4, 5, 2, 2), new(2, 5, 2, 2), new(1, 5, 2, 2), new(4, 5, 2, 2)]

    def run() -> Any:
        return functional.relax_step(
            state, bias, drives=drives, below=below, above=above, nudge=nudge, nudge_gain=0.3, phases=2, lo=-5.0, hi=5.0
        )

    state, bias, nudge = new(4, 5, 2, 2), new(5), new(1, 5, 2, 2)
    assert_same(outputs(run, "triton"), outputs(run, "reference"), 1e-5)


@pytest.mark.parametrize("pre", [1, 2, 4])
def test_preactivations_and_nudges_of_fewer_samples(pre: int) -> None:
    """Of one phase, of all samples, and of one: what is not of one phase is made so."""
    new = Maker(torch.float32)
    state, free = new(4, 3, 2, 2), 0.5 + new(pre, 3, 2, 2)
    for nudge in (new(1, 3, 2, 2), new(2, 3, 2, 2), new(4, 3, 2, 2)):

        def run(nudge: Tensor = nudge) -> Any:
            return functional.relax_step(
                state, nudge=nudge, nudge_gain=0.4, preactivation=free, form="delta", phases=2, scale=4.0
            )

        assert_same(outputs(run, "triton"), outputs(run, "reference"), 1e-5)


@pytest.mark.parametrize("operands", [None, torch.float16, "tf32"])
def test_operands_of_the_contrast(operands: Any) -> None:
    """Rounded as the reference rounds them: the difference in its own unit, the mean in the states'."""
    samples = [s for s in sample_inputs("contrast", torch.float32) if s.args[0].shape[0] and "1-1-0.5" in s.name]
    for sample in samples[:3]:
        low = Sample(sample.op, sample.name, sample.args, {**sample.kwargs, "operands": operands})
        got, expected = low.run("triton"), low.run("reference")
        scale = 0.15 * float(sample.args[3].norm())
        # where float32 sums differ in their last bits, a few values round to the other neighbour
        assert_same(got, expected, 2e-4 if operands == torch.float16 else 1e-5, scale)
        if operands == torch.float16:
            assert not torch.equal(got[0], sample.run("triton")[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("pool", ["none", "max", "avg"])
def test_nan_surfaces_in_the_contrast(pool: str) -> None:
    new = Maker(torch.float32)
    shape = (2, 4, 7, 5) if pool == "none" else (2, 4, 3, 2)
    winners = torch.zeros(shape, dtype=torch.uint8) if pool == "max" else None
    delta = new(*shape)
    delta[1, 2, 1, 1] = nan
    args = (new(2, 3, 7, 5), new(2, 3, 7, 5), new(*shape), delta, (4, 3, 3, 3), (1, 1), (1, 1), pool, winners)
    with backend("triton"):
        weight, bias = functional.contrast(*args)  # type: ignore[arg-type]
    assert bias.isnan().tolist() == [False, False, True, False]
    assert weight.isnan().flatten(1).all(1).tolist() == [False, False, True, False]


def test_maps_are_channels_last() -> None:
    new = Maker(torch.float32)
    for channels in (5, 16):
        with backend("triton"):
            pooled, won = functional.drive(new(2, 3, 6, 4), new(channels, 3, 3, 3), padding=(1, 1), pool="max")
            state, _, pre = functional.relax_step(new(2, channels, 3, 2), drives=[pooled])
        for out in (pooled, won, state, pre):
            assert out is not None
            assert out.is_contiguous(memory_format=torch.channels_last)


def test_float32_is_multiplied_as_torch_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for precision, products in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        assert ops.products() == products


def test_the_samples_are_of_every_kind() -> None:
    assert {g.pool for g in BASE} == {"none", "max", "avg"}
    kinds = [s.name for dtype, s in SAMPLES if dtype == torch.float32 and s.op == "drive"]
    for kind in ("linear", "1x1", "5x3", "3x3", "-(2,2)-", "frozen", "-none", "-avg", "-max"):
        assert any(kind in n for n in kinds), kind
