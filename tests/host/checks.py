"""What the self-test kernels must do, for the tests and for their mutants. Layouts are written from the PTX ISA's
formulas ("Matrix Fragments for mma.m16n8k16", "m16n8k8"; "ldmatrix"), one element at a time."""

from __future__ import annotations

from typing import Any

import torch

ORDERS: tuple[str | int, ...] = ("forward", "reverse", 1, 2)


def equal(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, but for NaNs."""
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def neighbours(module: Any) -> None:
    """Barriers: each thread sees what the next one wrote in the same round, in every order of turns."""
    x = torch.arange(3.0 * 96).reshape(3, 96)
    for order in ORDERS:
        module.set_order(order)
        out = torch.full_like(x, torch.nan)
        module.run("neighbours", blocks=3, threads=96, shared=384, input=x.data_ptr(), output=out.data_ptr(), option=3)
        equal(out, 3 * x.roll(-1, 1) + 3)


def tile(module: Any) -> None:
    """cp.async, ldmatrix and mma in a pipeline of two stages."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-4, 5, (24, 80), generator=generator).half()
    for order in ORDERS:
        module.set_order(order)
        out = torch.full((16, 8), torch.nan)
        module.run("tile", threads=64, shared=1536, input=rows.data_ptr(), output=out.data_ptr(), option=5)
        equal(out, rows[:16].float() @ rows[16:].float().T)


def warpgroup(module: Any) -> None:
    """wgmma in a pipeline of three stages."""
    generator = torch.Generator().manual_seed(0)
    module.set_device(major=9)
    for dtype, option in ((torch.float16, 4), (torch.bfloat16, -4)):
        rows = torch.randint(-4, 5, (192, 256), generator=generator).to(dtype)
        for order in ORDERS:
            module.set_order(order)
            out = torch.full((64, 128), torch.nan)
            module.run(
                "warpgroup", threads=128, shared=73728, input=rows.data_ptr(), output=out.data_ptr(), option=option
            )
            equal(out, rows[:64].float() @ rows[64:].float().T)


def a_element(lane: int, i: int, depth: int) -> tuple[int, int]:
    """Row and column of element i of a lane's part of A [16, depth]."""
    group, thread = lane >> 2, lane % 4
    if depth == 8:
        return group + 8 * (i in (1, 3)), thread + 4 * (i >= 2)
    return group if i < 2 or 4 <= i < 6 else group + 8, thread * 2 + (i & 1) + 8 * (i >= 4)


def b_element(lane: int, i: int, depth: int) -> tuple[int, int]:
    """Row and column of element i of a lane's part of B [depth, 8]."""
    group, thread = lane >> 2, lane % 4
    if depth == 8:
        return thread + 4 * i, group
    return thread * 2 + (i & 1) + 8 * (i >= 2), group


def c_element(lane: int, i: int) -> tuple[int, int]:
    """Row and column of element i of a lane's part of the accumulator [16, 8]."""
    return (lane >> 2) + 8 * (i >= 2), (lane % 4) * 2 + (i & 1)


def product(module: Any) -> None:
    """Every mma against the formulas; the numbers are small integers, so that float32 sums are exact."""
    generator = torch.Generator().manual_seed(0)
    kinds = ((0, torch.float16, 16), (1, torch.bfloat16, 16), (2, torch.float32, 8))
    for option, dtype, depth in kinds:
        a = torch.randint(-99, 100, (16, depth), generator=generator).to(dtype)
        b = torch.randint(-99, 100, (depth, 8), generator=generator).to(dtype)
        c = torch.randint(-99, 100, (16, 8), generator=generator).float()
        size = 4 // a.element_size()  # elements in a register
        lanes = torch.empty(32, 10)
        for lane in range(32):
            left = torch.stack([a[a_element(lane, i, depth)] for i in range(4 * size)]).view(torch.float32)
            right = torch.stack([b[b_element(lane, i, depth)] for i in range(2 * size)]).view(torch.float32)
            lanes[lane] = torch.cat([left, right, torch.stack([c[c_element(lane, i)] for i in range(4)])])
        out = torch.full((32, 4), torch.nan)
        module.run("product", input=lanes.data_ptr(), output=out.data_ptr(), option=option)
        expected = c + a.float() @ b.float()
        equal(out, torch.tensor([[float(expected[c_element(lane, i)]) for i in range(4)] for lane in range(32)]))


def matrices(module: Any) -> None:
    """ldmatrix and ldmatrix.trans of four matrices."""
    stored = torch.randperm(256, generator=torch.Generator().manual_seed(0)).to(torch.int16).reshape(4, 8, 8)
    for transposed in (0, 1):
        out = torch.empty(32, 4, 2, dtype=torch.int16)
        module.run("matrices", shared=512, input=stored.data_ptr(), output=out.data_ptr(), option=transposed)
        seen = stored.transpose(1, 2) if transposed else stored
        for lane in range(32):
            for matrix in range(4):
                for i in range(2):
                    assert out[lane, matrix, i] == seen[matrix, lane >> 2, 2 * (lane % 4) + i]
