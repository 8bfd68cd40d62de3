"""quality_vs_time: how near EP's gradient is to the true one, against the time of the training batch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch

from benchmarks.baselines.unrolled import bptt
from benchmarks.case import Case, Competitor, Row, Timed, compete
from benchmarks.markdown import good, ms, number, ratio, table, without_figures
from benchmarks.problem import (
    PRECISIONS,
    Precision,
    Problem,
    backends_of,
    label,
    network_of,
    on_cpu,
    problem_of,
    require_backend,
    size_of,
    tf32,
)
from benchmarks.questions.precision import Truth
from benchmarks.questions.train_batch import ON_CPU, backprop, backprop_name, gradient_error, unrolled
from benchmarks.registry import Question, Target
from benchmarks.setting import Setting
from ep_kernels import Network, Parameters, RelaxConfig, backends, ep_gradients
from ep_train.check import compare, smallest_cosine

FINE, NEEDED = 0.99, 0.98  # cosines: of the headline, and of the project's target
SLOW = 12  # sweeps: from here on a CPU times it less often (as what is narrower than fp32, for which few have units)
GOOD_RESIDUAL = 1e-3  # of the true state: one that still moves has no gradient to compare with


@dataclass(frozen=True)
class Point:
    """A setting of EP. ``beta`` of None is the default; ``classical``: that of the published codes (at gain 1)."""

    gain: float
    free_steps: int
    nudged_steps: int
    schedule: str = "sweep"
    estimator: str = "tangent"
    beta: float | None = None
    classical: bool = False

    @property
    def name(self) -> str:
        """As tables have it."""
        kind = "classical EP, sync, " if self.classical else f"{self.schedule}, {self.estimator}, "
        strength = "" if self.beta is None else f", beta {self.beta:g}"
        return f"{kind}k {self.gain:g}{strength}, {self.free_steps} + {self.nudged_steps}"

    def config(self, precision: Precision) -> RelaxConfig:
        """``classical`` relaxes states, with beta 0.2 and live winners."""
        if self.classical:
            base = RelaxConfig.classical(free_steps=self.free_steps, nudged_steps=self.nudged_steps)
            return replace(base, operands=precision.operands)
        strength = {} if self.beta is None else {"beta": self.beta}
        return precision.config(
            schedule=self.schedule, free_steps=self.free_steps, nudged_steps=self.nudged_steps,
            estimator=self.estimator, **strength,
        )  # fmt: skip


GAINS = {0.05: ((2, 1), (4, 3)), 0.1: ((2, 1), (4, 3), (6, 4)), 0.25: ((4, 3), (12, 8)), 1.0: ((30, 20),)}
# What changes within each group is in its name; the rest are the fast settings: sweep, tangent, k 0.02, default beta.
GROUPS: dict[str, tuple[Point, ...]] = {
    "sweeps": tuple(Point(0.02, t, k) for t, k in ((1, 1), (2, 1), (3, 2), (4, 3), (6, 4), (12, 8))),
    "schedule": (
        *(Point(0.02, t, k, "even_odd") for t, k in ((3, 2), (6, 4), (12, 8))),
        *(Point(0.02, t, k, "sync") for t, k in ((6, 4), (12, 8), (60, 30))),
    ),
    "gain": tuple(Point(gain, t, k) for gain, sweeps in GAINS.items() for t, k in sweeps),
    "estimator and beta": (
        *(Point(0.02, t, k, estimator="symmetric") for t, k in ((2, 1), (4, 3))),
        *(Point(0.1, 6, 4, estimator="symmetric", beta=beta) for beta in (None, 0.02, 0.2)),
    ),
    "precision": (Point(0.02, 2, 1), Point(0.02, 4, 3)),
    "published": (Point(1.0, 60, 30, "sync", "symmetric", classical=True),),
}
DEEPER = ("sweeps",)  # on a CPU, of every network after the first
UNROLLED = (4, 12)  # sweeps that BPTT goes through, in the group "published"
DIGITS = 5  # of a cosine: the float32 truth has no more


def cases(setting: Setting) -> list[Case]:
    """A case a network, batch and group; each has the backprop batch among its competitors, as the common measure."""
    models = setting.choose(setting.models, ON_CPU, ("vgg11",), ("3p-4",))
    batches = setting.choose(setting.batches, (16,), (128,), (2,))
    found = []
    for number_of, model in enumerate(models):
        for group in GROUPS if number_of == 0 or setting.cuda else DEEPER:
            if not precisions(setting, group):
                continue
            for batch in batches:
                run = partial(group_rows, setting, model, batch, group)
                found.append(Case(f"{model}, batch {batch}: {group}", run, 240.0))
    return found


def networks(setting: Setting) -> int:
    """Random networks whose cosines' median is taken."""
    return 1 if setting.quick else 3


