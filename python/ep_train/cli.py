"""The command ``ep-train``: train (the default), ``teacher``, ``check``, ``resume``, ``recipe``, and the tools."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from ep_kernels import BackendError, ConvergenceError

from . import locks
from .check import CheckConfig, run_check
from .checkpoint import FOLDER, CheckpointError
from .commands import TOOLS
from .config import TrainConfig
from .config_file import FREE, START, config_from_json, for_another_run
from .data import DataError
from .device import check_name
from .distributed import FirstFailed, ProcessError, voice
from .divergence import Diverged
from .extras import MissingExtra
from .presets import PRESETS, preset
from .recipes import RECIPES, write_recipe
from .run_folder import CONFIG, METRICS, RunFolderError
from .runs import resume, train
from .signals import PREEMPTED

COMMANDS = ("train", "teacher", "check", "resume", "recipe", *TOOLS)
DESCRIPTION = """Train a convolutional network by Equilibrium Propagation.

`--preset NAME` starts from a published recipe (`--preset list` shows them), `--config FILE` from a config.json or the
folder of a run (all but its --out, --overwrite and --resume-or-start); other options change what they say.

Other commands: `ep-train teacher` trains a teacher by backprop; `ep-train check` compares EP gradients with BPTT layer
by layer; `ep-train resume DIR` continues a run that was stopped or killed; `ep-train recipe NAME` writes the
configuration of a run on a GPU; `ep-train eval RUN` says how well a run's network does, `predict RUN FILES` what images
show, `export RUN` writes it for use elsewhere, `plot RUN...` compares runs.

A run folder holds config.json, metrics.jsonl, summary.json, curves.png, checkpoints/. Ctrl-C or SIGTERM ends a run
after the current batch and keeps what was learnt (exit code 130); so does SIGUSR1, which batch systems send before they
take a machine away (exit code 75)."""


TEACHER_DESCRIPTION = """Train a teacher by ordinary backprop, on the data of its student: vgg11_bn, vgg13_bn, vgg16_bn
or resnet18. Its folder is what `ep-train --teacher` takes.

Options of relaxations have no meaning here; those of heads and distillation are refused."""


@dataclass(frozen=True)
class ResumeConfig:
    """Continue a run from its newest good checkpoint, to the same numbers as if it had never stopped (bit for bit on
    the same kind of device only)."""

    folder: tyro.conf.Positional[Path]
    """The run folder."""
    epochs: int | None = None
    """Train to this many epochs in all, instead of the run's own number."""
    device: str | None = None
    """Go on there instead of on the run's own: auto, cpu, cuda, or cuda:N."""
    threads: int | None = None
    """CPU threads, instead of the run's own number."""
    data_root: Path | None = None
    """Folder that holds the dataset's files, or that a folder:PATH is in, unless that is absolute; instead of the run's
    own."""
    data_cache: Literal["memory", "mmap"] | None = None
    """Where the images of a folder:PATH are, instead of the run's own."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints within an epoch, instead of the run's own number (0: only at its end)."""
    keep_checkpoints: int | None = None
    """So many of the newest checkpoints are kept, instead of the run's own number."""
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


# What `ep-train teacher` trains unless told otherwise: no crops, which suit some image sizes only.
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
)


def started_from(arguments: list[str], start: TrainConfig) -> TrainConfig:
    """Take ``--preset NAME`` and ``--config FILE`` off the arguments; the configuration that they give. That of a run
    is taken without its folder: the new run gets one of its own, and what was left out is said.

    Raises:
        ValueError: an unknown preset, with the valid names, or an option without its value.
        CheckpointError: an unreadable file.
    """
    for option in ("--preset", "--config"):
        at = next((i for i, part in enumerate(arguments) if part.split("=")[0] == option), None)
        if at is None:
            continue
        _, equals, value = arguments.pop(at).partition("=")
        if not equals:
            if at == len(arguments):
                raise ValueError(f"argument '{option}': expected a value, got none")
            value = arguments.pop(at)
        if option == "--preset":
            start = replace(start, **preset(value).values)  # type: ignore[arg-type]
        else:
            path = Path(value)
            path = path / CONFIG if path.is_dir() else path
            start = config_from_json(path, complete=False)
            if path.name == CONFIG and any((path.parent / name).exists() for name in (METRICS, FOLDER, locks.LOCK)):
                start = _of_another_run(start, path.parent, arguments)
    return start


def _of_another_run(config: TrainConfig, folder: Path, arguments: list[str]) -> TrainConfig:
    """For a new run; a line names what it does not take over, unless the arguments say it anew."""
    given = {part.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for part in arguments}
    left = [name for name in START if getattr(config, name) != getattr(TrainConfig, name) and name not in given]
    if left and voice()[1]:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in left)
        print(f"ep-train: the options of {folder} are taken without its {names}", file=sys.stderr)
    return for_another_run(config)


def list_presets() -> str:
    """What ``--preset list`` prints."""
    lines = []
    for name, found in PRESETS.items():
        lines.append(f"{name}: {found.what}")
        lines += [f"    {found.source}", *(f"    here: {text}" for text in found.differs)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 failed, 2 bad arguments, 75 stopped by SIGUSR1 (resume it), 130
    stopped by SIGINT or SIGTERM."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "train"
    if arguments and command == "train" and not arguments[0].startswith("-"):
        known = ", ".join(COMMANDS)
        print(f"ep-train: expected a command ({known}) or an option first, got '{arguments[0]}'", file=sys.stderr)
        sys.exit(2)  # as tyro does
    who, speaks = voice()
    try:
        if command == "check":
            check = tyro.cli(CheckConfig, prog="ep-train check", args=arguments)
            return run_check(check)
        if command in TOOLS:
            options, run = TOOLS[command]
            return run(tyro.cli(options, prog=f"ep-train {command}", args=arguments))
        if command == "resume":
            chosen = tyro.cli(ResumeConfig, prog="ep-train resume", args=arguments, console_outputs=speaks)
            summary, _ = resume(chosen.folder, epochs=chosen.epochs, **{name: getattr(chosen, name) for name in FREE})
        elif command == "recipe":
            asked = tyro.cli(RecipeConfig, prog="ep-train recipe", args=arguments)
            path = asked.out or Path(f"{asked.name}.json")
            if path.exists():
                raise ValueError(f"argument '--out': {path} is there already; name another file")
            path.parent.mkdir(parents=True, exist_ok=True)
            print(write_recipe(asked.name, path).summary())
            print(f"run it with: ep-train --config {path}")
            return 0
        else:
            if command == "teacher":
                prog, start, description = "ep-train teacher", TEACHER, TEACHER_DESCRIPTION
            else:
                if "--preset=list" in arguments or ["--preset", "list"] in [
                    arguments[i : i + 2] for i in range(len(arguments))
                ]:
                    print(list_presets())
                    return 0
                prog, start, description = "ep-train", started_from(arguments, TrainConfig()), DESCRIPTION
            config = tyro.cli(
                TrainConfig,
                prog=prog,
                args=arguments,
                default=start,
                description=description,
                console_outputs=speaks,
            )
            summary, _ = train(config)
    except FirstFailed:  # which says why
        return 1
    except (
        BackendError, CheckpointError, ConvergenceError, DataError, Diverged, MissingExtra, OSError, ProcessError,
        RunFolderError,
        ValueError,
    ) as error:  # fmt: skip
        print(f"{who}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # outside the training loop: nothing was learnt yet
        print("ep-train: stopped by Ctrl-C", file=sys.stderr)
        return 130
    if summary["status"] == "interrupted":
        return 75 if summary.get("signal") == PREEMPTED else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
