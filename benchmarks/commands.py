"""Commands that a question runs on a GPU machine, and what their output says: pytest, compute-sanitizer."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.case import Row
from benchmarks.rows import TimeIsUp
from benchmarks.runner import LOGS, run

OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
NAME = re.compile(rf"tests/\S+::.+?(?=\s+{OUTCOME.pattern}|$)")
DAY = 86_400.0


def pytest_command(marker: str, chosen: str, *, workers: int = 1) -> list[str]:
    """The GPU tests with a marker, by keyword."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", marker, "-k", chosen, "-v", "--tb=short",
               "-W", "default", "-p", "no:cacheprovider"]  # fmt: skip
    return [*command, "-n", str(workers)] if workers > 1 else command


def workers() -> int:
    """Processes for the tests: half the cores if pytest-xdist is there."""
    return max(1, (os.cpu_count() or 1) // 2) if importlib.util.find_spec("xdist") else 1


def log_file(name: str) -> Path:
    """Where a command's output goes."""
    folder = Path(os.environ.get(LOGS, "."))
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.log"


def run_tests(command: Sequence[str], log: Path, extra: dict[str, str] | None = None) -> Row:
    """Run tests to their end, or to the end of the question's time: the row has what ended before.

    Returns:
        ``status``, ``reason``, ``counts`` by outcome, ``failures``, ``seconds``, and the last lines as ``tail``.
    """
    log.unlink(missing_ok=True)
    began, code = time.perf_counter(), None
    stopped = ""
    try:
        code = run(command, log, DAY, extra)
    except TimeIsUp as error:  # of the case
        stopped = f"{error}: the counts are of what ended before"
    text = log.read_text(errors="replace") if log.exists() else ""
    row: Row = {"seconds": time.perf_counter() - began, **outcomes(text), "tail": text[-1500:]}
    if code == 0:
        return {**row, "status": "ok"}
    why = stopped or f"exit code {code}: {'; '.join(row['failures'][:5]) or f'see {log.name}'}"
    return {**row, "status": "failed", "reason": why}


def outcomes(text: str) -> Row:
    """Counts by outcome and names of failures, of pytest's verbose output with or without xdist, also when cut off."""
    seen: dict[str, str] = {}
    for line in text.splitlines():
        name, outcome = NAME.search(line), OUTCOME.search(line)
        if name and outcome:
            test = name.group(0).split(" - ")[0].strip()
            if not (outcome.group(1) == "PASSED" and seen.get(test) == "ERROR"):
                seen[test] = outcome.group(1)
    counts = Counter(seen.values())
    failures = [test for test, outcome in seen.items() if outcome in ("FAILED", "ERROR")]
    return {"counts": {k.lower(): v for k, v in sorted(counts.items())}, "failures": failures}


def lines(rows: Sequence[Row]) -> list[str]:
    """A line a command."""
    from benchmarks.markdown import number, table

    head = ("command", "result", "seconds", "counts", "")
    cells = [
        [row["case"], "passed" if row["status"] == "ok" else row["status"], number(row.get("seconds")),
         ", ".join(f"{n} {what}" for what, n in row.get("counts", {}).items()), row.get("reason", "")]
        for row in rows
    ]  # fmt: skip
    return table(head, cells)
