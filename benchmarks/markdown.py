"""Cells and tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.case import Row


def table(head: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in cells]


def good(rows: Iterable[Row]) -> list[Row]:
    """Those that have figures."""
    return [row for row in rows if row["status"] == "ok"]


def without_figures(rows: Iterable[Row]) -> list[str]:
    """A line for each of the others, with the reason."""
    odd = [row for row in rows if row["status"] != "ok"]
    lines = [
        f"* {row['case']}{': ' if row['name'] else ''}{row['name']}: {row['status']}: {row.get('reason', '')}"
        for row in odd
    ]
    return ["", *lines] if lines else []


def cases(rows: Sequence[Row]) -> list[str]:
    """Their names, in order."""
    return list(dict.fromkeys(row["case"] for row in rows))


def number(value: object, digits: int = 3) -> str:
    """Rounded; nothing for what is not there."""
    return "" if value is None else f"{value:.{digits}g}" if isinstance(value, (int, float)) else str(value)


def ms(row: Row) -> str:
    """Median and quantiles."""
    q = row["ms"]
    digits = 1 if q["0.5"] >= 100 else 2 if q["0.5"] >= 1 else 4
    return f"{q['0.5']:.{digits}f} {spread(row, q, digits)}"


def spread(row: Row, q: dict[str, float], digits: int) -> str:
    """Quantiles, of three rounds and more."""
    if row.get("rounds", 3) < 3:
        return f"(n = {row['rounds']})"
    return f"({q['0.2']:.{digits}f} to {q['0.8']:.{digits}f})"


def ratio(row: Row) -> str:
    """To the competitor that the row names, median and quantiles."""
    found = row.get("ratio")
    if not found:
        return ""
    few = f"(n = {row['rounds']})" if row.get("rounds", 3) < 3 else f"({found['0.2']:.3g} to {found['0.8']:.3g})"
    return f"{found['0.5']:.3g} {few}"


def mebibytes(row: Row, key: str = "memory") -> str:
    """Peak memory."""
    return "" if row.get(key) is None else f"{row[key] / 2**20:.1f}"
