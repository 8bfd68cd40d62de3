"""memory_vs_steps: peak memory of one training batch as T grows: EP keeps states, BPTT keeps every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines.unrolled import bptt, checkpointed
from benchmarks.case import Case, Row, Unavailable, Wrong, check, short
from benchmarks.markdown import good, table, without_figures
from benchmarks.memory import cpu_peak, gpu_peak
from benchmarks.problem import (
    PRECISIONS,
    Problem,
    backends_of,
    label,
    network_of,
    precisions,
    problem_at,
    require_backend,
    size_of,
    sweep_flops,
    tf32,
)
from benchmarks.questions.train_batch import ON_CPU, gradient_error, takes_slow
from benchmarks.registry import Question, Target
from benchmarks.setting import Setting
from ep_kernels import Parameters, RelaxConfig, backends, ep_gradients

STEPS = (5, 15, 30, 60, 120, 250)
FEW = (5, 15, 60, 250)  # each is a process
QUICK = (2, 4)
AT = 60  # sweeps at which EP and BPTT are compared; measured however long it takes
BPTT, CHECKPOINTED = "BPTT", "BPTT, checkpointed"
UNROLLED = {BPTT: "linear", CHECKPOINTED: "sqrt(T)"}
LONG_FLOPS = 160e9  # of the sweeps of an unrolled batch on a CPU beyond AT: more takes minutes
SECONDS = 240.0  # that a process may take
PART = 0.6  # of the free memory that a process may be expected to need
Work = Callable[[], Parameters]


@dataclass(frozen=True)
class Method:
    """A way to gradients through T sweeps. ``backend`` and ``precision``: of ours, else empty."""

    name: str
    backend: str = ""
    precision: str = ""

    def work(self, p: Problem, steps: int) -> Work:
        """One batch: ours with a free phase of ``steps`` sweeps and one tangent sweep; the others through all."""
        if self.backend:
            settings = {"free_steps": steps, "nudged_steps": 1, "estimator": "tangent"}
            config = PRECISIONS[self.precision].config(**settings)
            return lambda: ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend=self.backend)[0]
        config = RelaxConfig(free_steps=steps)

        def unrolled() -> Parameters:
            with tf32(False):
                if self.name == CHECKPOINTED:
                    return checkpointed(p.network, p.parameters, p.x, p.targets, config)
                return bptt(p.network, p.parameters, p.x, p.targets, config, steps)

        return unrolled

    def exact(self, p: Problem, steps: int) -> Work:
        """The same in float64: ours by the reference, BPTT without checkpoints."""
        other = Method(self.name, "reference", "fp32") if self.backend else Method(BPTT)
        return other.work(p.double(), steps)

    @property
    def limit(self) -> float:
        """Largest relative error of its gradients."""
        return PRECISIONS[self.precision].gradient_error if self.backend else 1e-2


def methods(setting: Setting) -> list[Method]:
    """Ours on every backend, then BPTT in float32."""
    pairs = [(on, q.name) for on in backends_of(setting) for q in precisions(setting, cuda=("fp32", "fp16"))]
    ours = [Method(f"ours, {label(on, setting)}, {precision}", on, precision) for on, precision in pairs]
    return [*ours, *map(Method, UNROLLED)]


def cases(setting: Setting) -> list[Case]:
    """A case a network, batch and method: all T."""
    models = setting.choose(setting.models, ON_CPU, ("vgg11",), ("3p-4",))
    batches = setting.choose(setting.batches, (8,), (128,), (2,))
    return [
        Case(f"{model}, batch {batch}, {method.name}", partial(peaks, setting, model, batch, method), 900.0)
        for model in models
        for batch in batches
        for method in methods(setting)
    ]


def steps_of(setting: Setting) -> tuple[int, ...]:
    """T."""
    return QUICK if setting.quick else STEPS if setting.cuda else FEW


def peaks(setting: Setting, model: str, batch: int, method: Method) -> list[Row]:
    """A row a T; the gradients are checked once, at a small batch."""
    rows: list[Row] = [
        {
            "name": f"{method.name}, T = {steps}", "method": method.name, "backend": method.backend,
            "precision": method.precision, "model": model, "batch": batch, "steps": steps,
        }
        for steps in steps_of(setting)
    ]  # fmt: skip
    try:
        if method.backend:
            require_backend(method.backend, setting)
        error = check(verified(setting, model, method), method.limit)
    except (Unavailable, Wrong) as why:
        status = "wrong" if isinstance(why, Wrong) else "unavailable"
        return [{**row, "status": status, "reason": str(why)} for row in rows]
    measured: dict[int, int] = {}
    broke = ""
    for row in rows:
        steps = row["steps"]
        try:
            if broke:
                raise Unavailable(broke)
            require_room(setting, model, batch, method, steps, measured)
        except Unavailable as why:
            row |= {"status": "unavailable", "reason": str(why)}
            continue
        try:
            measured[steps] = peak(setting, model, batch, method, steps)
        except (torch.OutOfMemoryError, Unavailable) as why:  # more sweeps would end as these did
            broke = f"T = {steps}: {short(why)}"
            row |= {"status": "unavailable", "reason": broke}
        else:
            row |= {"status": "ok", "memory": measured[steps], "error": error, "limit": method.limit}
    return rows


def verified(setting: Setting, model: str, method: Method, steps: int = 5) -> float:
    """Largest relative error of the gradients of two images through ``steps`` sweeps."""
    p = problem_at(setting, model, 2)
    found = method.work(p, steps)()
    with tf32(False), backends.backend("reference"):
        return gradient_error(found, method.exact(p, steps)())


def peak(setting: Setting, model: str, batch: int, method: Method, steps: int) -> int:
    """Bytes of one batch beyond parameters and images."""
    if not setting.cuda:
        arguments = (setting.json(), model, batch, method.name, method.backend, method.precision, steps)
        return cpu_peak("benchmarks.questions.memory_vs_steps:alone", *arguments, timeout=SECONDS)
    p = problem_at(setting, model, batch)
    method.work(p, 2)()  # cuDNN tries its algorithms, whose workspaces are no part of the batch
    work = method.work(p, steps)
    repeats = 3 if method.backend else 1  # the backend cuda captures its graph in the second call

    def again() -> None:
        for _ in range(repeats):
            work()

    try:
        return gpu_peak(again, fresh=backends.release)
    finally:
        backends.release()


def alone(text: str, model: str, batch: int, *rest: Any) -> Work:
    """One batch, for a process that measures its memory.

    The same batch runs first with two sweeps: it touches the libraries' code for these very shapes. A batch of one
    takes other code, and what is left, 2 MiB for ours and 10 for BPTT, would be counted.
    """
    setting = Setting.parse(text)
    setting.apply()
    *names, steps = rest
    method, p = Method(*names), problem_at(setting, model, batch)
    method.work(p, 2)()
    return method.work(p, steps)


def require_room(
    setting: Setting, model: str, batch: int, method: Method, steps: int, measured: dict[int, int]
) -> None:
    """Raise Unavailable where an unrolled batch on a CPU would take minutes, or the machine's memory.

    Args:
        measured: bytes by T so far; the expectation grows from its last entry in proportion to T.
    """
    if setting.cuda or method.backend:
        return
    flops = steps * sweep_flops(network_of(model, size_of(setting)), batch)
    if steps > AT and not takes_slow(setting, model):
        raise Unavailable(f"left out for its time: beyond T = {AT} BPTT is run with the first network, {ON_CPU[0]}")
    if steps > AT and flops > LONG_FLOPS:
        raise Unavailable(
            f"left out for its time: its sweeps forward alone are {flops / 1e9:.0f} GFLOP, beyond T = {AT} at most "
            f"{LONG_FLOPS / 1e9:.0f} are run"
        )
    free = available()
    if measured and free is not None:
        last = max(measured)
        expected = measured[last] * steps / last
        if expected > PART * free:
            raise Unavailable(
                f"left out for its memory: up to {expected / 2**30:.1f} GiB by its growth to T = {last}, "
                f"{free / 2**30:.1f} GiB are free"
            )


def available() -> int | None:
    """Bytes that Linux says can be had; None where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


