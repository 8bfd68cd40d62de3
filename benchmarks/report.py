"""Tables and pictures of the newest rows of each device, as Markdown between two markers of a page."""

from __future__ import annotations

import json
import os
import re
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import registry
from benchmarks.case import Row, short
from benchmarks.markdown import cases as names_of
from benchmarks.markdown import good, number, table
from benchmarks.registry import Question, Target
from benchmarks.runner import RunError, load

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
KINDS = {"cpu": "CPU", "gpu": "GPU"}  # and their sections, in this order
COMMANDS = {"cpu": "python -m benchmarks run cpu", "gpu": "python -m benchmarks.gpu"}
# what a GPU is asked for (the questions judge it as soon as they have rows of one)
GPU_TARGETS = (
    Target("EP batch at cosine >= 0.98 / backprop batch", None, "<=", 3, "VGG-11"),
    Target("published autograd loop / EP batch", None, ">=", 30, "VGG-11"),
    Target("best PyTorch batch of the same algorithm / EP batch", None, ">=", 2, "torch.compile, CUDA graphs"),
    Target("sweep, % of the matmul rate", None, ">=", 60, "fp16, VGG-11, batch 256"),
    Target("peak memory / BPTT", None, "<=", 0.1, "T = 60"),
)


def write(results: Path, page: Path | None, plots: Path | None) -> str:
    """The report of every result file in a folder.

    Args:
        page: gets the text between its markers; None: it is only returned.
        plots: folder of the pictures; None: there are none.

    Raises:
        RunError: no such folder, a file that cannot be read, or a page without the markers; nothing is written then.
    """
    around = None if page is None else split(page)
    rows = newest(stored(results))
    text = markdown(rows, registry.questions(), page, plots)
    if page is not None and around is not None:
        found = f"{around[0]}{BEGIN}\n\n{text}\n{END}{around[1]}"
        if found != page.read_text(encoding="utf-8"):
            page.write_text(found, encoding="utf-8")
    return text


def split(page: Path) -> tuple[str, str]:
    """What is before and after the markers, each of which has a line of its own, once."""
    expected = f"expected the lines {BEGIN} and {END}, once each, in this order"
    try:
        text = page.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunError(f"{page} is not there: {expected} in it") from None
    found = [list(re.finditer(f"^{re.escape(marker)}[ \t]*$", text, re.MULTILINE)) for marker in (BEGIN, END)]
    if [len(matches) for matches in found] != [1, 1] or found[0][0].end() > found[1][0].start():
        raise RunError(f"{page}: {expected}, got {len(found[0])} and {len(found[1])} of them")
    return text[: found[0][0].start()], text[found[1][0].end() :]


# --- rows -------------------------------------------------------------------------------------------------------------


def stored(results: Path) -> list[Row]:
    """Rows of all result files in a folder; JSON files that are something else are passed over.

    Raises:
        RunError: no such folder, or a file that is no JSON.
    """
    if not results.is_dir():
        raise RunError(f"{results}: expected a folder of result files")
    rows: list[Row] = []
    for path in sorted(results.glob("*.json")):
        try:
            json.loads(path.read_text())
        except ValueError as error:
            raise RunError(f"{path} is no JSON: {error}") from error
        try:
            rows += load(path)
        except RunError:
            continue
    return rows


def device_of(row: Row) -> str:
    """Its name."""
    return str(row["environment"]["device"])


def kind_of(row: Row) -> str:
    """Key of KINDS: only a GPU has a compute capability."""
    return "gpu" if "capability" in row["environment"] else "cpu"


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of each device, question and case, those that were measured last."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((device_of(row), row["question"], row["case"]), []).append(row)
    out = []
    for group in groups.values():
        last = max(row["environment"]["when"] for row in group)
        out += unique(row for row in group if row["environment"]["when"] == last)
    return out


def unique(rows: Iterable[Row]) -> list[Row]:
    """Without those that a second file repeats."""
    return [json.loads(text) for text in dict.fromkeys(json.dumps(row, sort_keys=True) for row in rows)]


# --- Markdown ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where pictures go, and where links to them start. ``device``: for file names, where a kind has several."""

    kind: str
    device: str
    page: Path | None
    plots: Path | None


