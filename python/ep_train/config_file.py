"""A run's config.json: written so that it means the same from any working directory, read strictly."""

from __future__ import annotations

import dataclasses
import json
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
    """The same run from any working directory: its paths are absolute (a folder of images that is given relative to
    ``data_root`` stays so)."""
    return dataclasses.replace(
        config,
        dataset=_dataset(config),
        data_root=None if config.data_root is None else config.data_root.expanduser().resolve(),
        teacher=_teacher(config.teacher),
        teacher_cache=None if config.teacher_cache is None else config.teacher_cache.resolve(),
        out=None if config.out is None else config.out.resolve(),
    )


def _dataset(config: TrainConfig) -> str:
    path = config.dataset.removeprefix(_FOLDER)
    if not path or path == config.dataset:  # no path, or another dataset
        return config.dataset
    place = Path(path).expanduser()
    if config.data_root is not None and not place.is_absolute():
        return config.dataset
    return f"{_FOLDER}{place.resolve()}"


def _teacher(spec: str | None) -> str | None:
    """Read as :func:`ep_train.teachers.load_teacher` reads it."""
    name, _, rest = (spec or "").partition(":")
    if rest and name in LIBRARIES:
        known, _, path = rest.partition(":")
        return f"{name}:{known}:{Path(path).resolve()}" if path else spec
    if rest and name in TEACHERS:
        return f"{name}:{Path(rest).resolve()}"
    return str(Path(spec).resolve()) if spec and Path(spec).exists() else spec


def with_free(config: TrainConfig, **free: Any) -> TrainConfig:
    """The same run with other :data:`FREE` options; those that are None stay as they are.

    Raises:
        TypeError: an option that is not one of them.
        ValueError: a value that it cannot have.
    """
    odd = sorted(set(free) - set(FREE))
    if odd:
        raise TypeError(f"with_free: expected some of {', '.join(FREE)}, got {', '.join(odd)}")
    return dataclasses.replace(config, **{name: value for name, value in free.items() if value is not None})


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
