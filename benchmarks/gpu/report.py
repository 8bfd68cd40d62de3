"""Tables for people, from the rows of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.gpu.problem import BACKENDS, SECTIONS

Row = dict[str, Any]
MS = "ms (quantiles 0.2 to 0.8)"
LAYER_NOTE = (
    "One free update of each node in a steady sweep: the drive from below (pooled ones in a launch of their own), "
    "the feedback from above, and everything else. Launches are those of a relaxation, on its own buffers; ops are "
    "functional calls on tensors, with the copies into and out of a backend's layout. FLOPs are 2 x multiply-adds of "
    "the convolution and the transposed one; the feedback of a pooled connection counts as the dense product that is "
    "computed (three of four operands are zero). % is of the matmul rate of the same operands in this run."
)


def ok(rows: Iterable[Row], section: str) -> list[Row]:
    """Rows of a section that have figures."""
    return [row for row in rows if row["section"] == section and row["status"] == "ok"]


def markdown(result: dict[str, Any]) -> str:
    """The whole report."""
    rows = result["rows"]
    lines = ["# GPU benchmark", ""]
    lines += [f"* {name}: {value}" for name, value in result["environment"].items()]
    lines += [f"* {name}: {text}" for name, text in result["notes"].items()]
    makers = {
        "tests": _commands,
        "sanitizer": _commands,
        "rates": _rates,
        "layers": _layers,
        "relaxation": _relaxation,
        "batch": _batch,
        "cosine": _cosine,
    }
    for section in SECTIONS:
        found = [row for row in rows if row["section"] == section]
        if found:
            lines += ["", f"## {section}", "", *makers[section](found)]
            lines += _without_figures(found)
    lines += ["", "## Targets", "", *targets_table(result["targets"])]
    return "\n".join(lines) + "\n"


def targets_table(targets: Sequence[Row]) -> list[str]:
    """What was asked for, and what was found."""
    cells = [[t["measure"], _number(t["value"]), t["target"], t["verdict"], t.get("of", "")] for t in targets]
    return _table(("measure", "measured", "target", "", "of"), cells)


def _table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in cells]


def _number(value: object, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}" if isinstance(value, (int, float)) else str(value)


def _ms(row: Row) -> str:
    ms = row["ms"]
    return f"{ms['0.5']:.4f} ({ms['0.2']:.4f} to {ms['0.8']:.4f})"


def _percent(row: Row) -> str:
    return "" if row.get("percent") is None else f"{row['percent']:.1f}"


def _mebibytes(row: Row) -> str:
    return "" if row.get("memory") is None else f"{row['memory'] / 2**20:.0f}"


def _without_figures(rows: Sequence[Row]) -> list[str]:
    odd = [row for row in rows if row["status"] not in ("ok", "passed")]
    if not odd:
        return []
    return ["", *(f"* {row['key']}: {row['status']}: {row.get('reason', '')}" for row in odd)]


def _commands(rows: Sequence[Row]) -> list[str]:
    return _table(
        ("command", "result", "seconds", "counts"),
        [[row["key"], row["status"], _number(row.get("took")), str(row.get("counts", ""))] for row in rows],
    )


def _rates(rows: Sequence[Row]) -> list[str]:
    cells = []
    for row in ok(rows, "rates"):
        speed = f"{row['tflops']:.1f} TFLOP/s" if "tflops" in row else f"{row['tb_per_s']:.2f} TB/s"
        cells.append([row["key"], speed, _ms(row)])
    return _table(("what", "rate", MS), cells)


def _layers(rows: Sequence[Row]) -> list[str]:
    lines = [LAYER_NOTE]
    found = ok(rows, "layers")
    for batch in sorted({row["batch"] for row in found}):
        cells = []
        for row in sorted((r for r in found if r["batch"] == batch), key=lambda r: r["node"]):
            best = best_baseline(found, batch, row["node"])
            ratio = "" if best is None or "ours" not in row["variant"] else f"{best / row['ms']['0.5']:.2f}"
            cells.append(
                [str(row["node"]), row["shape"], f"{row['gflop']:.2f}", row["variant"], _ms(row),
                 f"{row['tflops']:.0f}", _percent(row), ratio, f"{row['error']:.0e}"]
            )  # fmt: skip
        head = ("node", "state", "GFLOP", "variant", MS, "TFLOP/s", "%", "best PyTorch / ours", "error")
        lines += ["", f"Batch {batch}:", "", *_table(head, cells)]
    return lines


def best_baseline(rows: Sequence[Row], batch: int, node: int) -> float | None:
    """Smallest median of PyTorch on a layer, in ms."""
    of_node = (row for row in rows if row["batch"] == batch and row["node"] == node)
    return min((row["ms"]["0.5"] for row in of_node if "ours" not in row["variant"]), default=None)


def _relaxation(rows: Sequence[Row]) -> list[str]:
    cells, phases = [], []
    for row in ok(rows, "relaxation"):
        speed = [_number(row.get("tflops")), _percent(row)]
        cells.append([str(row["batch"]), row["variant"], _ms(row), *speed, f"{row['error']:.0e}"])
        phases += [
            [str(row["batch"]), row["variant"], name, _ms(phase), _number(phase["tflops"]), _percent(phase)]
            for name, phase in row.get("phases", {}).items()
        ]
    lines = ["One sweep:", "", *_table(("batch", "variant", MS, "TFLOP/s", "%", "error"), cells)]
    head = ("batch", "variant", "sweeps", MS, "TFLOP/s", "%")
    return [*lines, "", "Whole free phases, as called from Python:", "", *_table(head, phases)]


def _batch(rows: Sequence[Row]) -> list[str]:
    cells = [
        [str(row["batch"]), row.get("setting", ""), row["variant"], _ms(row), _number(row.get("tflops")), _percent(row),
         _mebibytes(row), _number(row.get("error"), 1)]
        for row in ok(rows, "batch")
    ]  # fmt: skip
    head = ("batch", "setting", "variant", MS, "TFLOP/s", "%", "peak MiB", "error")
    return _table(head, cells)


def _cosine(rows: Sequence[Row]) -> list[str]:
    lines: list[str] = []
    found = ok(rows, "cosine")
    for case in dict.fromkeys(row["case"] for row in found):
        of_case = [row for row in found if row["case"] == case]
        names = list(of_case[0]["cosines"])
        cells = [[name, *(f"{row['cosines'][name]:.4f}" for row in of_case)] for name in names]
        cells.append(["smallest over connections", *(f"{row['smallest']:.4f}" for row in of_case)])
        cells.append(["residual, free phase", *(f"{row['residual']:.0e}" for row in of_case)])
        cells.append(["residual, true state", *(f"{row['true_residual']:.0e}" for row in of_case)])
        lines += ["", f"{case}, batch {of_case[0]['batch']}:", ""]
        lines += _table(("gradient of", *(row["variant"] for row in of_case)), cells)
    return lines[1:]


# --- targets ----------------------------------------------------------------------------------------------------------


def targets(rows: Sequence[Row]) -> list[Row]:
    """The targets of docs/performance.md that this run can judge, at its largest batch."""
    relaxation, batch, cosine = (ok(rows, section) for section in ("relaxation", "batch", "cosine"))
    largest = max((row["batch"] for row in [*relaxation, *batch]), default=0)

    def find(found: Iterable[Row], variant: str, setting: str | None = None) -> list[float]:
        return [
            row["ms"]["0.5"]
            for row in found
            if row["batch"] == largest and setting in (None, row.get("setting"))
            if row["variant"] == variant or ("backend" not in row and variant in row["variant"])
        ]

    def verdict(measure: str, value: float | None, bound: float, sign: str, of: str) -> Row:
        met = None if value is None else value >= bound if sign == ">=" else value <= bound
        words = {None: "not measured", True: "met", False: "MISSED"}
        target = f"{sign} {bound:g}"
        return {"measure": measure, "value": value, "target": target, "verdict": words[met], "of": of}

    out = []
    ours = dict.fromkeys(row["backend"] for row in [*relaxation, *batch] if "backend" in row) or BACKENDS
    memory = {row["variant"]: row["memory"] for row in batch if row.get("setting") == "60 sweeps" and row["memory"]}
    few = "T 2 + K 1, tangent"
    for on in ours:
        name = f"ours fp16, {on}"
        for row in relaxation:
            if row["batch"] == largest and row["variant"] == name:
                of = f"fp16, batch {largest}, {on}"
                out.append(verdict("relaxation sweep, % of matmul", row["percent"], 60, ">=", of))
                out.append(verdict("free phase T 4, % of matmul", row["phases"]["T 4"]["percent"], 60, ">=", of))
        step = _over(find(relaxation, "autograd step"), find(relaxation, name))
        out.append(verdict("autograd step / sweep", step, 10, ">=", f"fp16, {on}"))
        for setting in (few, "T 4 + K 3, symmetric"):
            mine, of = find(batch, name, setting), f"{setting}, {on}"
            out.append(verdict("autograd loop / EP batch", _over(find(batch, "autograd loop"), mine), 10, ">=", of))
            plain = sorted([*find(batch, "eager", setting), *find(batch, "torch.compile", setting)])
            out.append(verdict("best PyTorch batch / EP batch", _over(plain, mine), 2, ">=", of))
            back = sorted(find(batch, "backprop fp16"))
            out.append(verdict("EP batch / best backprop", _over(mine, back), 3, "<=", of))
        own, bptt = memory.get(f"ours tf32, {on}"), memory.get("BPTT")
        value = own / bptt if own and bptt else None
        out.append(verdict("peak memory / BPTT, 60 sweeps", value, 0.1, "<=", f"tf32, {on}"))
    for variant in dict.fromkeys(row["variant"] for row in cosine if row["backend"] in BACKENDS):
        for case in dict.fromkeys(row["case"] for row in cosine):
            found = [row["smallest"] for row in cosine if row["case"] == case and row["variant"] == variant]
            out.append(verdict(f"smallest cosine, {variant}", min(found, default=None), 0.99, ">=", case))
    return out


def _over(a: Sequence[float], b: Sequence[float]) -> float | None:
    return a[0] / b[0] if a and b else None
