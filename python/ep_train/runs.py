"""Start a run, or go on with one that stopped."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from . import checkpoint
from .config import TrainConfig
from .config_file import config_from_json
from .run_folder import CONFIG, RunFolder
from .trainer import Trainer, new_folder


def train(config: TrainConfig) -> tuple[dict[str, Any], Path]:
    """Start a run; returns its summary and folder."""
    trainer = Trainer(config)
    folder = new_folder(config)
    return trainer.run(folder), folder.path


def resume(
    path: Path, *, epochs: int | None = None, device: str | None = None, quiet: bool = False
) -> tuple[dict[str, Any], Path]:
    """Continue the run in ``path`` from its newest good checkpoint: the same numbers as if it had never stopped.

    A run that was killed before its first checkpoint starts from its beginning. Checkpoints that are damaged are named
    in the log and renamed.

    The same bit for bit is promised on the same kind of device only; a run may go on on another one, and says so. On a
    GPU the kernels of backend ``triton`` add without atomics, in one order; cuDNN, which computes for ``reference`` and
    BPTT there, promises none.

    Args:
        epochs: train to this many instead; a falling learning rate then falls over the new total.
        device: go on there instead of on the run's own.

    Raises:
        CheckpointError, RunFolderError: there is nothing to resume there.
        ValueError, BackendError: the device is not there, or the backend cannot run on it; nothing has been written.
    """
    with RunFolder(path).in_use() if path.is_dir() else nullcontext():
        found = _where_it_stopped(path)
        config = config_from_json(path / CONFIG, quiet=quiet)
        if epochs is not None:
            config = dataclasses.replace(config, epochs=epochs)
        if device is not None:
            config = dataclasses.replace(config, device=device)
        trainer = Trainer(config)
        folder = RunFolder.resume(path, before_epoch=1 if found is None else found.state["epoch"] + 1)
        if found is not None:
            checkpoint.set_aside(found.refused)
        if epochs is not None or device is not None:
            folder.write_config(dataclasses.asdict(config))
        trainer.folder = folder
        if found is not None:
            trainer.restore(found.state, folder.read_metrics())
        return trainer.run(folder), folder.path


def _where_it_stopped(path: Path) -> checkpoint.Found | None:
    """The checkpoint to go on from; None where none has been written yet.

    Raises:
        CheckpointError: there is no run, none of its checkpoints is good, or they are gone.
    """
    # the first row may be there already: it is written just before the first checkpoint
    if (path / CONFIG).is_file() and checkpoint.never_written(path) and len(RunFolder(path).read_metrics()) <= 1:
        return None
    return checkpoint.newest_good(path)
