"""train_batch: one training batch without the optimizer's step, ours against every other way to get its gradients."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.plain import PlainEP, Pooling
from benchmarks.baselines.published import AutogradLoop, FeedForward
from benchmarks.baselines.unrolled import bptt, checkpointed
from benchmarks.case import Case, Competitor, Row, Timed, Unavailable, check, compete, short
from benchmarks.graphs import captured
from benchmarks.markdown import good, mebibytes, ms, number, ratio, table, without_figures
from benchmarks.memory import cpu_peak, gpu_peak
from benchmarks.plots import bars, finish, panels
from benchmarks.problem import (
    BATCHES,
    COMPILED,
    PRECISIONS,
    Precision,
    Problem,
    backends_of,
    batch_flops,
    label,
    largest_error,
    precisions,
    problem_at,
    relative_error,
    require_backend,
    tf32,
)
from benchmarks.registry import Question, Target
from benchmarks.setting import Setting
from ep_kernels import Parameters, RelaxConfig, backends, ep_gradients, free_phase, readout
from ep_kernels import backend as ep_backend
from ep_train.check import compare, smallest_cosine, true_gradients

FEW, DEFAULT = BATCHES  # names of the settings of ours
PUBLISHED = (250, 30)  # T and K of the autograd loop
ON_CPU = ("laborieux/4", "vgg8/8")
LONG = 60  # sweeps that BPTT goes through
BACKPROP = "backprop"
Make = Callable[[], Timed]


def cases(setting: Setting) -> list[Case]:
    """A case a network, batch and group of competitors, the most wanted first: what is cut by time loses one group."""
    models = setting.choose(setting.models, ON_CPU, ("vgg11",), ("3p-4",))
    batches = setting.choose(setting.batches, (32,), (256, 128), (2,))
    pairs = [(m, b) for b in batches for m in models]
    return [
        Case(f"{m}, batch {b}: {group}", partial(batch_rows, setting, m, b, group, names), 300.0)
        for number in range(max(len(groups(setting, m, b)) for m, b in pairs))
        for m, b in pairs
        for group, names in list(groups(setting, m, b).items())[number : number + 1]
    ]


def parts(key: str) -> tuple[str, int]:
    """Network and batch of a case's key."""
    model, batch = key.split(": ")[0].split(", batch ")
    return model, int(batch)


def rounds_of(name: str) -> int | None:
    """Rounds that slow ones take part in."""
    return 1 if name == loop_name() or f"T = {LONG}" in name else None


def groups(setting: Setting, model: str, batch: int) -> dict[str, list[str]]:
    """Names of competitors that are timed together, each with backprop and with the first of ours.

    Ours are a group a precision: the GPU backends keep buffers and graphs of so many relaxations only.
    """
    names = list(makers(setting, model, batch))
    both = [names[0], to_name(setting)]
    found: dict[str, list[str]] = {}
    for name in names:
        if name.startswith("ours"):
            group = ", ".join(name.split(", ")[:1] + name.split(", ")[2:-2])  # without the backend and the sweeps
        elif "torch.compile" in name:
            group = name
        else:
            kinds = {BACKPROP: "backprop", "the same in": "PyTorch", "BPTT": "BPTT", "autograd": "autograd"}
            group = next(kind for start, kind in kinds.items() if name.startswith(start))
        found.setdefault(group, []).append(name)
    if not setting.cuda:
        del found["backprop"]  # it is in every other group
    return {group: list(dict.fromkeys([*both, *mine])) for group, mine in found.items()}


def batch_rows(setting: Setting, model: str, batch: int, group: str, names: Sequence[str]) -> list[Row]:
    """Times, then peak memory of every competitor that has a time. ``repeated``: another case has the same row."""
    kinds = makers(setting, model, batch)
    competitors = [Competitor(name, kinds[name], rounds_of(name)) for name in names]
    rows = compete(setting, competitors, against=to_name(setting), least=0.05)
    first = next(iter(groups(setting, model, batch)))
    for row in rows:
        row |= {"model": model, "batch": batch, "repeated": group != first and row["name"] in names[:2]}
        if row["status"] != "ok" or row["repeated"]:
            continue
        try:
            row["memory"] = peak(setting, model, batch, row["name"], kinds[row["name"]])
        except Exception as why:  # a time without its memory is a time
            row["memory_reason"] = short(why)
    return rows


