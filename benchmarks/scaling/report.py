"""Rows of what was measured and predicted, and their tables."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.case import Row
from benchmarks.markdown import ms, number, table, without_figures
from benchmarks.scaling.measure import Job
from benchmarks.scaling.model import (
    ETHERNET,
    GIGA,
    INFINIBAND,
    MICRO,
    NVLINK,
    SHARE,
    Cluster,
    Cost,
    Line,
    Link,
    clusters,
    fit,
    link_of,
    predictions,
    ring,
)

Measured = dict[str, Any]  # of Worker.measure
QUESTION = "scaling"
NO_LINK = Link(math.inf, 0.0, "none")  # one process sends nothing


@dataclass(frozen=True)
class Links:
    """What the command line says about links; None: measured, or the constants of ``model``."""

    inside_bandwidth: float | None = None
    inside_latency: float | None = None
    between_bandwidth: float | None = None
    between_latency: float | None = None
    per_node: int = 8

    def inside(self, otherwise: Link) -> Link:
        return _override(otherwise, self.inside_bandwidth, self.inside_latency)

    def between(self, otherwise: Link) -> Link:
        return _override(otherwise, self.between_bandwidth, self.between_latency)


def _override(link: Link, bandwidth: float | None, latency: float | None) -> Link:
    if bandwidth is None and latency is None:
        return link
    given = [name for name, value in (("bandwidth", bandwidth), ("latency", latency)) if value is not None]
    source = f"{' and '.join(given)} as given" + ("" if len(given) == 2 else f", else {link.source}")
    return Link(
        link.bandwidth if bandwidth is None else bandwidth,
        link.latency if latency is None else latency,
        source,
        link.peak if bandwidth is None else None,
    )


def line_of(found: Measured, name: str) -> tuple[Line, dict[str, float]]:
    """Fitted to the medians of the entries ``name/x``, and those, in ms."""
    times = {k.split("/")[1]: v["sum"]["0.5"] for k, v in found["times"].items() if k.startswith(name + "/")}
    return fit([float(x) for x in times], [t / 1e3 for t in times.values()]), times


def measured_link(found: Measured) -> Link:
    """Of the processes of this run. Where noise hides that more bytes take longer, from the largest message alone."""
    line, points = line_of(found, "link")
    source = f"measured here, {found['processes']} processes"
    if line.slope == 0:
        size, took = max((float(x), t / 1e3) for x, t in points.items())
        line, source = Line(0.0, took / size), f"{source}, too noisy for a latency"
    return link_of(line, found["processes"], source)


def cost_of(found: Measured, compute: str, inside: Link, between: Link) -> Cost:
    """From a run; ``compute``: ``alone`` (one process while the others wait) or ``together`` (all at once)."""
    seconds = {name: found["times"][name]["sum"]["0.5"] / 1e3 for name in ("copies", "optimizer")}
    line, _ = line_of(found, compute)
    return Cost(line, tuple(found["bucket_bytes"]), seconds["copies"], seconds["optimizer"], inside, between)


# --- measured ---------------------------------------------------------------------------------------------------------


def measured_rows(job: Job, found: Measured) -> list[Row]:
    """Of one run: the fits, and the steps with what the model says of them.

    A step has ``predicted_ms`` (from the line of one process alone), ``measured_ms`` and ``relative_error``
    (predicted / measured - 1), and ``together_...``: the same from the line of all processes computing at once.
    """
    n, times, batch = found["processes"], found["times"], job.batch
    head = {
        "case": f"{job.model}, batch {batch}, {job.processes_of(found)}",
        "status": "ok",
        "model": job.model,
        "batch": batch,
        "processes": n,
        "threads": found["threads"],
        "setting": job.setting,
        "precision": job.precision,
        "rounds": found["steps"],
        "error": found["error"],
        "limit": job.tolerance,
        "timed_error": found["timed_error"],
        "timed_limit": found["timed_limit"],
    }
    rows: list[Row] = []
    for name, label in (("alone", "compute, one process alone"), ("together", f"compute, {n} processes at once")):
        if name == "alone" or n > 1:
            line, points = line_of(found, name)
            fitted = {"constant_ms": 1e3 * line.constant, "per_image_ms": 1e3 * line.slope, "spread": line.spread}
            rows.append({**head, "name": label, **fitted, "points_ms": points})
    link = NO_LINK
    if n > 1:
        link = measured_link(found)
        line, points = line_of(found, "link")
        rows.append({**head, "name": "link", "gb_per_s": link.bandwidth / GIGA, "latency_us": link.latency / MICRO,
                     "spread": line.spread, "points_ms": points})  # fmt: skip
    volume = {"parameter_bytes": found["parameter_bytes"], "bucket_bytes": found["bucket_bytes"]}
    rows.append({**head, "name": "bucket copies", "ms": times["copies"]["sum"], **volume})
    rows.append({**head, "name": "optimizer", "ms": times["optimizer"]["sum"], **volume})
    alone = times["step alone"]["sum"]
    rows.append({**head, "name": "step, one process alone", **_step(found, link, "alone", 1, batch, alone)})
    for kind, local in (("weak", batch), ("strong", batch // n)) if n > 1 else ():
        whole, parts = times[f"{kind} whole"]["sum"], times[f"{kind} parts"]["parts"]
        images = {"weak": n * batch, "strong": batch}[kind]
        rows.append({
            **head,
            "name": f"step, {kind}",
            "scaling": kind,
            **_step(found, link, "alone", n, local, whole),
            **{f"together_{k}": v for k, v in _step(found, link, "together", n, local, whole).items() if k in CHECKED},
            **{f"{part}_ms": q for part, q in zip(("compute", "exchange", "optimizer"), parts, strict=True)},
            "images_per_second": 1e3 * images / whole["0.5"],
            "efficiency": images / batch / n * alone["0.5"] / whole["0.5"],
        })  # fmt: skip
    return rows


CHECKED = ("predicted_ms", "relative_error")


def _step(found: Measured, link: Link, compute: str, processes: int, local: int, took: dict[str, float]) -> Row:
    """A measured step beside its prediction; one flat ring over the link that was measured in the same run."""
    cost = cost_of(found, compute, link, link)
    predicted = 1e3 * cost.step(Cluster(1, processes), local)
    return {
        "local_batch": local,
        "ms": took,
        "images_per_second": 1e3 * processes * local / took["0.5"],
        "predicted_ms": predicted,
        "predicted_exchange_ms": 1e3 * cost.exchange(Cluster(1, processes)),
        "measured_ms": took["0.5"],
        "relative_error": predicted / took["0.5"] - 1,
    }


# --- predicted --------------------------------------------------------------------------------------------------------


def predicted_rows(job: Job, runs: Sequence[Measured], links: Links, total: int) -> tuple[list[Row], list[str]]:
    """Of machines like this one, from its run with the fewest processes; and what that assumes."""
    cuda = job.device.startswith("cuda")
    processes = operator.itemgetter("processes")
    first = min(runs, key=processes)
    n = first["processes"]
    compute = "alone" if n == 1 else "together"
    per_node = links.per_node if cuda else n // first["nodes"]
    within = [run for run in runs if run["processes"] > 1 and run["nodes"] == 1]
    across = [run for run in runs if run["nodes"] > 1]  # their one ring is as fast as its slowest link: the network's
    constant = NVLINK if cuda else NO_LINK
    inside = measured_link(max(within or across, key=processes)) if within or (across and not cuda) else constant
    ethernet = Link(ETHERNET.bandwidth / per_node, ETHERNET.latency, ETHERNET.source)
    between = measured_link(max(across, key=processes)) if across else INFINIBAND if cuda else ethernet
    inside, between = links.inside(inside), links.between(between)
    cost = cost_of(first, compute, inside, between)
    over = clusters(per_node, whole=not cuda)
    rows = predictions(cost, over, job.batch, total)
    name = f"{job.model}, predicted from {job.processes_of(first)}"
    kept = {"case": name, "status": "ok", "model": job.model, "setting": job.setting, "precision": job.precision,
            "inside": str(inside) if per_node > 1 else "none", "between": str(between), "gpus": cuda}  # fmt: skip
    for row in rows:
        row["outside"] = not inside_fit(first, compute, row["local_batch"])
    notes = assumptions(job, first, cost, over, compute, total)
    return [{**kept, **row} for row in rows], notes


def assumptions(job: Job, first: Measured, cost: Cost, over: Sequence[Cluster], compute: str, total: int) -> list[str]:
    """Of the predictions, a line each."""
    n, last, cuda = first["processes"], over[-1], job.device.startswith("cuda")
    size, images = sum(cost.buckets), fit_x(first, compute)
    by_network = 1e3 * sum(ring(last.nodes, s / last.per_node, cost.between) for s in cost.buckets)
    inside = "" if last.per_node == 1 else f"inside a node {cost.inside}; "
    lines = [
        (
            f"compute(b) = {1e3 * cost.compute.constant:.4g} ms + {1e3 * cost.compute.slope:.4g} ms b: least squares "
            f"of relative deviations over b = {', '.join(map(str, images))} (largest deviation "
            f"{100 * cost.compute.spread:.1f} %), {job.processes_of(first)}; extrapolated below "
            f"b = {min(images)} and above b = {max(images)} (outside, in the tables)"
        ),
        (
            f"exchanged: {size / 2**20:.3g} MiB of float32 gradients, buckets: {len(cost.buckets)}; filling and "
            f"emptying them takes {1e3 * cost.copies:.3g} ms, the optimizer (Adam) {1e3 * cost.optimizer:.3g} ms"
        ),
        (
            "rings: 2 (n - 1) / n bytes / bandwidth + 2 (n - 1) latency a bucket; reduce-scatter and all-gather inside "
            "a node, all-reduce of each process's part between nodes"
        ),
        f"{inside}between nodes, for each {'GPU' if cuda else 'process'}, {cost.between}",
        *([AT_PEAK] if cost.best != cost else []),
        (
            "no congestion, no stragglers, no trees, no reduction in switches; of a step on "
            f"{last.nodes} nodes the network takes {by_network:.3g} ms"
        ),
        (
            "no overlap: gradients exist only after the contrast. The bound with full overlap, max(compute, exchange) "
            "+ optimizer, is below what any order of the contrast can reach"
        ),
        f"weak: {job.batch} images a process; strong: {total} images in all",
    ]
    if not inside_fit(first, compute, total / over[0].processes):
        lines.append(f"strong efficiencies are over {over[0].processes} with {total / over[0].processes:g} images "
                     "each, which is extrapolated too")  # fmt: skip
    if cuda:
        lines.append(f"measured on GPUs: {n}; everything beyond is a prediction, not a measurement")
        return lines
    lines.append(
        f"measured on a CPU, so only machines like this one are predicted, each with {job.processes_of(first)}: "
        "predictions for GPUs need a measurement on one GPU (--device cuda)"
    )
    return lines


AT_PEAK = (
    f"bandwidths of data sheets count with {100 * SHARE:.0f} %, which is an assumption; the peak itself, in columns of "
    "its own, is an optimistic bound"
)


def inside_fit(found: Measured, name: str, local: float) -> bool:
    """Whether the line interpolates there."""
    images = fit_x(found, name)
    return min(images) <= local <= max(images)


def fit_x(found: Measured, name: str) -> list[int]:
    """Local batches of a line."""
    return [int(x) for x in line_of(found, name)[1]]


# --- tables -----------------------------------------------------------------------------------------------------------


def lines(rows: Sequence[Row]) -> list[str]:
    """Markdown: steps, the check of the model, predictions and what they assume."""
    steps = [row for row in rows if "measured_ms" in row]
    out = table(
        ("processes", "step", "images a process", "ms (quantiles 0.2 to 0.8)", "compute", "exchange", "optimizer",
         "images/s", "efficiency"),
        [
            [where(row), row["name"].removeprefix("step, "), str(row["local_batch"]), ms(row),
             *(number(row[f"{part}_ms"]["0.5"]) if f"{part}_ms" in row else "" for part in
               ("compute", "exchange", "optimizer")),
             number(row["images_per_second"]), number(row.get("efficiency", 1.0), 2)]
            for row in steps
        ],
    )  # fmt: skip
    out += ["", *table(
        ("processes", "step", "measured ms", "predicted ms", "error", "compute of all at once: predicted ms", "error"),
        [
            [where(row), row["name"].removeprefix("step, "), number(row["measured_ms"], 4),
             number(row["predicted_ms"], 4), percent(row["relative_error"]),
             number(row.get("together_predicted_ms"), 4), percent(row.get("together_relative_error"))]
            for row in steps
        ],
    )]  # fmt: skip
    for kind in ("weak", "strong"):
        mine = [row for row in rows if "nodes" in row and row.get("scaling") == kind]
        shares = any("peak_predicted_ms" in row for row in mine)
        cells = [
            [f"{row['nodes']} x {row['per_node']}", images_of(row), number(row["predicted_ms"], 4),
             number(row["exchange_ms"]), f"{row['images_per_second']:.0f}", number(row["efficiency"], 2),
             *([number(row.get("peak_predicted_ms"), 4), number(row.get("peak_efficiency"), 2)] if shares else []),
             number(row["overlap_predicted_ms"], 4), number(row["overlap_efficiency"], 2)]
            for row in mine
        ]  # fmt: skip
        each = "GPUs" if mine and mine[0]["gpus"] else "processes"
        head = (f"{kind}: nodes x {each}", "images a process", "predicted ms", "of it exchange", "images/s",
                "efficiency", *(("bound with peak bandwidths: ms", "efficiency") if shares else ()),
                "bound with overlap: ms", "efficiency")  # fmt: skip
        out += ["", *table(head, cells)]
    notes = [note for row in rows for note in row.get("assumptions", ())]
    return [*out, "", *(f"* {note}" for note in notes), *without_figures(rows)]


def where(row: Row) -> str:
    """How many processes, of what."""
    return str(row["case"].split(", ")[-1])


def images_of(row: Row) -> str:
    """A process, and whether the line of the computation was fitted to batches like it."""
    return f"{number(row['local_batch'], 6)}{' (outside)' if row.get('outside') else ''}"


def percent(value: float | None) -> str:
    """Signed."""
    return "" if value is None else f"{100 * value:+.1f} %"
