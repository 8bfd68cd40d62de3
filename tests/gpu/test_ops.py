"""``drive``, ``relax_step`` and ``contrast`` on the device, by both backends, against the reference in float64.

``cuda`` multiplies float32 tensors exactly; ``triton`` as torch.set_float32_matmul_precision says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ep_kernels import RelaxConfig, backend, backends, ep_gradients, functional, relax_op
from ep_kernels.functional import Neighbour
from ep_kernels.relaxation import Relaxation
from tests.core.nets import NETWORKS
from tests.gpu.device import DEVICE, INTERPRETED, assert_close, assert_equal, moved, on_device, random_problem
from tests.ops.inputs import TENSOR_LISTS, Maker, Sample, sample_inputs

OPS = ("drive", "relax_step", "contrast")
# relative L2 error by dtype of the tensors; tf32: float32 under torch.set_float32_matmul_precision("high")
DTYPES = {
    "fp32": (torch.float32, 1e-5),
    "tf32": (torch.float32, 5e-3),
    "fp16": (torch.float16, 5e-3),
    "bf16": (torch.bfloat16, 4e-2),
}


@contextmanager
def products(name: str) -> Iterator[None]:
    """How float32 operands are multiplied."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture(params=list(DTYPES))
def dtype(request: pytest.FixtureRequest) -> str:
    if request.param == "bf16" and INTERPRETED:
        pytest.skip("Triton's interpreter multiplies bfloat16 as raw bits")
    return str(request.param)


def check(sample: Sample, name: str, on: str) -> None:
    """The op on tensors of a dtype, against the reference on the same numbers in float64."""
    kind, limit = DTYPES[name]
    rounded = sample.change(lambda t: moved(t, kind))
    expected = rounded.change(lambda t: moved(t, torch.float64)).run("reference")
    with products(name):
        found = rounded.run(on)
    if sample.op == "drive":  # a winner may fall the other way where two are equal but for rounding
        limit_winners = 0.0 if name == "fp32" else 0.05
        if found[1] is not None and expected[1] is not None and found[1].numel():
            assert float((found[1] != expected[1]).float().mean()) <= limit_winners, "winners"
        found, expected = found[:1], expected[:1]
    assert_close(found, expected, limit, sample.name)


@pytest.mark.parametrize("op", OPS)
def test_small(op: str, dtype: str, on: str) -> None:
    for sample in sample_inputs(op):
        check(sample, dtype, on)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_thorough(op: str, dtype: str, on: str) -> None:
    for sample in sample_inputs(op, thorough=True):
        check(sample, dtype, on)


@pytest.mark.parametrize("channels", [1, 3, 17, 64, 512])
@pytest.mark.parametrize("pool", ["none", "max", "avg"])
def test_channels(channels: int, pool: str, dtype: str, on: str) -> None:
    """Numbers of channels that do and do not fill a tile, on a ragged map, batch 1 and 5."""
    if INTERPRETED and channels == 512:
        pytest.skip("takes minutes in the interpreter")
    kind, limit = DTYPES[dtype]
    new = Maker(torch.float64, channels)
    for batch in (1, 5):
        source = moved(new(batch, channels, 9, 7), kind)
        weight = moved(new(17, channels, 3, 3) / (9 * channels) ** 0.5, kind)
        expected = functional.drive(moved(source, torch.float64), moved(weight, torch.float64), (1, 1), (1, 1), pool)
        with backend(on), products(dtype):
            found = functional.drive(source, weight, (1, 1), (1, 1), pool)
        assert_close(found[:1], expected[:1], limit)


def test_small_ties_go_to_the_first(on: str) -> None:
    """As in max_pool2d: equal values everywhere."""
    source = torch.ones(2, 3, 6, 6, device=DEVICE)
    weight = torch.ones(4, 3, 1, 1, device=DEVICE)
    with backend(on):
        pooled, winners = functional.drive(source, weight, (1, 1), (0, 0), "max")
    assert winners is not None
    assert int(winners.max()) == 0
    assert_equal([pooled], [torch.full_like(pooled, 3.0)])


