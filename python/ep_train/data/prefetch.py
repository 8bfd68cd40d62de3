"""Batches from the host made on a stream of their own, one ahead of the batch that is computed with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch", bound=tuple[Tensor, ...])


def ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches; while the caller computes with one, the next is copied to the GPU and prepared there.

    Everything that ``batches`` puts on a stream goes to a side stream. The caller's stream waits for a batch, not for
    the one after it; the host waits for neither.

    Args:
        batches: makes each batch, on ``device``, when it is asked for.
        device: a CUDA device.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))  # for what the batches are made from

    def make() -> Batch | None:
        with torch.cuda.stream(side):
            return next(batches, None)

    following = make()
    while following is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)  # before the next batch joins that stream
        batch = following
        for tensor in batch:
            tensor.record_stream(current)  # its memory is not used again before the caller's work is done
        following = make()
        yield batch
