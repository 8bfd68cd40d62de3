"""Pictures of the questions, on a white ground: readable in light and in dark pages, and without a display."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.category import StrCategoryFormatter
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.case import Row
from benchmarks.machine import slug
from benchmarks.registry import Draw

OURS, OTHERS = "#2a6fbb", "#9aa5b1"  # of bars
COLOURS = ("#2a6fbb", "#d1603d", "#3a8f5c", "#8e5aa8", "#b8860b", "#5b6770", "#c2578f", "#1f9aa8")  # of lines
WIDTH, HEIGHT, DPI = 9.0, 4.2, 120  # inches, and dots an inch: about what a page shows
BAR = 0.2  # inches that a named bar and its gap take
ACROSS = 3  # panels beside each other
PLAIN = 5.0  # decades of a logarithmic axis that are written as 0.1, 1, 10
FEW = 5  # entries of a legend that find room within an axes
STYLE = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.edgecolor": "white",
    "legend.framealpha": 0.85,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.88",
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.markersize": 4,
    "axes.prop_cycle": cycler(color=COLOURS),
}


class Undrawn(RuntimeError):
    """A picture that could not be drawn; the cause is its ``__cause__``."""


def file_name(kind: str, question: str, device: str = "") -> str:
    """Of a picture. ``kind``: cpu or gpu; ``device``: where there are several of a kind."""
    return f"bench-{kind}-{question}{'-' + slug(device) if device else ''}.png"


def picture(draw: Draw, rows: Sequence[Row], path: Path) -> None:
    """Write what ``draw`` makes of the rows.

    Raises:
        Undrawn: it failed, or drew nothing; a file that was there is gone, for it would show other rows.
    """
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]  # matplotlib lists the names of its settings one by one
        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        try:
            draw(rows, figure)
            if not figure.axes:
                raise ValueError("nothing was drawn")
            arrange(figure)
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        except Exception as error:
            path.unlink(missing_ok=True)
            raise Undrawn(f"{type(error).__name__}: {error}") from error


def panels(figure: Figure, names: Sequence[str]) -> list[Axes]:
    """One row of axes, each with its title: as many as there are names, and at least one, which then says so.

    For questions: ``for axes, name in zip(panels(figure, names), names, strict=False)``, names of rows with figures.
    """
    found = list(figure.subplots(1, max(1, len(names)), squeeze=False)[0])
    for axes, name in zip(found, names, strict=False):
        axes.set_title(name)
    if not names:
        found[0].text(0.5, 0.5, "no figures", ha="center", va="center", transform=found[0].transAxes)
    return found


def bars(axes: Axes, rows: Sequence[Row], value: Callable[[Row], float]) -> None:
    """A named bar a row, the last row's at the top; ours stand out."""
    colours = [OURS if row["name"].startswith("our") else OTHERS for row in rows]
    axes.barh([row["name"] for row in rows], [value(row) for row in rows], color=colours)


def finish(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, names of the axes, and a legend: within the axes where it is small, else at its right.

    For questions; grid, spines and sizes come from the style that :func:`picture` draws in.
    """
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    entries = len(axes.get_legend_handles_labels()[1])
    if entries > FEW:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)
    elif entries:
        axes.legend()


def arrange(figure: Figure) -> None:
    """Give what was drawn the room that it needs: panels of named bars below each other, others three in a row."""
    panels = [axes for axes in figure.axes if axes.get_subplotspec() is not None]
    for axes in panels:
        if named_bars(axes):
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", labelsize=8, length=0)
            axes.set_ylim(-0.7, max(axes.get_yticks(), default=0) + 0.7)
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            if axis.get_scale() == "log":
                plain_numbers(axis, low, high)
    one_legend(figure, panels)
    if not one_row(panels):
        rows = max((axes.get_subplotspec().get_gridspec().nrows for axes in panels), default=1)  # type: ignore[union-attr]
        figure.set_size_inches(WIDTH, max(HEIGHT, 3.2 * rows))
        return
    if all(map(named_bars, panels)):
        heights = [0.8 + BAR * max(len(axes.get_yticks()), 2) for axes in panels]
        place(figure, panels, 1, heights)
        figure.set_size_inches(WIDTH, sum(heights))
    elif len(panels) > ACROSS and not any(shared(axes) for axes in panels):
        rows = -(-len(panels) // ACROSS)
        place(figure, panels, ACROSS, [1.0] * rows)
        figure.set_size_inches(WIDTH, 3.2 * rows)


def one_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Below the panels, where theirs all say the same."""
    legends = [(axes, axes.get_legend_handles_labels()) for axes in panels if axes.get_legend() is not None]
    if len(legends) < 2 or any(labels != legends[0][1][1] for _, (_, labels) in legends):
        return
    for axes, _ in legends:
        axes.get_legend().remove()  # type: ignore[union-attr]
    handles, labels = legends[0][1]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))


def plain_numbers(axis: Axis, low: float, high: float) -> None:
    """At the ticks of a logarithmic axis, as many as find room."""
    decades = math.log10(high / low)
    axis.set_minor_formatter(NullFormatter())
    if decades <= PLAIN:
        subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 0.8 else (1.0, 2.0, 5.0) if decades < 1.8 else (1.0,)
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def named_bars(axes: Axes) -> bool:
    """Whether the ticks at its left are names."""
    return isinstance(axes.yaxis.get_major_formatter(), StrCategoryFormatter)


def one_row(panels: Sequence[Axes]) -> bool:
    """Whether the axes are the panels of one row, in order."""
    specs = [axes.get_subplotspec() for axes in panels]
    if not specs or any(spec is None or spec.get_gridspec() is not specs[0].get_gridspec() for spec in specs):  # type: ignore[union-attr]
        return False
    grid = specs[0].get_gridspec()  # type: ignore[union-attr]
    return grid.nrows == 1 and [spec.num1 for spec in specs] == list(range(grid.ncols))  # type: ignore[union-attr]


def shared(axes: Axes) -> bool:
    """Whether it leaves its numbers to another panel."""
    return any(len(group.get_siblings(axes)) > 1 for group in (axes.get_shared_x_axes(), axes.get_shared_y_axes()))


def place(figure: Figure, panels: Sequence[Axes], columns: int, heights: Sequence[float]) -> None:
    """Row by row, into ``columns``."""
    grid = GridSpec(len(heights), columns, figure=figure, height_ratios=heights)
    for number, axes in enumerate(panels):
        axes.set_subplotspec(grid[divmod(number, columns)])