def test_small_nan_is_passed_on(on: str) -> None:
    source = torch.rand(1, 3, 6, 6, device=DEVICE)
    source[0, 1, 2, 2] = float("nan")
    weight = torch.rand(4, 3, 1, 1, device=DEVICE)
    with backend(on):
        pooled, _ = functional.drive(source, weight, (1, 1), (0, 0), "max")
    assert bool(pooled[0, :, 1, 1].isnan().all())
    assert int(pooled.isnan().sum()) == 4


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_layouts(layout: str, on: str) -> None:
    """The same numbers in other memory."""
    new = Maker(torch.float32, 3)
    source, weight = moved(new(2, 17, 8, 6)), moved(new(16, 17, 3, 3))
    with backend(on):
        expected = functional.drive(source, weight, (1, 1), (1, 1), "max")
        if layout == "channels_last":
            source = source.contiguous(memory_format=torch.channels_last)
        elif layout == "strided":
            wide = torch.full((2, 35, 17, 13), float("nan"), device=DEVICE)
            view = wide[:, 1::2, 1::2, 1::2]
            source = view.copy_(source)
        found = functional.drive(source, weight, (1, 1), (1, 1), "max")
    assert_equal(found, expected)


@pytest.mark.parametrize("op", OPS)
def test_repeats_are_equal_bit_for_bit(op: str, on: str) -> None:
    for sample in list(sample_inputs(op))[:4]:
        here = sample.change(moved)
        first, second = here.run(on), here.run(on)
        assert_equal(second, first, sample.name)


def test_float64_is_left_to_the_reference(on: str) -> None:
    for sample in list(sample_inputs("drive"))[:3]:
        here = sample.change(lambda t: moved(t, torch.float64))
        assert_equal(here.run(on), here.run("reference"), sample.name)


def test_compiled(cuda: torch.device, on: str) -> None:
    """torch.compile around functional ops."""
    pytest.importorskip("triton", reason="torch.compile needs triton on a GPU")
    new = Maker(torch.float32, 5)
    x, state, above = moved(new(2, 16, 12, 12)), moved(new(2, 32, 6, 6)), moved(new(2, 16, 6, 6))
    weight, up, bias = moved(new(32, 16, 3, 3) / 12), moved(new(16, 32, 3, 3) / 17), moved(new(32))

    def update(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        pooled, _ = functional.drive(x.sigmoid(), weight, (1, 1), (1, 1), "max")
        neighbour = Neighbour(above, up, (1, 1), (1, 1), gain=0.3)
        return functional.relax_step(state, bias, drives=[pooled], above=[neighbour])[0] * 2

    with backend(on):
        expected = update(x, state)
        torch.compiler.reset()
        found = torch.compile(update)(x, state)
    assert_close([found], [expected], 1e-5)


def test_relax_compiled(on: str, cuda: torch.device) -> None:
    """torch.compile around the op that runs a whole relaxation."""
    pytest.importorskip("triton", reason="torch.compile needs triton on a GPU")
    here = on_device(random_problem(NETWORKS["max"]))
    with backends.recorded() as jobs:
        ep_gradients(here.network, here.parameters, here.x, here.targets, RelaxConfig(), backend=on)
    for job in jobs:
        if not isinstance(job, Relaxation):
            continue
        arguments = relax_op.flat(job)
        lists, rest = arguments[: len(TENSOR_LISTS)], arguments[len(TENSOR_LISTS) :]

        def run(*lists: list[torch.Tensor], rest: tuple[Any, ...] = rest) -> tuple[torch.Tensor, ...]:
            relax = torch.ops.ep_kernels.triton_relax if on == "triton" else torch.ops.ep_kernels.relax
            states, _, drives, winners, residual = relax(*lists, *rest)
            return *(s * 2 for s in states), *drives, *winners, residual

        torch.compiler.reset()
        assert_equal(torch.compile(run, fullgraph=True)(*lists), run(*lists))


@pytest.mark.skipif(os.environ.get("EP_KERNELS_WGMMA") != "1", reason="run by test_cuda_with_wgmma")
def test_wgmma_is_used(cuda: torch.device) -> None:
    """What the tests beside this one saw."""
    source, weight = torch.rand(4, 64, 16, 16, device=cuda).half(), torch.rand(128, 64, 3, 3, device=cuda).half()
    with backend("cuda"), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        functional.drive(source, weight, (1, 1), (1, 1), "max")
        torch.cuda.synchronize()
    assert any("Warpgroup" in event.key for event in profiler.key_averages()), profiler.key_averages()
