"""solver: what each way to a free equilibrium gains, in sweeps, convolutions and time, at equal gradient cosine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case, Competitor, Row, Timed, compete
from benchmarks.markdown import good, ms, number, ratio, table, without_figures
from benchmarks.problem import Problem, backends_of, network_of, problem_of
from benchmarks.questions.precision import Truth
from benchmarks.registry import Question
from benchmarks.setting import Setting
from ep_kernels import Network, Parameters, RelaxConfig, ep_gradients, free_phase
from ep_kernels.stages import plans_of
from ep_train.check import compare, smallest_cosine

FOUR, EIGHT = "32-32p-64-64p", "32-32p-64-64p-64-64-64p-64"  # those of docs/decisions.md
GAIN, SIZE, BATCH, NUDGED = 0.1, 16, 8, 4
SETTLE = 12  # sweeps to convergence, and again as many through which BPTT goes
UPDATES, LR = 45, 1e-3  # Adam steps between two visits of a batch: an epoch of the digits
WANTED = (0.95, 0.98, 0.99)
LIMIT, ROUGH = 1e-3, 0.1  # relative errors of the top states to the same sweeps in float64; with rounded operands


@dataclass(frozen=True)
class Way:
    """A way to the equilibrium, tried with several numbers of sweeps.

    Args:
        settings: of RelaxConfig. sweeps: T. warm: from the equilibrium of ``UPDATES`` Adam steps ago.
        trained: after those steps, too. backend: None: the device's.
    """

    name: str
    settings: dict[str, Any]
    sweeps: tuple[int, ...]
    warm: bool = False
    trained: bool = False
    backend: str | None = None


FP16, BF16 = torch.float16, torch.bfloat16
WAYS: dict[str, tuple[Way, ...]] = {
    "over-relaxation": (
        Way("sweep, omega 1", {"over_relaxation": 1.0}, (2, 3, 4, 5, 6, 8)),
        Way("sweep, default omega", {}, (2, 3, 4, 5, 6)),
    ),
    "start": (
        Way("even_odd, zero", {"schedule": "even_odd"}, (6, 8, 10, 12)),
        Way("even_odd, feedforward", {"schedule": "even_odd", "start": "feedforward"}, (2, 4, 6, 8, 10)),
        Way("sync, zero", {"schedule": "sync"}, (8, 12, 16, 20)),
        Way("sync, feedforward", {"schedule": "sync", "start": "feedforward"}, (4, 8, 12, 16)),
    ),
    "warm start": (
        Way("sweep, zero, after an epoch", {}, (2, 3, 4, 5, 6), trained=True),
        Way("sweep, warm, after an epoch", {}, (1, 2, 3, 4, 5), warm=True, trained=True),
    ),
    "low precision first": tuple(
        Way(name, settings, sweeps, backend="reference")
        for name, settings, sweeps in (
            ("bf16 everywhere", {"operands": BF16}, (4, 6)),
            ("bf16, the last 1 in fp32", {"early_operands": BF16, "early_steps": 99}, (4, 5, 6)),
            ("bf16, the last 2 in fp32", {"early_operands": BF16, "early_steps": -2}, (4, 5, 6)),
            ("fp16, the last 1 in fp32", {"early_operands": FP16, "early_steps": 99}, (4, 5, 6)),
        )
    ),
    "early stop": tuple(
        Way(f"sweep, tol {tol:g}", {"tol": tol, "on_fail": "ignore"}, (12,)) for tol in (0.1, 0.03, 0.01)
    ),
}  # fmt: skip


def cases(setting: Setting) -> list[Case]:
    """A case a network and group."""
    models = setting.choose(setting.models, (FOUR, EIGHT), (FOUR, EIGHT), ("3p-4",))
    return [
        Case(f"{model}: {group}", partial(rows, setting, model, group), 400.0) for model in models for group in WAYS
    ]


def config_of(network: Network, way: Way, sweeps: int) -> RelaxConfig:
    """An ``early_steps`` below zero counts from the end. In ``sync`` a nudge climbs down one layer a sweep."""
    settings = dict(way.settings)
    nudged = network.top if settings.get("schedule") == "sync" else NUDGED
    if settings.get("early_steps", 0) < 0:
        settings["early_steps"] += sweeps
    return RelaxConfig(free_steps=sweeps, nudged_steps=max(nudged, NUDGED), estimator="tangent", **settings)


def rows(setting: Setting, model: str, group: str) -> list[Row]:
    """Of every way and number of sweeps: cosine, sweeps that ran, convolutions, and the time of the free phase."""
    network = network_of(model, 8 if setting.quick else SIZE, GAIN)
    base = Way("sweep, default omega", {}, (4,))
    found = [Competitor("the default: sweep, 4", partial(timed, setting, network, base, 4))]
    for way in WAYS[group]:
        for sweeps in way.sweeps[: 1 if setting.quick else None]:
            # a CPU that has no units for a precision takes ever so long: its cost is counted, not timed
            rounds = 2 if way.backend == "reference" else None
            found.append(Competitor(f"{way.name}, {sweeps}", partial(timed, setting, network, way, sweeps), rounds))
    measured = compete(setting, found, against=found[0].name, least=0.02)
    return [{**row, "model": model, "group": group} for row in measured]


def timed(setting: Setting, network: Network, way: Way, sweeps: int) -> Timed:
    """The free phase of the first random network; ``verify`` adds the cosines over all of them."""
    on = way.backend or backends_of(setting)[0]
    config = config_of(network, way, sweeps)
    first = place(setting, network, 0, way)
    values: Row = {
        "way": way.name, "free_steps": sweeps, "backend": on,
        "convolutions": convolutions(network, config, warm=way.warm),
    }  # fmt: skip

    def relax(p: Problem, states: Sequence[Tensor] | None) -> Any:
        return free_phase(p.network, p.parameters, p.x, config, states=states, keep=True, backend=on)

    def verify() -> float:
        cosines, ran = [], []
        for seed in range(networks(setting)):
            here = place(setting, network, seed, way)
            p = here.truth.problem
            states = here.before if way.warm else None
            gradients, end = ep_gradients(p.network, p.parameters, p.x, p.targets, config, states=states, backend=on)
            true, _ = here.truth.at(end.states)
            cosines.append(smallest_cosine(compare(gradients, true)))
            ran.append(end.steps)
        values.update(cosine=statistics.median(cosines), cosine_least=min(cosines), sweeps=statistics.mean(ran))
        if config.tol:
            whole = replace(config, tol=0.0, free_steps=round(statistics.mean(ran)))
            values["convolutions"] = convolutions(network, whole, warm=way.warm)
        return error(first, config, on, warm=way.warm)

    start = first.before if way.warm else None
    return Timed(
        lambda: relax(first.truth.problem, start),
        verify,
        LIMIT if (config.operands, config.early_operands) == (None, None) else ROUGH,
        values=values,
    )


def convolutions(network: Network, config: RelaxConfig, *, warm: bool) -> float:
    """A connection, of a free phase with what the nudged phases need."""
    *before, (last, end) = plans_of(network, config, warm=warm)
    count = sum(plan.convolutions(stage.steps) for stage, plan in before) + end.convolutions(last.steps, refresh=True)
    return count / len(network.connections)


def networks(setting: Setting) -> int:
    """Random networks whose cosines' median is taken."""
    return 1 if setting.quick else 5


