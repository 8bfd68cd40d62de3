"""``ep-train plot``: the curves of several runs in one picture."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from ..config import TrainConfig
from ..run_folder import CONFIG, RunFolderError, read_metrics
from .output import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WITHOUT_EFFECT = ("out", "overwrite", "quiet", "tensorboard", "probe_gradient", "data_root", "teacher_cache")
LONGEST = 80  # characters of a name
# By panel: the keys of a row, solid and dashed, and the factor that they are shown with.
PANELS = (
    ("loss", ("train_loss",), 1.0),
    ("accuracy (%), dashed: training", ("test_accuracy", "train_accuracy"), 100.0),
    ("residual", ("residual",), 1.0),
)


@dataclass(frozen=True)
class PlotConfig:
    """Compare runs: loss, accuracy and residual against epochs and against the time of training, as a PNG. The legend
    names what their configurations differ in."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The run folders."""
    out: Path = Path("runs.png")
    """The picture; it is replaced."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("PlotConfig: argument 'runs': expected at least one run folder, got none")


@dataclass(frozen=True)
class Run:
    """What a picture shows of a run: its rows of metrics by name, and the options that it was started with."""

    path: Path
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]


def run_plot(config: PlotConfig) -> int:
    """The command; returns its exit code."""
    runs = [read_run(path) for path in config.runs]
    plot_runs(runs, config.out)
    for run, name in zip(runs, names(runs), strict=True):
        tested = [row["test_accuracy"] for row in run.rows if row.get("test_accuracy") is not None]
        result = f"test accuracy {tested[-1]:.2%}, best {max(tested):.2%}" if tested else "never tested"
        print(f"{name}: {len(run.rows)} epochs, {result}")
    print(config.out)
    return 0


def read_run(path: Path) -> Run:
    """The metrics and the configuration of a run of any version: options that it did not have are at their defaults.

    Raises:
        RunFolderError: one of them is not there or damaged, or no epoch has finished.
    """
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: no run that can be shown, {CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise RunFolderError(f"{path / CONFIG}: expected a JSON object of options, got {type(config).__name__}")
    rows = read_metrics(path)
    if not rows:
        raise RunFolderError(f"{path}: nothing to show yet, no epoch has finished")
    return Run(path, {**dataclasses.asdict(TrainConfig()), **config}, rows)


def names(runs: Sequence[Run]) -> list[str]:
    """What each run is called in the legend: the options that differ between them; the folder where none does."""
    keys = sorted({key for run in runs for key in run.config if key not in WITHOUT_EFFECT})
    differ = [key for key in keys if len({_text(run.config.get(key)) for run in runs}) > 1]
    found = []
    for run in runs:
        name = ", ".join(f"{key} {_text(run.config.get(key))}" for key in differ) or run.path.name
        found.append(name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}...")
    return [
        f"{name} ({run.path.name})" if found.count(name) > 1 and name != run.path.name else name
        for run, name in zip(runs, found, strict=True)
    ]


def plot_runs(runs: Sequence[Run], out: Path) -> None:
    """Draw loss, accuracy and residual against epoch (above) and time of training (below) into a PNG, atomically.

    Values that are missing or not finite are gaps. A panel for which no run has a value says so.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(14, 7.5), dpi=120, layout=ConstrainedLayoutEngine(wspace=0.04, hspace=0.04))
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(PANELS), squeeze=False)
    times = [list(accumulate(_number(row, "seconds", 1.0) for row in run.rows)) for run in runs]
    longest = max((t[-1] for t in times if math.isfinite(t[-1])), default=0.0)
    unit, scale = ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 120 else ("seconds", 1.0)
    epochs = [[_number(row, "epoch", 1.0) for row in run.rows] for run in runs]
    across = (("epoch", epochs), (f"{unit} of training", [[t / scale for t in own] for own in times]))
    for axes_row, (label, places) in zip(grid, across, strict=True):
        for axes, panel in zip(axes_row, PANELS, strict=True):
            _draw(axes, runs, places, panel)
            axes.set_xlabel(label)
            if label == "epoch":
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = grid[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1 if len(runs) > 3 else len(runs), frameon=False)
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png")


def _draw(
    axes: Axes, runs: Sequence[Run], places: Sequence[Sequence[float]], panel: tuple[str, tuple[str, ...], float]
) -> None:
    title, keys, scale = panel
    drawn = False
    for index, (run, across, name) in enumerate(zip(runs, places, names(runs), strict=True)):
        marker = "o" if len(run.rows) <= 40 else ""
        for key, style in zip(keys, ("-", "--"), strict=False):
            values = [_number(row, key, scale) for row in run.rows]
            tested = [(at, value) for at, value in zip(across, values, strict=True) if math.isfinite(value)]
            drawn |= bool(tested)
            # evaluations every few epochs are joined
            axes.plot(
                [at for at, _ in tested],
                [value for _, value in tested],
                style,
                color=f"C{index % 10}",
                marker=marker if style == "-" else "",
                markersize=3,
                linewidth=1.5 if style == "-" else 1.0,
                label=name if style == "-" else None,
            )
    if title == "residual" and drawn:
        axes.set_yscale("log", nonpositive="mask")
    if not drawn:
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", color="0.5")
    axes.set_title(title, fontsize=10)
    axes.grid(visible=True, color="0.88", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _number(row: Mapping[str, Any], key: str, scale: float) -> float:
    value = row.get(key)
    return float(value) * scale if isinstance(value, int | float) else math.nan


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
