"""``python -m benchmarks.gpu.section OPTIONS`` (JSON): the process of one section, started by benchmarks.gpu.

A section that hangs or breaks the device loses no other. Started again, it goes on after the job that broke.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch

from benchmarks.gpu import batch, cosine, layers, rates, relaxation, warm
from benchmarks.gpu.problem import Options
from benchmarks.gpu.rows import Job, run_jobs

JOBS: dict[str, Callable[[Options], list[Job]]] = {
    "rates": rates.jobs,
    "layers": layers.jobs,
    "relaxation": relaxation.jobs,
    "batch": batch.jobs,
    "cosine": cosine.jobs,
    "warm": warm.jobs,
}


def jobs_of(options: Options) -> list[Job]:
    """The jobs of a section. Nothing is computed yet."""
    return JOBS[options.section](options)


def main(argv: list[str] | None = None) -> int:
    options = Options.parse((sys.argv[1:] if argv is None else argv)[0])
    torch.backends.cudnn.benchmark = True
    return run_jobs(options, jobs_of(options))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a device that broke would hang the interpreter's own end
