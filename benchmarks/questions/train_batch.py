"""train_batch: one training batch without the optimizer's step, ours against every other way to get its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.plain import PlainEP, Pooling
from benchmarks.baselines.published import AutogradLoop, FeedForward
from benchmarks.baselines.unrolled import bptt, checkpointed
from benchmarks.case import Case, Competitor, Row, Timed, Unavailable, compete
from benchmarks.graphs import captured
from benchmarks.markdown import cases as names_of
from benchmarks.markdown import good, mebibytes, ms, number, ratio, table, without_figures
from benchmarks.memory import cpu_peak, gpu_peak
from benchmarks.problem import (
    BATCHES,
    PRECISIONS,
    Precision,
    Problem,
    backends_of,
    batch_flops,
    label,
    largest_error,
    network_of,
    problem_of,
    relative_error,
    require_backend,
    tf32,
)
from benchmarks.registry import Question, Target
from benchmarks.setting import Setting
from ep_kernels import Parameters, RelaxConfig, backends, ep_gradients, free_phase, readout
from ep_train.check import compare, smallest_cosine, true_gradients

FEW, DEFAULT = BATCHES  # names of the settings of ours
PUBLISHED = (250, 30)  # T and K of the autograd loop
LONG = 60  # sweeps that BPTT goes through
BACKPROP = "backprop"
COMPILED = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}  # of torch.compile; graphs are ours
Make = Callable[[], Timed]


def cases(setting: Setting) -> list[Case]:
    """A case a network and batch: all competitors in turn."""
    models = setting.choose(setting.models, ("laborieux/2", "vgg8/2"), ("vgg11",), ("3p-4",))
    batches = setting.choose(setting.batches, (32,), (256, 128), (2,))
    limit = 240.0 if setting.cuda else 600.0
    return [Case(f"{m}, batch {b}", partial(batch_rows, setting, m, b), limit) for m in models for b in batches]


def parts(key: str) -> tuple[str, int]:
    """Network and batch of a case's key."""
    model, batch = key.split(", batch ")
    return model, int(batch)


def size_of(setting: Setting) -> int:
    """Side of the images."""
    return 8 if setting.quick else 32


def problem(setting: Setting, model: str, batch: int) -> Problem:
    """Of a case."""
    return problem_of(network_of(model, size_of(setting)), batch, setting.device)


def batch_rows(setting: Setting, model: str, batch: int) -> list[Row]:
    """Times, then peak memory of every competitor that has a time."""
    rows = compete(setting, competitors(setting, model, batch), against=backprop_name(setting), least=0.05)
    kinds = makers(setting, model, batch)
    for row in rows:
        row |= {"model": model, "batch": batch}
        if row["status"] != "ok" or row["name"] == loop_name():
            continue  # the loop's memory is that of the same loop with our settings: it keeps one step's graph
        if setting.cuda:
            work = kinds[row["name"]]().work
            row["memory"] = gpu_peak(lambda work=work: [work() for _ in range(3)], fresh=backends.release)
        else:
            found = cpu_peak("benchmarks.questions.train_batch:alone", setting.json(), model, batch, row["name"])
            row["memory"] = found
    return rows


def alone(text: str, model: str, batch: int, name: str) -> Callable[[], object]:
    """One competitor's work, for a process that measures its memory; libraries are loaded by two images first.

    (By one image they are not: its convolutions take other code.)
    """
    setting = Setting.parse(text)
    setting.apply()
    makers(setting, model, 2)[name]().work()
    return makers(setting, model, batch)[name]().work


def competitors(setting: Setting, model: str, batch: int) -> list[Competitor]:
    """Slow ones take part in one round."""
    once = {loop_name(): 1}
    return [Competitor(name, make, once.get(name)) for name, make in makers(setting, model, batch).items()]


