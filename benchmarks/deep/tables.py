"""The tables: which runs each one needs. A run is a configuration of ep-train and a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SEEDS = (0, 1, 2)
Values = Mapping[str, Any]

# Chains of 3x3 convolutions for 28x28 images: three pools each, widths 8 to 32.
DEPTHS = {
    4: "8p-16p-32p-32",
    6: "8p-16p-16-16p-32-32",
    8: "8p-16p-16-16-16p-32-32-32",
    11: "8p-16p-16-16-16-16p-32-32-32-32-32",
}
FASHION: Values = {
    "dataset": "fashion-mnist",
    "train_limit": 10_000,
    "batch_size": 50,
    "lr": 2e-3,
    "lr_schedule": "cosine",
    "threads": 1,
}
CLASSICAL: Values = {
    "feedback_gain": 1.0,
    "schedule": "sync",
    "free_steps": 60,
    "nudged_steps": 20,
    "beta": 0.2,
    "form": "states",
    "winners": "live",
    "over_relaxation": 1.0,
    "weight_gain": 0.5,  # with 1 the free phase of gain 1 does not converge at all (docs/results.md)
}
OURS: Values = {"feedback_gain": 0.05}
# At small gain local errors on every layer, or of weight 0.2, cost accuracy (docs/results.md): a few weak ones. At gain
# 1 they are most of the signal.
LOCAL_LAYERS = {4: "2", 6: "2,4", 8: "3,6", 11: "3,6,9"}
LOCAL_CLASSICAL: Values = {"local_heads": "all", "local_weight": (0.2,)}
BACKPROP: Values = {"method": "backprop"}


def distilled(teacher: str, *, local: bool = False) -> Values:
    """Output and intermediate distillation from a teacher."""
    values: dict[str, Any] = {
        "teacher": teacher,
        "distill_logits": 0.1,
        "distill_features": ("auto",),
        "distill_feature_weight": (1.0,),
    }
    if local:
        values["distill_local_logits"] = 0.05
    return values


@dataclass(frozen=True)
class Run:
    """One training run of a table: its row and column there, the configuration and the seed."""

    table: str
    row: str
    column: str
    seed: int
    values: Values

    @property
    def name(self) -> str:
        """Of its folder."""
        text = f"{self.table}-{self.row}-{self.column}-{self.seed}"
        return "".join(c if c.isalnum() or c in "-.+" else "_" for c in text)


@dataclass(frozen=True)
class Table:
    """A question, and the runs that answer it: ``rows`` and ``columns`` in their order."""

    name: str
    what: str
    cells: Callable[[str], Iterator[tuple[str, str, Values]]]
    epochs: int
    teacher: str | None = None

    @property
    def length(self) -> Values:
        """Epochs, and one evaluation after the last."""
        return {"epochs": self.epochs, "evaluate_every": self.epochs}

    def runs(self, teacher: str) -> list[Run]:
        """All of them, seed by seed, so that what is there first is a whole table of one seed."""
        found = list(self.cells(teacher))
        return [
            Run(self.name, row, column, seed, {**values, **self.length, "seed": seed})
            for seed in SEEDS
            for row, column, values in found
        ]


def _depth_cells(teacher: str) -> Iterator[tuple[str, str, Values]]:
    for depth, model in DEPTHS.items():
        base = {**FASHION, "model": model}
        local: Values = {"local_heads": LOCAL_LAYERS[depth], "local_weight": (0.05,)}
        column = str(depth)
        yield "(b) EP, k 0.05", column, {**base, **OURS}
        yield "(c) + local errors", column, {**base, **OURS, **local}
        yield "(d) + distillation", column, {**base, **OURS, **distilled(teacher)}
        yield "(c + d) both", column, {**base, **OURS, **local, **distilled(teacher, local=True)}
        yield "(e) backprop", column, {**base, **BACKPROP}
        yield "(e + d) backprop, distillation", column, {**base, **BACKPROP, **distilled(teacher)}


def _classical_cells(teacher: str) -> Iterator[tuple[str, str, Values]]:
    for depth, model in DEPTHS.items():
        base = {**FASHION, **CLASSICAL, "model": model}
        column = str(depth)
        yield "(a) classical EP", column, base
        yield "(a+) + local errors", column, {**base, **LOCAL_CLASSICAL}
        yield "(a+) + distillation", column, {**base, **distilled(teacher)}
        yield "(a+) + both", column, {**base, **LOCAL_CLASSICAL, **distilled(teacher, local=True)}


def _stability_cells(teacher: str) -> Iterator[tuple[str, str, Values]]:
    """One setting changed at a time, on 8 layers."""
    base = {**FASHION, "train_limit": 5_000, "model": DEPTHS[8]}
    gain_half = {"feedback_gain": 0.5}
    for row, values in (
        ("defaults: k 0.1, sweep, 4 + 3, Adam", {}),
        ("k 0.02, 2 + 1 tangent", {"feedback_gain": 0.02, "free_steps": 2, "nudged_steps": 1, "estimator": "tangent"}),
        ("k 0.5", gain_half),
        ("k 0.5, even_odd", {**gain_half, "schedule": "even_odd"}),
        ("k 0.5, sync", {**gain_half, "schedule": "sync"}),
        ("k 0.5, sync, 12 + 10", {**gain_half, "schedule": "sync", "free_steps": 12, "nudged_steps": 10}),
        ("k 0.5, local errors 0.2", {**gain_half, "local_heads": "all"}),
        ("even_odd", {"schedule": "even_odd"}),
        ("sync, 8 + 8", {"schedule": "sync", "free_steps": 8, "nudged_steps": 8}),
        ("local errors 0.2 on all layers", {"local_heads": "all"}),
        ("local errors 0.05 on layers 3, 6", {"local_heads": "3,6", "local_weight": (0.05,)}),
        ("linearised nudge", {"linear_nudge": True}),
        ("linearised nudge, local errors 0.2", {"linear_nudge": True, "local_heads": "all"}),
        ("weight decay 1e-4", {"weight_decay": 1e-4}),
        ("AdamW, weight decay 1e-2", {"optimizer": "adamw", "weight_decay": 1e-2}),
        ("SGD 0.05, momentum 0.9", {"optimizer": "sgd", "lr": 0.05}),
        ("initial gain 0.5", {"weight_gain": 0.5}),
        ("initial gain 1.4", {"weight_gain": 1.4}),
        ("initial gain 2", {"weight_gain": 2.0}),
        ("damping 0.5", {"damping": 0.5}),
    ):
        yield row, "8", {**base, **values}


def _gain_cells(teacher: str) -> Iterator[tuple[str, str, Values]]:
    for gain in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        for depth in (4, 11):
            yield f"k {gain:g}", str(depth), {**FASHION, "model": DEPTHS[depth], "feedback_gain": gain}


def _cifar_cells(teacher: str) -> Iterator[tuple[str, str, Values]]:
    base = {
        "train_limit": 5_000,
        "batch_size": 50,
        "model": "vgg8",
        "width": 0.125,
        "lr": 1e-3,
        "lr_schedule": "cosine",
        "threads": 1,
    }
    ours = {"feedback_gain": 0.02, "free_steps": 2, "nudged_steps": 1, "estimator": "tangent"}
    local = {"local_heads": "3,5", "local_weight": (0.05,)}
    column = "vgg8 / 8"
    yield "(b) EP, k 0.02, 2 + 1 tangent", column, {**base, **ours}
    yield "(c) + local errors", column, {**base, **ours, **local}
    yield "(d) + distillation", column, {**base, **ours, **distilled(teacher)}
    yield "(e) backprop", column, {**base, **BACKPROP}


TABLES = {
    table.name: table
    for table in (
        Table("depth", "accuracy and gradient against depth", _depth_cells, epochs=4),
        Table("classical", "classical EP against depth", _classical_cells, epochs=1),
        Table("gain", "the feedback gain", _gain_cells, epochs=3),
        Table("cifar", "CIFAR-10 (JPEG q75), 5,000 training images", _cifar_cells, epochs=4),
        Table("stability", "what settings do (8 layers, 5,000 training images)", _stability_cells, epochs=2),
    )
}
