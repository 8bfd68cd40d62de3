"""Tables (Markdown) and plots (PNG) from results of runs; medians over seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.deep.measure import RESULT
from benchmarks.deep.tables import TABLES

Result = dict[str, Any]
Pick = Callable[[Result], float]


def load(work: Path, kept: Path | None) -> list[Result]:
    """Every finished run: under ``work``, and in ``kept``, runs of another machine or day."""
    results = [json.loads(path.read_text()) for path in sorted(work.glob(f"*/{RESULT}"))]
    if kept is not None and kept.exists():
        known = {key(r) for r in results}
        results += [r for r in json.loads(kept.read_text()) if key(r) not in known]
    return sorted(results, key=lambda r: [str(part) for part in key(r)])


def report(work: Path, kept: Path | None, plots: Path | None) -> str:
    """Markdown of every table that has results; results into ``kept``, plots into ``plots``."""
    results = load(work, kept)
    if kept is not None:
        kept.write_text("[\n" + ",\n".join(json.dumps(r, sort_keys=True) for r in results) + "\n]\n")
    parts = []
    for name, table in TABLES.items():
        mine = [r for r in results if r["table"] == name]
        if mine:
            parts += [f"## {table.what}\n", *(section(mine, title, pick, form) for title, pick, form in MEASURES)]
    if plots is not None:
        from benchmarks.deep.plots import draw

        draw(results, plots)
    return "\n".join(part for part in parts if part)


def key(r: Result) -> tuple[str, str, str, int, str]:
    """What makes two runs the same one: the place of the teacher and of the data aside, all of the configuration."""
    return r["table"], r["row"], r["column"], r["seed"], settings(r["values"])


def settings(values: Mapping[str, Any]) -> str:
    """A configuration as text, without what differs between machines."""
    return json.dumps({k: v for k, v in values.items() if k not in ("teacher", "dataset")}, sort_keys=True)


def _last(name: str) -> Pick:
    return lambda r: r["epochs"][-1][name]


def _smallest_cosine(r: Result) -> float:
    return min(r["gradient"]["after"]["cosines"].values())


def _reach(r: Result) -> float:
    norms = r["gradient"]["after"]["norms"]
    return norms[0] / norms[-1]


MEASURES: tuple[tuple[str, Pick, str], ...] = (
    ("test accuracy (%)", lambda r: 100 * r["summary"]["test_accuracy"], ".1f"),
    ("training loss", _last("train_loss"), ".3f"),
    ("residual of the free phase", _last("residual"), ".1e"),
    ("smallest cosine to the true gradient, after training", _smallest_cosine, ".3f"),
    ("gradient norm of the first layer over that of the last, after training", _reach, ".1e"),
    ("training time (s)", lambda r: r["summary"]["seconds"], ".0f"),
)


def section(results: Sequence[Result], title: str, pick: Pick, form: str) -> str:
    """One measure as rows and columns; a cell is the median of its seeds, with how many where they are not three."""
    rows = list(dict.fromkeys(r["row"] for r in sorted(results, key=lambda r: r["row"])))
    columns = sorted({r["column"] for r in results}, key=lambda c: (len(c), c))
    cells = {(row, column): values(results, row, column, pick) for row in rows for column in columns}
    if not any(cells.values()):
        return ""
    lines = [f"{title}:\n", "| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for row in rows:
        found = [cells[row, column] for column in columns]
        if any(found):
            lines.append(f"| {row} | " + " | ".join(cell(v, form) for v in found) + " |")
    return "\n".join(lines) + "\n"


def values(results: Sequence[Result], row: str, column: str, pick: Pick) -> list[float]:
    """Of the seeds that have it."""
    out = []
    for r in results:
        if (r["row"], r["column"]) == (row, column):
            try:
                value = pick(r)
            except (KeyError, TypeError, ValueError, ZeroDivisionError):
                continue
            if value is not None:
                out.append(value)
    return out


def cell(found: Sequence[float], form: str) -> str:
    if not found:
        return ""
    few = "" if len(found) == 3 else f" ({len(found)})"
    return f"{median(found):{form}}{few}"
