"""What got faster or slower since a revision, beyond the spread: from stored rows, or measured now in both trees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks import registry
from benchmarks.case import Row
from benchmarks.machine import device_name
from benchmarks.registry import Question
from benchmarks.report import date_of, device_of, latest, newest, revision_of, stored, values
from benchmarks.runner import RunError
from benchmarks.setting import Setting
from benchmarks.worktree import Commit, measure_both

MEMORY = 0.05  # relative difference of peak memory that is said
COSINE = 0.005  # fall of a cosine that is said
TIME = 0.02  # relative difference of medians below which nothing is faster or slower, whatever the spread
ROUNDS = 3  # below which quantiles say nothing
COSINES = ("cosine", "smallest", "cosine_least")  # columns; of tensors there is the dictionary ``cosines``
RATES = {"tflops": "TFLOP/s", "tb_per_s": "TB/s"}  # columns of work over the median time
COLUMNS = {"models": "model", "batches": "batch", "precisions": "precision", "backends": "backend"}  # of a Setting
CONDITIONS = ("threads", "python", "torch", "triton", "cuda", "driver")  # that two measurements should share
Key = tuple[str, str, str, int]  # question, case, name, and which of those that share them
Rows = dict[Key, Row]
Sides = tuple[list[Row], list[Row], list[str]]  # before, now, and what to know about them


def between(
    revision: str, results: Path, setting: Setting, asked: Sequence[Question], *, run: bool, command: str
) -> str:
    """Rows of a revision against the newest ones of the same device, or, with ``run``, of both trees now.

    Raises:
        RunError: an unknown revision, no rows of it or none since, or a tree that cannot be built or run.
    """
    commit = Commit.of(revision)
    names = [question.name for question in asked]
    device = device_name(setting.device)
    if run:
        before, after, notes = measure(commit, setting, names or stored_names(results, device, setting))
    else:
        before, after, notes = stored_rows(commit, results, setting, device, names)
    lines = [f"{command}", f"device: {device}", f"before: {revision}, {described(before)}"]
    lines += [f"now:    {described(after)}", *differing(before, after), *notes]
    return "\n".join([*lines, "", *Comparison.of(before, after).lines()])


def described(rows: Sequence[Row]) -> str:
    """Revisions and days."""
    return f"revision {values(rows, revision_of)}, measured {values(rows, date_of)}"


def differing(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """Conditions that are not those of the other side: then a difference need not be the code's."""
    lines = []
    for key in CONDITIONS:
        a, b = (", ".join(sorted({str(row["environment"].get(key, "")) for row in rows})) for rows in (before, after))
        if a != b:
            lines.append(f"{key} differs: {a or 'unknown'} before, {b or 'unknown'} now")
    if any("--quick" in str(row["environment"].get("command", "")).split() for row in (*before, *after)):
        lines.append("rows of --quick runs: their figures mean nothing")
    return lines


# --- which rows -------------------------------------------------------------------------------------------------------


def stored_rows(commit: Commit, results: Path, setting: Setting, device: str, names: Sequence[str]) -> Sides:
    """Those of the revision, and the newest ones of the same questions."""
    here = [row for row in stored(results) if device_of(row) == device]
    here = [row for row in here if (not names or row["question"] in names) and setting.only in row["case"]]
    here, notes = chosen(here, setting)
    old = newest(row for row in here if commit.wrote(row))
    if not old:
        known = values(here, revision_of)
        there = f"there are some of {known}" if known else "there are none of any revision"
        raise RunError(f"no rows of {commit.short} on {device} in {results}: {there}; --run measures it now")
    places = {(row["question"], row["case"]) for row in old}
    asked = {row["question"] for row in old}
    tried = latest(row for row in here if row["status"] != "skipped")  # a failure since is news, too little time is not
    new = [row for row in tried if row["question"] in asked and not commit.wrote(row)]
    since = {(row["question"], row["case"]) for row in new}
    if not places & since:
        raise RunError(f"the newest rows on {device} in {results} are those of {commit.short}; --run measures both now")
    notes += [f"{question}: {case}: not measured since {commit.short}" for question, case in sorted(places - since)]
    return [row for row in old if (row["question"], row["case"]) in since], new, notes