def images(setting: Setting, batch: int) -> int:
    """Of the batch, those that the cosine is of: BPTT to convergence keeps every state of theirs."""
    return min(batch, 32 if setting.cuda else 8)


def settle(setting: Setting, gain: float) -> int:
    """Sweeps to convergence, and again as many through which BPTT goes."""
    return 10 if setting.quick else 20 if gain <= 0.1 else 30


def net(setting: Setting, model: str, gain: float) -> Network:
    """Of a point's gain."""
    return network_of(model, size_of(setting), gain)


def points(setting: Setting, group: str) -> tuple[Point, ...]:
    """Of a group; in a hurry without the longest."""
    return tuple(p for p in GROUPS[group] if not setting.quick or p.free_steps <= SLOW or p.classical)


def precisions(setting: Setting, group: str) -> list[Precision]:
    """One, or in its own group all the others that this device multiplies."""
    usual = setting.choose(setting.precisions[:1], ("fp32",), ("fp16",), ("fp32",))[0]
    if group != "precision":
        return [PRECISIONS[usual]]
    others = setting.choose(setting.precisions, on_cpu(), tuple(PRECISIONS), ("bf16",))
    return [PRECISIONS[name] for name in others if name != usual]


# --- competitors ------------------------------------------------------------------------------------------------------


def group_rows(setting: Setting, model: str, batch: int, group: str) -> list[Row]:
    """Time and cosine of every point of a group on every backend, and the time of backprop."""
    measure = backprop_name(setting)
    first = partial(problem_of, net(setting, model, GROUPS["sweeps"][0].gain), batch, setting.device)
    found = [Competitor(measure, partial(backprop, setting, first, measure))]
    for point in points(setting, group):
        slow = not setting.cuda and (point.free_steps >= SLOW or group == "precision")
        for precision in precisions(setting, group):
            for on in backends_of(setting):
                name = f"{point.name}, {precision.name}, {label(on, setting)}"
                make = partial(ep_batch, setting, model, batch, point, precision, on)
                found.append(Competitor(name, make, 2 if slow else None))
    found += [
        Competitor(f"BPTT through T = {steps}, k 0.02", partial(bptt_batch, setting, model, batch, steps), 2)
        for steps in (UNROLLED if group == "published" else ())
    ]
    rows = compete(setting, found, against=measure, least=0.02, warmup=3 if setting.cuda else 1)
    backends.release()  # graphs of this group
    return [{**row, "model": model, "batch": batch, "group": group} for row in rows]


def ep_batch(setting: Setting, model: str, batch: int, point: Point, precision: Precision, on: str) -> Timed:
    """``ep_gradients`` of a batch; ``verify`` adds the cosines to the values."""
    require_backend(on, setting)
    network, config = net(setting, model, point.gain), point.config(precision)
    p = problem_of(network, batch, setting.device)
    values: Row = {
        "method": "EP", "gain": point.gain, "schedule": config.schedule, "estimator": config.estimator,
        "free_steps": config.free_steps, "nudged_steps": config.nudged_steps, "beta": config.beta,
        "precision": precision.name, "backend": label(on, setting),
    }  # fmt: skip

    def gradients(of: Problem) -> tuple[Parameters, Sequence[torch.Tensor]]:
        found, equilibrium = ep_gradients(of.network, of.parameters, of.x, of.targets, config, backend=on)
        return found, equilibrium.states

    def verify() -> float:
        values.update(quality(setting, model, batch, point.gain, gradients))
        return short_error(setting, p, config, on)

    return Timed(lambda: gradients(p), verify, precision.gradient_error, values=values)


def short_error(setting: Setting, p: Problem, config: RelaxConfig, on: str) -> float:
    """Error of the gradient of two images to the same relaxation in float64, of so few sweeps as reach every layer.

    At gain 1 longer ones may not converge: they magnify rounding.
    """
    layers = len(p.network.shapes) - 1
    config = replace(config, free_steps=min(config.free_steps, 4), nudged_steps=min(config.nudged_steps, layers))
    few = part(p, 2)
    exact = few.double()
    plain = replace(config, operands=None, storage=None)
    found, _ = ep_gradients(few.network, few.parameters, few.x, few.targets, config, backend=on)
    true, _ = ep_gradients(exact.network, exact.parameters, exact.x, exact.targets, plain, backend="reference")
    return gradient_error(found, true)


