"""depth: cost of a training batch, and gradient norm of every layer, from VGG-5 to VGG-16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from benchmarks.case import Case, Competitor, Row, Timed, compete
from benchmarks.markdown import good, ms, number, ratio, table, without_figures
from benchmarks.problem import BATCHES, Precision, Problem, backends_of, label, precisions, problem_at
from benchmarks.questions.precision import Truth
from benchmarks.questions.train_batch import (
    FEW,
    backprop,
    backprop_name,
    gradient_error,
    our_batch,
    true_batch,
)
from benchmarks.registry import Question
from benchmarks.setting import Setting
from ep_kernels import ep_gradients
from ep_train.check import compare, smallest_cosine

MODELS = ("vgg5", "vgg7", "vgg8", "vgg9", "vgg11", "vgg13", "vgg16")
CONVERGE = 20  # sweeps to the true equilibrium, and as many that BPTT goes through


def cases(setting: Setting) -> list[Case]:
    """A case a network."""
    reduced = tuple(f"{model}/8" for model in MODELS)
    models = setting.choose(setting.models, reduced, MODELS, ("3p-4", "3p-4-4p"))
    batches = setting.choose(setting.batches, (16,), (128,), (2,))
    return [Case(f"{m}, batch {b}", partial(depth_rows, setting, m, b), 240.0) for m in models for b in batches]


def depth_rows(setting: Setting, model: str, batch: int) -> list[Row]:
    """Times of ours and of backprop in turn; cosine and norms of our gradients."""
    given = partial(problem_at, setting, model, batch)
    name = backprop_name(setting)
    competitors = [
        Competitor(f"ours, {label(on, setting)}, {precision.name}", partial(layered, setting, given, on, precision))
        for on in backends_of(setting)
        for precision in precisions(setting, cuda=("fp16",))
    ]
    competitors.append(Competitor(name, partial(backprop, setting, given, name)))
    if setting.cuda and not setting.wgmma:
        graph = partial(backprop, setting, given, name, "graph")
        competitors.append(Competitor(f"{name}, CUDA graph", graph))
    rows = compete(setting, competitors, against=name, least=0.05, warmup=2)
    layers = len(given().network.connections)
    return [{**row, "model": model, "batch": batch, "depth": layers} for row in rows]


@lru_cache(maxsize=1)
def truth(p: Problem) -> Truth:
    """True gradients, in float32 without TF32."""
    return Truth(p, CONVERGE)


def layered(setting: Setting, given: Callable[[], Problem], on: str, precision: Precision) -> Timed:
    """``train_batch``'s, which also tells the layers apart.

    Returns:
        With ``layers`` among the values, from the input on, of each connection's weights: ``norm`` of our gradient,
        ``true_norm`` of that by BPTT to convergence, ``relative_norm``, their ratio, and ``cosine``.
    """
    timed = our_batch(setting, given, on, precision, FEW)
    config = precision.config(**BATCHES[FEW])

    def verify() -> float:
        p = given()
        gradients, equilibrium = ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend=on)
        true, _ = truth(p).at(equilibrium.states)
        checks, ours, theirs = compare(gradients, true), gradients.named(), true.named()
        timed.values["cosine"] = smallest_cosine(checks)
        timed.values["layers"] = [
            {
                "name": layer.name,
                "norm": float(ours[layer.name].double().norm()),
                "true_norm": float(theirs[layer.name].double().norm()),
                "relative_norm": layer.relative_norm,
                "cosine": layer.cosine,
            }
            for layer in checks
            if layer.name.startswith("connections")
        ]
        return gradient_error(gradients, true_batch(p, FEW))

    return replace(timed, verify=verify)


# --- report -----------------------------------------------------------------------------------------------------------


def lines(rows: Sequence[Row]) -> list[str]:
    """A line a network and competitor; norms are those of our gradient over the true one's."""
    cells = []
    for row in good(rows):
        norms = [layer["relative_norm"] for layer in row.get("layers", ())]
        between = f"{min(norms):.3f} to {max(norms):.3f}" if norms else ""
        cells.append(
            [
                row["model"], str(row["depth"]), str(row["batch"]), row["name"], ms(row), ratio(row) or "1",
                number(row.get("cosine")), between, falls(row),
            ]
        )  # fmt: skip
    to = next((row["ratio"]["to"] for row in good(rows) if row.get("ratio")), "")
    head = (
        *("network", "convolutions", "images", "batch by", "ms (quantiles 0.2 to 0.8)", f"/ {to}"),
        *("smallest cosine", "norm / true norm, over layers", "norm of the first layer / last"),
    )
    return [*table(head, cells), *without_figures(rows)]


def falls(row: Row) -> str:
    """How the norm changes down the layers."""
    layers = row.get("layers")
    return number(layers[0]["norm"] / layers[-1]["norm"]) if layers and layers[-1]["norm"] else ""


def draw(rows: Sequence[Row], figure: Any) -> None:
    """Cost against depth, and the norm of every layer beside the true one."""
    from benchmarks.plots import finish

    left, right = figure.subplots(1, 2)
    mine = [row for row in good(rows) if row.get("layers")]
    for name in dict.fromkeys(row["name"] for row in mine):
        points = sorted((r["depth"], r["ratio"]["0.5"]) for r in mine if r["name"] == name and r.get("ratio"))
        if points:
            left.plot(*zip(*points, strict=True), marker="o", label=name)
    left.set_ylim(bottom=0)
    first = mine[0]["name"] if mine else ""
    for row in mine:
        if row["name"] != first:
            continue
        at = range(1, len(row["layers"]) + 1)
        (line,) = right.semilogy(at, [layer["norm"] for layer in row["layers"]], marker="o", label=row["model"])
        right.semilogy(at, [layer["true_norm"] for layer in row["layers"]], ":", color=line.get_color())
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    to = next((row["ratio"]["to"] for row in mine if row.get("ratio")), "backprop")
    finish(left, f"EP batch / {to}", "convolutions", "ratio of times")
    finish(right, f"{first} (dotted: the true gradient)", "layer", "norm of the weights' gradient")


QUESTION = Question(
    "depth",
    "cost and gradient norm of every layer, VGG-5 to VGG-16",
    cases,
    lines,
    conditions=(
        "3x32x32 random images, k 0.02, T 2 + K 1 tangent, without the optimizer's step; on a CPU an eighth of the "
        f"widths; the true gradient is BPTT to convergence ({CONVERGE} more sweeps, then through {CONVERGE}) in float32"
    ),
    draw=draw,
    seconds={"cpu": 40.0, "cuda": 15.0},
    wgmma=True,
)
