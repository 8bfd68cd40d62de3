"""The command ``ep-train``: train (the default), ``check`` gradients, ``resume`` a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ep_kernels import BackendError

from .check import CheckConfig, run_check
from .checkpoint import CheckpointError
from .config import TrainConfig
from .data import DataError
from .device import check_name
from .run_folder import RunFolderError
from .trainer import Diverged, resume, train

COMMANDS = ("train", "check", "resume")
DESCRIPTION = """Train a convolutional network by Equilibrium Propagation.

Other commands: `ep-train check` compares EP gradients with BPTT layer by layer; `ep-train resume DIR` continues a run
that was stopped or killed. A run folder holds config.json, metrics.jsonl, summary.json, curves.png, checkpoint.pt.
Ctrl-C ends a run after the current batch and keeps what was learnt (exit code 130)."""


@dataclass(frozen=True)
class ResumeConfig:
    """Continue a run from its last checkpoint, to the same numbers as if it had never stopped (bit for bit on the same
    kind of device only)."""

    folder: tyro.conf.Positional[Path]
    """The run folder."""
    epochs: int | None = None
    """Train to this many epochs in all, instead of the run's own number."""
    device: str | None = None
    """Go on there instead of on the run's own: auto, cpu, cuda, or cuda:N."""
    quiet: bool = False
    """Print nothing."""

    def __post_init__(self) -> None:
        if self.device is not None:
            check_name(self.device, "ResumeConfig")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 failed, 2 bad arguments, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "train"
    if arguments and command == "train" and not arguments[0].startswith("-"):
        known = ", ".join(COMMANDS)
        print(f"ep-train: expected a command ({known}) or an option first, got '{arguments[0]}'", file=sys.stderr)
        sys.exit(2)  # as tyro does
    try:
        if command == "check":
            check = tyro.cli(CheckConfig, prog="ep-train check", args=arguments)
            return run_check(check)
        if command == "resume":
            chosen = tyro.cli(ResumeConfig, prog="ep-train resume", args=arguments)
            summary, _ = resume(chosen.folder, epochs=chosen.epochs, device=chosen.device, quiet=chosen.quiet)
        else:
            config = tyro.cli(TrainConfig, prog="ep-train", args=arguments, description=DESCRIPTION)
            summary, _ = train(config)
    except (BackendError, CheckpointError, DataError, Diverged, RunFolderError, ValueError) as error:
        print(f"ep-train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # outside the training loop: nothing was learnt yet
        print("ep-train: stopped by Ctrl-C", file=sys.stderr)
        return 130
    return 130 if summary["status"] == "interrupted" else 0


if __name__ == "__main__":
    sys.exit(main())
