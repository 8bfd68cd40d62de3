"""The command ``ep-train``: train (the default), ``teacher``, ``check`` gradients, ``resume`` a run, ``recipe``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from ep_kernels import BackendError

from .check import CheckConfig, run_check
from .checkpoint import CheckpointError
from .config import TrainConfig
from .data import DataError
from .device import check_name
from .presets import PRESETS
from .recipes import RECIPES, write_recipe
from .run_folder import RunFolderError
from .trainer import Diverged, config_from_json, resume, train

COMMANDS = ("train", "teacher", "check", "resume", "recipe")
DESCRIPTION = """Train a convolutional network by Equilibrium Propagation.

Before all other options, `--preset NAME` starts from a published recipe (`--preset list` shows them) and `--config
FILE` from a config.json; other options change what they say.

Other commands: `ep-train teacher` trains a teacher by backprop; `ep-train check` compares EP gradients with BPTT layer
by layer; `ep-train resume DIR` continues a run that was stopped or killed; `ep-train recipe NAME` writes the
configuration of a run on a GPU. A run folder holds config.json, metrics.jsonl, summary.json, curves.png, checkpoint.pt.
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


@dataclass(frozen=True)
class RecipeConfig:
    """Write the complete configuration of a run on a GPU, with an estimate of its time and memory; run it with
    ep-train --config FILE."""

    name: tyro.conf.Positional[Literal[tuple(RECIPES)]]  # type: ignore[valid-type]
    """Which one."""
    out: Path | None = None
    """The file (default: NAME.json here)."""


# What `ep-train teacher` trains unless told otherwise.
TEACHER = TrainConfig(
    dataset="cifar10",
    model="vgg16_bn",
    method="backprop",
    optimizer="sgd",
    lr=0.05,
    nesterov=True,
    weight_decay=5e-4,
    lr_schedule="cosine",
    batch_size=128,
    epochs=30,
    crop_padding=4,
    flip=True,
)


def started_from(arguments: list[str], start: TrainConfig) -> TrainConfig:
    """Take leading ``--preset NAME`` and ``--config FILE`` off the arguments; the configuration that they give.

    Raises:
        ValueError: an unknown preset, with the valid names. CheckpointError: an unreadable file.
    """
    while arguments and arguments[0].split("=")[0] in ("--preset", "--config"):
        option, _, value = arguments.pop(0).partition("=")
        if not value and arguments:
            value = arguments.pop(0)
        if option == "--config":
            start = config_from_json(Path(value))
        elif value in PRESETS:
            start = replace(start, **PRESETS[value].values)  # type: ignore[arg-type]
        else:
            known = "".join(f"\n  {name:32s} {preset.what}" for name, preset in PRESETS.items())
            raise ValueError(f"argument '--preset': expected one of{known}\ngot {value!r}")
    return start


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
        elif command == "recipe":
            asked = tyro.cli(RecipeConfig, prog="ep-train recipe", args=arguments)
            print(write_recipe(asked.name, asked.out or Path(f"{asked.name}.json")).summary())
            return 0
        else:
            start = TEACHER if command == "teacher" else TrainConfig()
            start = started_from(arguments, start)
            prog = "ep-train teacher" if command == "teacher" else "ep-train"
            config = tyro.cli(TrainConfig, prog=prog, args=arguments, default=start, description=DESCRIPTION)
            summary, _ = train(config)
    except (BackendError, CheckpointError, DataError, Diverged, FileExistsError, RunFolderError, ValueError) as error:
        print(f"ep-train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # outside the training loop: nothing was learnt yet
        print("ep-train: stopped by Ctrl-C", file=sys.stderr)
        return 130
    return 130 if summary["status"] == "interrupted" else 0


if __name__ == "__main__":
    sys.exit(main())
