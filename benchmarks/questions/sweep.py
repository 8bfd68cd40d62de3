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
from benchmarks.markdown import good, ms, number, table, without_figures
from benchmarks.markdown import ratio as ratio_cell
from benchmarks.problem import (
    COMPILED,
    FLOAT16_LIMIT,
    Precision,
    Problem,
    backends_of,
    free_flops,
    label,
    largest_error,
    on_cpu,
    precisions,
    problem_at,
    require_backend,
    sweep_flops,
    tf32,
)
from benchmarks.questions.roofline import measured
from benchmarks.registry import Question, Target
from benchmarks.setting import Setting
from benchmarks.timing import Times, ratio
from ep_kernels import RelaxConfig, free_phase

ALONE = "its convolutions alone"
AUTOGRAD = "a step of autograd of the energy"


def cases(setting: Setting) -> list[Case]:
    """A case a network and batch; on a CPU, whose compiler takes long, torch.compile is asked of the first one."""
    models = setting.choose(setting.models, ("laborieux/4", "vgg8/4"), ("vgg11",), ("3p-4",))
    batches = setting.choose(setting.batches, (32,), (256, 128), (2,))
    pairs = [(m, b) for m in models for b in batches]
    return [
        Case(f"{m}, batch {b}", partial(sweep_rows, setting, m, b, setting.cuda or (m, b) == pairs[0]), 300.0)
        for m, b in pairs
    ]


def lengths(setting: Setting) -> tuple[int, int]:
    """Sweeps of both phases whose difference is timed. On a GPU even the short one keeps the device busier than the
    host: where the host is what is waited for, the difference would be the host's."""
    return (16, 48) if setting.cuda and not setting.quick else (2, 42) if setting.quick else (2, 10)


def named(setting: Setting, name: str, dtype: str = "fp16") -> str:
    """A competitor's name; on a GPU with what it computes in."""
    return f"{name}, {dtype}" if setting.cuda else name


def sweep_rows(setting: Setting, model: str, batch: int, compiled: bool = False) -> list[Row]:
    """Ours as the difference between phases of both lengths, round by round."""
    p = problem_at(setting, model, batch)
    flops = sweep_flops(p.network, batch)
    few, many = lengths(setting)
    ours = [(on, q) for on in backends_of(setting) for q in precisions(setting, cpu=on_cpu())]
    pairs = {f"ours, {label(on, setting)}, {q.name}": (on, q) for on, q in ours}
    competitors = [
        Competitor(name + end, partial(phase, setting, p, on, q, steps))
        for name, (on, q) in pairs.items()
        for end, steps in (("", many), (" (short)", few))
    ]
    competitors += baselines(setting, p, compiled)
    against, times = named(setting, ALONE), {}

    def keep(name: str, found: Times) -> Row:
        times[name] = found
        return {}

    rows = {row["name"]: row for row in compete(setting, competitors, against=against, warmup=2, after=keep)}
    for name in pairs:
        short = rows.pop(f"{name} (short)")
        if rows[name]["status"] == "ok":
            both = (times[name], times.get(short["name"]))
            rows[name] = difference(rows[name], short, *both, many - few, times.get(against))
    for row in rows.values():
        row |= {"model": model, "batch": batch}
        if row["status"] == "ok" and "rate" in row:
            row |= speed(setting, flops, row["ms"]["0.5"] / 1e3, row["rate"])
    return list(rows.values())


def difference(row: Row, short: Row, a: Times, b: Times | None, sweeps: int, to: Times | None) -> Row:
    """The row of one sweep, from those of a long and a short phase.

    Args:
        a, b: their times; ``b`` is None where the short one has none, and then its row says why.
        sweeps: by which they differ.
        to: what the ratio is to.
    """
    found = {key: value for key, value in row.items() if key not in ("ms", "ratio", "rounds", "samples")}
    if b is None:
        return {**found, "status": short["status"], "reason": short.get("reason", "")}
    one = Times(row["name"], [(x - y) / sweeps for x, y in zip(a.seconds, b.seconds, strict=True)])
    if min(one.seconds) <= 0:
        worst = f"{1e3 * a.seconds[0]:.3g} ms of the longer phase"
        return {**found, "status": "failed", "reason": f"too noisy: a difference of {1e3 * min(one.seconds):.3g} ms a "
                f"sweep in one of {len(one.seconds)} rounds ({worst})"}  # fmt: skip
    found |= one.row()
    return found if to is None else {**found, "ratio": {"to": to.name, **ratio(one, to).quantiles()}}


def speed(setting: Setting, flops: float, seconds: float, rate: str) -> Row:
    """Dense-equivalent TFLOP/s, and percent of the matmul rate with the same operands, measured in this process."""
    tflops = flops / seconds / 1e12
    return {"gflop": flops / 1e9, "tflops": tflops, "percent": 1e14 * tflops / measured(setting, rate)}


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


