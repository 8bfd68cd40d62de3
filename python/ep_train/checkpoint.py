"""The state of a run on disk: written atomically after every epoch, loaded with ``weights_only``.

It holds no state of a random generator, because none is left between two batches: initial weights, the order of the
images and their augmentation are drawn on the host from the seed and the epoch, random signs and dropout from the seed,
the epoch and the batch. Nothing draws on a GPU.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

NAME = "checkpoint.pt"
KEYS = {"model", "optimizer", "scheduler", "epoch", "seconds", "partial", "device"}


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another run."""


def save(folder: Path, state: dict[str, Any]) -> Path:
    """Write ``folder/checkpoint.pt``; a reader, or a crash, sees the old one or the new one, never half of it."""
    path = folder / NAME
    partial = path.with_suffix(".pt.part")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return path


def load(folder: Path) -> dict[str, Any]:
    """Read the checkpoint of a run folder, into the memory of the CPU, from whichever device it was written.

    Raises:
        CheckpointError: it is missing or cannot be read.
    """
    path = folder / NAME
    if not path.is_file():
        when = "the first is written after an epoch, or when a run is stopped"
        raise CheckpointError(f"{path}: expected a checkpoint, got no such file ({when})")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch.load raises many kinds; each means the same here
        raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from error
    if not isinstance(state, dict) or not state.keys() >= KEYS:
        raise CheckpointError(f"{path}: not a checkpoint of ep-train")
    return state
