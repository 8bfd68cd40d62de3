"""The commands that come before the tables: the tests on the device, and compute-sanitizer on the small ones."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu.problem import BACKENDS
from benchmarks.gpu.rows import append
from ep_kernels import backends

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]
OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
NAME = re.compile(rf"tests/\S+::.+?(?=\s+{OUTCOME.pattern}|$)")
SANITIZER_ERRORS = 86  # exit code that compute-sanitizer is told to use


def environment() -> dict[str, str]:
    """Of the children: the checkout is importable, installed or not."""
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1"}


def run(command: list[str], log: Path, seconds: float, extra: dict[str, str] | None = None) -> tuple[int | None, float]:
    """Exit code (None: stopped after ``seconds``) and duration. Output is appended to ``log``."""
    began = time.perf_counter()
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env={**environment(), **(extra or {})}, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process)
    return code, time.perf_counter() - began


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a child and all that it started (its own process group)."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tests_command(workers: int, backend: str) -> list[str]:
    """The tests with marker ``gpu`` of a backend (with ``triton`` those of none too), but for the slow ones."""
    chosen = "cuda" if backend == "cuda" else "not cuda"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu and not slow", "-k", chosen, "-v", "--tb=short",
               "-W", "default", "-p", "no:cacheprovider"]  # fmt: skip
    return [*command, "-n", str(workers)] if workers > 1 else command


def workers() -> int:
    """Processes for the tests: half the cores if pytest-xdist is there."""
    return max(1, (os.cpu_count() or 1) // 2) if importlib.util.find_spec("xdist") else 1


def run_tests(out: Path, seconds: float) -> None:
    """A row for each backend, with the counts of what ended in time; first the one that compiles nothing."""
    deadline = time.time() + seconds
    for left, name in ((2, "cuda"), (1, "triton")):
        run_tests_of(name, out, (deadline - time.time()) / left)


def run_tests_of(name: str, out: Path, seconds: float) -> None:
    """One row."""
    log = out / f"tests-{name}.log"
    row: Row = {"section": "tests", "key": f"pytest -m gpu, {name}"}
    append(out / "rows.jsonl", {**row, "status": "started"})
    code, took = run(tests_command(workers(), name), log, seconds)
    row |= {"took": took, **outcomes(log.read_text(errors="replace"))}
    if code is None:
        row |= {"status": "failed", "reason": f"stopped after {seconds:.0f} s: the counts are of what ended before"}
    elif code == 0:
        row["status"] = "passed"
    else:
        row |= {
            "status": "failed",
            "reason": f"exit code {code}: {'; '.join(row['failures'][:5]) or f'see {log.name}'}",
        }
    append(out / "rows.jsonl", row)


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


LEAST_SANITIZED = 40.0  # seconds: importing torch under a tool takes half of it


def sanitizer_runs() -> list[tuple[str, str]]:
    """Tools and backends, the most important first: cuda, which compiles nothing under the tool."""
    order = sorted(BACKENDS, key=lambda name: name != "cuda")
    return [(tool, name) for name in order for tool in ("memcheck", "racecheck", "synccheck")]


def sanitizer_command(tool: str, backend: str) -> list[str]:
    """The tests named ``small`` of a backend, one process, one call each."""
    return [
        "compute-sanitizer", "--tool", tool, "--error-exitcode", str(SANITIZER_ERRORS), "--print-limit", "20",
        "--target-processes", "all",
        sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-k", f"small and {backend}", "-v", "--tb=short",
        "-W", "default", "-p", "no:cacheprovider",
    ]  # fmt: skip


def run_sanitizer(out: Path, seconds: float) -> None:
    """A row for each tool and backend."""
    deadline = time.time() + seconds
    runs = sanitizer_runs()
    for number, (tool, name) in enumerate(runs):
        row: Row = {"section": "sanitizer", "key": f"compute-sanitizer --tool {tool}, {name}"}
        append(out / "rows.jsonl", {**row, "status": "started"})
        if shutil.which("compute-sanitizer") is None:
            append(out / "rows.jsonl", {**row, "status": "skipped", "reason": "compute-sanitizer is not on the PATH"})
            continue
        reason = backends.why_not(name)
        if reason is not None:
            append(out / "rows.jsonl", {**row, "status": "skipped", "reason": f"backend {name} cannot run: {reason}"})
            continue
        log = out / f"{tool}-{name}.log"
        share = max(LEAST_SANITIZED, (deadline - time.time()) / (len(runs) - number))
        if number > 0 and deadline - time.time() < LEAST_SANITIZED:
            reason = "no time left: --sections sanitizer --minutes 8 runs them all"
            append(out / "rows.jsonl", {**row, "status": "skipped", "reason": reason})
            continue
        extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        code, took = run(sanitizer_command(tool, name), log, share, extra)
        text = log.read_text(errors="replace")
        summary = [line for line in text.splitlines() if "SUMMARY" in line]
        row |= {"took": took, **outcomes(text), "tail": text[-1500:], "summary": summary[-3:]}
        clean = all(re.search(r"\b0 (errors|hazards)", line) for line in summary)
        if code == 0 and summary and clean:
            row["status"] = "passed"
        else:
            why = f"stopped after {share:.0f} s" if code is None else f"exit code {code}"
            row |= {"status": "failed", "reason": f"{why}; {' '.join(summary[-1:]) or 'no summary'}"}
        append(out / "rows.jsonl", row)
