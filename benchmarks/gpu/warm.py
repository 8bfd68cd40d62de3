"""Compiles what the timed sections will launch, in several processes at once: Triton keeps it in its cache on disk."""

from __future__ import annotations

from functools import partial

from benchmarks.gpu import cosine
from benchmarks.gpu.problem import BATCHES, PRECISIONS, Options, contenders, network_of, problem_of
from benchmarks.gpu.rows import Job, Row
from ep_kernels import ep_gradients, free_phase


def jobs(options: Options) -> list[Job]:
    """The most important first."""
    if "triton" not in contenders(options):
        return []  # the others are compiled
    found = []
    for precision in PRECISIONS:
        for batch in sorted(options.batches, reverse=True):
            for setting in BATCHES:
                run = partial(compiled, options, batch, precision, setting)
                found.append(Job(f"{batch}/{precision}/{setting}", run, 300))
        found.append(Job(f"cosine/{precision}", partial(cosine.compiled, options, precision), 300))
    return found


def compiled(options: Options, batch: int, precision: str, setting: str) -> Row:
    """Every kernel of a training batch, and of a free phase alone."""
    problem = problem_of(network_of(options.model, options.size), batch, options.device)
    config = PRECISIONS[precision].config(**BATCHES[setting])
    ep_gradients(problem.network, problem.parameters, problem.x, problem.targets, config, backend="triton")
    free_phase(problem.network, problem.parameters, problem.x, config, backend="triton")
    return {}
