"""Contrasts of all connections in one CUDA graph: one by one their launches take the host longer than the device."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..network import POOLS
from ..precision import OPERANDS
from ..relaxation import Contrast
from . import layout, ops
from .graphs import Graphs, Kept, Turn, capturing, context

MAX_CONTRASTS = 8  # signatures kept
Gradients = tuple[Tensor, Tensor]


class Contrasts:
    """Copies of the tensors that some contrasts read, and the graph that reads them."""

    def __init__(self, jobs: Sequence[Contrast]):
        copies: dict[int, Tensor] = {}  # a state is the target of one connection and the source of others
        for tensor in tensors_of(jobs):
            copies.setdefault(id(tensor), torch.empty_like(tensor))
        self.copies = list(copies.values())
        self.jobs = [_on_copies(job, copies) for job in jobs]
        self.found: list[Gradients] = []
        self.graphs = Graphs()
        self.turn = Turn(jobs[0].weight.device)

    def run(self, jobs: Sequence[Contrast]) -> list[Gradients]:
        weight = jobs[0].weight
        with self.turn.taken(weight):
            given = {id(tensor): tensor for tensor in tensors_of(jobs)}
            layout.copy_all(list(zip(self.copies, given.values(), strict=True)))
            self.graphs.run(0, self._launch, weight.device)
            out = [(torch.empty_like(w), torch.empty_like(b)) for w, b in self.found]
            torch._foreach_copy_([t for pair in out for t in pair], [t for pair in self.found for t in pair])
            return out

    def _launch(self) -> None:
        self.found = [contrast(job) for job in self.jobs]


_kept: Kept[Contrasts] = Kept(MAX_CONTRASTS)


def contrasts(jobs: Sequence[Contrast]) -> list[Gradients]:
    """Gradients of the weight and the bias of each connection, in the dtype of its weight."""
    weight = jobs[0].weight
    with context(weight):
        if weight.device.type != "cuda" or capturing(weight):
            return [contrast(job) for job in jobs]
        return _kept.get(signature(jobs), lambda: Contrasts(jobs)).run(jobs)


def clear() -> None:
    """Forget every graph and its buffers."""
    _kept.clear()


def contrast(job: Contrast) -> Gradients:
    """One of them, launch by launch."""
    conn = job.connection
    return ops.contrast(
        job.source,
        job.source_delta,
        job.target,
        job.target_delta,
        job.weight.shape,
        conn.stride,
        conn.padding,
        POOLS.index(conn.pool),
        job.winners,
        job.source_gain,
        job.target_gain,
        job.centre,
        job.scale,
        OPERANDS.index(job.operands),
        dtype=job.weight.dtype,
    )


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
