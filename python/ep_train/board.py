"""A run as TensorBoard shows it: every number of its metrics, and histograms of its states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from . import extras

FOLDER = "tensorboard"  # in the run's folder
BINS = 64
# What a row of metrics holds, by what TensorBoard calls it. Numbers of one group stand side by side.
SCALARS = {
    "train_loss": "loss/train",
    "train_accuracy": "accuracy/train",
    "test_accuracy": "accuracy/test",
    "residual": "residual/train",
    "spectral_radius": "residual/spectral_radius",
    "gradient_cosine_smallest": "gradient/smallest_cosine",
    "gradient_residual": "gradient/residual_of_true_state",
    "images_per_second": "run/images_per_second",
    "seconds": "run/seconds_per_epoch",
    "peak_memory_bytes": "run/peak_memory_bytes",
    "lr": "run/learning_rate",
    "skipped_batches": "run/skipped_batches",
}
PER_LAYER = {
    "layer_residual": "layer_residual",
    "at_lo": "saturation_lo",
    "at_hi": "saturation_hi",
}


class Board:
    """Writes the events of a run. Make it with :func:`open_board`.

    Steps are training batches since the start of the run.
    """

    def __init__(self, folder: Path, *, after_step: int = 0) -> None:
        """
        Args:
            folder: of the events.
            after_step: where a run begins or goes on: TensorBoard drops what was written later than that.

        Raises:
            MissingExtra: tensorboard is not installed.
        """
        self._folder = folder
        self._last = after_step
        self._writer = self._after(after_step)

    def write(self, row: Mapping[str, Any], states: Mapping[int, Tensor]) -> None:
        """One epoch, and flush it to the disk. What was written of this step and later ones, before the run went back
        to an earlier checkpoint, is dropped.

        Args:
            row: of metrics.jsonl, with ``step``; what is None or not there is left out.
            states: by node, of some images.
        """
        step = int(row["step"])
        if step <= self._last:
            self._writer.close()
            self._writer = self._after(step - 1)
        self._last = step
        for tag, value in scalars(row):
            self._writer.add_scalar(tag, value, step)
        for node, state in states.items():
            values = state.detach().flatten().float().cpu().numpy()
            values = values[np.isfinite(values)]
            if values.size:
                self._writer.add_histogram(f"states/layer_{node}", values, step, bins=BINS)
        self._writer.flush()

    def _after(self, step: int) -> Any:
        return require_tensorboard().SummaryWriter(str(self._folder), purge_step=step + 1)

    def close(self) -> None:
        """Write what is left, and close the file."""
        self._writer.close()


def scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The tags and numbers of a row of metrics, layers counted from 1."""
    for key, tag in SCALARS.items():
        if row.get(key) is not None:
            yield tag, float(row[key])
    for key, group in PER_LAYER.items():
        for layer, value in enumerate(row.get(key) or (), 1):
            if value is not None:
                yield f"{group}/layer_{layer}", float(value)
    for name, value in (row.get("gradient_cosine") or {}).items():
        yield f"gradient_cosine/{name}", float(value)


def require_tensorboard() -> Any:
    """``torch.utils.tensorboard``. Raises MissingExtra where tensorboard is not installed."""
    return extras.require("torch.utils.tensorboard", extra="tensorboard", what="--tensorboard")


@contextmanager
def open_board(wanted: bool, run: Path, *, after_step: int = 0) -> Iterator[Board | None]:
    """The board of a run's folder; None where none is wanted."""
    if not wanted:
        yield None
        return
    board = Board(run / FOLDER, after_step=after_step)
    try:
        yield board
    finally:
        board.close()
