"""One process of a run that is killed again and again; a module of its own, which imports no more than it must."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ep_train import TrainConfig, Trainer, resume, train
from ep_train.run_folder import RunFolder


def go_on(path: Path, options: dict[str, Any], pipe: Connection) -> None:
    """Start the run in ``path``, or resume it; says when its training begins, and how many seconds it took."""
    torch.set_num_threads(1)
    original = Trainer.run

    def run(self: Trainer, folder: RunFolder) -> dict[str, Any]:
        pipe.send("training")
        began = time.perf_counter()
        summary = original(self, folder)
        pipe.send(time.perf_counter() - began)
        return summary

    Trainer.run = run  # type: ignore[method-assign]
    if (path / "config.json").is_file():
        resume(path, quiet=True)
    else:
        train(TrainConfig(**options, out=path, quiet=True))