def makers(setting: Setting, model: str, batch: int) -> dict[str, Make]:
    """By name. Ours first; what compiles last."""
    p = partial(problem, setting, model, batch)
    found: dict[str, Make] = {}
    for on in backends_of(setting):
        for precision in precisions(setting):
            for name in BATCHES:
                key = f"ours, {label(on, setting)}, {precision.name}, {name}"
                found[key] = partial(our_batch, setting, p, on, precision, name)
    found[backprop_name(setting)] = partial(backprop, setting, p, backprop_name(setting))
    if setting.wgmma:
        return found
    for kind in ("backprop fp32", "backprop tf32") if setting.cuda else ():
        found[kind] = partial(backprop, setting, p, kind)
    if setting.cuda:
        found[f"{BACKPROP} fp16 autocast, CUDA graph"] = partial(
            backprop, setting, p, "backprop fp16 autocast", "graph"
        )
    for name in BATCHES if setting.cuda else (FEW,):
        found[f"the same in eager PyTorch, {name}"] = partial(plain_batch, setting, p, name, None, False)
        if setting.cuda:
            key = f"the same in eager PyTorch, CUDA graph, {name}"
            found[key] = partial(plain_batch, setting, p, name, None, True)
    found["BPTT through T = 4"] = partial(unrolled, p, 4, 4)
    found["BPTT through the last 3 of T = 4"] = partial(unrolled, p, 4, 3)
    found[f"BPTT through T = {LONG}"] = partial(unrolled, p, LONG, LONG)
    found[f"BPTT through T = {LONG}, checkpointed"] = partial(unrolled, p, LONG, 0)
    found[loop_name("ours")] = partial(autograd_loop, p, "ours")
    found[loop_name("local")] = partial(autograd_loop, p, "local")
    found[loop_name()] = partial(autograd_loop, p, "published", *((3, 2) if setting.quick else PUBLISHED))
    for mode in () if setting.quick else tuple(COMPILED) if setting.cuda else ("default",):
        graph = ", CUDA graph" if setting.cuda else ""
        for name in BATCHES if setting.cuda else (FEW,):
            key = f"the same under torch.compile ({mode}{graph}), {name}"
            found[key] = partial(plain_batch, setting, p, name, COMPILED[mode], setting.cuda)
    if setting.cuda:
        key = f"{BACKPROP} fp16 autocast, torch.compile (max-autotune, CUDA graph)"
        found[key] = partial(backprop, setting, p, "backprop fp16 autocast", "compiled")
    return found


def precisions(setting: Setting) -> list[Precision]:
    """Of our operands."""
    names = setting.choose(setting.precisions, ("fp32",), tuple(PRECISIONS), ("fp32",))
    return [PRECISIONS[name] for name in names]


def backprop_name(setting: Setting) -> str:
    """What ratios are to: the fastest that needs no tuning."""
    return f"{BACKPROP} fp16 autocast" if setting.cuda else BACKPROP


def loop_name(which: str = "published") -> str:
    """Of the loops of autograd."""
    return {
        "published": f"autograd of the energy, T = {PUBLISHED[0]}, K = {PUBLISHED[1]}",
        "ours": "autograd of the energy, our gain, order and sweeps (2 + 1)",
        "local": "the same, each layer by its own two terms only",
    }[which]


def gradient_error(found: Parameters, expected: Parameters) -> float:
    """Largest over tensors, of those that ``found`` has."""
    a, b = found.named(), expected.named()
    return largest_error(list(a.values()), [b[name] for name in a])


@lru_cache(maxsize=4)
def true_batch(p: Problem, name: str) -> Parameters:
    """What these settings give in float64."""
    exact = p.double()
    config = RelaxConfig(**BATCHES[name])  # type: ignore[arg-type]
    return ep_gradients(exact.network, exact.parameters, exact.x, exact.targets, config, backend="reference")[0]


def our_batch(setting: Setting, given: Callable[[], Problem], on: str, precision: Precision, name: str) -> Timed:
    """``ep_gradients``, with the smallest cosine over layers to the true gradient."""
    dtype = torch.float32
    require_backend(on, setting, dtype)
    p, config = given(), precision.config(**BATCHES[name])

    def work() -> Parameters:
        return ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend=on)[0]

    values: Row = {"setting": name, "backend": label(on, setting), "precision": precision.name}
    values["gflop"] = batch_flops(p.network, config, p.x.shape[0]) / 1e9

    def verify() -> float:
        gradients, equilibrium = ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend=on)
        states = [s.to(torch.float32) for s in equilibrium.states]
        true, _ = true_gradients(p.network, p.parameters, states, p.targets, steps=20)
        values["cosine"] = smallest_cosine(compare(gradients, true))
        return gradient_error(gradients, true_batch(p, name))

    return Timed(work, verify, precision.gradient_error, values=values)