def peak(setting: Setting, model: str, batch: int, name: str, make: Make) -> int | None:
    """Bytes beyond parameters and inputs; None where a number would mislead.

    A CUDA graph has its memory before it is called. The published loop has that of the same loop with our settings,
    which keeps one step's graph as well. Of long BPTT, ``memory_vs_steps`` asks. On a CPU what is compiled would be
    compiled again in the process that is measured.
    """
    compiled = "torch.compile" in name and not setting.cuda
    if name == loop_name() or f"T = {LONG}" in name or "CUDA graph" in name or compiled:
        return None
    if not setting.cuda:
        return cpu_peak("benchmarks.questions.train_batch:alone", setting.json(), model, batch, name)
    work = make().work

    def thrice() -> None:
        for _ in range(3):  # the backend cuda captures its graph in the second call
            work()

    return gpu_peak(thrice, fresh=backends.release)


def alone(text: str, model: str, batch: int, name: str) -> Callable[[], object]:
    """One competitor's work, for a process that measures its memory: it has run once, so what it loads is loaded."""
    setting = Setting.parse(text)
    setting.apply()
    work = makers(setting, model, batch)[name]().work
    work()
    return work


def makers(setting: Setting, model: str, batch: int) -> dict[str, Make]:
    """By name. Ours first; what compiles last."""
    p = partial(problem_at, setting, model, batch)
    found: dict[str, Make] = {}
    for on in backends_of(setting):
        for precision in precisions(setting):
            for name in BATCHES:
                key = f"ours, {label(on, setting)}, {precision.name}, {name}"
                found[key] = partial(our_batch, setting, p, on, precision, name)
    if setting.cuda:
        found[to_name(setting)] = partial(backprop, setting, p, backprop_name(setting), "graph")
    found[backprop_name(setting)] = partial(backprop, setting, p, backprop_name(setting))
    if setting.wgmma:
        return found
    for kind in ("backprop fp32", "backprop tf32") if setting.cuda else ():
        found[kind] = partial(backprop, setting, p, kind)
    for name in BATCHES if setting.cuda else (FEW,):
        found[f"the same in eager PyTorch, {name}"] = partial(plain_batch, setting, p, name, None, False)
        if setting.cuda:
            key = f"the same in eager PyTorch, CUDA graph, {name}"
            found[key] = partial(plain_batch, setting, p, name, None, True)
    slow = takes_slow(setting, model)
    found["BPTT through T = 4"] = partial(unrolled, p, 4, 4)
    found["BPTT through the last 3 of T = 4"] = partial(unrolled, p, 4, 3)
    if slow:
        found[f"BPTT through T = {LONG}"] = partial(unrolled, p, LONG, LONG)
        found[f"BPTT through T = {LONG}, checkpointed"] = partial(unrolled, p, LONG, 0)
    found[loop_name("ours")] = partial(autograd_loop, p, "ours")
    found[loop_name("local")] = partial(autograd_loop, p, "local")
    found[loop_name()] = partial(autograd_loop, p, "published", *((3, 2) if setting.quick else PUBLISHED))
    for mode in () if setting.quick or not slow else tuple(COMPILED) if setting.cuda else ("default",):
        graph = ", CUDA graph" if setting.cuda else ""
        for name in BATCHES if setting.cuda else (FEW,):
            key = f"the same under torch.compile ({mode}{graph}), {name}"
            found[key] = partial(plain_batch, setting, p, name, COMPILED[mode], setting.cuda)
    if setting.cuda:
        key = f"{backprop_name(setting)}, torch.compile (max-autotune, CUDA graph)"
        found[key] = partial(backprop, setting, p, backprop_name(setting), "compiled")
    return found


def takes_slow(setting: Setting, model: str) -> bool:
    """Whether what takes a minute on a CPU (its compiler, BPTT through many sweeps) is asked of this network, too."""
    return setting.cuda or bool(setting.models) or model == ON_CPU[0]


