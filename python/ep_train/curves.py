"""The learning curves of a run as a picture."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import durable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"train": "#1f77b4", "test": "#d62728", "residual": "#2ca02c"}
_MARKERS_UP_TO = 40


def plot_curves(metrics_rows: Iterable[Mapping[str, Any]], path: Path, *, title: str | None = None) -> Path:
    """Draw loss, accuracy and residual (log scale) against epoch into a PNG.

    A panel whose values no row has is left out. Values that are missing, null or not finite are gaps in
    their curve; zero residuals, too.

    Args:
        metrics_rows: rows with any of epoch, train_loss, train_accuracy, test_accuracy (fractions) and
            residual; a row without epoch counts as the next one.
        path: the file to write, atomically; its folder must exist.
        title: a line above the panels.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no row has a value to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = list(metrics_rows)
    epochs = _epochs(rows)
    panels = [
        ("loss", {"train": _series(rows, "train_loss")}),
        (
            "accuracy (%)",
            {"train": _series(rows, "train_accuracy", scale=100), "test": _series(rows, "test_accuracy", scale=100)},
        ),
        ("residual", {"residual": _series(rows, "residual", positive=True)}),
    ]
    drawn = [(label, {name: curve for name, curve in curves.items() if _finite(curve)}) for label, curves in panels]
    drawn = [(label, curves) for label, curves in drawn if curves]
    if not drawn:
        raise ValueError("no row has a loss, an accuracy or a residual to draw")
    figure = Figure(figsize=(4.6 * len(drawn), 3.8), dpi=120, layout=ConstrainedLayoutEngine(wspace=0.06))
    FigureCanvasAgg(figure)
    for axes, (label, curves) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        _draw(axes, epochs, label, curves)
    if title:
        figure.suptitle(textwrap.fill(title, 38 * len(drawn)), fontsize=12)
    with durable.replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def _draw(axes: Axes, epochs: list[float], label: str, curves: Mapping[str, list[float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    marker = "o" if len(epochs) <= _MARKERS_UP_TO else ""
    for name, values in curves.items():
        axes.plot(epochs, values, marker=marker, markersize=3.5, linewidth=1.6, color=_COLOURS[name], label=name)
    if label == "residual":
        axes.set_yscale("log")
    else:
        axes.legend(frameon=False)
    axes.set_title(_caption(epochs, curves), fontsize=9, color="0.3")
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    if len(set(epochs)) == 1:
        axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, which="major", color="0.88", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _caption(epochs: list[float], curves: Mapping[str, list[float]]) -> str:
    """The numbers one looks for: the last value, and of the test accuracy the best one too."""
    if "test" in curves:
        last = _finite(curves["test"])[-1]
        best, epoch = max(
            (value, -at) for at, value in zip(epochs, curves["test"], strict=True) if math.isfinite(value)
        )
        return f"test: last {last:.2f} %, best {best:.2f} % (epoch {-epoch:g})"
    name, values = next(iter(curves.items()))
    return f"{name}: last {_finite(values)[-1]:.3g}"


def _finite(values: list[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _epochs(rows: list[Mapping[str, Any]]) -> list[float]:
    epochs: list[float] = []
    for row in rows:
        epoch = row.get("epoch")
        following = epochs[-1] + 1 if epochs else 1.0
        epochs.append(float(epoch) if isinstance(epoch, int | float) and math.isfinite(epoch) else following)
    return epochs


def _series(rows: list[Mapping[str, Any]], key: str, *, scale: float = 1, positive: bool = False) -> list[float]:
    """One number per row; NaN where there is none to draw."""
    values = []
    for row in rows:
        value = row.get(key)
        number = float(value) * scale if isinstance(value, int | float) else math.nan
        values.append(number if math.isfinite(number) and (number > 0 or not positive) else math.nan)
    return values