def plain_batch(setting: Setting, given: Callable[[], Problem], name: str, mode: str | None, graph: bool) -> Timed:
    """``PlainEP.gradients``: float16 on a GPU, float32 on a CPU; eager or compiled, called or as a CUDA graph."""
    p = given()
    pooling: Pooling = "indices" if mode is None else "windows"
    plain = PlainEP(p.network, torch.float16 if setting.cuda else torch.float32, pooling)
    config = RelaxConfig(**BATCHES[name])  # type: ignore[arg-type]
    scales = plain.scales(config)
    function: Callable[..., Parameters] = plain.gradients
    if mode is not None:
        torch.compiler.reset()
        function = torch.compile(plain.gradients, mode=mode, dynamic=False)

    def work() -> Parameters:
        return function(p.parameters, p.x, p.targets[0], config, scales)

    def verify() -> float:
        return gradient_error(work(), true_batch(p, name))

    values = {"setting": name, "precision": "fp16" if setting.cuda else "fp32"}
    if graph:
        verify_first = verify()
        replay, calls = captured([work])
        return Timed(replay, lambda: verify_first, 0.3, calls, values)
    return Timed(work, verify, 0.3 if setting.cuda else 0.05, values=values)


def backprop(setting: Setting, given: Callable[[], Problem], kind: str, how: str = "called") -> Timed:
    """Forward and backward of the feed-forward net of the same shape, in channels_last memory."""
    p = given()
    model: nn.Module = FeedForward(p.network, p.parameters).to(setting.device, memory_format=torch.channels_last)
    weights = list(model.parameters())
    if how == "compiled":
        torch.compiler.reset()
        model = torch.compile(model, mode="max-autotune-no-cudagraphs", dynamic=False)
    half, rounded = "fp16" in kind, "tf32" in kind

    def forward() -> Tensor:
        with torch.autocast(p.x.device.type, torch.float16, enabled=half, cache_enabled=False):
            out: Tensor = model(p.x)
        return out

    def work() -> tuple[Tensor, ...]:
        with tf32(rounded):
            return torch.autograd.grad(F.cross_entropy(forward().float(), p.labels), weights)

    def verify() -> float:
        """The first free sweep has no feedback, so it is the feed-forward net."""
        exact = p.double()
        first = free_phase(exact.network, exact.parameters, exact.x, RelaxConfig(free_steps=1), backend="reference")
        with tf32(rounded):
            return relative_error(forward(), readout(exact.network, exact.parameters, first))

    limit = 2e-2 if half or rounded else 1e-4
    if how == "called":
        return Timed(work, verify, limit)
    error = verify()
    replay, calls = captured([work])
    return Timed(replay, lambda: error, limit, calls)


def unrolled(given: Callable[[], Problem], total: int, steps: int) -> Timed:
    """BPTT in float32 through the last ``steps`` of ``total`` sweeps (0: through all, checkpointed)."""
    p = given()

    def gradients(of: Problem, total: int, steps: int) -> Parameters:
        config = RelaxConfig(free_steps=total)
        if steps:
            return bptt(of.network, of.parameters, of.x, of.targets, config, steps)
        return checkpointed(of.network, of.parameters, of.x, of.targets, config)

    def verify() -> float:
        """Through four sweeps, in float64 (more of them only repeat)."""
        shallow = (4, min(steps, 4))
        exact = p.double()
        config = RelaxConfig(free_steps=4)
        expected = bptt(exact.network, exact.parameters, exact.x, exact.targets, config, shallow[1] or 4)
        return gradient_error(gradients(p, *shallow), expected)

    return Timed(lambda: gradients(p, total, steps), verify, 1e-2)


def autograd_loop(given: Callable[[], Problem], which: str, free_steps: int = 2, nudged_steps: int = 1) -> Timed:
    """The loop, in PyTorch's default memory format. Its states are checked, at its own settings, in float64."""
    p = given()
    if any(conn.kernel_size != (3, 3) for conn in p.network.connections):
        raise Unavailable("the loop is written for chains of 3x3 convolutions")
    options: dict[str, Any] = {}
    network, config = replace(p.network, feedback_gain=1.0), RelaxConfig.classical(free_steps=3)
    if which != "published":
        options = {"gain": p.network.feedback_gain, "in_turn": True, "local": which == "local"}
        network, config = p.network, RelaxConfig(free_steps=3, over_relaxation=1.0)
    loop = AutogradLoop(p.network, p.parameters, **options)
    x, beta = p.x.contiguous(), 0.2

    def verify() -> float:
        exact = p.double()
        expected = free_phase(network, exact.parameters, exact.x, config, backend="reference").states
        return largest_error(loop.relax(x, 3), expected[1:])

    values = {"setting": f"T {free_steps} + K {nudged_steps}"}
    return Timed(lambda: loop.batch(x, p.labels, free_steps, nudged_steps, beta), verify, 3e-2, values=values)


