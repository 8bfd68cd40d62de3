"""Pictures of the tables: medians of the seeds that are there, on a white ground (readable in light and dark pages)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Result = dict[str, Any]


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write every picture that there are results for; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, table, picture in (
        ("deep-accuracy.png", ("depth", "classical"), accuracy),
        ("deep-loss.png", ("depth", "classical"), losses),
        ("deep-gradient.png", ("depth", "classical"), gradients),
        ("deep-gain.png", ("gain",), gains),
    ):
        mine = [r for r in results if r["table"] in table]
        if mine:
            figure = Figure(figsize=(9, 4.2), dpi=120, layout="constrained")
            FigureCanvasAgg(figure)
            picture(mine, figure)
            figure.savefig(folder / name)
            drawn.append(folder / name)
    return drawn


def accuracy(results: Sequence[Result], figure: Figure) -> None:
    """Test accuracy against depth, a line for each variant."""
    panels = _panels(results)
    for axes, (title, mine) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for row in _rows(mine):
            depths = sorted({int(r["column"]) for r in mine if r["row"] == row})
            values = [
                median(100 * r["summary"]["test_accuracy"] for r in mine if (r["row"], r["column"]) == (row, str(d)))
                for d in depths
            ]
            axes.plot(depths, values, marker="o", markersize=4, label=row)
        _finish(axes, title, "convolutional layers", "test accuracy (%)")


def losses(results: Sequence[Result], figure: Figure) -> None:
    """Training loss against epochs, of the deepest network."""
    panels = _panels(_deepest(results))
    for axes, (title, mine) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for row in _rows(mine):
            runs = [r["epochs"] for r in mine if r["row"] == row]
            epochs = range(1, min(map(len, runs)) + 1)
            axes.plot(epochs, [median(run[e - 1]["train_loss"] for run in runs) for e in epochs], marker=".", label=row)
        _finish(axes, title, "epoch", "training loss of the readout")


def gradients(results: Sequence[Result], figure: Figure) -> None:
    """Norm of the gradient that reaches each layer of the deepest network, before training."""
    panels = _panels(_deepest(results))
    for axes, (title, mine) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for row in _rows(mine):
            runs = [r["gradient"]["before"]["norms"] for r in mine if r["row"] == row]
            layers = range(1, len(runs[0]) + 1)
            axes.plot(layers, [median(run[i - 1] for run in runs) for i in layers], marker=".", label=row)
        axes.set_yscale("log")
        _finish(axes, title, "layer", "gradient norm before training")


def gains(results: Sequence[Result], figure: Figure) -> None:
    """Accuracy, residual and gradient cosine against the feedback gain."""
    measures = (
        ("test accuracy (%)", lambda r: 100 * r["summary"]["test_accuracy"], "linear"),
        ("residual", lambda r: r["epochs"][-1]["residual"], "log"),
        ("smallest cosine after training", lambda r: min(r["gradient"]["after"]["cosines"].values()), "linear"),
    )
    for axes, (label, pick, scale) in zip(figure.subplots(1, len(measures)), measures, strict=True):
        for column in sorted({r["column"] for r in results}, key=int):
            mine = [r for r in results if r["column"] == column]
            found = sorted({r["values"]["feedback_gain"] for r in mine})
            values = [median(pick(r) for r in mine if r["values"]["feedback_gain"] == k) for k in found]
            axes.plot(found, values, marker="o", markersize=4, label=f"{column} layers")
        axes.set_xscale("log")
        axes.set_yscale(scale)
        _finish(axes, "", "feedback gain k", label)


def _panels(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    titles = {"depth": "4 epochs", "classical": "classical settings, 1 epoch"}
    found = [(title, [r for r in results if r["table"] == table]) for table, title in titles.items()]
    return [(title, mine) for title, mine in found if mine]


def _deepest(results: Sequence[Result]) -> list[Result]:
    deepest = str(max(int(r["column"]) for r in results))
    return [r for r in results if r["column"] == deepest]


def _rows(results: Sequence[Result]) -> list[str]:
    return sorted({r["row"] for r in results})


def _finish(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, color="0.88", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
