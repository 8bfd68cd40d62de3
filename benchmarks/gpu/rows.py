"""Results as lines of a file, written as soon as they exist, and the jobs that make them."""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.gpu.problem import Options

Row = dict[str, Any]
BROKEN = 3  # exit code: the device does not answer any more
ENDED = 4  # exit code: the section's time is over


class Wrong(RuntimeError):
    """A result that differs from the reference: it is not timed."""


@dataclass(frozen=True)
class Job:
    """One row to be. ``run`` returns its values; ``limit`` is the longest that it may take, in seconds."""

    key: str
    run: Callable[[], Row]
    limit: float = 60.0


def append(path: Path, row: Row) -> None:
    """One line, on disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """The last row of each section and key, in the order of their first lines."""
    rows: dict[tuple[str, str], Row] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # a process was stopped while it wrote
                continue
            rows[row["section"], row["key"]] = row
    return list(rows.values())


def close_started(path: Path, section: str, reason: str) -> None:
    """Rows of a section that were started and never finished get this reason."""
    for row in read(path):
        if row["section"] == section and row["status"] == "started":
            append(path, {**row, "status": "failed", "reason": reason})


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """TimeoutError after ``seconds``, at the next Python instruction of the main thread."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_jobs(options: Options, jobs: Sequence[Job]) -> int:
    """Every job that has no row yet; returns the exit code."""
    done = {row["key"] for row in read(options.rows) if row["section"] == options.section}
    code = 0
    for job in jobs:
        if job.key in done or options.only not in job.key:
            continue
        row: Row = {"section": options.section, "key": job.key}
        left = options.deadline - time.time()
        if left < 1:
            append(options.rows, {**row, "status": "skipped", "reason": "the section's time was over"})
            code = ENDED
            continue
        append(options.rows, {**row, "status": "started"})
        began = time.perf_counter()
        try:
            with limited(min(job.limit, left)):
                row |= {"status": "ok", **job.run()}
        except Exception as error:
            traceback.print_exc()
            status = "wrong" if isinstance(error, Wrong) else "failed"
            row |= {"status": status, "reason": _short(error)}
        row["took"] = round(time.perf_counter() - began, 3)
        append(options.rows, row)
        print(f"{options.section}: {job.key}: {row['status']} {row.get('reason', '')} ({row['took']} s)", flush=True)
        if row["status"] == "failed" and not _answers():
            return BROKEN
    return code


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _answers() -> bool:
    """Whether the device still works: after an illegal access, nothing does in that process."""
    if not torch.cuda.is_available():
        return True
    try:
        with limited(10):
            torch.cuda.synchronize()
            return bool((torch.ones(8, device="cuda") * 2).sum().item() == 16)
    except Exception:
        return False