# --- report -----------------------------------------------------------------------------------------------------------

Group = tuple[str, int]  # model and batch


def groups(rows: Sequence[Row]) -> list[Group]:
    """Networks and batches, in order. Rows of cases that never ran have neither."""
    return list(dict.fromkeys((row["model"], row["batch"]) for row in rows if "model" in row))


def by_method(rows: Sequence[Row], group: Group) -> dict[str, dict[int, int]]:
    """Bytes by method and T, of the rows that have figures."""
    found: dict[str, dict[int, int]] = {}
    for row in good(rows):
        if (row["model"], row["batch"]) == group:
            found.setdefault(row["method"], {})[row["steps"]] = row["memory"]
    return found


def lines(rows: Sequence[Row]) -> list[str]:
    """A table a network: MiB by T; under BPTT's, how many times ours it is."""
    out: list[str] = []
    for model, batch in groups(rows):
        found = by_method(rows, (model, batch))
        steps = sorted({t for peaks in found.values() for t in peaks})
        cells = [[name, *(mib(peaks.get(t)) for t in steps)] for name, peaks in found.items()]
        ours = [name for name in found if name.startswith("ours")]
        for name in ours:
            for other in UNROLLED:
                pairs = [(found.get(other, {}).get(t), found[name].get(t)) for t in steps]
                if any(a and b for a, b in pairs):
                    cells.append([f"{other} / {name}", *(f"{a / b:.1f}" if a and b else "" for a, b in pairs)])
        if cells:
            head = ("peak MiB", *(f"T = {t}" for t in steps))
            out += [f"{model}, batch {batch}:", "", *table(head, cells), ""]
    return [*out[:-1], *without_figures(rows)]