@dataclass(frozen=True)
class Place:
    """A problem with its true gradients, and where a warm start begins."""

    truth: Truth
    before: list[Tensor]


def place(setting: Setting, network: Network, seed: int, way: Way) -> Place:
    """Of one random network, before or after training."""
    return _place(setting, network, seed, way.trained)


@lru_cache(maxsize=16)
def _place(setting: Setting, network: Network, seed: int, trained: bool) -> Place:
    p = problem_of(network, BATCH, setting.device, seed)
    before = free_phase(network, p.parameters, p.x, RelaxConfig(free_steps=SETTLE)).states
    if trained:
        p = replace(p, parameters=updated(p, 2 if setting.quick else UPDATES, seed))
    return Place(Truth(p, 4 if setting.quick else SETTLE), before)


def updated(p: Problem, steps: int, seed: int) -> Parameters:
    """Parameters after Adam steps on other random images and labels."""
    named = {name: t.clone().requires_grad_() for name, t in p.parameters.named().items()}
    optimizer = torch.optim.Adam(list(named.values()), lr=LR)
    generator = torch.Generator().manual_seed(77 + seed)
    for _ in range(steps):
        x = torch.rand(p.x.shape, generator=generator).to(p.x)
        order = torch.randperm(len(x), generator=generator).tolist()
        targets = [t[order] for t in p.targets]
        tensors = Parameters.from_named(p.network, {name: t.detach() for name, t in named.items()})
        gradients, _ = ep_gradients(p.network, tensors, x, targets, RelaxConfig())
        for leaf, gradient in zip(named.values(), gradients.named().values(), strict=True):
            leaf.grad = gradient
        optimizer.step()
    return Parameters.from_named(p.network, {name: t.detach() for name, t in named.items()})


