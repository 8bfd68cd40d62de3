"""The state of a run on disk, written whole or not at all, and checked before it is used.

A checkpoint is a folder ``checkpoints/step-00000123`` of the run's folder, named for the steps behind it:

* ``weights.safetensors``: the model's tensors by name;
* ``state.pt``: everything else (optimizer, learning rate, position, kept equilibria of a warm start), which
  ``torch.load(..., weights_only=True)`` reads;
* ``manifest.json``: size and SHA-256 of both, and of itself.

It is written under another name and renamed when all of it is on the disk. What does not fit its manifest is refused.

It holds no state of a random generator, because none is left between two batches: initial weights, the order of the
images and their augmentation are drawn on the host from the seed and the epoch, random signs and dropout from the seed,
the epoch and the batch. Nothing draws on a GPU.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import ep_kernels

from . import durable

FOLDER = "checkpoints"
WEIGHTS, STATE, MANIFEST = "weights.safetensors", "state.pt", "manifest.json"
REFUSED = "refused-"  # begins the name of a checkpoint that a resumed run could not use
OLD = "checkpoint.pt"  # of earlier development versions
FORMAT = 1
NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
LARGEST_MANIFEST = 1 << 20
KINDS: dict[str, type | tuple[type, ...]] = {
    "model": dict,
    "optimizer": dict,
    "scheduler": dict,
    "step": int,
    "epoch": int,
    "seconds": (int, float),
    "partial": dict,
    "device": str,
    "scheduled": bool,
}

_log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another run, or cannot be written."""


@dataclass(frozen=True)
class Found:
    """A good checkpoint.

    Attributes:
        path: its folder. state: what it holds.
        refused: newer ones, which are damaged.
    """

    path: Path
    state: dict[str, Any]
    refused: list[Path]