def mib(value: int | None) -> str:
    """Of bytes."""
    return "" if value is None else f"{value / 2**20:.1f}"


TO_BPTT = Target(f"peak memory, EP / BPTT, T = {AT}", None, "<=", 0.1, "VGG-11")


def targets(rows: Sequence[Row]) -> list[Target]:
    """Against BPTT through 60 sweeps (both in float32), and flat from 5 to 250."""
    found = []
    for group in groups(rows):
        methods = by_method(rows, group)
        through = methods.get(BPTT, {}).get(AT)
        names = [row["method"] for row in rows if row.get("backend") and (row["model"], row["batch"]) == group]
        precision = {row["method"]: row["precision"] for row in rows if row.get("backend")}
        for name in dict.fromkeys(names):
            mine, of = methods.get(name, {}), f"{group[0]}, batch {group[1]}, {name}"
            if precision[name] == "fp32":
                value = mine[AT] / through if AT in mine and through else None
                found.append(replace(TO_BPTT, value=value, of=of))
            whole = min(mine.values(), default=0) > 0 and {STEPS[0], STEPS[-1]} <= set(mine)
            value = max(mine.values()) / min(mine.values()) if whole else None
            measure = f"peak memory of EP, largest / smallest, T = {STEPS[0]} to {STEPS[-1]}"
            found.append(Target(measure, value, "<=", 1.05, of))
    return found


def draw(rows: Sequence[Row], figure: Any) -> None:
    """Memory against T, a panel a network."""
    from benchmarks.plots import finish

    names = [group for group in groups(rows) if by_method(rows, group)]
    for axes, group in zip(figure.subplots(1, max(1, len(names)), squeeze=False)[0], names, strict=False):
        for name, peaks in by_method(rows, group).items():
            steps = sorted(peaks)
            style = "-" if name.startswith("ours") else "--"
            axes.loglog(steps, [peaks[t] / 2**20 for t in steps], style, marker="o", label=name)
        finish(axes, f"{group[0]}, batch {group[1]}", "T, sweeps of the free phase", "peak memory, MiB")


QUESTION = Question(
    "memory_vs_steps",
    "peak memory of one training batch as T grows, EP against BPTT",
    cases,
    lines,
    conditions=(
        "3x32x32 random images, k 0.02; EP with T sweeps and one tangent sweep (K = 1, whatever T); BPTT in float32 "
        "through all T sweeps with our gain and order, checkpointed after every sqrt(T); bytes beyond parameters and "
        "images, on a CPU each from a process of its own"
    ),
    draw=draw,
    targets=targets,
    asked=(TO_BPTT,),
    seconds={"cpu": 80.0, "cuda": 25.0},
)