def bptt_batch(setting: Setting, model: str, batch: int, steps: int) -> Timed:
    """BPTT through all of ``steps`` sweeps at the fast settings' gain, in float32."""
    gain = GROUPS["sweeps"][0].gain
    timed = unrolled(partial(problem_of, net(setting, model, gain), batch, setting.device), steps, steps)
    values: Row = {"method": "BPTT", "gain": gain, "free_steps": steps, "precision": "fp32"}

    def gradients(of: Problem) -> tuple[Parameters, Sequence[torch.Tensor]]:
        config = RelaxConfig(free_steps=steps)
        with tf32(False):
            end = ep_gradients(of.network, of.parameters, of.x, of.targets, config, backend="reference")[1]
            return bptt(of.network, of.parameters, of.x, of.targets, config, steps), end.states

    def verify() -> float:
        values.update(quality(setting, model, batch, gain, gradients))
        return timed.verify()

    return replace(timed, verify=verify, values=values)


# --- quality ----------------------------------------------------------------------------------------------------------


def part(p: Problem, count: int) -> Problem:
    """Its first images."""
    return Problem(p.network, p.parameters, p.x[:count], p.labels[:count], [t[:count] for t in p.targets])


@lru_cache(maxsize=16)
def truth(setting: Setting, model: str, batch: int, gain: float, seed: int) -> tuple[Truth, Parameters]:
    """True gradients of a random network at this gain, and those of backprop of its feed-forward net, in float32.

    The feed-forward net is the first free sweep: there is no feedback yet.
    """
    whole = problem_of(net(setting, model, gain), batch, setting.device, seed)
    p = part(whole, images(setting, batch))
    with tf32(False):
        plain = bptt(p.network, p.parameters, p.x, p.targets, RelaxConfig(free_steps=1), 1)
    return Truth(p, settle(setting, gain)), plain


def quality(
    setting: Setting, model: str, batch: int, gain: float,
    gradients: Callable[[Problem], tuple[Parameters, Sequence[torch.Tensor]]],
) -> Row:  # fmt: skip
    """Smallest cosines over the connections' weights; ``cosine`` is the median over random networks.

    Args:
        gradients: of a problem, and the states where the free phase ended: the true gradient is that of the
            equilibrium near them.
    """
    found, plain, residuals = [], [], []
    for seed in range(networks(setting)):
        true, feedforward = truth(setting, model, batch, gain, seed)
        ours, states = gradients(true.problem)
        expected, residual = true.at(states)
        found.append(smallest_cosine(compare(ours, expected)))
        plain.append(smallest_cosine(compare(ours, feedforward)))
        residuals.append(residual)
    return {
        "cosine": statistics.median(found), "cosine_least": min(found), "cosine_backprop": statistics.median(plain),
        "true_residual": max(residuals), "networks": len(found), "images": images(setting, batch),
    }  # fmt: skip


# --- report -----------------------------------------------------------------------------------------------------------


