"""sweep: one sweep of a free phase, against its convolutions alone, the same in PyTorch, and a step of autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.plain import PlainEP, Pooling
from benchmarks.baselines.published import AutogradLoop, Convolutions
from benchmarks.case import Case, Competitor, Row, Timed, check, compete
from benchmarks.graphs import captured
from benchmarks.markdown import cases as names_of
from benchmarks.markdown import good, ms, number, ratio, table, without_figures
from benchmarks.problem import (
    FLOAT16_LIMIT,
    PRECISIONS,
    Precision,
    Problem,
    backends_of,
    free_flops,
    label,
    largest_error,
    network_of,
    on_cpu,
    problem_of,
    require_backend,
    sweep_flops,
)
from benchmarks.questions.roofline import measured
from benchmarks.registry import Question, Target
from benchmarks.setting import Setting
from benchmarks.timing import Times
from ep_kernels import RelaxConfig, free_phase

BASE = 2  # sweeps before the steady ones that are timed
ALONE = "its convolutions alone"
AUTOGRAD = "a step of autograd of the energy"
COMPILED = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}  # of torch.compile; graphs are ours


def cases(setting: Setting) -> list[Case]:
    """A case a network and batch."""
    models = setting.choose(setting.models, ("laborieux/2", "vgg8/2"), ("vgg11",), ("3p-4",))
    batches = setting.choose(setting.batches, (32,), (256, 128), (2,))
    return [Case(f"{m}, batch {b}", partial(sweep_rows, setting, m, b), 300.0) for m in models for b in batches]


def steady(setting: Setting) -> int:
    """Sweeps of a timed phase: on a GPU enough of them that a launch from Python does not count."""
    return 2 if setting.quick else 16 if setting.cuda else 4


def sweep_rows(setting: Setting, model: str, batch: int) -> list[Row]:
    """Ours as the difference between phases of ``BASE + steady`` and ``BASE`` sweeps, round by round."""
    p = problem_of(network_of(model, 8 if setting.quick else 32), batch, setting.device)
    flops = sweep_flops(p.network, batch)
    ours = [(on, precision) for on in backends_of(setting) for precision in precisions(setting)]
    pairs = {f"ours, {label(on, setting)}, {q.name}": (on, q) for on, q in ours}
    competitors = [
        Competitor(name + end, partial(phase, setting, p, on, q, BASE + more))
        for name, (on, q) in pairs.items()
        for end, more in (("", steady(setting)), (" (short)", 0))
    ]
    competitors += baselines(setting, p)
    times: dict[str, Times] = {}

    def keep(name: str, found: Times) -> Row:
        times[name] = found
        return {}

    rows = {row["name"]: row for row in compete(setting, competitors, against=ALONE, warmup=2, after=keep)}
    for name in pairs:
        row, short = rows[name], rows.pop(f"{name} (short)")
        if name not in times or short["name"] not in times:
            continue
        both = zip(times[name].seconds, times[short["name"]].seconds, strict=True)
        row |= with_ratio(Times(name, [(a - b) / steady(setting) for a, b in both]), times.get(ALONE))
    for row in rows.values():
        row |= {"model": model, "batch": batch}
        if row["status"] == "ok" and row["name"] != AUTOGRAD:
            row |= speed(setting, flops, row["ms"]["0.5"] / 1e3, row.get("rate", "fp32"))
    return list(rows.values())


def with_ratio(times: Times, to: Times | None) -> Row:
    """Figures of a competitor whose seconds were computed."""
    row: Row = dict(times.row())
    if to is not None:
        seconds = [a / b for a, b in zip(times.seconds, to.seconds, strict=False)]
        row["ratio"] = {"to": to.name, **Times("", seconds).quantiles()}
    return row


def speed(setting: Setting, flops: float, seconds: float, rate: str) -> Row:
    """TFLOP/s, and percent of the matmul rate with the same operands, measured in this process."""
    tflops = flops / seconds / 1e12
    return {"gflop": flops / 1e9, "tflops": tflops, "percent": 1e14 * tflops / measured(setting, rate)}


def precisions(setting: Setting) -> list[Precision]:
    """Of our operands."""
    names = setting.choose(setting.precisions, on_cpu(), tuple(PRECISIONS), ("fp32",))
    return [PRECISIONS[name] for name in names]


@lru_cache(maxsize=2)
def true_states(p: Problem, steps: int) -> list[Tensor]:
    """States after ``steps`` free sweeps in float64."""
    exact = p.double()
    config = RelaxConfig(free_steps=steps)
    return free_phase(exact.network, exact.parameters, exact.x, config, backend="reference").states


def phase(setting: Setting, p: Problem, on: str, precision: Precision, steps: int) -> Timed:
    """``free_phase`` of a backend."""
    require_backend(on, setting)
    config = precision.config(free_steps=steps)

    def work() -> list[Tensor]:
        return free_phase(p.network, p.parameters, p.x, config, backend=on).states

    def verify() -> float:
        four = precision.config(free_steps=4)
        states = free_phase(p.network, p.parameters, p.x, four, backend=on).states
        return largest_error(states[1:], true_states(p, 4)[1:])

    values: Row = {"backend": label(on, setting), "precision": precision.name, "rate": precision.rate}
    values["phase_gflop"] = free_flops(p.network, config, p.x.shape[0]) / 1e9
    return Timed(work, verify, precision.error, values=values)


def baselines(setting: Setting, p: Problem) -> list[Competitor]:
    """What a sweep is compared with."""
    found = [Competitor(ALONE, partial(convolutions, setting, p))]
    if setting.wgmma:
        return found
    graph = ", CUDA graph" if setting.cuda else ""
    modes = () if setting.quick else tuple(COMPILED) if setting.cuda else ("default",)
    found.append(Competitor(f"the same in eager PyTorch{graph}", partial(plain, setting, p, None)))
    found.append(Competitor(AUTOGRAD, partial(autograd_step, p)))
    found += [
        Competitor(f"the same under torch.compile ({mode}{graph})", partial(plain, setting, p, COMPILED[mode]))
        for mode in modes
    ]
    return found


def convolutions(setting: Setting, p: Problem) -> Timed:
    """Those of a steady sweep through torch, on random tensors in channels_last memory (float16 on a GPU)."""
    dtype = torch.float16 if setting.cuda else torch.float32
    alone = Convolutions(p.network, p.parameters, p.x.shape[0], device=setting.device, dtype=dtype)

    def verify() -> float:
        """As many operations as our sweep counts."""
        return abs(alone.flops() / sweep_flops(p.network, p.x.shape[0]) - 1)

    values = {"rate": "fp16" if setting.cuda else "fp32"}
    if not setting.cuda:
        return Timed(alone.run, verify, 1e-9, values=values)
    replay, calls = captured([alone.run])
    return Timed(replay, verify, 1e-9, calls, values)


def plain(setting: Setting, p: Problem, mode: str | None) -> Timed:
    """A steady sweep of ``PlainEP``, eager or compiled; on a GPU in float16 and as a CUDA graph."""
    pooling: Pooling = "indices" if mode is None else "windows"
    plain = PlainEP(p.network, torch.float16 if setting.cuda else torch.float32, pooling)
    omega = RelaxConfig().free_damping(p.network.feedback_gain)
    limit = FLOAT16_LIMIT if setting.cuda else 1e-3
    with torch.no_grad():
        four = plain.free(p.parameters, p.x, RelaxConfig(free_steps=4))[0]
        error = check(largest_error(four[1:], true_states(p, 4)[1:]), limit)
        states, winners, _ = plain.free(p.parameters, p.x, RelaxConfig(free_steps=BASE))
        weights, biases = plain.cast(p.parameters.weights), plain.cast(p.parameters.biases)
        first = plain.drive(0, states[0], weights)

    def sweep(states: list[Tensor], winners: list[Tensor | None]) -> list[Tensor]:
        return plain.sweep(states, first, winners, weights, biases, omega)[0]

    function: Callable[..., list[Tensor]] = sweep
    if mode is not None:
        torch.compiler.reset()
        function = torch.compile(sweep, mode=mode, dynamic=False, fullgraph=True)

    @torch.no_grad()
    def work() -> list[Tensor]:
        return function(states, winners)

    def verify() -> float:
        if mode is None:
            return error
        with torch.no_grad():
            return largest_error(work()[1:], sweep(states, winners)[1:])

    values = {"rate": "fp16" if setting.cuda else "fp32"}
    if not setting.cuda:
        return Timed(work, verify, limit, values=values)
    found = check(verify(), limit)
    replay, calls = captured([work])
    return Timed(replay, lambda: found, limit, calls, values)


def autograd_step(p: Problem) -> Timed:
    """One step of all layers as published codes run it: float32, default memory format."""
    loop = AutogradLoop(p.network, p.parameters)
    x = p.x.contiguous()
    states = loop.relax(x, 3)

    def verify() -> float:
        """Three steps against ours at gain 1 in float64."""
        exact, config = p.double(), RelaxConfig.classical(free_steps=3)
        classical = replace(p.network, feedback_gain=1.0)
        expected = free_phase(classical, exact.parameters, exact.x, config, backend="reference").states
        return largest_error(states, expected[1:])

    return Timed(lambda: loop.step(x, states), verify, 3e-2)


# --- report -----------------------------------------------------------------------------------------------------------


def lines(rows: Sequence[Row]) -> list[str]:
    """A table a case."""
    out: list[str] = []
    for case in names_of(rows):
        mine = good(row for row in rows if row["case"] == case)
        cells = [
            [row["name"], ms(row), ratio(row), number(_giga(row)), number(row.get("percent")), number(row["error"], 1)]
            for row in mine
        ]
        head = ("one sweep by", "ms (quantiles 0.2 to 0.8)", f"/ {ALONE}", "GFLOP/s", "% of matmul", "error")
        out += [f"{case}:", "", *table(head, cells), ""]
    return [*out[:-1], *without_figures(rows)]


def _giga(row: Row) -> float | None:
    return 1e3 * row["tflops"] if "tflops" in row else None


def targets(rows: Sequence[Row]) -> list[Target]:
    """On a CPU: within 10 % of the convolutions. On a GPU: of the matmul rate, and against autograd's step."""
    found = []
    for case in names_of(rows):
        mine = good(row for row in rows if row["case"] == case)
        step = next((row["ms"]["0.5"] for row in mine if row["name"] == AUTOGRAD), None)
        for row in mine:
            if not row["name"].startswith("ours"):
                continue
            of = f"{case}, {row['name']}"
            if row["backend"] == "cpu" and row["precision"] == "fp32":
                value = row.get("ratio", {}).get("0.5")
                found.append(Target("sweep / its convolutions", value, "<=", 1.1, of))
                value = None if step is None else step / row["ms"]["0.5"]
                found.append(Target("autograd step / sweep", value, ">=", 1.8, of))
            elif row["backend"] != "cpu" and row["precision"] == "fp16":
                found.append(Target("sweep, % of the matmul rate", row["percent"], ">=", 60, of))
    return found


def draw(rows: Sequence[Row], figure: Any) -> None:
    """Time of every competitor, a panel a case."""
    names = names_of(rows)
    for axes, case in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        mine = sorted(good(row for row in rows if row["case"] == case), key=lambda row: -row["ms"]["0.5"])
        colours = ["#2a6fbb" if row["name"].startswith("ours") else "#9aa5b1" for row in mine]
        axes.barh([row["name"] for row in mine], [row["ms"]["0.5"] for row in mine], color=colours)
        axes.set_xlabel("ms a sweep")
        axes.set_title(case, fontsize=10)
        axes.tick_params(axis="y", labelsize=7)


QUESTION = Question(
    "sweep",
    "one sweep of the free phase, against its convolutions alone and a step of the autograd loop",
    cases,
    lines,
    conditions=(
        f"3x32x32 random images, k 0.02; a sweep updates every layer once; ours is the difference between phases of "
        f"{BASE} sweeps and of some more; the convolutions alone are the same ones through torch, channels_last"
    ),
    draw=draw,
    targets=targets,
    seconds={"cpu": 60.0, "cuda": 40.0},
    wgmma=True,
)
