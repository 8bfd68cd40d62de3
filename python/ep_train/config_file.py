"""A run's config.json: written so that it means the same from any working directory, read strictly."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from .checkpoint import CheckpointError
from .config import TrainConfig
from .teachers import TEACHERS
from .teachers.load import LIBRARIES

# What a run may go on with otherwise, by `ep-train resume` or --resume-or-start, and be evaluated with: it says where
# and how the run is kept, not what it computes.
FREE = ("device", "threads", "data_root", "data_cache", "checkpoint_every", "keep_checkpoints", "quiet")
# What says where and how a run starts: nothing to whoever goes on with it, or takes its options for a new one.
START = ("out", "overwrite", "resume_or_start")
_FOLDER = "folder:"


def portable(config: TrainConfig) -> TrainConfig:
    """The same run from any working directory: its paths are absolute. A folder of images that is given relative stays
    so, with what it is relative to as ``data_root``: where it is may change, and which one it is not."""
    place = _folder(config.dataset)
    root = config.data_root
    if root is None and place is not None and not place.is_absolute():
        root = Path()
    return dataclasses.replace(
        config,
        dataset=f"{_FOLDER}{_absolute(place)}" if place is not None and place.is_absolute() else config.dataset,
        data_root=None if root is None else _absolute(root.expanduser()),
        teacher=_teacher(config.teacher),
        teacher_cache=None if config.teacher_cache is None else _absolute(config.teacher_cache),
        out=None if config.out is None else _absolute(config.out),
    )


def _absolute(path: Path) -> Path:
    """Links stay: what they lead to may be another place tomorrow, or on another machine. So do steps up from one."""
    plain = os.path.abspath(path)
    return Path(plain) if os.path.realpath(plain) == os.path.realpath(path) else path.absolute()


def _folder(dataset: str) -> Path | None:
    """The folder of a dataset that is one; read as :func:`ep_train.data.load_dataset` reads it."""
    path = dataset.removeprefix(_FOLDER)
    return Path(path).expanduser() if path and path != dataset else None


def _teacher(spec: str | None) -> str | None:
    """Read as :func:`ep_train.teachers.load_teacher` reads it."""
    name, _, rest = (spec or "").partition(":")
    if rest and name in LIBRARIES:
        known, _, path = rest.partition(":")
        return f"{name}:{known}:{_absolute(Path(path))}" if path else spec
    if rest and name in TEACHERS:
        return f"{name}:{_absolute(Path(rest))}"
    return str(_absolute(Path(spec))) if spec and Path(spec).exists() else spec


def with_free(config: TrainConfig, **free: Any) -> TrainConfig:
    """The same run with other :data:`FREE` options; those that are None stay as they are.

    Raises:
        TypeError: an option that is not one of them.
        ValueError: a value that it cannot have; a ``data_root`` for a folder of images that is given absolute.
    """
    odd = sorted(set(free) - set(FREE))
    if odd:
        raise TypeError(f"with_free: expected some of {', '.join(FREE)}, got {', '.join(odd)}")
    place, root = _folder(config.dataset), free.get("data_root")
    if root is not None and place is not None and place.is_absolute():
        raise ValueError(
            f"argument 'data_root': expected none, as the images are in {config.dataset}, which is absolute, got {root}"
        )
    return dataclasses.replace(config, **{name: value for name, value in free.items() if value is not None})


def going_on(config: TrainConfig, theirs: TrainConfig) -> TrainConfig:
    """``config`` for the run ``theirs`` that it goes on with: options of :data:`FREE` that it leaves at their defaults
    are as they are there (but quiet, which is of the process)."""
    left = [name for name in FREE if name != "quiet" and getattr(config, name) == getattr(TrainConfig, name)]
    return dataclasses.replace(config, **{name: getattr(theirs, name) for name in left})


def for_another_run(config: TrainConfig) -> TrainConfig:
    """The same options for a new run, in a folder of its own."""
    return dataclasses.replace(config, **{name: getattr(TrainConfig, name) for name in START})


def config_from_json(path: Path, *, quiet: bool = False, complete: bool = True) -> TrainConfig:
    """The configuration that a run folder holds.

    Args:
        complete: every option must be there; else those that are not have their defaults.

    Raises:
        CheckpointError: it is missing, damaged or of another version.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable configuration: {error}") from error
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object of options, got {type(values).__name__}")
    odd = {"unknown": sorted(set(values) - known), "missing": sorted(known - set(values)) if complete else []}
    if any(odd.values()):
        found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in odd.items() if names)
        raise CheckpointError(f"{path}: not the configuration of this version of ep-train ({found})")
    try:
        for name in ("data_root", "out", "teacher_cache"):
            values[name] = Path(values[name]) if values.get(name) is not None else None
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return TrainConfig(**{**values, "quiet": quiet})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a configuration of ep-train: {error}") from error
