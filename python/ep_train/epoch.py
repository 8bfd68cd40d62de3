"""One epoch: every batch once, its losses read as seldom as a GPU likes, its row of metrics."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ep_kernels import ConvergenceError

from .divergence import Diverged, Step, gradient_norm, keep, wrong
from .learners import Batch
from .progress import Progress
from .signals import Stopped
from .step import StepResult, read

if TYPE_CHECKING:
    from .trainer import Trainer

READ_EVERY = 0.3  # seconds between two readings of the losses from a GPU; on the CPU every batch's is read at once


@dataclass
class Partial:
    """Sums over the batches of an epoch that is not finished."""

    batches: int = 0
    seen: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    residual_sum: float = 0.0
    seconds: float = 0.0
    skipped: int = 0


@dataclass(frozen=True)
class Unread:
    """What a batch came to, perhaps still being computed. The indices are of this process's part of ``size`` images."""

    result: StepResult
    gradient: Tensor
    indices: Tensor
    size: int


def train_epoch(trainer: Trainer, progress: Progress) -> dict[str, Any]:
    """Train on every batch once; returns the epoch's row of metrics (without the test accuracy).

    Raises:
        Diverged: see :func:`~ep_train.divergence.wrong`; with "continue", more than half the batches were left out.
        Stopped: a signal asked for it; every batch that was begun is counted in ``trainer.partial``.
        ConvergenceError: a free phase ended above ``tol``, with ``on_fail`` raise; of a single process every batch
            before it is counted.
        CheckpointError: a checkpoint on the way cannot be written.
    """
    config = trainer.config
    epoch = trainer.epoch + 1
    done = trainer.partial
    lenient = config.on_divergence == "continue"
    progress.start_epoch(epoch, len(trainer.train), completed=done.batches)
    began = time.perf_counter()
    unread: list[Unread] = []

    def count_seconds() -> None:
        nonlocal began
        now = time.perf_counter()
        done.seconds += now - began
        began = now

    def show(batches: int, residual: float | None) -> None:
        count_seconds()
        progress.update(
            loss=done.loss_sum / done.seen,
            accuracy=done.correct / done.seen,
            residual=residual,
            images_per_second=done.seen / done.seconds,
            batches=batches,
        )

    def read_all() -> None:
        """Losses of batches that the optimizer has used."""
        if unread:
            show(len(unread), _add_up(trainer, unread, moved=1))

    for images, labels, indices in trainer.train.indexed(epoch, start=done.batches):
        if trainer.stopping:
            read_all()
            raise Stopped
        buffers = [b.clone() for b in trainer.model.buffers()] if lenient else []
        trainer.ask(read=time.perf_counter() - began >= READ_EVERY)
        try:
            result, size = trainer.learn(Batch(images, labels, indices, epoch, done.batches + len(unread)))
        except ConvergenceError:
            if not trainer.processes.several:  # a loss that is wrong would concern the others, who are elsewhere
                read_all()
            raise
        unread.append(Unread(result, gradient_norm(trainer.model), indices, size))
        wanted = trainer.agreement.answer()["read"]
        count = len(unread)
        save = trainer.checkpoint_due(done.batches + count)
        due = lenient or save or trainer.device.type == "cpu" or wanted
        residual: float | None = None
        left_out = False
        if due:
            try:
                residual = _add_up(trainer, unread)
            except Diverged as error:
                if not lenient:
                    raise
                _leave_out(trainer, error, buffers)
                unread.clear()
                left_out = True
        if left_out:
            count_seconds()
        else:
            trainer.optimizer.step()
            trainer.scheduler.step()
            if due:
                show(count, residual)
        if save:
            trainer.save()
            began = time.perf_counter()
    read_all()
    if done.skipped:
        progress.note(
            f"epoch {epoch}: {done.skipped} of {len(trainer.train)} batches left out: the loss had run away, or it or "
            "a gradient was not finite"
        )
    trainer.seconds += done.seconds
    trainer.epoch, trainer.partial = epoch, Partial()
    row: dict[str, Any] = {
        "epoch": epoch,
        "step": epoch * len(trainer.train),
        "train_loss": done.loss_sum / done.seen,
        "train_accuracy": done.correct / done.seen,
        "images_per_second": done.seen / done.seconds,
        "seconds": done.seconds,
        "lr": trainer.optimizer.param_groups[0]["lr"],
    }
    if config.method == "ep":
        row["residual"] = done.residual_sum / done.seen
    if done.skipped:
        row["skipped_batches"] = done.skipped
    if trainer.rollbacks:
        row["rollbacks"] = trainer.rollbacks
    return row


def _leave_out(trainer: Trainer, error: Diverged, buffers: list[Tensor]) -> None:
    """Go on as if the batch had not been seen.

    Raises:
        Diverged: this was more than half of the epoch.
    """
    done = trainer.partial
    for buffer, before in zip(trainer.model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    if trainer.folder is not None:
        keep(trainer, trainer.folder.path, error)
    done.batches += 1
    done.skipped += 1
    if done.skipped > len(trainer.train) // 2:
        raise Diverged(
            f"more than half of epoch {trainer.epoch + 1} was left out: lower --lr or --feedback-gain"
        ) from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)  # before any other step
        trainer.scheduler.step()


def _add_up(trainer: Trainer, unread: list[Unread], *, moved: int = 0) -> float | None:
    """Add batches to the epoch's sums and empty the list; returns the last one's residual.

    Args:
        moved: 1 if the optimizer has used the last batch's gradient.

    Raises:
        Diverged: at the first batch whose loss is not finite or has run away, or whose gradient is not finite.
    """
    done = trainer.partial
    residual: float | None = None
    values = read([one.result for one in unread])
    gradients = torch.stack([one.gradient for one in unread]).tolist()
    for at, (one, (loss, correct, residual), gradient) in enumerate(zip(unread, values, gradients, strict=True)):
        if what := wrong(trainer, loss, gradient):
            step = Step(
                number=trainer.step,
                epoch=trainer.epoch + 1,
                batch=done.batches,
                indices=one.indices.tolist(),
                loss=loss,
                gradient=gradient,
                later=len(unread) - 1 - at + moved,
            )
            raise Diverged(what, step)
        done.batches += 1
        done.seen += one.size
        done.loss_sum += loss * one.size
        done.correct += correct
        done.residual_sum += (residual or 0.0) * one.size
    unread.clear()
    return residual
