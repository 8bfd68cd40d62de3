"""A run's config.json: written so that it means the same from any working directory, read strictly."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from .checkpoint import CheckpointError
from .config import TrainConfig


def portable(config: TrainConfig) -> TrainConfig:
    """The same run from any working directory: paths of the teacher and its cache are absolute."""
    name, colon, path = (config.teacher or "").rpartition(":")
    teacher = f"{name}{colon}{Path(path).resolve()}" if path and Path(path).exists() else config.teacher
    cache = config.teacher_cache.resolve() if config.teacher_cache is not None else None
    return dataclasses.replace(config, teacher=teacher, teacher_cache=cache)


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