def error(here: Place, config: RelaxConfig, on: str, *, warm: bool) -> float:
    """Of the top states, to the same sweeps in float64 (with the early ones' operands)."""
    p = here.truth.problem
    exact = p.double()
    states = here.before if warm else None
    wide = None if states is None else [s.double() for s in states]
    ours = free_phase(p.network, p.parameters, p.x, config, states=states, backend=on)
    plain = replace(config, operands=None, tol=0.0, free_steps=ours.steps)
    true = free_phase(exact.network, exact.parameters, exact.x, plain, states=wide, backend="reference").states[-1]
    return float((ours.states[-1] - true).abs().max() / true.abs().max())


# --- report -----------------------------------------------------------------------------------------------------------


def lines(rows: Sequence[Row]) -> list[str]:
    """A table a network: by group and way, in the order of the sweeps."""
    out: list[str] = []
    for model in dict.fromkeys(row["model"] for row in good(rows)):
        mine = [row for row in good(rows) if row["model"] == model]
        cells = [
            [
                row["group"], row["name"], number(row["sweeps"]), number(row["convolutions"]),
                f"{row['cosine']:.4f}", f"{row['cosine_least']:.4f}", ms(row),
                ratio(row),
            ]
            for row in mine
        ]  # fmt: skip
        head = (
            "group",
            "way, T",
            "sweeps",
            "convolutions a connection",
            "cosine",
            "worst network",
            "ms",
            "/ the default",
        )
        out += [model, "", *table(head, cells), "", *needed(mine), ""]
    return [*out[:-1], *without_figures(rows)]


def needed(rows: Sequence[Row]) -> list[str]:
    """What each way needs for a cosine: the fewest sweeps that were tried and reach it."""
    cells = []
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = sorted((row for row in rows if row["way"] == way), key=lambda row: row["free_steps"])
        cell = [way]
        for cosine in WANTED:
            best = next((row for row in mine if row["cosine"] >= cosine), None)
            cell.append("-" if best is None else f"{best['sweeps']:.3g} ({best['convolutions']:.3g})")
        cells.append(cell)
    return table(("way", *(f"sweeps (convolutions) for {cosine:g}" for cosine in WANTED)), cells)


QUESTION = Question(
    "solver",
    "sweeps, convolutions and time of each way to the free equilibrium, at equal gradient cosine",
    cases,
    lines,
    conditions=(
        f"random networks, k {GAIN:g}, 3x{SIZE}x{SIZE} random images, batch {BATCH}, T + {NUDGED} tangent sweeps "
        "(sync: at least one a layer), float32; cosine: the smallest over the connections' weights to BPTT to "
        "convergence, median of 5 networks; convolutions are those of the free phase, per connection; times of the "
        f"free phase of the first network; warm: from the equilibrium before {UPDATES} Adam steps (lr {LR:g}) on others"
    ),
    seconds={},  # minutes: in no suite, asked by its name
)
