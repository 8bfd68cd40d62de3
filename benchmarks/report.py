"""Tables and pictures of the newest rows of each device, as Markdown between two markers of a page."""

from __future__ import annotations

import json
import os
import re
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
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
PICTURES = "bench-*.png"  # as plots.file_name has them; others in the folder are not ours


def write(results: Path, page: Path | None, plots: Path | None) -> str:
    """The report of every result file in a folder.

    Args:
        page: gets the text between its markers; None: it is only returned.
        plots: folder of the pictures, where those of an earlier report that this one has not are deleted; None: there
            are none.

    Raises:
        RunError: no such folder, a file that cannot be read, or a page without the markers; nothing is written then.
    """
    around = None if page is None else split(page)
    rows = stored(results)
    made: set[str] = set()
    text = markdown(newest(rows), failures(rows), registry.questions(), page, plots, made)
    for path in () if plots is None else plots.glob(PICTURES):
        if path.name not in made:
            path.unlink()
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


Runs = dict[str, list[Row]]  # by the time at which they began


def by_case(rows: Iterable[Row]) -> list[Runs]:
    """Runs of each device, question and case."""
    groups: dict[tuple[str, str, str], Runs] = {}
    for row in rows:
        runs = groups.setdefault((device_of(row), row["question"], row["case"]), {})
        runs.setdefault(row["environment"]["when"], []).append(row)
    return list(groups.values())


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of each device, question and case, those that were measured last.

    A run in which the case has no figures at all (it failed, its time was over) replaces none that has some.
    """
    return [row for runs in by_case(rows) for row in unique(runs[shown(runs)])]


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of each device, question and case, the last run's, with figures or without."""
    return [row for runs in by_case(rows) for row in unique(runs[max(runs)])]


def failures(rows: Iterable[Row]) -> list[Row]:
    """Rows of the last run, where it has no figures of a case and an earlier one has."""
    return [row for runs in by_case(rows) if shown(runs) != max(runs) for row in unique(runs[max(runs)])]


def shown(runs: Runs) -> str:
    """The last run with figures; without any, the last."""
    return max((when for when in runs if good(runs[when])), default=max(runs))


def unique(rows: Iterable[Row]) -> list[Row]:
    """Without those that a second file repeats."""
    return [json.loads(text) for text in dict.fromkeys(json.dumps(row, sort_keys=True) for row in rows)]


# --- Markdown ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where pictures go, and where links to them start.

    Args:
        device: for file names, where a kind has several.
        made: gets the names of the pictures.
    """

    kind: str
    device: str
    page: Path | None
    plots: Path | None
    made: set[str] = field(default_factory=set)


def markdown(
    rows: Sequence[Row], failed: Sequence[Row], known: dict[str, Question], page: Path | None, plots: Path | None,
    made: set[str],
) -> str:  # fmt: skip
    """A section a kind of device. Rows of questions that are no more are left out.

    Args:
        failed: of runs since ``rows``, without figures. made: gets the names of the pictures.
    """
    lines: list[str] = []
    for kind, title in KINDS.items():
        mine = [row for row in rows if kind_of(row) == kind and row["question"] in known]
        devices = list(dict.fromkeys(map(device_of, mine)))
        lines += [f"## {title}", ""]
        if not devices:
            lines += [*nothing(kind, known), ""]
        for device in devices:
            place = Place(kind, device if len(devices) > 1 else "", page, plots, made)
            here, later = ([row for row in these if device_of(row) == device] for these in (mine, failed))
            lines += section(device, here, later, known, place)
    return re.sub("\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def nothing(kind: str, known: dict[str, Question]) -> list[str]:
    """Instead of figures."""
    command = f"`{COMMANDS[kind]}` will, and `python -m benchmarks report` puts it here"
    lines = [f"Nothing has been measured on a {KINDS[kind]} yet. {command}."]
    targets = unmeasured(kind, known, ())
    return [*targets_table(targets), "", *lines] if targets else lines


def unmeasured(kind: str, known: dict[str, Question], judged: Sequence[Target]) -> list[Target]:
    """What the questions ask of a GPU and no rows have judged, told apart by what is measured."""
    found = {target.measure for target in judged}
    asked = [target for question in known.values() for target in question.asked]
    return [target for target in asked if kind == "gpu" and target.measure not in found]


def section(
    device: str, rows: Sequence[Row], failed: Sequence[Row], known: dict[str, Question], place: Place
) -> list[str]:
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
    judged += unmeasured(place.kind, known, judged)
    if judged:
        lines += [*targets_table(judged), ""]
    for question, mine in asked:
        lines += [f"#### {question.name}", "", sentence(question.what), ""]
        found, problem = attempt(question.table, mine)
        lines += [*(found or []), f"The table could not be made: {problem}" if problem else "", ""]
        lines += [*since(mine, [row for row in failed if row["question"] == question.name]), ""]
        lines += [*drawn(question, mine, place), caption(question, device, mine), ""]
    return lines


def since(rows: Sequence[Row], failed: Sequence[Row]) -> list[str]:
    """A line for each row of a later run that has no figures, beside whose figures are above."""
    lines = []
    for row in failed:
        above = values((r for r in rows if r["case"] == row["case"]), date_of)
        name = f"{row['case']}: {row['name']}".rstrip(": ")
        reason = f"{row['status']}: {row.get('reason', '')}".rstrip(": ")
        lines.append(f"* {name}: measured {above}; {date_of(row)}, revision {revision_of(row)}: {reason}")
    return ["Without figures since:", "", *lines] if lines else []


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
    place.made.add(path.name)
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
