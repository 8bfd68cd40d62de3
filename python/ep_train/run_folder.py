"""The folder of one run: config.json, metrics.jsonl (one row per line), summary.json.

JSON has no NaN and no infinity, and a row with one is just the row somebody will look for. Such a
number is written as null and named in an extra field of the outermost object,

    {"epoch": 3, "train_loss": null, "nonfinite": {"train_loss": "nan"}}

(nested values by their path: "layers/0/residual"), so that every line is valid JSON and
`read_metrics` gives back the number.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from . import durable, locks

CONFIG, METRICS, SUMMARY, CURVES = "config.json", "metrics.jsonl", "summary.json", "curves.png"
NONFINITE = "nonfinite"
# What a run writes, and so all that overwrite=True removes.
EVENTS = "tensorboard/events.out.tfevents.*"
OWN = (CONFIG, METRICS, SUMMARY, CURVES)
RUN_FILES = (*OWN, EVENTS, "checkpoint*.pt*", *(f".{name}-*.tmp" for name in OWN))
RUN_FOLDERS = ("checkpoints", "diverged")  # of these, what begins with step-, refused-step- or .step-

Row = dict[str, Any]

_log = logging.getLogger(__name__)
_in_use: set[Path] = set()  # by this process


class RunFolderError(ValueError):
    """The folder or a file in it cannot be used; the message says why and what to do."""


class RunFolder:
    """A folder that one run writes to. Make it with `create`, or with `resume` to go on.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(
        cls,
        out: Path | None = None,
        *,
        dataset: str,
        model: str,
        method: str,
        seed: int,
        overwrite: bool = False,
        runs: Path = Path("runs"),
        held: ExitStack | None = None,
    ) -> RunFolder:
        """Make the folder of a new run.

        Args:
            out: the folder; default: `runs/<dataset>-<model>-<method>-<UTC timestamp>-<seed>`.
            dataset, model, method, seed: name the run; characters that are awkward in a file name
                become "-".
            overwrite: use `out` though it is not empty: what an older run wrote there (`RUN_FILES`)
                and in its `RUN_FOLDERS` is removed, other files stay.
            runs: parent of the default folder.
            held: keeps other processes out of the folder until it is closed; default: only while it is made.

        Raises:
            RunFolderError: `out` is a file, cannot be made, is not empty, or another process runs in it. A run that
                has written no metrics yet (at most a config.json) counts as empty.
        """
        if out is not None:
            try:
                out.mkdir(parents=True, exist_ok=True)
                _refuse_used(out, overwrite)  # before the lock, too: it leaves a file
                folder = cls(out)
                with ExitStack() as stack:
                    stack.enter_context(folder.in_use())
                    _refuse_used(out, overwrite)
                    _clear(out)
                    if held is not None:
                        held.enter_context(stack.pop_all())
            except OSError as error:  # FileExistsError when it is a file
                raise RunFolderError(f"cannot use {out} as the run's folder: {error}") from error
            return folder
        stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S")
        stem = "-".join(_slug(part) for part in (dataset, model, method, stamp, str(seed)))
        for attempt in range(1, 1000):
            path = runs / (stem if attempt == 1 else f"{stem}-{attempt}")
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue  # another run of the same second
            except OSError as error:
                raise RunFolderError(f"cannot make the run folder {path}: {error}") from error
            folder = cls(path)
            if held is not None:
                held.enter_context(folder.in_use())
            return folder
        raise RunFolderError(f"cannot make a run folder {runs / stem}: the name is taken; give one with --out")

    @classmethod
    def resume(cls, path: Path, *, before_epoch: int | None = None) -> RunFolder:
        """Open the folder of a run that stopped, to append to its metrics.

        Args:
            path: the folder.
            before_epoch: drop the rows from this epoch on: they will be written again.

        Raises:
            RunFolderError: there is no run in it, or its metrics are damaged elsewhere than in a torn
                last line, which is dropped.
        """
        if not (path / CONFIG).is_file():
            raise RunFolderError(f"{path}: no run to resume, {CONFIG} is not there")
        metrics = path / METRICS
        if metrics.is_file():
            rows = read_metrics(metrics)
            if before_epoch is not None:
                rows = [row for row in rows if not _is_from(row, before_epoch)]
            durable.replace_text(metrics, "".join(_line(row) for row in rows))
        return cls(path)

    def write_config(self, config: Mapping[str, Any]) -> Path:
        """Write config.json, atomically; returns its path.

        Raises:
            TypeError: a value has no form in JSON (it is named).
        """
        return self._write(CONFIG, config)

    def write_summary(self, summary: Mapping[str, Any]) -> Path:
        """Write summary.json, atomically: a reader never sees half of it; returns its path.

        Raises:
            TypeError: a value has no form in JSON (it is named).
        """
        return self._write(SUMMARY, summary)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl as one line, and bring it to the disk.

        Raises:
            TypeError: a value has no form in JSON (it is named); nothing is written.
            RunFolderError: it cannot be written (no space left); the rows before it are as they were.
        """
        line = _line(row).encode()
        path = self.path / METRICS
        try:
            with path.open("ab", buffering=0) as file:
                before = file.seek(0, os.SEEK_END)
                try:
                    written = 0
                    while written < len(line):
                        written += file.write(line[written:])
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(before)  # no half of a line
                    raise
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be written: {error.strerror or error}") from error

    @contextmanager
    def in_use(self, *, wait: float = 0.0) -> Iterator[None]:
        """Keep other processes from running in the folder meanwhile. A file system without locks, or one that is only
        read, is worth a warning in the log.

        Args:
            wait: so many seconds for another process's end; that is a warning, too.

        Raises:
            RunFolderError: another process runs in it, or it cannot be locked for another reason.
        """
        here = self.path.resolve()
        if here in _in_use:
            yield
            return
        descriptor = None
        try:
            descriptor = _take(here, wait)
        except BlockingIOError as error:
            busy = f"{self.path}: another process is running in this folder: wait for its end, or stop it"
            raise RunFolderError(busy) from error
        except OSError as error:
            reason = error.strerror or error
            if error.errno not in locks.NO_LOCKS:
                raise RunFolderError(f"{self.path / locks.LOCK}: cannot be locked: {reason}") from error
            _log.warning("%s cannot be locked (%s): nothing keeps other processes out of it", self.path, reason)
        _in_use.add(here)
        try:
            yield
        finally:
            _in_use.discard(here)
            if descriptor is not None:
                os.close(descriptor)

    def read_metrics(self) -> list[Row]:
        """The rows written so far; see `read_metrics`."""
        path = self.path / METRICS
        return read_metrics(path) if path.exists() else []

    def _write(self, name: str, values: Mapping[str, Any]) -> Path:
        path = self.path / name
        text = json.dumps(to_json(values), indent=2, allow_nan=False) + "\n"
        try:
            durable.replace_text(path, text)
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be written: {error.strerror or error}") from error
        return path


class NoFolder(RunFolder):
    """The same folder in a process that does not write to it: what it is given is left out."""

    def write_config(self, config: Mapping[str, Any]) -> Path:
        """Nothing."""
        return self.path / CONFIG

    def write_summary(self, summary: Mapping[str, Any]) -> Path:
        """Nothing."""
        return self.path / SUMMARY

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Nothing."""

    @contextmanager
    def in_use(self, *, wait: float = 0.0) -> Iterator[None]:
        """Nothing: the process that writes there keeps others out."""
        yield


