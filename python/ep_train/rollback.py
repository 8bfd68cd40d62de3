"""Going back to the last good checkpoint after a divergence, with a lower learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checkpoint
from .divergence import Diverged, keep
from .run_folder import RunFolder

if TYPE_CHECKING:
    from .trainer import Trainer


def go_back(trainer: Trainer, folder: RunFolder, error: Diverged) -> str:
    """Keep the step that went wrong and, with ``--on-divergence rollback``, go on from the newest good checkpoint that
    was not written because of a signal.

    From there on every learning rate is ``rollback_factor`` times what it was, once more for each rollback; images come
    in the same order. The run's n-th rollback is thus the same whether or not the run was killed and resumed between:
    the count and the learning rates are in every checkpoint, and a run that is resumed from one before the divergence
    diverges and goes back again.

    Returns:
        What happened, in a line.

    Raises:
        Diverged: ``error``, if the run stops at a divergence or has gone back ``max_rollbacks`` times.
        CheckpointError: no checkpoint is good.
    """
    config = trainer.config
    keep(trainer, folder.path, error)
    if config.on_divergence != "rollback":
        raise error
    count = trainer.rollbacks + 1
    if count > config.max_rollbacks:
        error.args = (f"{error.args[0]} (given up after {trainer.rollbacks} rollbacks)",)
        raise error
    found, rows = trainer.processes.first_does(lambda: _last_good(folder.path))
    trainer.restore(found.state, rows)
    factor = config.rollback_factor ** (count - trainer.rollbacks)
    trainer.rollbacks = count
    for group in trainer.optimizer.param_groups:
        group["lr"] *= factor
        group["initial_lr"] *= factor
    trainer.scheduler.base_lrs = [rate * factor for rate in trainer.scheduler.base_lrs]
    return (
        f"{error}; back to {found.path.name} with {config.rollback_factor**count:.3g} times the learning rate "
        f"({count} of {config.max_rollbacks} rollbacks)"
    )


def _last_good(folder: Path) -> tuple[checkpoint.Found, list[dict[str, Any]]]:
    """The checkpoint to go back to, and the metrics up to it; damaged ones are put aside, and what a stop has left
    after it is removed: it is of the steps that are taken back."""
    found = checkpoint.newest_good(folder, scheduled=True)
    checkpoint.set_aside(found.refused)
    checkpoint.remove_newer(folder, found.path)
    return found, RunFolder.resume(folder, before_epoch=found.state["epoch"] + 1).read_metrics()