def baselines(setting: Setting, p: Problem, compiled: bool) -> list[Competitor]:
    """What a sweep is compared with."""
    found = [Competitor(named(setting, ALONE), partial(convolutions, setting, p))]
    if setting.wgmma:
        return found
    graph = ", CUDA graph" if setting.cuda else ""
    modes = () if setting.quick or not compiled else tuple(COMPILED) if setting.cuda else ("default",)
    eager = named(setting, "the same in eager PyTorch") + graph
    found.append(Competitor(eager, partial(plain, setting, p, None)))
    found.append(Competitor(named(setting, AUTOGRAD, "fp32"), partial(autograd_step, p)))
    for mode in modes:
        name = named(setting, f"the same under torch.compile ({mode})") + graph
        found.append(Competitor(name, partial(plain, setting, p, COMPILED[mode])))
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
    once = alone.run()
    replay, calls = captured([alone.run], lambda last: largest_error(last, once), FLOAT16_LIMIT)
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
        states, winners, _ = plain.free(p.parameters, p.x, RelaxConfig(free_steps=2))
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
    found, once = check(verify(), limit), sweep(states, winners)
    replay, calls = captured([work], lambda new: largest_error(new[1:], once[1:]), limit)
    return Timed(replay, lambda: found, limit, calls, values)


def autograd_step(p: Problem) -> Timed:
    """One step of all layers as published codes run it: float32, default memory format."""
    loop = AutogradLoop(p.network, p.parameters)
    x, steps = p.x.contiguous(), len(p.network.shapes)  # the input has reached the top after one for each layer
    with tf32(False):
        states = loop.relax(x, steps)

    def work() -> list[Tensor]:
        with tf32(False):
            return loop.step(x, states)

    def verify() -> float:
        """Its states against ours at gain 1 in float64."""
        exact, config = p.double(), RelaxConfig.classical(free_steps=steps)
        classical = replace(p.network, feedback_gain=1.0)
        expected = free_phase(classical, exact.parameters, exact.x, config, backend="reference").states
        return largest_error(states, expected[1:])

    return Timed(work, verify, 3e-2)


# --- report -----------------------------------------------------------------------------------------------------------


def lines(rows: Sequence[Row]) -> list[str]:
    """A table a case."""
    out: list[str] = []
    for case in names_of(good(rows)):
        mine = good(row for row in rows if row["case"] == case)
        to = next((row["ratio"]["to"] for row in mine if row.get("ratio")), "")
        cells = [
            [
                *(row["name"], ms(row), ratio_cell(row) or ("1" if row["name"] == to else "")),
                *(number(_giga(row)), number(row.get("percent")), number(row["error"], 1)),
            ]
            for row in mine
        ]
        head = ("one sweep by", "ms (quantiles 0.2 to 0.8)", f"/ {to}", "GFLOP/s", "% of matmul", "error")
        out += [f"{case}:", "", *table(head, cells), ""]
    return [*out[:-1], *without_figures(rows)]


def _giga(row: Row) -> float | None:
    return 1e3 * row["tflops"] if "tflops" in row else None


OF_MATMUL = Target("sweep, % of the matmul rate", None, ">=", 60, "VGG-11, fp16")


def targets(rows: Sequence[Row]) -> list[Target]:
    """On a CPU: within 10 % of the convolutions. On a GPU: of the matmul rate, in fp16 at a network's largest batch."""
    found = []
    mine = [row for row in good(rows) if row["name"].startswith("ours")]
    for row in mine:
        of = f"{row['case']}, {row['name']}"
        if row["backend"] == "cpu" and row["precision"] == "fp32":
            value = row["ratio"]["0.5"] if "ratio" in row else None
            found.append(Target("sweep / its convolutions", value, "<=", 1.1, of))
        largest = max(other["batch"] for other in mine if other["model"] == row["model"])
        if row["backend"] != "cpu" and row["precision"] == "fp16" and row["batch"] == largest:
            found.append(replace(OF_MATMUL, value=row["percent"], of=of))
    return found


def draw(rows: Sequence[Row], figure: Any) -> None:
    """Time of every competitor, a panel a case."""
    names = names_of(good(rows))
    for axes, case in zip(figure.subplots(1, max(1, len(names)), squeeze=False)[0], names, strict=False):
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
        "3x32x32 random images, k 0.02; a sweep updates every layer once; ours is the difference between phases of 2 "
        "and 10 sweeps (16 and 48 on a GPU); the convolutions alone are the same ones through torch, channels_last; "
        "GFLOP/s are dense-equivalent: zeros of unpooled feedback and of the halo count; no TF32 in fp32"
    ),
    draw=draw,
    targets=targets,
    asked=(OF_MATMUL,),
    seconds={"cpu": 30.0, "cuda": 40.0},
    wgmma=True,
)
