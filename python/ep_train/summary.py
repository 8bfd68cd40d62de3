"""What a run says of itself: its first line, its last one, and summary.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import ep_kernels
from ep_kernels import backends

from . import device as devices
from .memory import peak_memory_bytes
from .run_folder import RunFolder

if TYPE_CHECKING:
    from .trainer import Trainer


def headline(trainer: Trainer) -> str:
    """One line that says what is trained, by which method, on which backend and, if a GPU, on which device."""
    config = trainer.config
    count = sum(p.numel() for p in trainer.model.parameters())
    storage = config.relax_config().storage
    backend = backends.choose(trainer.device, storage=storage) if config.method == "ep" else "autograd"
    where = f" on {devices.describe(trainer.device)}" if trainer.device.type == "cuda" else ""
    where += f", {trainer.processes.count} processes" if trainer.processes.several else ""
    how = f"k {config.feedback_gain:g}, {config.schedule}, {config.free_steps} + {config.nudged_steps} sweeps"
    how = "" if config.method == "backprop" else f" {how},"
    return (
        f"{trainer.dataset.source}: {config.model_name} ({count / 1e6:.2f} M parameters) by {config.method},{how} "
        f"backend {backend}{where}"
    )


def closing(summary: dict[str, Any], folder: RunFolder) -> str:
    """The last line: result, time and place."""
    accuracy = summary["test_accuracy"]
    result = "no epoch finished" if accuracy is None else f"test accuracy {accuracy:.2%}"
    return f"{result} after {summary['seconds']:.1f} s of training; {folder.path}"


def summarise(trainer: Trainer, status: str, *, reason: str | None = None) -> dict[str, Any]:
    """What summary.json holds; accuracies are fractions, rates per second of training. ``reason``: of a failure."""
    last = trainer.rows[-1] if trainer.rows else {}
    images = trainer.epoch * trainer.train.images_per_epoch
    return {
        "status": status,
        **({} if reason is None else {"reason": reason}),
        **({} if trainer.stop_signal is None else {"signal": trainer.stop_signal}),
        "test_accuracy": last.get("test_accuracy"),
        "best_test_accuracy": max(
            (row["test_accuracy"] for row in trainer.rows if row.get("test_accuracy") is not None), default=None
        ),
        "train_loss": last.get("train_loss"),
        "train_accuracy": last.get("train_accuracy"),
        "residual": last.get("residual"),
        "epochs": trainer.epoch,
        "seconds": trainer.seconds + trainer.partial.seconds,
        "images_per_second": images / trainer.seconds if trainer.seconds else None,
        "peak_memory_bytes": peak_memory_bytes(trainer.device),
        "device": devices.describe(trainer.device),
        "processes": trainer.processes.count,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "data": trainer.dataset.source,
        "versions": {"ep_kernels": ep_kernels.__version__, "torch": torch.__version__},
    }