def chosen(rows: Sequence[Row], setting: Setting) -> tuple[list[Row], list[str]]:
    """Rows of the models, batches, precisions and backends that were asked for; and what that leaves out.

    A row without such a column (a baseline, a case that failed) goes by those of its case.

    Raises:
        RunError: none is left, with the values that there are.
    """
    left, notes = list(rows), []
    for option, column in COLUMNS.items():
        asked = {str(value) for value in getattr(setting, option)}
        if not asked or not rows:
            continue
        of_case: dict[tuple[str, str], set[str]] = {}
        for row in rows:
            of_case.setdefault((row["question"], row["case"]), set()).update(own(row, column))
        silent = sorted({question for (question, _), found in of_case.items() if not found})
        notes += [f"{question}: left out, where rows do not say their {column}" for question in silent]
        left = [row for row in left if asked & (own(row, column) or of_case[row["question"], row["case"]])]
        if not left:
            known = ", ".join(sorted(set().union(*of_case.values()))) or "none"
            given = f"--{column} {' '.join(sorted(asked))}"
            raise RunError(f"{given}: no stored rows are left; a {column} that stored rows have: {known}")
    return left, notes


def own(row: Row, column: str) -> set[str]:
    """Its value, as the command line has it (the opt-in loop of a backend is that backend's)."""
    return set() if row.get(column) is None else {str(row[column]).removesuffix("-wgmma")}


def stored_names(results: Path, device: str, setting: Setting) -> list[str]:
    """Questions with rows of this device; without any, all that such a device is asked."""
    found = {row["question"] for row in stored(results) if device_of(row) == device} if results.is_dir() else set()
    kind = "cuda" if setting.cuda else "cpu"
    return [name for name, q in registry.questions().items() if (name in found if found else kind in q.seconds)]


def measure(commit: Commit, setting: Setting, names: Sequence[str]) -> Sides:
    """In turn, in a worktree of the revision and in this tree; the passes of each merged."""
    if not commit.has("benchmarks/__main__.py"):
        raise RunError(f"{commit.short} has no benchmarks/__main__.py: it is older than this benchmark suite")
    there = [name for name in names if commit.has(f"benchmarks/questions/{name}.py")]
    lacking = ", ".join(name for name in names if name not in there)
    if not there:
        raise RunError(f"{commit.short} asks none of {', '.join(names)}")
    before, after = measure_both(commit, setting, there)
    return merged(before), merged(after), [f"{commit.short} does not ask {lacking}"] if lacking else []


def merged(passes: Sequence[Sequence[Row]]) -> list[Row]:
    """One row of each name: the widest interval, the median of medians, of memory and of cosines, the rate to match.

    A row that is not ok in some pass is not ok. Its rounds are those of all passes.
    """
    groups: dict[Key, list[Row]] = {}
    for rows in passes:
        for key, row in keyed(rows).items():
            groups.setdefault(key, []).append(row)
    return [one(group) for group in groups.values()]


def one(group: Sequence[Row]) -> Row:
    """Of the passes of one row."""
    bad = [row for row in group if row["status"] != "ok"]
    if bad:
        return bad[0]
    row = dict(group[0])
    if all("ms" in r for r in group):
        pool: tuple[tuple[str, Callable[[Iterable[float]], float]], ...] = (("0.2", min), ("0.5", median), ("0.8", max))
        row["ms"] = {q: take([r["ms"][q] for r in group]) for q, take in pool}
    if all("rounds" in r for r in group):
        row["rounds"] = sum(r["rounds"] for r in group)
    for key in RATES:  # the work of all passes is the same
        if row.get(key) and "ms" in row:
            row[key] *= group[0]["ms"]["0.5"] / row["ms"]["0.5"]
    for key in ("memory", *COSINES):
        found = [r[key] for r in group if r.get(key) is not None]
        if found:
            row[key] = median(found)
    if all("cosines" in r for r in group):
        row["cosines"] = {name: median(r["cosines"].get(name, c) for r in group) for name, c in row["cosines"].items()}
    return row


def keyed(rows: Iterable[Row]) -> Rows:
    """By question, case and name; rows that share them are told apart by their order."""
    out: Rows = {}
    for row in rows:
        number = 0
        while (key := (row["question"], row["case"], row["name"], number)) in out:
            number += 1
        out[key] = row
    return out


