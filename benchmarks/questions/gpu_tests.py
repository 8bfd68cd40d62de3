"""gpu_tests: the tests with marker ``gpu``, of each backend."""

from __future__ import annotations

from functools import partial

from benchmarks.case import Case, Row
from benchmarks.commands import lines, log_file, pytest_command, run_tests, workers
from benchmarks.registry import Question
from benchmarks.setting import Setting

LIMIT = 600.0


def cases(setting: Setting) -> list[Case]:
    """First the backend that compiles nothing; with ``triton`` come the tests of none."""
    return [Case(f"pytest -m gpu, {name}", partial(rows, name), LIMIT) for name in ("cuda", "triton")]


def rows(name: str) -> list[Row]:
    """All but the slow ones."""
    chosen = "cuda" if name == "cuda" else "not cuda"
    command = pytest_command("gpu and not slow", chosen, workers=workers())
    return [{"name": name, **run_tests(command, log_file(f"tests-{name}"))}]


QUESTION = Question(
    "gpu_tests",
    "the tests with marker gpu, on the device",
    cases,
    lines,
    conditions="all but the slow ones, half the cores' number of processes",
    seconds={"cuda": 90.0},
)
