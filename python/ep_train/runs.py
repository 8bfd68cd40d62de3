"""Start a run, or go on with one that stopped."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from . import checkpoint
from .config import TrainConfig
from .config_file import config_from_json
from .run_folder import RunFolder
from .trainer import Trainer, new_folder


def train(config: TrainConfig) -> tuple[dict[str, Any], Path]:
    """Start a run; returns its summary and folder."""
    trainer = Trainer(config)
    folder = new_folder(config)
    return trainer.run(folder), folder.path


def resume(
    path: Path, *, epochs: int | None = None, device: str | None = None, quiet: bool = False
) -> tuple[dict[str, Any], Path]:
    """Continue the run in ``path`` from its last checkpoint: the same numbers as if it had never stopped.

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
    state = checkpoint.load(path)
    config = config_from_json(path / "config.json", quiet=quiet)
    if epochs is not None:
        config = dataclasses.replace(config, epochs=epochs)
    if device is not None:
        config = dataclasses.replace(config, device=device)
    trainer = Trainer(config)
    folder = RunFolder.resume(path, before_epoch=state["epoch"] + 1)
    if epochs is not None or device is not None:
        folder.write_config(dataclasses.asdict(config))
    trainer.restore(state, folder.read_metrics())
    return trainer.run(folder), folder.path
