"""A training step of several processes: each learns from its part of the batch, all get the batch's result."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .gradients import GradientMean
from .processes import Processes

if TYPE_CHECKING:
    from ..learners import Batch, Learner
    from ..step import StepResult


def shared_step(learner: Learner, batch: Batch, total: int, mean: GradientMean) -> StepResult:
    """Gradients of a batch of ``total`` images into ``.grad``, the same in all processes, and the batch's result.

    Args:
        batch: this process's part (:meth:`Processes.part`).

    Raises:
        LostContact: another process is gone.
        ProcessError: the processes do not compute the same gradients.
    """
    processes = mean.processes
    if not processes.several:
        return learner.step(batch)
    share = processes.share(total)
    mean.begin(share)
    return pooled(processes, learner.step(replace(batch, mean=mean)), share)


def pooled(processes: Processes, result: StepResult, share: float) -> StepResult:
    """Of the whole batch: mean loss and residual, and the number of correct predictions, in one message.

    Args:
        share: fraction of the batch that ``result`` is of.

    Raises:
        LostContact: another process is gone.
    """
    parts = [share * result.loss.double(), result.correct.double()]
    if result.residual is not None:
        parts.append(share * result.residual.double())
    numbers = torch.stack(parts)
    found = processes.sum(numbers if share else torch.zeros_like(numbers))
    loss, correct = found[0].to(result.loss.dtype), found[1].round().to(torch.int64)
    residual = None if result.residual is None else found[2].to(result.residual.dtype)
    return replace(result, loss=loss, correct=correct, residual=residual)
