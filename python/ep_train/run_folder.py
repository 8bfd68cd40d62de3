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
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG, METRICS, SUMMARY, CURVES = "config.json", "metrics.jsonl", "summary.json", "curves.png"
NONFINITE = "nonfinite"
# What a run writes, and so all that overwrite=True removes.
RUN_FILES = (CONFIG, METRICS, SUMMARY, CURVES, "checkpoint*.pt*")

Row = dict[str, Any]


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
    ) -> RunFolder:
        """Make the folder of a new run.

        Args:
            out: the folder; default: `runs/<dataset>-<model>-<method>-<UTC timestamp>-<seed>`.
            dataset, model, method, seed: name the run; characters that are awkward in a file name
                become "-".
            overwrite: use `out` though it is not empty: what an older run wrote there (`RUN_FILES`)
                is removed, other files stay.
            runs: parent of the default folder.

        Raises:
            RunFolderError: `out` is a file, cannot be made, or is not empty. A run that has written no
                metrics yet (at most a config.json) counts as empty.
        """
        if out is not None:
            return cls(_prepare(out, overwrite))
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
            return cls(path)
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
            _write_atomically(metrics, "".join(_line(row) for row in rows))
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
        """Append one row to metrics.jsonl as one line, and flush it to the file.

        Raises:
            TypeError: a value has no form in JSON (it is named); nothing is written.
        """
        line = _line(row)
        with (self.path / METRICS).open("a", encoding="utf-8", newline="\n") as file:
            file.write(line)

    def read_metrics(self) -> list[Row]:
        """The rows written so far; see `read_metrics`."""
        path = self.path / METRICS
        return read_metrics(path) if path.exists() else []

    def _write(self, name: str, values: Mapping[str, Any]) -> Path:
        path = self.path / name
        _write_atomically(path, json.dumps(to_json(values), indent=2, allow_nan=False) + "\n")
        return path


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
        except ValueError as error:  # UnicodeDecodeError is one too
            if number == len(lines):
                break
            raise RunFolderError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise RunFolderError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
        try:
            rows.append(_restore(row))
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
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


def _write_atomically(path: Path, text: str) -> None:
    """Replace a file by a new one that is on the disk in full."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _prepare(out: Path, overwrite: bool) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        entries = {entry.name: entry for entry in out.iterdir()}
        metrics = entries.get(METRICS)
        unused = set(entries) <= {CONFIG, METRICS} and (metrics is None or metrics.stat().st_size == 0)
        if not unused and not overwrite:
            raise RunFolderError(
                f"{out} is not empty ({', '.join(sorted(entries)[:5])}{', ...' if len(entries) > 5 else ''});"
                " choose another folder, or pass --overwrite to replace the run in it"
            )
        for pattern in RUN_FILES:
            for old in out.glob(pattern):
                old.unlink()
    except OSError as error:  # FileExistsError when it is a file
        raise RunFolderError(f"cannot use {out} as the run's folder: {error}") from error
    return out


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+]+", "-", text).strip("-.") or "unnamed"
