"""One epoch: every batch once, its losses read as seldom as a GPU likes, its row of metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .divergence import Diverged, broken, runaway
from .learners import Batch
from .progress import Progress
from .step import StepResult, read

if TYPE_CHECKING:
    from .trainer import Trainer

READ_EVERY = 0.3  # seconds between two readings of the losses from a GPU; on the CPU every batch's is read at once


class Stopped(Exception):
    """A signal asked for the end, and a batch has just been finished."""


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


def train_epoch(trainer: Trainer, progress: Progress) -> dict[str, Any]:
    """Train on every batch once; returns the epoch's row of metrics (without the test accuracy)."""
    config = trainer.config
    epoch = trainer.epoch + 1
    done = trainer.partial
    lenient = config.on_divergence == "continue"
    progress.start_epoch(epoch, len(trainer.train), completed=done.batches)
    began = time.perf_counter()
    unread: list[tuple[StepResult, int]] = []  # with the number of images

    def show(batches: int, residual: float | None) -> None:
        nonlocal began
        now = time.perf_counter()
        done.seconds += now - began
        began = now
        progress.update(
            loss=done.loss_sum / done.seen,
            accuracy=done.correct / done.seen,
            residual=residual,
            images_per_second=done.seen / done.seconds,
            batches=batches,
        )

    for images, labels, indices in trainer.train.indexed(epoch, start=done.batches):
        if trainer.stop_asked:
            if unread:
                show(len(unread), _add_up(trainer, unread))
            raise Stopped
        buffers = [b.clone() for b in trainer.model.buffers()] if lenient else []
        result = trainer.learner.step(Batch(images, labels, indices, epoch, done.batches + len(unread)))
        unread.append((result, len(labels)))
        count = len(unread)
        due = lenient or trainer.device.type == "cpu" or time.perf_counter() - began >= READ_EVERY
        if lenient and broken(trainer, result):
            for buffer, before in zip(trainer.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
            unread.clear()
            done.batches += 1
            done.skipped += 1
            if done.skipped > len(trainer.train) // 2:
                raise Diverged(f"more than half of epoch {epoch} was left out: lower --lr or --feedback-gain")
            trainer.scheduler.step()
            continue
        residual = _add_up(trainer, unread) if due else None
        trainer.optimizer.step()
        trainer.scheduler.step()
        if due:
            show(count, residual)
    if unread:
        show(len(unread), _add_up(trainer, unread))
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
    return row


def _add_up(trainer: Trainer, unread: list[tuple[StepResult, int]]) -> float | None:
    """Add batches to the epoch's sums and empty the list; returns the last one's residual.

    Raises:
        Diverged: at the first batch whose loss is not finite or has run away.
    """
    done = trainer.partial
    residual: float | None = None
    for (loss, correct, residual), (_, count) in zip(read([result for result, _ in unread]), unread, strict=True):
        if not loss < runaway(trainer):
            raise Diverged(
                f"the loss became {loss:.3g} in epoch {trainer.epoch + 1} after {done.seen} images: lower --lr or "
                "--feedback-gain, or raise --free-steps"
            )
        done.batches += 1
        done.seen += count
        done.loss_sum += loss * count
        done.correct += correct
        done.residual_sum += (residual or 0.0) * count
    unread.clear()
    return residual
