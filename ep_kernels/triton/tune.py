"""The user's cache of measured tiles: a JSON file for each device and triton, written by ``ep-kernels tune``.

    {"format": 1, "device": "NVIDIA H200", "arch": "sm_90", "triton": "3.9.0",
     "tiles": {"kernel=step n=256 ...": {"tile": [128, 128, 64, 8, 4, 16], "microseconds": 61.2}}}

A key holds every field of a :class:`~ep_kernels.triton.tiling.Problem`. A file that is missing, damaged or of another
device, version or format counts as empty; so does an entry that is no tile of the table any more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

from .. import cache
from .arch import INTERPRETER, Arch
from .tiling import Problem, Tile, candidates

FORMAT = 1


def tuned(problem: Problem, arch: Arch) -> Tile | None:
    """The measured winner for this problem on the current CUDA device, or None. Never raises."""
    if arch.name == INTERPRETER.name:
        return None
    device = _device_name()
    if device is None:
        return None
    tile = _winners(device, arch.name).get(key(problem))
    return tile if tile in candidates(problem, arch) else None


def forget() -> None:
    """Read the cache again when it is next needed. Launches that are bound already keep their tiles."""
    _winners.cache_clear()


def store(winners: Mapping[Problem, tuple[Tile, float]], device: str, arch: Arch, folder: Path | None = None) -> Path:
    """Add tiles and their times in seconds to the cache, atomically: readers see the old file or the new one.

    Args:
        device: the name that torch gives it.
        folder: None is the user's (:func:`ep_kernels.cache.cache_folder`).

    Returns: the file.

    Raises:
        OSError: it cannot be written.
    """
    path = cache_file(device, folder)
    tiles = _read(path, device, arch.name)
    for problem, (tile, seconds) in winners.items():
        tiles[key(problem)] = {"tile": list(dataclasses.astuple(tile)), "microseconds": round(1e6 * seconds, 3)}
    cache.write(path, "tiles", _identity(device, arch.name), tiles)
    forget()
    return path


def cache_file(device: str, folder: Path | None = None) -> Path:
    """Where the tiles of a device are kept for the triton that is imported."""
    name = f"tiles-{cache.slug(device)}-triton-{triton.__version__}.json"
    return (cache.cache_folder() if folder is None else folder) / name


def key(problem: Problem) -> str:
    """A problem as text: its fields and their values."""
    return " ".join(f"{field.name}={getattr(problem, field.name)}" for field in _FIELDS)


_FIELDS = dataclasses.fields(Problem)


def _device_name() -> str | None:
    try:  # whoever binds a launch has CUDA running; nobody else is made to start it
        return torch.cuda.get_device_name() if torch.cuda.is_initialized() else None
    except (RuntimeError, AssertionError):
        return None


@lru_cache(maxsize=64)
def _winners(device: str, arch: str) -> dict[str, Tile]:
    """Tiles by key, read once."""
    try:
        path = cache_file(device)
    except RuntimeError:  # no home folder
        return {}
    return {name: Tile(*entry["tile"]) for name, entry in _read(path, device, arch).items()}


def _read(path: Path, device: str, arch: str) -> dict[str, Any]:
    """Valid entries of a file by key."""
    entries = cache.read(path, "tiles", _identity(device, arch), "tuned tiles")
    return {name: entry for name, entry in entries.items() if _is_entry(entry)}


def _is_entry(entry: object) -> bool:
    tile = entry.get("tile") if isinstance(entry, dict) else None
    numbers = len(dataclasses.fields(Tile))
    return isinstance(tile, list) and len(tile) == numbers and all(type(v) is int for v in tile)


def _identity(device: str, arch: str) -> dict[str, object]:
    return {"format": FORMAT, "device": device, "arch": arch, "triton": triton.__version__}
