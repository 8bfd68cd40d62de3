"""Peak memory from a process of its own."""

from __future__ import annotations

import pytest
import torch

from benchmarks.case import Unavailable
from benchmarks.memory import cpu_peak

MIB = 2**20


def peak_of(before: int, during: int):
    """Prepares ``before`` MiB, then needs ``during`` more, all of it at the same time."""
    kept = torch.ones(before * MIB // 4)

    def work():
        return float(torch.ones(during * MIB // 4)[-1] + kept[-1])

    return work


def steps_of(count: int):
    """Needs a new 16 MiB at every step and gives the old one back."""

    def work():
        state = torch.ones(4 * MIB)
        for _ in range(count):
            state = state * 2
        return state

    return work


def broken():
    raise ValueError("nothing to prepare")


@pytest.mark.parametrize("during", [8, 64])
def test_only_the_work_counts(during):
    found = cpu_peak("tests.benchmarks.test_memory:peak_of", 100, during)
    assert (during - 1) * MIB <= found < (during + 1) * MIB


def test_what_is_given_back_does_not_add_up():
    # The least of three: on a busy machine the kernel was seen once to count 16 MiB that had been given back.
    few, many = (min(cpu_peak("tests.benchmarks.test_memory:steps_of", count) for _ in range(3)) for count in (2, 40))
    assert abs(many - few) < MIB


def test_a_process_that_fails_says_why():
    with pytest.raises(Unavailable, match=r"test_memory:broken: .*nothing to prepare"):
        cpu_peak("tests.benchmarks.test_memory:broken")