def _take(folder: Path, wait: float) -> int:
    """See :func:`ep_train.locks.take`; ``wait`` in seconds."""
    if wait > 0:
        with suppress(BlockingIOError):
            return locks.take(folder)
        _log.warning("another process is running in %s: waiting for its end, %.0f s at most", folder, wait)
    deadline = time.monotonic() + wait
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(1.0, left))
        with suppress(BlockingIOError):
            return locks.take(folder)
    return locks.take(folder)


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, or of the one in a run's folder, with NaN and infinity put back.

    A last line that is torn (the run was killed while it wrote) is left out.

    Raises:
        RunFolderError: the file cannot be read, or another line is no JSON object (its number is given).
    """
    if path.is_dir():
        path = path / METRICS
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RunFolderError(f"{path}: cannot read the metrics: {error}") from error
    while lines and not lines[-1].strip(b" \t\r\0"):  # zeros: what a power cut can leave
        lines.pop()
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one too
            if number == len(lines):
                break
            raise RunFolderError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise RunFolderError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
        try:
            rows.append(_restore(row))
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise RunFolderError(f"{path}, line {number}: its field {NONFINITE!r} does not fit ({error!r})") from error
    return rows


def to_json(values: Mapping[str, Any]) -> Row:
    """A mapping as JSON's types, with a `nonfinite` field where needed (see the module's docstring).

    Paths, enums, dataclasses, torch dtypes and devices, and tensors or arrays with one number are converted.

    Raises:
        TypeError: a value has no form in JSON (it is named), or a key `nonfinite` is in the way.
    """
    if NONFINITE in values:
        raise TypeError(f"the key {NONFINITE!r} is reserved for numbers that JSON cannot hold")
    nonfinite: dict[str, str] = {}
    plain: Row = _plain(values, (), nonfinite)
    return {**plain, NONFINITE: nonfinite} if nonfinite else plain


def _plain(value: Any, where: tuple[str, ...], nonfinite: dict[str, str]) -> Any:
    if isinstance(value, enum.Enum):
        return _plain(value.value, where, nonfinite)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        nonfinite[_join(where)] = str(float(value))
        return None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, (*where, str(key)), nonfinite) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, (*where, str(index)), nonfinite) for index, entry in enumerate(value)]
    if type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device"):
        return str(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return _plain(value.item(), where, nonfinite)
    raise TypeError(f"{_join(where)}: a {type(value).__name__} has no form in JSON")


def _join(where: tuple[str, ...]) -> str:
    """A path in the manner of JSON Pointer: "~" and "/" inside a key are "~0" and "~1"."""
    return "/".join(key.replace("~", "~0").replace("/", "~1") for key in where)


def _restore(row: Row) -> Row:
    for where, number in row.pop(NONFINITE, {}).items():
        *parents, last = (key.replace("~1", "/").replace("~0", "~") for key in where.split("/"))
        place: Any = row
        for name in parents:
            place = place[int(name) if isinstance(place, list) else name]
        place[int(last) if isinstance(place, list) else last] = float(number)
    return row


def _is_from(row: Row, epoch: int) -> bool:
    number = row.get("epoch")
    return isinstance(number, int | float) and number >= epoch


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(to_json(row), allow_nan=False) + "\n"


def _refuse_used(out: Path, overwrite: bool) -> None:
    entries = {entry.name: entry for entry in out.iterdir() if entry.name != locks.LOCK}
    metrics = entries.get(METRICS)
    torn = {entry.name for entry in out.glob(".*.tmp")}  # of a run that was killed
    unused = set(entries) - torn <= {CONFIG, METRICS} and (metrics is None or metrics.stat().st_size == 0)
    if not unused and not overwrite:
        raise RunFolderError(
            f"{out} is not empty ({', '.join(sorted(entries)[:5])}{', ...' if len(entries) > 5 else ''});"
            " choose another folder, or pass --overwrite to replace the run in it"
        )


def _clear(out: Path) -> None:
    """Remove what an older run left; the lock stays."""
    for pattern in RUN_FILES:
        for old in out.glob(pattern):
            old.unlink()
    for name in RUN_FOLDERS:
        for old in list((out / name).iterdir()) if (out / name).is_dir() else ():
            if re.match(r"(refused-|\.)?step-\d", old.name):
                shutil.rmtree(old)
        with suppress(OSError):  # not there, or not empty
            (out / name).rmdir()


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+]+", "-", text).strip("-.") or "unnamed"
