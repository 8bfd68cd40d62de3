"""Cases as lines of a file, written as soon as they end, so that a run that is stopped goes on where it was."""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.case import Case, Row, short

Record = dict[str, Any]  # question, case, status, reason, took, rows
BROKEN = 3  # exit code: the device does not answer any more
ENDED = 4  # exit code: the question's time is over


class TimeIsUp(BaseException):
    """A case has taken as long as it may. No ``except Exception`` on the way swallows it."""


def append(path: Path, record: Record) -> None:
    """One line, on disk when this returns; after a line that was cut short, too."""
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
        cut = size > 0 and file.read(1) != b"\n"
        file.write(b"\n" * cut + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Record]:
    """The last record of each question and case, in the order of their first lines.

    Each has the ``environment`` of the process that ran it: that of the last line of this kind before it.
    """
    records: dict[tuple[str, str], Record] = {}
    environment: Row = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
                if "environment" in record and "case" not in record:
                    environment = record["environment"]
                    continue
                records[record["question"], record["case"]] = {"environment": environment, **record}
            except (ValueError, KeyError):
                continue
    return list(records.values())


def close_started(path: Path, question: str, reason: str, status: str = "failed") -> None:
    """Cases of a question that were started and never finished get this reason."""
    for record in read(path):
        if record["question"] == question and record["status"] == "started":
            append(path, {**record, "status": status, "reason": reason})


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """TimeIsUp after ``seconds``, at the next Python instruction of the main thread; again every second if need be."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TimeIsUp(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_cases(path: Path, question: str, cases: Sequence[Case], *, only: str, deadline: float) -> int:
    """Every case that has no record yet; returns the exit code.

    Args:
        only: cases whose key contains this. deadline: as time.time(); later cases are recorded as skipped.
    """
    done = {r["case"] for r in read(path) if r["question"] == question and r["status"] not in ("started", "skipped")}
    code = 0
    for case in cases:
        if case.key in done or only not in case.key:
            continue
        record: Record = {"question": question, "case": case.key, "rows": []}
        left = deadline - time.time()
        if left < 1:
            append(path, {**record, "status": "skipped", "reason": "the question's time was over"})
            code = ENDED
            continue
        append(path, {**record, "status": "started"})
        began = time.perf_counter()
        try:
            with limited(min(case.limit, left)):
                record |= {"rows": case.run(), "status": "ok"}
        except TimeIsUp as error:
            # cut by the question's deadline, it is made up later; by its own limit, it would be cut again
            record |= {"status": "skipped" if left < case.limit else "failed", "reason": str(error)}
            code = ENDED if left < case.limit else code
        except Exception as error:
            traceback.print_exc()
            record |= {"status": "failed", "reason": short(error)}
        record["took"] = round(time.perf_counter() - began, 3)
        append(path, record)
        print(f"{question}: {case.key}: {record['status']} {record.get('reason', '')} ({record['took']} s)", flush=True)
        if record["status"] == "failed" and not answers():
            return BROKEN
    return code


def answers() -> bool:
    """Whether the device still works: after an illegal access, nothing does in that process."""
    if not torch.cuda.is_available():
        return True
    try:
        with limited(10):
            torch.cuda.synchronize()
            return bool((torch.ones(8, device="cuda") * 2).sum().item() == 16)
    except (Exception, TimeIsUp):
        return False


def flat(records: Sequence[Record]) -> list[Row]:
    """Rows as result files keep them: each with its question, its case and what it was measured on.

    A case without rows (failed, skipped) becomes one row that says why.
    """
    found = []
    for record in records:
        head = {"question": record["question"], "case": record["case"]}
        rows = record["rows"] or [{"name": "", "status": record["status"], "reason": record.get("reason", "")}]
        found += [{**head, "status": "ok", **row, "environment": record.get("environment", {})} for row in rows]
    return found
