"""cold_start: what the first call costs: the import, then loading, compiling and capturing, in fresh processes.

Each process prints one line of JSON (:data:`CHILD`); nothing of it is timed from outside.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case, Row, Unavailable, Wrong, check, short, synchronize
from benchmarks.markdown import cases as names_of
from benchmarks.markdown import good, ms, ratio, table, without_figures
from benchmarks.problem import (
    BATCHES,
    PRECISIONS,
    Problem,
    backends_of,
    largest_error,
    precisions,
    problem_at,
    require_backend,
)
from benchmarks.questions.train_batch import FEW, backprop, backprop_name, gradient_error, true_batch
from benchmarks.registry import Question
from benchmarks.runner import child_environment
from benchmarks.setting import Setting
from benchmarks.timing import Times
from benchmarks.timing import ratio as over
from ep_kernels import RelaxConfig, ep_gradients, free_phase

TORCH, OURS = "import torch", "import ep_kernels, beyond torch"
EMPTY, FILLED = "empty cache", "filled cache"
LATER = 5  # calls after the second
SECONDS = 240.0  # that a process may take
ROUNDS = 3  # processes of each kind at most; of what compiles for seconds, one
GPU_SECONDS = 15.0  # after which a GPU begins no other round: each process imports, and starts the device
CHILD = """
import json, sys, time
began = time.perf_counter()
import torch
middle = time.perf_counter()
import ep_kernels
end = time.perf_counter()
from benchmarks.questions.cold_start import calls
print(json.dumps({"torch": middle - began, "ours": end - middle, **calls(*sys.argv[1:])}))
"""
Work = Callable[[], object]


@dataclass(frozen=True)
class Start:
    """What a process calls first: ``kind`` is ours, compiled or backprop; ``cache``: of what compiles."""

    kind: str
    backend: str = ""
    precision: str = "fp32"
    cache: str = ""

    @property
    def name(self) -> str:
        """Of its row."""
        if self.kind == "backprop":
            return self.kind
        what = "ours" if self.kind == "ours" else "a free phase of ours under torch.compile"
        return ", ".join(part for part in (what, self.backend, self.precision, self.cache) if part)


def cases(setting: Setting) -> list[Case]:
    """One a network and batch."""
    models = setting.choose(setting.models, ("laborieux/4",), ("vgg11",), ("3p-4",))
    batches = setting.choose(setting.batches, (8,), (32,), (2,))
    return [Case(f"{m}, batch {b}", partial(start_rows, setting, m, b), 600.0) for m in models for b in batches]


def starts(setting: Setting) -> list[Start]:
    """Ours on every backend, with caches empty and then filled; on a CPU what compiles; backprop."""
    found = []
    for on in backends_of(setting):
        for precision in precisions(setting, cuda=("fp16",)):
            caches = (EMPTY, FILLED) if on == "triton" else ("",)
            found += [Start("ours", on, precision.name, cache) for cache in caches]
            if not setting.quick and not setting.cuda:
                found.append(Start("compiled", on, precision.name, EMPTY))
    return [*found, Start("backprop")]


def start_rows(setting: Setting, model: str, batch: int) -> list[Row]:
    """Processes in turn. On a CPU after one that is not counted: it brings the files into memory (on a GPU, where time
    is short, the questions before this one have). The start with an empty cache fills it for those after it."""
    found: dict[Start, list[Row]] = {start: [] for start in starts(setting)}
    bad: dict[Start, Row] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if not setting.quick and not setting.cuda:
            attempt(setting, model, batch, replace(next(iter(found)), cache=""), Path(folder))
        for r in range(1 if setting.quick else min(setting.rounds, ROUNDS)):
            if r and setting.cuda and time.monotonic() - began > GPU_SECONDS:
                break
            for start in found:
                if start in bad or (r and start.cache == EMPTY):
                    continue
                if start.cache == FILLED and replace(start, cache=EMPTY) in bad:
                    bad[start] = {**bad[replace(start, cache=EMPTY)]}  # nothing has filled it
                    continue
                times = attempt(setting, model, batch, start, Path(folder))
                if "status" in times:
                    bad[start] = times
                else:
                    found[start].append(times)
    every = [times for these in found.values() for times in these]
    rows = imports(every)
    for start, these in found.items():
        row: Row = {"name": start.name, "backend": start.backend, "precision": start.precision, "cache": start.cache}
        rows.append({**row, **(bad[start] if start in bad else first_row(start.name, these))})
    return [{**row, "model": model, "batch": batch} for row in rows]


def attempt(setting: Setting, model: str, batch: int, start: Start, folder: Path) -> Row:
    """What a process measured, or ``status`` and ``reason`` why there is nothing."""
    try:
        times = fresh(setting, model, batch, start, folder)
        check(times["error"], times["limit"])
    except Unavailable as why:
        return {"status": "unavailable", "reason": str(why)}
    except Wrong as why:
        return {"status": "wrong", "reason": str(why)}
    except Exception as why:
        return {"status": "failed", "reason": short(why)}
    return times


def fresh(setting: Setting, model: str, batch: int, start: Start, kept: Path) -> Row:
    """Seconds that a fresh process measures.

    Args:
        kept: folder of the caches that one process fills for others, a folder for each backend and precision.

    Raises:
        Unavailable: the backend cannot run here. RuntimeError: the process failed.
    """
    if start.backend:
        require_backend(start.backend, setting)
    shared = start.kind == "ours" and bool(start.cache)
    folder = kept / f"{start.backend}-{start.precision}" if shared else Path(tempfile.mkdtemp())
    environment = child_environment(
        {"TRITON_CACHE_DIR": str(folder / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    )
    arguments = [setting.json(), model, str(batch), json.dumps([start.kind, start.backend, start.precision])]
    try:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *arguments], env=environment, capture_output=True, text=True,
            timeout=SECONDS, check=False,
        )  # fmt: skip
    finally:
        if not shared:
            shutil.rmtree(folder, ignore_errors=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"exit code {done.returncode}: {last}")
    found: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def calls(text: str, model: str, batch: str, what: str) -> Row:
    """In the child: seconds to the device's first answer, of the first, second and later calls; then the check.

    The first call loads the library and compiles; the second captures a CUDA graph where a backend does so.
    """
    setting = Setting.parse(text)
    setting.apply()
    start = Start(*json.loads(what))
    began = time.perf_counter()
    torch.zeros(1, device=setting.device)
    synchronize()
    device = time.perf_counter() - began
    p = problem_at(setting, model, int(batch))
    work, verify, limit = prepared(setting, p, start)
    synchronize()
    seconds = []
    for _ in range(2 + LATER):
        began = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - began)
    times = {"first": seconds[0], "second": seconds[1], "later": Times("", seconds[2:]).median}
    return {"device": device, **times, "error": verify(), "limit": limit}


def prepared(setting: Setting, p: Problem, start: Start) -> tuple[Work, Callable[[], float], float]:
    """What is called, how its result is checked, and the largest error. Nothing of ours is loaded before the call."""
    if start.kind == "backprop":
        timed = backprop(setting, lambda: p, backprop_name(setting))
        return timed.work, timed.verify, timed.limit
    precision = PRECISIONS[start.precision]
    if start.kind == "ours":
        config = precision.config(**BATCHES[FEW])

        def gradients() -> Any:
            return ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend=start.backend)[0]

        return gradients, lambda: gradient_error(gradients(), true_batch(p, FEW)), precision.gradient_error
    two = precision.config(free_steps=2)

    def relax(x: torch.Tensor) -> list[torch.Tensor]:
        return free_phase(p.network, p.parameters, x, two, backend=start.backend).states

    compiled = torch.compile(relax)

    def verify() -> float:
        exact = p.double()
        config = RelaxConfig(free_steps=2)
        expected = free_phase(exact.network, exact.parameters, exact.x, config, backend="reference").states
        return largest_error(compiled(p.x)[1:], expected[1:])

    return lambda: compiled(p.x), verify, precision.error


def imports(every: Sequence[Row]) -> list[Row]:
    """Rows of both imports, from all processes."""
    if not every:
        return []
    both = Times(TORCH, [t["torch"] for t in every]), Times(OURS, [t["ours"] for t in every])
    to = {"to": TORCH, **over(both[1], both[0]).quantiles()}
    return [{**both[0].row(), "status": "ok"}, {**both[1].row(), "status": "ok", "ratio": to}]


def first_row(name: str, these: Sequence[Row]) -> Row:
    """Of one kind of process: ``ms`` is that of the first call, ``ratio`` that to the import of torch before it."""
    first = Times(name, [t["first"] for t in these])
    row: Row = {**first.row(), "status": "ok", "error": these[-1]["error"], "limit": these[-1]["limit"]}
    row["ratio"] = {"to": TORCH, **over(first, Times(TORCH, [t["torch"] for t in these])).quantiles()}
    columns = {"torch_ms": "torch", "import_ms": "ours", "device_ms": "device", "first_ms": "first",
               "second_ms": "second", "later_ms": "later"}  # fmt: skip
    return row | {key: Times(name, [t[of] for t in these]).quantiles(1e3) for key, of in columns.items()}


# --- report -----------------------------------------------------------------------------------------------------------


def lines(rows: Sequence[Row]) -> list[str]:
    """A table a case."""
    out: list[str] = []
    for case in names_of(rows):
        mine = good(row for row in rows if row["case"] == case)
        cells = [
            [row["name"], ms(row), ratio(row) or "1", *(middle(row, key) for key in ("second_ms", "later_ms"))]
            for row in mine
        ]
        head = ("import, or first call of a batch by", "ms (quantiles 0.2 to 0.8)", f"/ {TORCH}", "second call, ms",
                "later calls, ms")  # fmt: skip
        if cells:
            out += [f"{case}:", "", *table(head, cells), ""]
    return [*out[:-1], *without_figures(rows)]


def middle(row: Row, key: str) -> str:
    """The median of a column."""
    return f"{row[key]['0.5']:.4g}" if key in row else ""


def draw(rows: Sequence[Row], figure: Any) -> None:
    """Import, first, second and later calls, a panel a case."""
    names = [case for case in names_of(rows) if good(row for row in rows if row["case"] == case)]
    for axes, case in zip(figure.subplots(1, max(1, len(names)), squeeze=False)[0], names, strict=False):
        mine = good(row for row in rows if row["case"] == case)[::-1]
        axes.barh([row["name"] for row in mine], [row["ms"]["0.5"] for row in mine], color="#2a6fbb")
        for key, marker in (("second_ms", "|"), ("later_ms", "x")):
            there = [row for row in mine if key in row]
            label = key.removesuffix("_ms") + (" call" if key == "second_ms" else " calls")
            axes.plot([row[key]["0.5"] for row in there], [row["name"] for row in there], marker, color="#d1603d",
                      markersize=8, label=label)  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel("ms: an import, or the first call")
        axes.set_title(case)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)


QUESTION = Question(
    "cold_start",
    "import, first call (loading, JIT) and second call (graph capture) in fresh processes",
    cases,
    lines,
    conditions=(
        "each in a fresh process with the files in memory; 3x32x32 random images, k 0.02, T 2 + K 1 tangent; a first "
        "call loads the library and compiles, the device itself has answered before; empty cache: of Triton and of "
        f"torch.compile, one process; of the others up to {ROUNDS}"
    ),
    draw=draw,
    seconds={"cpu": 40.0, "cuda": 25.0},
)
