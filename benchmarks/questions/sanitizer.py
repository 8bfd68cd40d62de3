"""sanitizer: compute-sanitizer over the small GPU tests of each backend."""

from __future__ import annotations

import re
import shutil
from functools import partial

from benchmarks.case import Case, Row
from benchmarks.commands import lines, log_file, pytest_command, run_tests
from benchmarks.registry import Question
from benchmarks.setting import Setting
from ep_kernels import backends

TOOLS = ("memcheck", "racecheck", "synccheck")
ERRORS = 86  # exit code that the tool is told to use
LIMIT = 300.0


def cases(setting: Setting) -> list[Case]:
    """A tool and a backend each; first cuda, which compiles nothing under the tool."""
    return [
        Case(f"compute-sanitizer --tool {tool}, {name}", partial(rows, tool, name), LIMIT)
        for name in ("cuda", "triton")
        for tool in TOOLS
    ]


def rows(tool: str, name: str) -> list[Row]:
    """Clean is: it ended well, said so, and said zero."""
    row: Row = {"name": f"{tool}, {name}"}
    reason = backends.why_not(name)
    if shutil.which("compute-sanitizer") is None:
        reason = "compute-sanitizer is not on the PATH"
    if reason is not None:
        return [{**row, "status": "unavailable", "reason": reason}]
    log = log_file(f"{tool}-{name}")
    row |= run_tests(command(tool, name), log, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    text = log.read_text(errors="replace") if log.exists() else ""
    summary = [line for line in text.splitlines() if "SUMMARY" in line]
    row["summary"] = summary[-3:]
    if row["status"] == "ok" and not (summary and all(re.search(r"\b0 (errors|hazards)", line) for line in summary)):
        row |= {"status": "failed", "reason": summary[-1] if summary else "no summary"}
    return [row]


def command(tool: str, name: str) -> list[str]:
    """The tests named ``small`` of a backend, one process, one call each."""
    tests = pytest_command("gpu", f"small and {name}")
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(ERRORS), "--print-limit", "20",
            "--target-processes", "all", *tests]  # fmt: skip


QUESTION = Question(
    "sanitizer",
    "compute-sanitizer over the small tests with marker gpu",
    cases,
    lines,
    conditions="one process, one call a test, torch's caching allocator off",
    seconds={"cuda": 60.0},
)