def backprop_name(setting: Setting) -> str:
    """Of the usual backprop batch, called from Python."""
    return f"{BACKPROP} fp16 autocast" if setting.cuda else BACKPROP


def to_name(setting: Setting) -> str:
    """What ratios are to: the same on a GPU as a CUDA graph, for Python is slower than these batches."""
    return f"{backprop_name(setting)}, CUDA graph" if setting.cuda else BACKPROP


def loop_name(which: str = "published") -> str:
    """Of the loops of autograd."""
    return {
        "published": f"autograd of the energy, T = {PUBLISHED[0]}, K = {PUBLISHED[1]}",
        "ours": "autograd of the energy, our gain, order and sweeps (2 + 1)",
        "local": "autograd of a layer's own two terms, the same settings",
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


def cosine_to_bptt(p: Problem, gradients: Parameters, states: Sequence[Tensor]) -> float:
    """Smallest over layers, to BPTT to convergence from these states, in float32 by the reference."""
    with tf32(False), ep_backend("reference"):
        start = [s.to(torch.float32) for s in states]
        true, _ = true_gradients(p.network, p.parameters, start, p.targets, steps=20)
    return smallest_cosine(compare(gradients, true))


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
        values["cosine"] = cosine_to_bptt(p, gradients, equilibrium.states)
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
    limit = PRECISIONS["fp16" if setting.cuda else "fp32"].gradient_error  # that of ours
    if not graph:
        return Timed(work, verify, limit, values=values)
    error = check(verify(), limit)
    replay, calls = captured([work], lambda out: gradient_error(out, true_batch(p, name)), limit)
    return Timed(replay, lambda: error, limit, calls, values)


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
    error = check(verify(), limit)
    called = work()

    def same(out: Sequence[Tensor]) -> float:
        return largest_error(out, called)

    replay, calls = captured([work], same, limit)
    return Timed(replay, lambda: error, limit, calls)


def unrolled(given: Callable[[], Problem], total: int, steps: int) -> Timed:
    """BPTT in float32 through the last ``steps`` of ``total`` sweeps (0: through all, checkpointed)."""
    p = given()

    def gradients(of: Problem, total: int, steps: int) -> Parameters:
        config = RelaxConfig(free_steps=total)
        with tf32(False):
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
    steps = len(p.network.shapes)  # all at once, the input has reached the top after one for each layer
    network, config = replace(p.network, feedback_gain=1.0), RelaxConfig.classical(free_steps=steps)
    if which != "published":
        options = {"gain": p.network.feedback_gain, "in_turn": True, "local": which == "local"}
        network, config = p.network, RelaxConfig(free_steps=steps, over_relaxation=1.0)
    loop = AutogradLoop(p.network, p.parameters, **options)
    x, beta = p.x.contiguous(), 0.2

    def verify() -> float:
        exact = p.double()
        expected = free_phase(network, exact.parameters, exact.x, config, backend="reference").states
        return largest_error(loop.relax(x, steps), expected[1:])

    values = {"setting": f"T {free_steps} + K {nudged_steps}"}
    return Timed(lambda: loop.batch(x, p.labels, free_steps, nudged_steps, beta), verify, 3e-2, values=values)


# --- report -----------------------------------------------------------------------------------------------------------


def by_problem(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows with figures of each network and batch; of those that several cases have, the first."""
    found: dict[str, list[Row]] = {}
    for row in good(rows):
        if not row["repeated"]:
            key = row["case"].split(": ")[0] + (", wgmma" if row["case"].endswith(", wgmma") else "")
            found.setdefault(key, []).append(row)
    return found


def lines(rows: Sequence[Row]) -> list[str]:
    """A table a network and batch."""
    out: list[str] = []
    for name, mine in by_problem(rows).items():
        to = next((row["ratio"]["to"] for row in mine if row.get("ratio")), "")
        cells = [
            [row["name"], ms(row), ratio(row) or "1", images_per_second(row), mebibytes(row), number(row.get("cosine"))]
            for row in mine
        ]
        head = ("implementation", "ms (quantiles 0.2 to 0.8)", f"/ {to}", "images/s", "peak MiB", "smallest cosine")
        out += [f"{name}:", "", *table(head, cells), ""]
    return [*out[:-1], *without_figures(rows)]


def images_per_second(row: Row) -> str:
    """Of a row with a batch."""
    return f"{row['batch'] / row['ms']['0.5'] * 1e3:.0f}"


TO_BACKPROP = Target("EP batch at cosine >= 0.98 / backprop batch", None, "<=", 3, "VGG-11")
TO_LOOP = Target("published autograd loop / EP batch", None, ">=", 30, "VGG-11")  # on a CPU 10
TO_SAME_LOOP = Target("the loop with our settings / EP batch", None, ">=", 4, "VGG-11")
TO_PYTORCH = Target("best PyTorch batch of the same algorithm / EP batch", None, ">=", 2, "VGG-11, torch.compile")


def targets(rows: Sequence[Row]) -> list[Target]:
    """Of each network and batch; ours is the fastest whose smallest cosine is at least 0.98."""
    found = []
    for name, mine in by_problem(rows).items():
        fine = [row for row in mine if row["name"].startswith("ours") and row.get("cosine", 0) >= 0.98]
        best = min(fine, key=lambda row: row["ms"]["0.5"], default=None)
        cuda = any("fp16 autocast" in row["name"] for row in mine)
        of = f"{name}, {best['name']}" if best else name
        back = fastest(row for row in mine if row["name"].startswith(BACKPROP))
        value = None if best is None or back is None else best["ms"]["0.5"] / back["ms"]["0.5"]
        against = f" (fastest: {back['name']})" if back is not None and back["name"] != BACKPROP else ""
        found.append(replace(TO_BACKPROP, value=value, of=of + against))
        if name.endswith(", wgmma"):
            continue
        case = [row for row in good(rows) if row["case"].startswith(f"{name}: autograd")]
        ours = next((row for row in case if row["name"].startswith("ours")), None)
        of = f"{name}, {ours['name']}" if ours is not None else name
        loop = paired(case, loop_name(), ours)
        found.append(replace(TO_LOOP, value=loop, bound=TO_LOOP.bound if cuda else 10, of=of))
        same = paired(case, loop_name("ours"), ours)
        found.append(replace(TO_SAME_LOOP, value=same, of=of))
        if cuda:
            plain = [row for row in mine if row["name"].startswith("the same") and best is not None]
            plain = [row for row in plain if best is not None and row.get("setting") == best["setting"]]
            first = fastest(plain) if any("torch.compile" in row["name"] for row in plain) else None
            value = None if best is None or first is None else first["ms"]["0.5"] / best["ms"]["0.5"]
            of = f"{name}" + (f", {first['name']}" if first is not None else ", none compiled")
            found.append(replace(TO_PYTORCH, value=value, of=of))
    return found


def fastest(rows: Iterable[Row]) -> Row | None:
    """Of rows with times."""
    return min(rows, key=lambda row: float(row["ms"]["0.5"]), default=None)


def paired(rows: Sequence[Row], name: str, ours: Row | None) -> float | None:
    """Median over rounds of a competitor's time over ours in the same round of the same case."""
    slow = next((row for row in rows if row["name"] == name), None)
    if slow is None or ours is None:
        return None
    pairs = zip(slow["samples"], ours["samples"], strict=False)
    return statistics.median(a / b for a, b in pairs)


def draw(rows: Sequence[Row], figure: Any) -> None:
    """Images per second of every competitor, a panel a network and batch."""
    found = by_problem(rows)
    for axes, (name, mine) in zip(panels(figure, list(found)), found.items(), strict=False):
        slowest_first = sorted(mine, key=lambda row: -float(row["ms"]["0.5"]))
        bars(axes, slowest_first, lambda row: float(row["batch"] / row["ms"]["0.5"] * 1e3))
        axes.set_xscale("log")
        finish(axes, name, "images per second", "")


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
    asked=(TO_BACKPROP, TO_LOOP, TO_SAME_LOOP, TO_PYTORCH),
    seconds={"cpu": 150.0, "cuda": 80.0},
    wgmma=True,
)
