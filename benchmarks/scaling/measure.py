"""What one process of a torchrun does: check the mean gradient, then time the parts and the whole of a step."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.case import check
from benchmarks.problem import BATCHES, PRECISIONS, Precision, largest_error, network_of, problem_of, tf32
from benchmarks.scaling.buckets import GradientMean, split
from benchmarks.timing import Times
from ep_kernels import Parameters, ep_gradients
from ep_train.models import Model

Work = Callable[[], object]
FRACTIONS = (1 / 8, 1 / 4, 3 / 4, 3 / 2)  # of the batch: what the line is fitted to, never what it predicts
MESSAGES = (2**14, 2**17, 2**20, 2**22, 2**24, 2**25)  # bytes that the link is fitted to


@dataclass(frozen=True)
class Job:
    """What is trained and how it is timed; the same for every process.

    Args:
        batch: images a process (weak scaling), and of all processes (strong scaling).
        size: side of the images.
        setting: of ``BATCHES``.
        bucket: bytes.
        tolerance: largest relative error of the mean gradient in float32.
    """

    model: str
    batch: int
    size: int
    device: str
    precision: str
    backend: str | None
    setting: str
    steps: int
    warmup: int
    bucket: int
    tolerance: float
    threads: int
    quick: bool

    def processes_of(self, found: dict[str, Any]) -> str:
        """How many a run had, and what each computed on."""
        n, threads = found["processes"], found["threads"]
        if self.device.startswith("cuda"):
            return f"{n} GPU{'s' * (n > 1)}"
        return f"{n} process{'es' * (n > 1)} of {threads} thread{'s' * (threads > 1)}"


@dataclass(frozen=True)
class Entry:
    """Works that are timed one after the other, as (entry, parts) of a result.

    Args:
        alone: the first process only, while the others wait.
        meet: all processes meet before every part, not only before the first.
        calls: of each work; the time is divided.
    """

    works: tuple[Work, ...]
    alone: bool = False
    meet: bool = False
    calls: int = 1


def fit_batches(batch: int, processes: int) -> list[int]:
    """Local batches of the line: neither ``batch`` nor ``batch / processes``, whose times it predicts."""
    found = {max(1, round(f * batch)) for f in FRACTIONS} - {batch, batch // processes}
    return sorted(found)


class Worker:
    """One process. ``with Worker(job) as worker: worker.measure()``."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.cuda = job.device.startswith("cuda")
        torch.set_num_threads(job.threads)
        self.device = f"cuda:{os.environ['LOCAL_RANK']}" if self.cuda else "cpu"
        if self.cuda:
            torch.cuda.set_device(self.device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if self.cuda else "gloo")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.network = network_of(job.model, job.size)
        self.model = Model(self.network).to(self.device)
        self.mean = GradientMean(job.bucket)
        # lr 0: the same work, and weights that stay the same in every process
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.0, fused=True)
        self.found: Parameters | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        dist.destroy_process_group()

    # --- a step ----------------------------------------------------------------------------------------------------

    def images(self, count: int) -> tuple[Tensor, list[Tensor]]:
        """A batch and its targets, the same in every process."""
        problem = problem_of(self.network, count, self.device)
        return problem.x, problem.targets

    def compute(self, x: Tensor, targets: list[Tensor], precision: Precision | None = None) -> Parameters:
        """Gradients of a local batch."""
        config = (precision or PRECISIONS[self.job.precision]).config(**BATCHES[self.job.setting])
        parameters = self.model.tensors()
        self.found, _ = ep_gradients(self.network, parameters, x, targets, config, backend=self.job.backend)
        return self.found

    def exchange(self) -> None:
        """The mean over processes."""
        assert self.found is not None
        self.mean(self.found)

    def update(self) -> None:
        """Of the optimizer."""
        assert self.found is not None
        self.model.set_gradients(self.found)
        self.optimizer.step()

    # --- the check -------------------------------------------------------------------------------------------------

    def error(self, precision: Precision) -> float:
        """Of the mean over processes, each with its part of a batch, against the gradient of the whole batch."""
        x, targets = self.images(self.job.batch * self.world)
        mine = slice(self.rank * self.job.batch, (self.rank + 1) * self.job.batch)
        with tf32(False):
            self.compute(x[mine], [t[mine] for t in targets], precision)
            self.exchange()
            assert self.found is not None
            found = {name: t.clone() for name, t in self.found.named().items()}
            verdict = torch.zeros((), dtype=torch.float64)
            if self.rank == 0:
                whole = self.compute(x, targets, precision).named()
                verdict += largest_error(list(found.values()), [whole[name] for name in found])
        dist.broadcast(verdict, 0)
        return float(verdict)

    # --- time ------------------------------------------------------------------------------------------------------

    def meet(self) -> None:
        """All processes, their devices idle."""
        if self.cuda:
            torch.cuda.synchronize()
        dist.all_reduce(torch.zeros(1))

    def seconds(self, entry: Entry) -> list[float]:
        """Of each part in this process: by events on a GPU, else by the clock on the wall."""
        groups = [(work,) for work in entry.works] if entry.meet else [entry.works]
        found: list[float] = []
        for works in groups:
            self.meet()
            if not entry.alone or self.rank == 0:
                found += [s / entry.calls for s in self._stamped(works, entry.calls)]
        return found or [0.0] * len(entry.works)

    def _stamped(self, works: Sequence[Work], calls: int) -> list[float]:
        if not self.cuda:
            stamps = [time.perf_counter()]
            for work in works:
                for _ in range(calls):
                    work()
                stamps.append(time.perf_counter())
            return [b - a for a, b in itertools.pairwise(stamps)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(works) + 1)]
        events[0].record()
        for work, event in zip(works, events[1:], strict=True):
            for _ in range(calls):
                work()
            event.record()
        events[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]

    def entries(self) -> dict[str, Entry]:
        """Everything that is timed, by name. Names with ``/`` are points of a line."""
        job, found = self.job, {}
        batches = {n: self.images(n) for n in sorted({*fit_batches(job.batch, self.world), job.batch,
                                                      job.batch // self.world})}  # fmt: skip
        on = {n: partial(self.compute, *given) for n, given in batches.items()}
        for n in fit_batches(job.batch, self.world):
            found[f"alone/{n}"] = Entry((on[n],), alone=True)
            if self.world > 1:
                found[f"together/{n}"] = Entry((on[n],))
        found["step alone"] = Entry((on[job.batch], self.update), alone=True)
        on[job.batch]()  # gradients for what follows
        gradients = self.found
        assert gradients is not None
        found["copies"] = Entry((lambda: self.mean.copies(gradients),))
        found["optimizer"] = Entry((self.update,))
        if self.world == 1:
            return found
        for size in MESSAGES[:4] if job.quick else MESSAGES:
            message = torch.zeros(size // 4, device=self.device)
            calls = 10 if size < 2**20 else 2
            found[f"link/{size}"] = Entry((partial(dist.all_reduce, message),), calls=calls)
        for kind, n in (("weak", job.batch), ("strong", job.batch // self.world)):
            works = (on[n], self.exchange, self.update)
            found[f"{kind} parts"] = Entry(works, meet=True)
            found[f"{kind} whole"] = Entry(works)
        return found

    def measure(self) -> dict[str, Any]:
        """Check, then time everything in turn, round by round, so that a machine that drifts slows all alike.

        Returns:
            ``times``: by entry, a dictionary of quantiles in ms for each part and for their sum; of every round what
            the slowest process took. ``bucket_bytes``, ``parameter_bytes``, ``error``, and who measured.

        Raises:
            Wrong: the mean over processes is not the gradient of the whole batch (in every process).
        """
        job = self.job
        error = check(self.error(PRECISIONS["fp32"]), job.tolerance)
        timed_error, limit = error, job.tolerance
        if job.precision != "fp32":
            limit = PRECISIONS[job.precision].gradient_error
            timed_error = check(self.error(PRECISIONS[job.precision]), limit)
        entries = self.entries()
        for _ in range(job.warmup):
            for entry in entries.values():
                self.seconds(entry)
        rounds = [[s for entry in entries.values() for s in self._with_sum(entry)] for _ in range(job.steps)]
        mine = torch.tensor(rounds, dtype=torch.float64)  # [steps, all parts and sums]
        dist.all_reduce(mine, dist.ReduceOp.MAX)
        named = list(self.model.parameters())
        times, column = {}, 0
        for name, entry in entries.items():
            parts = [Times(name, mine[:, column + i].tolist()) for i in range(len(entry.works) + 1)]
            column += len(parts)
            times[name] = {"parts": [p.quantiles(1e3) for p in parts[:-1]], "sum": parts[-1].quantiles(1e3)}
        return {
            "processes": self.world,
            "nodes": self.world // int(os.environ["LOCAL_WORLD_SIZE"]),
            "threads": job.threads,
            "steps": job.steps,
            "error": error,
            "timed_error": timed_error,
            "timed_limit": limit,
            "parameter_bytes": sum(p.numel() * p.element_size() for p in named),
            "bucket_bytes": [sum(t.numel() * t.element_size() for t in group) for group in split(named, job.bucket)],
            "times": times,
        }

    def _with_sum(self, entry: Entry) -> list[float]:
        found = self.seconds(entry)
        return [*found, sum(found)]