# --- report -----------------------------------------------------------------------------------------------------------


def lines(rows: Sequence[Row]) -> list[str]:
    """A table a case."""
    out: list[str] = []
    for case in names_of(rows):
        mine = good(row for row in rows if row["case"] == case)
        to = next((row["ratio"]["to"] for row in mine if row.get("ratio")), "")
        cells = [
            [row["name"], ms(row), ratio(row) or "1", images_per_second(row), mebibytes(row), number(row.get("cosine"))]
            for row in mine
        ]
        head = ("batch by", "ms (quantiles 0.2 to 0.8)", f"/ {to}", "images/s", "peak MiB", "smallest cosine")
        out += [f"{case}:", "", *table(head, cells), ""]
    return [*out[:-1], *without_figures(rows)]


def images_per_second(row: Row) -> str:
    """Of a row with a batch."""
    return f"{row['batch'] / row['ms']['0.5'] * 1e3:.0f}"


def targets(rows: Sequence[Row]) -> list[Target]:
    """Of each case; ours is the fastest whose smallest cosine is at least 0.98."""
    found = []
    for case in names_of(rows):
        mine = {row["name"]: row for row in good(row for row in rows if row["case"] == case)}
        fine = [r for r in mine.values() if r["name"].startswith("ours") and r.get("cosine", 0) >= 0.98]
        best = min(fine, key=lambda r: r["ms"]["0.5"], default=None)

        def over(name: str, sign: str, bound: float, measure: str, case: str = case, best: Row | None = best,
                 mine: dict[str, Row] = mine) -> Target:  # fmt: skip
            value = None
            if best is not None and name in mine:
                a, b = best["ms"]["0.5"], mine[name]["ms"]["0.5"]
                value = a / b if sign == "<=" else b / a
            return Target(measure, value, sign, bound, f"{case}, {best['name'] if best else ''}".rstrip(", "))

        cuda = any("fp16 autocast" in name for name in mine)
        back = f"{BACKPROP} fp16 autocast" if cuda else BACKPROP
        found.append(over(back, "<=", 3, "EP batch at cosine >= 0.98 / backprop batch"))
        found.append(over(loop_name(), ">=", 30 if cuda else 10, "published autograd loop / EP batch"))
        found.append(over(loop_name("ours"), ">=", 4, "the loop with our settings / EP batch"))
        if cuda and best is not None:
            plain = [name for name in mine if name.startswith("the same") and name.endswith(str(best["setting"]))]
            first = min(plain, key=lambda name: mine[name]["ms"]["0.5"], default="")
            found.append(over(first, ">=", 2, "best PyTorch batch of the same algorithm / EP batch"))
    return found


def draw(rows: Sequence[Row], figure: Any) -> None:
    """Images per second of every competitor, a panel a case."""
    names = names_of(rows)
    for axes, case in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        mine = sorted(good(row for row in rows if row["case"] == case), key=lambda row: -row["ms"]["0.5"])
        rates = [row["batch"] / row["ms"]["0.5"] * 1e3 for row in mine]
        colours = ["#2a6fbb" if row["name"].startswith("ours") else "#9aa5b1" for row in mine]
        axes.barh([row["name"] for row in mine], rates, color=colours)
        axes.set_xscale("log")
        axes.set_xlabel("images per second")
        axes.set_title(case, fontsize=10)
        axes.tick_params(axis="y", labelsize=7)


QUESTION = Question(
    "train_batch",
    "images/s and peak memory of one training batch, against every other way to its gradients",
    cases,
    lines,
    conditions=(
        "3x32x32 random images, k 0.02, without the optimizer's step; our cosine is the smallest over layers to BPTT "
        "to convergence; BPTT uses our gain and order; peak memory is that of the call beyond parameters and inputs "
        "(on a CPU in a process of its own)"
    ),
    draw=draw,
    targets=targets,
    seconds={"cpu": 200.0, "cuda": 80.0},
    wgmma=True,
)
