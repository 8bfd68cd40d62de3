"""batch: images per second of one training batch, ours and backprop, from one image to many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.case import Case, Competitor, Row, Timed, compete
from benchmarks.markdown import good, ms, number, ratio, table, without_figures
from benchmarks.problem import Precision, backends_of, label, precisions, problem_at
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
from benchmarks.timing import Times

CPU = (1, 4, 16, 64, 128)
CUDA = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def cases(setting: Setting) -> list[Case]:
    """A case a network and batch."""
    models = setting.choose(setting.models, ("laborieux/4",), ("vgg11",), ("3p-4",))
    batches = setting.choose(setting.batches, CPU, CUDA, (1, 4))
    return [Case(f"{m}, batch {b}", partial(batch_rows, setting, m, b), 240.0) for m in models for b in batches]


def batch_rows(setting: Setting, model: str, batch: int) -> list[Row]:
    """Times of ours and of backprop in turn, and images per second."""

    def rate(_name: str, times: Times) -> Row:
        return {"images_per_s": batch / times.median}

    found = competitors(setting, model, batch)
    rows = compete(setting, found, against=backprop_name(setting), least=0.05, warmup=2, after=rate)
    return [{**row, "model": model, "batch": batch} for row in rows]


def competitors(setting: Setting, model: str, batch: int) -> list[Competitor]:
    """Ours with two sweeps and one tangent sweep, on every backend; backprop, on a GPU also as a CUDA graph."""
    given = partial(problem_at, setting, model, batch)
    found: list[tuple[str, Callable[[], Timed]]] = []
    for on in backends_of(setting):
        for precision in precisions(setting, cuda=("fp16",)):
            make = partial(checked_batch, setting, given, on, precision)
            found.append((f"ours, {label(on, setting)}, {precision.name}", make))
    name = backprop_name(setting)
    found.append((name, partial(backprop, setting, given, name)))
    if setting.cuda and not setting.wgmma:
        found.append((f"{name}, CUDA graph", partial(backprop, setting, given, name, "graph")))
    return [Competitor(name, make) for name, make in found]


def checked_batch(setting: Setting, given: Callable[[], Any], on: str, precision: Precision) -> Timed:
    """``train_batch``'s, checked against float64 only: the true gradient of many images would take a minute."""
    timed = our_batch(setting, given, on, precision, FEW)

    def verify() -> float:
        gradients: Any = timed.work()
        return gradient_error(gradients, true_batch(given(), FEW))

    return replace(timed, verify=verify)


# --- report -----------------------------------------------------------------------------------------------------------


def lines(rows: Sequence[Row]) -> list[str]:
    """A table a network, a line a batch and competitor."""
    out: list[str] = []
    for model in models_of(rows):
        cells = [
            [str(row["batch"]), row["name"], number(row["images_per_s"], 4), ms(row), ratio(row) or "1"]
            for row in good(rows)
            if row["model"] == model
        ]
        to = next((row["ratio"]["to"] for row in good(rows) if row["model"] == model and row.get("ratio")), "")
        head = ("images", "batch by", "images/s", "ms (quantiles 0.2 to 0.8)", f"/ {to}")
        out += [f"{model}:", "", *table(head, cells), ""]
    return [*out[:-1], *without_figures(rows)]


def models_of(rows: Sequence[Row]) -> list[str]:
    """Networks that have figures, in order."""
    return list(dict.fromkeys(row["model"] for row in good(rows)))


def draw(rows: Sequence[Row], figure: Any) -> None:
    """Images per second against the batch, a panel a network."""
    from benchmarks.plots import finish

    models = models_of(rows)
    for axes, model in zip(figure.subplots(1, max(1, len(models)), squeeze=False)[0], models, strict=False):
        mine = [row for row in good(rows) if row["model"] == model]
        for name in dict.fromkeys(row["name"] for row in mine):
            points = sorted((row["batch"], row["images_per_s"]) for row in mine if row["name"] == name)
            style = "-" if name.startswith("ours") else "--"
            axes.loglog(*zip(*points, strict=True), style, marker="o", label=name)
        finish(axes, model, "images a batch", "images per second")


QUESTION = Question(
    "batch",
    "images/s of one training batch from one image to many, EP against backprop",
    cases,
    lines,
    conditions=(
        "3x32x32 random images, k 0.02, T 2 + K 1 tangent, without the optimizer's step; backprop is that of the "
        "feed-forward net of the same shape; ours and backprop in turn, batch by batch"
    ),
    draw=draw,
    seconds={"cpu": 30.0, "cuda": 15.0},
    wgmma=True,
)
