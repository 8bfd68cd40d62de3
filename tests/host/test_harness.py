"""The host run itself: scheduler, stand-ins for PTX, streams and graphs, numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.host import checks
from tests.host.build import host_module, missing
from tests.host.checks import equal

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture
def module() -> Iterator[Any]:
    """ep_selftest, as it comes."""
    loaded = host_module("ep_selftest")
    loaded.set_order("forward")
    loaded.set_device()
    loaded.reset_statistics()
    yield loaded
    loaded.set_order("forward")
    loaded.set_device()


@pytest.mark.parametrize("check", [checks.neighbours, checks.tile, checks.product, checks.matrices, checks.warpgroup])
def test_kernels(module: Any, check: Any) -> None:
    check(module)


# ---- the scheduler ---------------------------------------------------------------------------------------------------
def test_turns(module: Any) -> None:
    def turns() -> list[int]:
        out = torch.zeros(71, dtype=torch.int32)
        module.run("turns", threads=70, output=out.data_ptr())
        return out[1:].tolist()

    assert turns() == list(range(70))
    module.set_order("reverse")
    assert turns() == list(range(70))[::-1]
    module.set_order(5)
    shuffled = turns()
    assert sorted(shuffled) == list(range(70))
    assert shuffled == turns()
    module.set_order(6)
    assert shuffled != turns()
    with pytest.raises(ValueError, match="expected 'forward', 'reverse' or a seed, got 'sideways'"):
        module.set_order("sideways")


def test_votes(module: Any) -> None:
    for x in (torch.arange(64) == 40, torch.arange(64) >= 0, torch.arange(64) < 0):
        out = torch.empty(64, 6, dtype=torch.int32)
        module.run("votes", threads=64, input=(values := x.int()).data_ptr(), output=out.data_ptr())
        for warp in (0, 1):
            mine = values[32 * warp : 32 * warp + 32].tolist()
            ballot = sum(bit << lane for lane, bit in enumerate(mine))
            expected = [any(values), all(values), sum(values), any(mine), all(mine), ballot - (ballot >> 31 << 32)]
            assert (out[32 * warp : 32 * warp + 32] == torch.tensor([int(e) for e in expected])).all()


def test_shuffles(module: Any) -> None:
    x = torch.arange(100.0, 132.0)
    for bits in (1, 2, 4, 8, 16, 31):
        out = torch.full((32, 6), torch.nan)
        module.run("shuffles", input=x.data_ptr(), output=out.data_ptr(), option=bits)
        for lane in range(32):
            down = lane + 3 if lane + 3 < 32 else lane
            up = lane - 3 if lane % 16 >= 3 else lane
            lanes = [5, lane // 8 * 8 + 3, lane ^ bits, down, up]
            half = 100.0 + (lane ^ 1) if lane < 16 else 0.0
            assert out[lane].tolist() == [100.0 + i for i in lanes] + [half]


def test_shared_memory_is_poison(module: Any) -> None:
    """In every block, though the one before wrote there."""
    out = torch.zeros(64, dtype=torch.int32)
    module.run("fresh", blocks=3, threads=64, shared=256, output=out.data_ptr())
    assert (out == -1).all()
    assert out.view(torch.float32).isnan().all()
    assert out.view(torch.float16).isnan().all()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (0, r"selftest::stuck, block 0: deadlock: 63 threads at __syncthreads \(first: thread 0\), 1 threads exited"),
        (1, r"deadlock: 31 threads at __shfl_sync .*, 33 threads exited \(first: thread 7\)"),
        (2, r"__any_sync with mask ffffffff while lane \d+ is at __syncwarp|__syncwarp .* lane 7 is at __any_sync"),
        (3, r"deadlock: 32 threads at __syncthreads \(first: thread 32\), 32 threads at __syncthreads_or"),
        (4, r"deadlock: 1 threads at __syncthreads \(first: thread 7\), 31 threads at __syncwarp"),
        (5, r"__syncwarp: the calling lane is not in the mask"),
        (6, r"thrown by a thread"),
    ],
)
def test_stuck(module: Any, option: int, message: str) -> None:
    for order in checks.ORDERS:
        module.set_order(order)
        with pytest.raises((RuntimeError, IndexError), match=message):
            module.run("stuck", threads=64, option=option)
    checks.neighbours(module)  # an error leaves nothing behind


def test_halves_of_a_warp(module: Any) -> None:
    module.run("stuck", threads=72, option=7)  # the last warp has eight lanes


def test_overrun(module: Any) -> None:
    module.run("overrun", shared=100, option=99)
    with pytest.raises(RuntimeError, match=r"overrun.*wrote after its 100 bytes of shared memory, at byte 100"):
        module.run("overrun", shared=100, option=100)
    with pytest.raises(RuntimeError, match="wrote before its 100 bytes of shared memory, at byte -1"):
        module.run("overrun", shared=100, option=-1)
    with pytest.raises(RuntimeError, match=r"ldmatrix: shared memory address: expected a multiple of 16 in \[0, 500\)"):
        module.run("matrices", shared=500, input=torch.zeros(128).data_ptr(), output=torch.zeros(128).data_ptr())


# ---- cp.async --------------------------------------------------------------------------------------------------------
def test_copies_arrive_at_their_wait(module: Any) -> None:
    source = torch.arange(80, dtype=torch.uint8)
    out = torch.zeros(4, 5, 16, dtype=torch.uint8)
    module.run("copies", threads=1, shared=80, input=source.data_ptr(), output=out.data_ptr())
    poison, data = torch.full((5, 16), 255, dtype=torch.uint8), source.reshape(5, 16).clone()
    data[2] = 0  # not valid
    for step, arrived in enumerate((0, 2, 3, 4)):  # the fifth is in no group: never
        equal(out[step], torch.cat([data[:arrived], poison[arrived:]]))


def test_copies_are_aligned(module: Any) -> None:
    source = torch.zeros(96, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"thread 0: cp.async: the global address is not a multiple of 16"):
        module.run("copies", threads=1, shared=80, input=source.data_ptr(), output=source.data_ptr(), option=8)
    with pytest.raises(RuntimeError, match=r"cp.async: shared memory address: .* in \[0, 64\), got 64"):
        module.run("copies", threads=1, shared=64, input=source.data_ptr(), output=source.data_ptr())


# ---- launches, streams and graphs ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("blocks", "threads", "shared", "allow", "expected"),
    [
        (1, 32, 128, 0, "cudaSuccess cudaSuccess"),
        (0, 32, 128, 0, "cudaSuccess cudaErrorInvalidConfiguration"),
        (1, 0, 128, 0, "cudaSuccess cudaErrorInvalidConfiguration"),
        (1, 1025, 8192, 0, "cudaSuccess cudaErrorInvalidConfiguration"),
        (1, 1024, 49153, 0, "cudaSuccess cudaErrorInvalidValue"),
        (1, 1024, 49153, 166913, "cudaErrorInvalidValue cudaErrorInvalidValue"),
        (1, 1024, 166912, 166912, "cudaSuccess cudaSuccess"),
    ],
)
def test_launch_errors(module: Any, blocks: int, threads: int, shared: int, allow: int, expected: str) -> None:
    assert module.launch_error(blocks, threads, shared, allow) == expected


@pytest.mark.parametrize("fork", [False, True])
@pytest.mark.parametrize("order", checks.ORDERS)
def test_graph(module: Any, fork: bool, order: str | int) -> None:
    module.set_order(order)
    out = torch.full((40,), 7.0)
    module.graph(out.data_ptr(), 40, 0, fork)
    equal(out, torch.full((40,), 7.0))  # nothing ran while it was captured
    assert module.statistics()["kernels"] == {}
    module.graph(out.data_ptr(), 40, 3, fork)
    equal(out, torch.full((40,), 2.0))
    seen = module.statistics()
    assert seen["graph_launches"] == seen["memsets"] == 3
    assert seen["kernels"] == {"selftest::add": 3, "selftest::twice": 3}
    assert set(seen["live"].values()) == {0}


@pytest.mark.parametrize(
    ("use", "error"),
    [
        ("default stream", "cudaErrorStreamCaptureUnsupported"),
        ("synchronize", "cudaErrorStreamCaptureUnsupported"),
        ("invalidated", "cudaErrorStreamCaptureInvalidated"),
        ("unjoined", "cudaErrorStreamCaptureUnjoined"),
        ("unmatched", "cudaErrorStreamCaptureUnmatched"),
        ("event", "cudaErrorCapturedEvent"),
        ("destroyed stream", "cudaErrorInvalidResourceHandle"),
        ("nothing wrong", "cudaSuccess"),
    ],
)
def test_capture_errors(module: Any, use: str, error: str) -> None:
    assert module.capture_error(use) == error


# ---- numbers ---------------------------------------------------------------------------------------------------------
def floats() -> torch.Tensor:
    """Random bits, and all that is near a float16: its patterns, their midpoints, and the neighbours of those."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator).int()
    narrow = torch.arange(1 << 15).short().view(torch.float16).float()
    middle = (narrow[1:] + narrow[:-1]) / 2
    near = torch.cat([narrow, middle]).view(torch.int32)
    near = torch.cat([near - 1, near, near + 1])
    wide = (torch.arange(1 << 16).int() << 16)[:, None] + torch.tensor([0x7FFF, 0x8000, 0x8001]).int()
    return torch.cat([bits, near, near ^ -(2**31), wide.flatten()]).view(torch.float32)


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat", torch.bfloat16)])
def test_conversions(module: Any, name: str, dtype: torch.dtype) -> None:
    x = floats()
    out = torch.empty_like(x, dtype=dtype)
    module.convert(name, x.data_ptr(), out.data_ptr(), x.numel())
    equal(out.nan_to_num(0.5), x.to(dtype).nan_to_num(0.5))
    equal(out.isnan(), x.isnan())
    assert (torch.signbit(out) == torch.signbit(x))[~x.isnan()].all()

    every = torch.arange(1 << 16).int().short().view(dtype)
    wide = torch.empty(1 << 16)
    module.convert(f"from {name}", every.data_ptr(), wide.data_ptr(), every.numel())
    equal(wide, every.float())
    assert (torch.signbit(wide) == torch.signbit(every)).all()


def test_tf32(module: Any) -> None:
    """The nearest number of ten fraction bits, ties away from zero."""
    x = floats()
    out = torch.empty_like(x)
    module.convert("tf32", x.data_ptr(), out.data_ptr(), x.numel())
    equal(out.isnan(), x.isnan())
    finite = x.isfinite()
    assert (out[x.isinf()] == x[x.isinf()]).all()
    assert (out[finite].view(torch.int32) & 0x1FFF == 0).all()
    exponent = torch.frexp(x[finite].double()).exponent
    exponent = exponent.clamp(min=-125)  # subnormals share the smallest exponent
    scaled = torch.ldexp(x[finite].double(), 11 - exponent)
    expected = torch.ldexp(scaled.sign() * (scaled.abs() + 0.5).floor(), exponent - 11)
    equal(out[finite], expected.float())