def markdown(rows: Sequence[Row], known: dict[str, Question], page: Path | None, plots: Path | None) -> str:
    """A section a kind of device. Rows of questions that are no more are left out."""
    lines: list[str] = []
    for kind, title in KINDS.items():
        mine = [row for row in rows if kind_of(row) == kind and row["question"] in known]
        devices = list(dict.fromkeys(map(device_of, mine)))
        lines += [f"## {title}", ""]
        if not devices:
            lines += [*nothing(kind), ""]
        for device in devices:
            place = Place(kind, device if len(devices) > 1 else "", page, plots)
            lines += section(device, [row for row in mine if device_of(row) == device], known, place)
    return re.sub("\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def nothing(kind: str) -> list[str]:
    """Instead of figures."""
    command = f"`{COMMANDS[kind]}` will, and `python -m benchmarks report` puts it here"
    lines = [f"Nothing has been measured on a {KINDS[kind]} yet. {command}."]
    return [*targets_table(GPU_TARGETS), "", *lines] if kind == "gpu" else lines


def section(device: str, rows: Sequence[Row], known: dict[str, Question], place: Place) -> list[str]:
    """Of one device: conditions, targets, and what each question found."""
    asked = [(q, [row for row in rows if row["question"] == q.name]) for q in known.values()]
    asked = [(q, mine) for q, mine in asked if mine]
    lines = [f"### {device}", "", *conditions(rows), ""]
    judged: list[Target] = []
    for question, mine in asked:
        if question.targets is not None:
            found, problem = attempt(question.targets, mine)
            judged += found or []
            lines += [f"The targets of {question.name} could not be judged: {problem}", ""] if problem else []
    if judged:
        lines += [*targets_table(judged), ""]
    for question, mine in asked:
        lines += [f"#### {question.name}", "", sentence(question.what), ""]
        found, problem = attempt(question.table, mine)
        lines += [*(found or []), f"The table could not be made: {problem}" if problem else "", ""]
        lines += [*drawn(question, mine, place), caption(question, device, mine), ""]
    return lines


def attempt(function: Callable[[Sequence[Row]], Any], rows: Sequence[Row]) -> tuple[Any, str]:
    """Its value, or why there is none: one question's trouble (rows of an older kind, say) loses no other."""
    try:
        return function(rows), ""
    except Exception as error:
        traceback.print_exc()
        return None, short(error)


def targets_table(targets: Sequence[Target]) -> list[str]:
    """What was asked for, and what was found."""
    cells = [[t.measure, number(t.value), f"{t.sign} {t.bound:g}", t.verdict, t.of] for t in targets]
    return table(("measure", "measured", "target", "", "of"), cells)


def drawn(question: Question, rows: Sequence[Row], place: Place) -> list[str]:
    """A link to the picture, or what went wrong."""
    if question.draw is None or place.plots is None or not good(rows):
        return []
    from benchmarks.plots import Undrawn, file_name, picture

    path = place.plots / file_name(place.kind, question.name, place.device)
    try:
        picture(question.draw, rows, path)
    except Undrawn as error:
        traceback.print_exc()
        return [f"The picture could not be drawn: {' '.join(str(error).split())}", ""]
    start = place.plots if place.page is None else place.page.parent
    link = Path(os.path.relpath(path.resolve(), start.resolve())).as_posix()
    return [f"![{question.name}: {question.what}]({link})", ""]


def caption(question: Question, device: str, rows: Sequence[Row]) -> str:
    """Of the table and the picture."""
    return f"Conditions: {question.conditions.rstrip('.')}; {device}, {values(rows, date_of)}."


def conditions(rows: Sequence[Row]) -> list[str]:
    """What a device's rows were measured with, and which revision each question is of, where there are several."""

    def of(key: str, form: str = "{}") -> str:
        return values(rows, lambda row: form.format(row["environment"][key]) if row["environment"].get(key) else "")

    parts = [
        values(rows, device_of), f"threads: {of('threads')}", f"Python {of('python')}", f"torch {of('torch')}",
        f"triton {of('triton')}", f"ep_kernels {of('ep_kernels')}, revision {values(rows, revision_of)}",
    ]  # fmt: skip
    if kind_of(rows[0]) == "gpu":
        parts += [f"CUDA {of('cuda')}", f"cuDNN {of('cudnn')}", f"driver {of('driver')}", of("memory_gib", "{} GiB")]
    lines = [f"{'; '.join(parts)}; {values(rows, date_of)}; {of('command', '`{}`')}."]
    if len(found := list(dict.fromkeys(map(revision_of, rows)))) > 1:
        lines += ["", "By revision: " + "; ".join(f"{name}: {asked_of(rows, name)}" for name in found) + "."]
    if any(revision_of(row).endswith("+") for row in rows):
        lines += ["", "A revision with + had changes that were not committed."]
    if any("--quick" in str(row["environment"].get("command", "")).split() for row in rows):
        lines += ["", "**Rows of --quick runs: their figures mean nothing.**"]
    return lines


def asked_of(rows: Sequence[Row], revision: str) -> str:
    """Questions whose rows are of a revision; with the cases, where others of that question are not."""
    found = []
    for name in dict.fromkeys(row["question"] for row in rows):
        mine = [row for row in rows if row["question"] == name]
        of = [row for row in mine if revision_of(row) == revision]
        if of:
            found.append(name if len(of) == len(mine) else f"{name} ({'; '.join(names_of(of))})")
    return ", ".join(found)


def revision_of(row: Row) -> str:
    """With ``+`` where there were other changes."""
    return str(row["environment"].get("revision") or "unknown")


def date_of(row: Row) -> str:
    """The day, UTC."""
    return str(row["environment"]["when"])[:10]


def values(rows: Iterable[Row], pick: Callable[[Row], str]) -> str:
    """All that there are."""
    return ", ".join(sorted({pick(row) for row in rows} - {""}))


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."