def save(folder: Path, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write a checkpoint of a run, and remove all but the newest ``keep``; returns its folder.

    A reader, or a crash, sees all of it or nothing. Checkpoints that are incomplete do not count among those kept, nor
    do those that are not "scheduled" (a signal asked for them): of these only the newest checkpoint is kept.

    Args:
        folder: the run's.
        state: of :meth:`Trainer.state`; its "step" names the checkpoint.

    Raises:
        CheckpointError: it cannot be written (no space left); those before it are as they were.
    """
    for part in _parts(folder):  # of a process that was killed
        durable.remove_folder(part)
    path = _new_name(folder, state["step"])
    files: dict[str, dict[str, Any]] = {}
    try:
        with durable.whole_folder(path) as inside:
            for name in (WEIGHTS, STATE):
                with durable.HashedFile(inside / name) as file:
                    if name == WEIGHTS:
                        file.write(safetensors.torch.save(_plain(state["model"])))
                    else:
                        _save_state(state, file)
                files[name] = {"bytes": file.size, "sha256": file.sha256}
            versions = {"ep_kernels": ep_kernels.__version__, "torch": str(torch.__version__)}
            manifest = {
                "format": FORMAT,
                "step": state["step"],
                "epoch": state["epoch"],
                "scheduled": state["scheduled"],
                "files": files,
                "versions": versions,
            }
            text = json.dumps({**manifest, "sha256": _digest(manifest)}, indent=2) + "\n"
            with durable.HashedFile(inside / MANIFEST) as file:
                file.write(text.encode())
    except OSError as error:
        left = existing(folder)
        then = f"the last one is {left[-1].name}" if left else "there is none before it"
        raise CheckpointError(f"{path}: cannot write the checkpoint ({_reason(error)}); {then}") from error
    _prune(folder, keep, path)
    return path


def load(folder: Path, *, mmap: bool = False) -> dict[str, Any]:
    """The newest good checkpoint of a run's folder: see :func:`newest_good`."""
    return newest_good(folder, mmap=mmap).state


def newest_good(folder: Path, *, mmap: bool = False, scheduled: bool = False) -> Found:
    """The newest checkpoint of a run's folder that can be used, with its state in the memory of the CPU.

    One that is damaged is named in a warning of the log, with the reason, and the one before it is taken.

    Args:
        folder: the run's.
        mmap: leave tensors other than the model's in their file until they are read.
        scheduled: only one that the run would also have if it had never been stopped.

    Raises:
        CheckpointError: there is none, or none is good.
    """
    found = existing(folder)
    if not found:
        if (folder / OLD).is_file():
            raise CheckpointError(
                f"{folder / OLD}: a checkpoint of an earlier version, whose runs this version does not continue: "
                "finish it with that version, or start again (one of vgg11_bn to resnet18 still serves as a --teacher)"
            )
        when = "the first is written after an epoch, after --checkpoint-every steps, or when a run is stopped"
        raise CheckpointError(f"{folder / FOLDER}: expected a checkpoint, got none ({when})")
    refused: dict[Path, str] = {}
    for path in reversed(found):
        try:
            state = read(path, mmap=mmap)
        except CheckpointError as error:
            refused[path] = str(error)
            continue
        if scheduled and not state["scheduled"]:
            continue
        for reason in refused.values():
            _log.warning("%s; using %s, which is older", reason, path.name)
        return Found(path, state, list(refused))
    why = "; ".join(refused.values()) or "none was written at the end of an epoch or after --checkpoint-every steps"
    raise CheckpointError(f"{folder / FOLDER}: no good checkpoint: {why}")


def read(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """One checkpoint, checked against its manifest.

    Args:
        path: its folder.
        mmap: see :func:`newest_good`.

    Raises:
        CheckpointError: it is damaged, incomplete or no checkpoint; the message names the file.
    """
    manifest = _manifest(path)
    for name, entry in manifest["files"].items():
        _check_size(path / name, entry["bytes"])
        try:
            found = durable.sha256_of(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name}: cannot be read: {error}") from error
        if found != entry["sha256"]:
            raise CheckpointError(
                f"{path / name}: damaged or changed: expected SHA-256 {entry['sha256'][:12]}... of its manifest, got "
                f"{found[:12]}..."
            )
    try:
        model = safetensors.torch.load_file(path / WEIGHTS)
    except Exception as error:  # many kinds; each means the same here
        raise CheckpointError(f"{path / WEIGHTS}: not a readable file of weights: {error}") from error
    try:
        state = torch.load(path / STATE, weights_only=True, map_location="cpu", mmap=mmap)
    except Exception as error:  # likewise
        raise CheckpointError(f"{path / STATE}: not a readable state: {error}") from error
    state = {**state, "model": model} if isinstance(state, dict) else {}
    odd = [key for key, kind in KINDS.items() if not isinstance(state.get(key), kind)]
    if odd or state["step"] != manifest["step"]:
        names = ", ".join(odd or ["step"])
        raise CheckpointError(f"{path / STATE}: not a state of ep-train (what does not fit: {names})")
    return state


def existing(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder, oldest first, whether good or not."""
    places = (folder / FOLDER).iterdir() if (folder / FOLDER).is_dir() else ()
    named = ((NAME.fullmatch(path.name), path) for path in places)
    return [path for *_, path in sorted((int(m[1]), int(m[2] or 1), path) for m, path in named if m)]


def never_written(folder: Path) -> bool:
    """No checkpoint was ever completed there: none is there, under whichever name."""
    refused = (folder / FOLDER).glob(f"{REFUSED}*")
    return not existing(folder) and next(refused, None) is None and not (folder / OLD).exists()


def set_aside(refused: list[Path]) -> None:
    """Rename checkpoints that were refused: they are kept, and not read again.

    Raises:
        CheckpointError: they cannot be renamed.
    """
    for path in refused:
        name, number = f"{REFUSED}{path.name}", 2
        while path.with_name(name).exists():
            name, number = f"{REFUSED}{path.name}.{number}", number + 1
        try:
            path.rename(path.with_name(name))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be renamed to {name}: {error}") from error


def remove_newer(folder: Path, than: Path) -> None:
    """Remove a run's checkpoints that are newer than one of them.

    Raises:
        CheckpointError: they cannot be removed.
    """
    found = existing(folder)
    path = than
    try:
        for path in reversed(found[found.index(than) + 1 :]):
            durable.remove_folder(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be removed: {_reason(error)}") from error


def model_of(folder: Path) -> dict[str, Any]:
    """The newest good checkpoint for whoever wants its "model" only; one of an earlier development version will do.

    Raises:
        CheckpointError: see :func:`newest_good`.
    """
    if existing(folder) or not (folder / OLD).is_file():
        return load(folder, mmap=True)
    try:
        state = torch.load(folder / OLD, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # torch.load raises many kinds; each means the same here
        raise CheckpointError(f"{folder / OLD}: not a readable checkpoint: {error}") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise CheckpointError(f"{folder / OLD}: not a checkpoint of ep-train")
    return state


def _plain(model: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as the format wants them: on the host, in row-major memory."""
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in model.items()}


def _save_state(state: dict[str, Any], file: durable.HashedFile) -> None:
    try:
        torch.save({key: value for key, value in state.items() if key != "model"}, file)  # type: ignore[arg-type]
    except RuntimeError:  # torch's own, raised over that of the file
        if file.failed is not None:
            raise file.failed from None
        raise


def _new_name(folder: Path, step: int) -> Path:
    name, number = f"step-{step:08d}", 2
    while (folder / FOLDER / name).exists():  # the same step again, in a run that went back
        name, number = f"step-{step:08d}-{number}", number + 1
    return folder / FOLDER / name


def _parts(folder: Path) -> list[Path]:
    return list((folder / FOLDER).glob(f".*{durable.PART}"))


def _prune(folder: Path, keep: int, saved: Path) -> None:
    """Remove all but the newest ``keep`` and, whatever its step, the one just ``saved``."""
    complete = 0
    for path in reversed(existing(folder)):
        try:
            manifest = _manifest(path)
            for name, entry in manifest["files"].items():
                _check_size(path / name, entry["bytes"])
            complete += manifest["scheduled"]
            wanted = path == saved or (manifest["scheduled"] and complete <= keep)
        except CheckpointError:
            wanted = complete < keep
        if not wanted:
            with suppress(OSError):  # what cannot be removed is only in excess
                durable.remove_folder(path)


def _manifest(path: Path) -> dict[str, Any]:
    """A manifest that fits itself and its folder's name."""
    where = path / MANIFEST
    try:
        if where.stat().st_size > LARGEST_MANIFEST:
            raise ValueError("too large")
        manifest = json.loads(where.read_text(encoding="utf-8"))
        digest = manifest.pop("sha256")
        if digest != _digest(manifest):
            raise ValueError("it does not fit its own SHA-256")
        if manifest["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT}, got {manifest['format']!r}")
        if set(manifest["files"]) != {WEIGHTS, STATE}:
            raise ValueError(f"expected the files {WEIGHTS} and {STATE}, got {', '.join(manifest['files'])}")
        for entry in manifest["files"].values():
            if not (isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)):
                raise ValueError("expected a number of bytes and a SHA-256 for every file")
        if not isinstance(manifest["scheduled"], bool):
            raise ValueError(f"expected true or false for scheduled, got {manifest['scheduled']!r}")
        match = NAME.fullmatch(path.name)
        if match is None or manifest["step"] != int(match[1]):
            raise ValueError(f"it is of step {manifest['step']!r}")
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: damaged or changed: {_reason(error)}") from error
    return dict(manifest)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if size != expected:
        raise CheckpointError(f"{path}: truncated or changed: expected {expected} bytes, got {size}")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"{error}" if isinstance(error, ValueError) else repr(error)
