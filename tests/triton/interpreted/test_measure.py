"""Tuning with the real kernels, in Triton's interpreter: every tile of the table runs on random operands and agrees."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import conv2d, max_pool2d

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1", allow_module_level=True)

from ep_kernels.triton.arch import INTERPRETER
from ep_kernels.triton.measure import RandomBench, measure
from ep_kernels.triton.tiling import Problem, candidates
from ep_kernels.triton.tune import key

PROBLEMS = [
    Problem("step", 2, 5, 4, 16, 9 * 32, 4),
    Problem("step", 2, 3, 3, 16, 0, 4),
    Problem("drive", 2, 6, 4, 16, 9 * 16, 4, True),
    Problem("drive", 3, 1, 1, 48, 32, 4),
    Problem("contrast", 2, 4, 5, 16, 9 * 16, 4),
]
CPU = torch.device("cpu")


@pytest.mark.parametrize("problem", PROBLEMS, ids=key)
def test_every_tile_agrees(problem: Problem) -> None:
    times = iter([2.0, 1.0])

    def timer(launch: Callable[[], None]) -> float:
        launch()
        return next(times)

    measured = measure(problem, INTERPRETER, RandomBench(problem, INTERPRETER, CPU, "float32"), timer)
    assert [c.error for c in measured.candidates] == [None, None]
    assert measured.winner is not None
    assert measured.winner.tile == candidates(problem, INTERPRETER)[1]


@pytest.mark.parametrize("storage", [torch.float32, torch.float16])
def test_operands_and_storage_of_two_bytes(storage: torch.dtype) -> None:
    problem = Problem("step", 2, 4, 4, 16, 144, 2)
    bench = RandomBench(problem, INTERPRETER, CPU, "float16", storage)
    assert [t.dtype for t in bench.outputs] == [storage, torch.float16][: 1 + (storage != torch.float16)]
    measured = measure(problem, INTERPRETER, bench, lambda launch: 1.0)
    assert [c.error for c in measured.candidates] == [None, None]


def test_the_results_are_those_of_pytorch() -> None:
    problem = Problem("drive", 2, 6, 4, 16, 9 * 16, 4, True)
    bench = RandomBench(problem, INTERPRETER, CPU, "float32")
    bench.launch(candidates(problem, INTERPRETER)[0])()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 4, 16, generator=generator)
    matrix = torch.randn(16, 144, generator=generator) / 12
    z = conv2d(x.permute(0, 3, 1, 2), matrix.view(16, 3, 3, 16).permute(0, 3, 1, 2), padding=1)
    torch.testing.assert_close(bench.outputs[0].permute(0, 3, 1, 2), max_pool2d(z, 2), rtol=1e-4, atol=1e-5)
