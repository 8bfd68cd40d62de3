"""Contrasts of all connections in one CUDA graph: one by one their launches take the host longer than the device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .graphs import Graphs, Kept, Turn, capturing, context, copy_all
from .relaxation import Contrast

MAX_CONTRASTS = 8  # signatures kept
Gradients = tuple[Tensor, Tensor]


class AllContrasts:
    """Gradients of all connections at once.

    Args:
        contrast: one of them, launch by launch; it never waits for the device.
    """

    def __init__(self, contrast: Callable[[Contrast], Gradients]):
        self.contrast = contrast
        self.kept: Kept[Contrasts] = Kept(MAX_CONTRASTS)

    def __call__(self, jobs: Sequence[Contrast]) -> list[Gradients]:
        """Gradients of the weight and the bias of each connection, in the dtype of its weight."""
        weight = jobs[0].weight
        with context(weight):
            if weight.device.type != "cuda" or capturing(weight):
                return [self.contrast(job) for job in jobs]
            return self.kept.get(signature(jobs), lambda: Contrasts(jobs, self.contrast)).run(jobs)

    def clear(self) -> None:
        """Forget every graph and its buffers."""
        self.kept.clear()


class Contrasts:
    """Copies of the tensors that some contrasts read, and the graph that reads them."""

    def __init__(self, jobs: Sequence[Contrast], contrast: Callable[[Contrast], Gradients]):
        copies: dict[int, Tensor] = {}  # a state is the target of one connection and the source of others
        for tensor in tensors_of(jobs):
            copies.setdefault(id(tensor), torch.empty_like(tensor))
        self.copies = list(copies.values())
        self.jobs = [_on_copies(job, copies) for job in jobs]
        self.contrast = contrast
        self.found: list[Gradients] = []
        self.graphs = Graphs()
        self.turn = Turn(jobs[0].weight.device)

    def run(self, jobs: Sequence[Contrast]) -> list[Gradients]:
        weight = jobs[0].weight
        with self.turn.taken(weight):
            given = {id(tensor): tensor for tensor in tensors_of(jobs)}
            copy_all(list(zip(self.copies, given.values(), strict=True)))
            self.graphs.run(0, self._launch, weight.device)
            out = [(torch.empty_like(w), torch.empty_like(b)) for w, b in self.found]
            torch._foreach_copy_([t for pair in out for t in pair], [t for pair in self.found for t in pair])
            return out

    def _launch(self) -> None:
        self.found = [self.contrast(job) for job in self.jobs]


def tensors_of(jobs: Sequence[Contrast]) -> list[Tensor]:
    """What the contrasts read; a tensor may come several times."""
    read = [t for job in jobs for t in (job.source, job.source_delta, job.target, job.target_delta, job.winners)]
    return [t for t in read if t is not None]


def signature(jobs: Sequence[Contrast]) -> Hashable:
    """Everything that launches and their constants depend on, and which tensors are the same one."""
    numbers: dict[int, int] = {}
    for tensor in tensors_of(jobs):
        numbers.setdefault(id(tensor), len(numbers))

    def of(t: Tensor | None) -> Hashable:
        return None if t is None else (numbers[id(t)], tuple(t.shape), t.stride(), t.dtype)

    return str(jobs[0].weight.device), tuple(
        (
            job.connection,
            tuple(job.weight.shape),
            job.weight.dtype,
            *map(of, (job.source, job.source_delta, job.target, job.target_delta, job.winners)),
            (job.source_gain, job.target_gain, job.centre, job.scale),
            str(job.operands),
        )
        for job in jobs
    )


def _on_copies(job: Contrast, copies: dict[int, Tensor]) -> Contrast:
    def copy(t: Tensor | None) -> Tensor | None:
        return None if t is None else copies[id(t)]

    return replace(
        job,
        weight=torch.empty(job.weight.shape, dtype=job.weight.dtype, device="meta"),
        source=copies[id(job.source)],
        source_delta=copy(job.source_delta),
        target=copies[id(job.target)],
        target_delta=copies[id(job.target_delta)],
        winners=copy(job.winners),
    )
