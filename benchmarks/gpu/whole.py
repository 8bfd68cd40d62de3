"""What whole relaxations and whole batches share: the problem, the truth in float64, the autograd loop."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from torch import Tensor

from benchmarks.baselines import AutogradLoop
from benchmarks.gpu.problem import (
    Options,
    Problem,
    largest_error,
    network_of,
    problem_of,
)
from benchmarks.gpu.rows import Wrong
from benchmarks.timing import Times
from ep_kernels import RelaxConfig, free_phase

MODES = {"compiled": "default", "max-autotune": "max-autotune-no-cudagraphs"}  # of torch.compile; graphs are ours
COMPILE_LIMIT = 100.0  # seconds


@lru_cache(maxsize=1)
def _problem(model: str, size: int, batch: int, device: str) -> Problem:
    return problem_of(network_of(model, size), batch, device)


def problem(options: Options, batch: int) -> Problem:
    return _problem(options.model, options.size, batch, options.device)


@lru_cache(maxsize=2)
def true_states(options: Options, batch: int, steps: int) -> list[Tensor]:
    """States after ``steps`` free sweeps in float64, in float32."""
    exact = problem(options, batch).double()
    config = RelaxConfig(free_steps=steps)
    states = free_phase(exact.network, exact.parameters, exact.x, config, backend="reference").states
    return [s.float() for s in states]


def check(error: float, limit: float) -> float:
    """Raise Wrong unless the error is at most ``limit``."""
    if not error <= limit:
        raise Wrong(f"relative error {error:.1e}, expected at most {limit:.0e}")
    return error


def difference(name: str, short: Times, long: Times, sweeps: int) -> Times:
    """Of one sweep, round by round."""
    return Times(name, [(b - a) / sweeps for a, b in zip(short.seconds, long.seconds, strict=False)])


def autograd_loop(options: Options, batch: int) -> tuple[AutogradLoop, float]:
    """The loop, and its error after three steps against ours at gain 1 in float64."""
    p = problem(options, batch)
    loop = AutogradLoop(p.network, p.parameters)
    exact = p.double()
    config = RelaxConfig.classical(free_steps=3)
    classical = replace(p.network, feedback_gain=1.0)
    expected = free_phase(classical, exact.parameters, exact.x, config, backend="reference").states
    return loop, check(largest_error(loop.relax(p.x.contiguous(), 3), expected[1:]), 3e-2)