def pareto(found: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of (cost, quality) that no other one dominates, cheapest first.

    One dominates another if it costs no more and is no worse, and one of both strictly. NaN is never on the front.
    """
    real = [i for i, (cost, quality) in enumerate(found) if cost == cost and quality == quality]

    def dominated(i: int) -> bool:
        return any(found[j][0] <= found[i][0] and found[j][1] >= found[i][1] and found[j] != found[i] for j in real)

    return sorted((i for i in real if not dominated(i)), key=lambda i: found[i])


def cost(row: Row) -> float:
    """In backprop batches of the same rounds; the median."""
    return float(row["ratio"]["0.5"])


def measured(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows with a cosine and a ratio to backprop, by network and batch."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in good(rows):
        if "cosine" in row and "ratio" in row:
            found.setdefault((row["model"], row["batch"]), []).append(row)
    return found


def settled(rows: Sequence[Row]) -> list[Row]:
    """EP's settings whose true state is an equilibrium: elsewhere a cosine says nothing."""
    return [row for row in rows if row["method"] == "EP" and row["true_residual"] <= GOOD_RESIDUAL]


def front(rows: Sequence[Row]) -> list[Row]:
    """Of EP's settings; cosines that differ by rounding only are equal."""
    ours = settled(rows)
    return [ours[i] for i in pareto([(cost(row), round(row["cosine"], DIGITS)) for row in ours])]


def fastest(rows: Sequence[Row], least: float) -> Row | None:
    """EP's setting of the smallest cost at this cosine."""
    return min((row for row in settled(rows) if row["cosine"] >= least), key=cost, default=None)


def headline(rows: Sequence[Row], where: str) -> str:
    """Time to cosine 0.99."""
    best = fastest(rows, FINE)
    if best is not None:
        return (
            f"{where}: cosine {FINE:g} after {best['ms']['0.5']:.3g} ms, {cost(best):.3g} {best['ratio']['to']} "
            f"batches: {best['name']} (cosine {best['cosine']:.4f})"
        )
    ours = settled(rows)
    if not ours:
        return f"{where}: no setting of EP has figures and an equilibrium"
    near = max(ours, key=lambda row: row["cosine"] if row["cosine"] == row["cosine"] else -2.0)
    return f"{where}: no setting reaches cosine {FINE:g}; the nearest is {near['name']} (cosine {near['cosine']:.4f})"


def lines(rows: Sequence[Row]) -> list[str]:
    """The headline and the settings in the order of their cost, those of the Pareto front marked."""
    out: list[str] = []
    for (model, batch), mine in measured(rows).items():
        best = {id(row) for row in front(mine)}
        to = mine[0]["ratio"]["to"]
        cells = [
            [
                row["name"], "*" if id(row) in best else "", ms(row), ratio(row), f"{row['cosine']:.4f}",
                f"{row['cosine_least']:.4f}", f"{row['cosine_backprop']:.4f}",
                number(row["true_residual"], 1) + (" (moves)" if row["true_residual"] > GOOD_RESIDUAL else ""),
            ]
            for row in sorted(mine, key=cost)
        ]  # fmt: skip
        head = (
            "setting", "front", "ms (quantiles 0.2 to 0.8)", f"/ {to}", "smallest cosine (median of networks)",
            "worst network", "to backprop", "residual of the true state",
        )  # fmt: skip
        out += [headline(mine, f"{model}, batch {batch}"), "", *table(head, cells), ""]
    return [*out[:-1], *without_figures(rows)]


def targets(rows: Sequence[Row]) -> list[Target]:
    """Of every network and batch."""
    found = []
    for (model, batch), mine in measured(rows).items():
        best = fastest(mine, NEEDED)
        of = f"{model}, batch {batch}" + (f", {best['name']}" if best else "")
        measure = f"EP batch at median cosine >= {NEEDED:g} / backprop batch"
        found.append(Target(measure, None if best is None else cost(best), "<=", 3, of))
    return found


def draw(rows: Sequence[Row], figure: Any) -> None:
    """Cost against ``1 - cosine``, both logarithmic: down and to the left is better. The line is the front."""
    panels = measured(rows)
    grid = figure.subplots(1, max(1, len(panels)), squeeze=False, sharey=True)[0]
    for axes, ((model, batch), mine) in zip(grid, panels.items(), strict=False):

        def loss(row: Row) -> float:
            return max(1 - row["cosine"], 1e-6)

        groups = list(dict.fromkeys(row["group"] for row in mine if row["method"] == "EP"))
        for group in groups:
            some = [row for row in mine if row["group"] == group and row["method"] == "EP"]
            axes.scatter([cost(r) for r in some], [loss(r) for r in some], s=18, label=group)
        others = [row for row in mine if row["method"] == "BPTT"]
        if others:
            axes.scatter([cost(r) for r in others], [loss(r) for r in others], marker="x", color="black", label="BPTT")
        line = front(mine)
        axes.step([cost(r) for r in line], [loss(r) for r in line], where="post", color="#2a6fbb", linewidth=1)
        for row in line:
            text = row["name"].rsplit(", ", 2)[0]
            axes.annotate(text, (cost(row), loss(row)), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axes.axvline(1, color="#9aa5b1", linewidth=0.8)
        axes.axhline(1 - FINE, color="#9aa5b1", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(f"time of a batch / {mine[0]['ratio']['to']}")
        axes.set_ylabel("1 - smallest cosine to the true gradient")
        axes.set_title(f"{model}, batch {batch}", fontsize=10)
        axes.legend(fontsize=7)


QUESTION = Question(
    "quality_vs_time",
    "cosine to the true gradient against the time of a batch, over schedules, gains, sweeps, estimators, precisions",
    cases,
    lines,
    conditions=(
        "networks of random weights, 3x32x32 random images; cosine: the smallest over the connections' weights to BPTT "
        "to convergence from the setting's own free phase at its own gain (float32), median of 3 networks, of the "
        "first 8 images (32 on a GPU); T + K are sweeps; to backprop: the same cosine to the feed-forward net's "
        "gradient; * is on the Pareto front of EP's settings; where the true state still moves, there is no "
        "equilibrium and the cosine says nothing"
    ),
    draw=draw,
    targets=targets,
    seconds={"cpu": 90.0, "cuda": 40.0},
)