# --- the comparison ---------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """Lines for people, by what happened.

    ``compared``: rows with figures on both sides. Of those with times, ``same`` are within the spread, and ``few`` have
    too few rounds on a side.
    """

    found: dict[str, list[str]] = field(default_factory=dict)
    compared: int = 0
    same: int = 0
    few: int = 0

    TITLES = ("slower", "faster", "more memory", "less memory", "smaller cosine", "without figures now",
              "with figures now", "gone", "new")  # fmt: skip

    @staticmethod
    def of(before: Sequence[Row], after: Sequence[Row]) -> Comparison:
        """Of the rows of two sides."""
        c, old, new = Comparison(), keyed(before), keyed(after)
        used = set()
        for key, row in old.items():
            whole = (*key[:2], "", 0)  # a case that failed as a whole has this row only
            found = key if key in new else whole if whole in new else None
            used.add(found)
            if found is None:
                if row["name"] or not any(k[:2] == key[:2] for k in new):
                    c.add("gone", key, row["status"])
            else:
                c.pair(key, row, new[found])
        for key, row in new.items():
            if key not in used:
                c.add("new", key, summary(row))
        return c

    def add(self, title: str, key: Key, text: str) -> None:
        """A line."""
        name = ": ".join(part for part in key[:3] if part) + (f" ({key[3] + 1})" if key[3] else "")
        self.found.setdefault(title, []).append(f"  {name}: {text}")

    def pair(self, key: Key, a: Row, b: Row) -> None:
        """One row on both sides."""
        if a["status"] != "ok" or b["status"] != "ok":
            if b["status"] != "ok" and a["status"] != b["status"]:
                self.add("without figures now", key, f"{a['status']} before, {summary(b)}")
            elif b["status"] == "ok":
                self.add("with figures now", key, f"{a['status']} before, {summary(b)}")
            return
        self.compared += 1
        if "ms" in a and "ms" in b:
            self.times(key, a, b)
        if a.get("memory") is not None and b.get("memory") is not None:
            x, y = float(a["memory"]), float(b["memory"])
            if abs(y - x) > MEMORY * x:
                text = f"{x / 2**20:.1f} MiB before, {y / 2**20:.1f} now{f' ({y / x:.3g} times)' if x else ''}"
                self.add("more memory" if y > x else "less memory", key, text)
        for column in COSINES:
            self.cosines(key, "" if column == "cosine" else f"{column} ", {"": a.get(column)}, {"": b.get(column)})
        self.cosines(key, "of ", a.get("cosines", {}), b.get("cosines", {}))

    def cosines(self, key: Key, what: str, a: Row, b: Row) -> None:
        """By tensor; the one that fell most, and how many fell. NaN is the smallest of all."""
        pairs = {name: (a[name], b[name]) for name in a if a[name] is not None and b.get(name) is not None}
        fell = {name: (x, y) for name, (x, y) in pairs.items() if x == x and not y >= x - COSINE}
        if not fell:
            return
        worst = max(fell, key=lambda name: fell[name][0] - fell[name][1] if fell[name][1] == fell[name][1] else 3.0)
        others = f" ({len(fell)} of {len(pairs)} are smaller)" if len(fell) > 1 else ""
        self.add("smaller cosine", key, f"{what}{worst}{': ' if worst else ''}{fell[worst][0]:.4f} before, "
                 f"{fell[worst][1]:.4f} now{others}")  # fmt: skip

    def times(self, key: Key, a: Row, b: Row) -> None:
        """Beyond the spread: the intervals of quantiles 0.2 to 0.8 have nothing in common, the medians differ by more
        than TIME. Where both sides have a rate, it decides: the work need not be the same.
        """
        if min(a.get("rounds", ROUNDS), b.get("rounds", ROUNDS)) < ROUNDS:
            self.few += 1
            return
        rate = next((c for c in RATES if a.get(c) and b.get(c)), None)
        work = 1.0 if rate is None else a[rate] * a["ms"]["0.5"] / (b[rate] * b["ms"]["0.5"])
        x, y = a["ms"], {q: work * value for q, value in b["ms"].items()}
        if abs(y["0.5"] - x["0.5"]) <= TIME * abs(x["0.5"]) or not (y["0.2"] > x["0.8"] or y["0.8"] < x["0.2"]):
            self.same += 1
            return
        text = f"{interval(a)} ms before, {interval(b)} now: {y['0.5'] / x['0.5']:.3g} times"
        if rate is not None:
            other = "" if abs(work - 1) < TIME else " the same work, which changed"
            text += f"{other}; {a[rate]:.4g} {RATES[rate]} before, {b[rate]:.4g} now"
        self.add("slower" if y["0.5"] > x["0.5"] else "faster", key, text)

    def lines(self) -> list[str]:
        """What was found, then how much was compared."""
        out = []
        for title in self.TITLES:
            if title in self.found:
                out += [f"{title}:", *self.found[title], ""]
        counts = ", ".join(f"{len(self.found.get(title, []))} {title}" for title in self.TITLES[:2])
        out.append(f"{self.compared} rows compared: {counts}, {self.same} within the spread or {100 * TIME:.0f} %")
        return [*out, f"{self.few} rows have too few rounds to tell"] if self.few else out


def interval(row: Row) -> str:
    """Median and quantiles, three digits beyond what differs little."""
    q = row["ms"]
    return f"{q['0.5']:.4g} ({q['0.2']:.4g} to {q['0.8']:.4g})"


def summary(row: Row) -> str:
    """Status and reason, or the time."""
    if row["status"] != "ok":
        return f"{row['status']} now{': ' + row['reason'] if row.get('reason') else ''}"
    return f"{interval(row)} ms" if "ms" in row else "ok"
