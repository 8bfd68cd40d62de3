"""torch.autocast changes neither the values nor the dtypes: the ops compute in float32."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ep_kernels import _library, functional, ops
from tests.ops.inputs import Maker, assert_same, sample_inputs
from tests.ops.test_relax import CALLS, calls

LOW = torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("op", ["drive", "relax_step", "contrast"])
def test_same_as_without(op: str) -> None:
    for sample in sample_inputs(op, torch.float32):
        raw, run = sample.raw(), getattr(ops, op)
        with LOW:
            got = run(*raw)
        assert_same(got, run(*raw), 0)


@pytest.mark.parametrize("case", CALLS)
def test_relax(case: str) -> None:
    for arguments in calls(*CALLS[case]):
        expected = ops.relax(*arguments)
        with LOW:
            got = ops.relax(*arguments)
        for group, group_ in zip(got, expected, strict=True):
            assert_same(*(g if isinstance(g, list) else [g] for g in (group, group_)), 0)


def test_low_precision_inputs_are_cast_up() -> None:
    new = Maker(torch.bfloat16)
    source, weight = new(2, 3, 7, 5), new(4, 3, 3, 3)
    with LOW:
        got = ops.drive(source, weight, [1, 1], [1, 1], 1, None)
    assert_same(got, ops.drive(source.float(), weight.float(), [1, 1], [1, 1], 1, None), 0)


def test_gradients() -> None:
    new = Maker(torch.float32)
    source, weight = new(2, 3, 7, 5).requires_grad_(), new(4, 3, 3, 3).requires_grad_()
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            pooled = functional.drive(source, weight, (1, 1), (1, 1), "max")[0]
        found.append(torch.autograd.grad(pooled.sum(), (source, weight)))
    assert_same(found[0], found[1], 1e-6)


SCRIPT = """
import sys, torch
torch.ops.load_library(sys.argv[1])
new = lambda *shape: torch.randn(*shape)
with torch.autocast("cpu", dtype=torch.bfloat16):
    weight, bias = torch.ops.ep_kernels.contrast(
        new(3, 5), None, new(3, 4), new(3, 4), [4, 5], [1, 1], [0, 0], 0, None, 1.0, 1.0, 0.5, 1.0, 0)
    pooled, winners = torch.ops.ep_kernels.drive(new(2, 3, 7, 5), new(4, 3, 3, 3), [1, 1], [1, 1], 1, None)
print(weight.dtype, pooled.dtype)
"""


def test_without_what_python_registers() -> None:
    """The bare library, loaded by itself: convolutions inside are cast, their results are cast back."""
    command = [sys.executable, "-c", SCRIPT, str(_library.LIBRARY)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["torch.float32", "torch.float32"], done.stderr
