"""Asks questions, each in a process of its own with its share of the time; results are on disk case by case.

Beside the result file OUT lies OUT.part.jsonl while a run is under way: the same command goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.case import Row
from benchmarks.machine import ROOT, environment
from benchmarks.problem import wgmma_runs
from benchmarks.registry import Question
from benchmarks.rows import BROKEN, append, close_started, flat, read
from benchmarks.setting import Setting

GRACE = 5.0  # seconds after a question's deadline, then its process is stopped
WGMMA_SHARE = 0.15  # of a question's time, for the cases of wgmma
LOGS = "EP_KERNELS_BENCH_LOGS"  # folder where a question's own commands leave their output
TRIES = 6  # processes for one question, when cases break them


class RunError(RuntimeError):
    """A run that cannot go on: the message says what to do."""


class Runner:
    """One run of the command.

    Args:
        out: the result file; rows of other questions that it holds stay.
        minutes: time for everything; None: each question takes what it takes.
        restart: begin again where a run of other settings was stopped.
    """

    def __init__(
        self, setting: Setting, out: Path, command: str, *, minutes: float | None = None, restart: bool = False
    ) -> None:
        self.setting, self.out = setting, out
        self.part, self.log = out.with_suffix(".part.jsonl"), out.with_suffix(".log")
        self.environment = environment(setting.device, setting.threads, command)
        self.deadline = None if minutes is None else time.time() + 60 * minutes
        self.began = time.time()
        self.notes: dict[str, str] = {}
        self.written: list[Row] = []
        out.parent.mkdir(parents=True, exist_ok=True)
        self._open_part(restart)

    def _open_part(self, restart: bool) -> None:
        names = ("revision", "device", "torch", "triton")
        mine = {"setting": self.setting.json(), **{name: self.environment[name] for name in names}}
        mine["sources"] = sources()  # what a revision does not say: changes, or a tree without git
        if restart:
            self.part.unlink(missing_ok=True)
        if self.part.exists():
            lines = self.part.read_text().splitlines()
            try:
                found = json.loads(lines[0])["run"]
            except (IndexError, KeyError, ValueError):
                found = None
            if found != mine:
                other = ", ".join(k for k in mine if not isinstance(found, dict) or found.get(k) != mine[k])
                raise RunError(f"{self.part} is of a run with another {other}; --restart begins again")
            print(f"going on after {len(read(self.part))} cases of {self.part}", flush=True)
            for record in read(self.part):
                close_started(self.part, record["question"], "its process was stopped")
        else:
            self.part.write_text(json.dumps({"run": mine}) + "\n")
        append(self.part, {"environment": self.environment})

    def ask(self, questions: Sequence[Question], before: Callable[[Question], None] | None = None) -> None:
        """All of them; the result file is written after each. ``before`` is called before each."""
        kind = "cuda" if self.setting.cuda else "cpu"
        for number, question in enumerate(questions):
            if before is not None:
                before(question)
            share = None
            if self.deadline is not None:
                weights = [q.seconds.get(kind, 30.0) for q in questions[number:]]
                share = (self.deadline - time.time()) * weights[0] / sum(weights)
            self._one(question, share)
            self.write()
        skipped = sum(record["status"] == "skipped" for record in read(self.part))
        if skipped:
            self.notes["time"] = f"{skipped} cases have had none; the same command goes on with them"
        if not self.notes:
            self.part.unlink(missing_ok=True)

    def _one(self, question: Question, seconds: float | None) -> None:
        began = time.time()
        wgmma = question.wgmma and wgmma_runs(self.setting)
        share = None if seconds is None else (1 - WGMMA_SHARE if wgmma else 1) * seconds
        self._process(question, self.setting, share)
        if wgmma:
            left = None if seconds is None else began + seconds - time.time()
            self._process(question, replace(self.setting, wgmma=True, backends=("cuda",)), left)
        print(f"{question.name}: {time.time() - began:.0f} s", flush=True)

    def _process(self, question: Question, setting: Setting, seconds: float | None) -> None:
        """A child, and again after a case that broke it."""
        deadline = time.time() + (86_400.0 if seconds is None else seconds)
        command = [sys.executable, "-m", "benchmarks.child", str(self.part), question.name, str(deadline)]
        for _ in range(TRIES):
            if deadline - time.time() < 1:
                self.notes[question.name] = "the time was over"
                return
            extra = {"EP_KERNELS_WGMMA": "1" if setting.wgmma else "0", LOGS: str(self.out.parent)}
            code = run([*command, setting.json()], self.log, deadline - time.time() + GRACE, extra)
            if code is None:
                close_started(self.part, question.name, "stopped: the question's time was over", "skipped")
            elif code != 0:
                close_started(self.part, question.name, f"its process ended with exit code {code}")
            if code == 1:
                self.notes[question.name] = f"did not run: see {self.log}"
            if code is not None and 0 <= code != BROKEN:
                return

    def rows(self) -> list[Row]:
        """Of this run so far."""
        return flat(read(self.part))

    def write(self) -> None:
        """This run's rows into the result file, in place of older ones of the same question and case.

        What had no time replaces nothing.
        """
        self.written = self.rows()
        mine = [row for row in self.written if row["status"] != "skipped"]
        new = {(row["question"], row["case"]) for row in mine}
        kept = [row for row in load(self.out) if (row["question"], row["case"]) not in new]
        save(self.out, [*kept, *mine])


def load(path: Path) -> list[Row]:
    """Rows of a result file; none where there is no file.

    Raises:
        RunError: a file that is not one of ours.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
        ok = isinstance(rows, list) and all({"question", "case", "name", "environment"} <= set(row) for row in rows)
    except (ValueError, TypeError):
        ok = False
    if not ok:
        raise RunError(f"{path} is not a result file of python -m benchmarks run (a list of rows)")
    return list(rows)


def save(path: Path, rows: Sequence[Row]) -> None:
    """Atomically, a line a row."""
    part = path.with_name(path.name + ".tmp")
    part.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    part.replace(path)


def child_environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """The checkout is importable, installed or not."""
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    joined = os.pathsep.join(p for p in paths if p)
    return {**os.environ, "PYTHONPATH": joined, "PYTHONUNBUFFERED": "1", **(extra or {})}


def run(command: Sequence[str], log: Path, seconds: float, extra: dict[str, str] | None = None) -> int | None:
    """Exit code (None: stopped after ``seconds``). Output is appended to ``log``; all that it started ends with it."""
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process: subprocess.Popen[Any] = subprocess.Popen(
            command, cwd=ROOT, env=child_environment(extra), stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            return None
        finally:
            stop(process)


def stop(process: subprocess.Popen[Any]) -> None:
    """End a child with everything that it started, in sessions of their own too."""
    found = [process.pid, *descendants(process.pid)]
    for pid in found:
        for end in (os.killpg, os.kill):
            with suppress(ProcessLookupError, PermissionError):
                end(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """Processes that ``pid`` started and those that they started, as far as /proc tells."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found, queue = [], [pid]
    while queue:
        more = children.get(queue.pop(), [])
        found += more
        queue += more
    return found


def sources() -> str:
    """Hash of all that a result may depend on in this tree."""
    digest = hashlib.sha256()
    for folder in ("ep_kernels", "csrc", "python", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".inl", ".so"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
