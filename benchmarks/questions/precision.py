"""precision: what rounding does to EP gradients, layer by layer, against the true gradient (BPTT to convergence)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import ep_kernels
from benchmarks.case import Case, Row, Unavailable, short
from benchmarks.markdown import cases as names_of
from benchmarks.markdown import good, number, table, without_figures
from benchmarks.problem import (
    BATCHES,
    PRECISIONS,
    Problem,
    backends_of,
    label,
    largest_error,
    network_of,
    problem_of,
    require_backend,
    size_of,
    tf32,
)
from benchmarks.registry import Question, Target
from benchmarks.setting import Setting
from ep_kernels import Equilibrium, Parameters, RelaxConfig, ep_gradients, free_phase
from ep_kernels.precision import rounded
from ep_train.bptt import bptt_gradients
from ep_train.check import compare, smallest_cosine

SETTLE = 30  # sweeps to convergence, and again as many through which BPTT goes
LEAST = 0.99  # a precision with a layer below this is not a default
MANY = {"free_steps": 6, "nudged_steps": 4, "estimator": "symmetric"}
FEW = BATCHES["T 2 + K 1, tangent"]
# A CPU has no fp16 or bf16 products of its own: the reference rounds the operands and accumulates in float32, as
# tensor cores do. Neither backend rounds to tf32, and in bf16 the backend cpu leaves the contrast in float32.
ON_CPU = {"reference": ("fp32", "fp16", "fp16, fp32 states", "bf16"), "cpu": ("fp32", "bf16")}
FORMS = ("two-phase form", "difference form")
CONTRAST = "contrast of one connection"
POSITIONS, WIDTH = 8192, 64  # of the products of the two forms
DIFFERENCES = (1e-3, 1e-4)


@dataclass(frozen=True)
class Subject:
    """A network and the settings of EP on it. Hashed by its name."""

    name: str
    model: str
    size: int
    batch: int
    gain: float
    settings: Mapping[str, Any]

    def __hash__(self) -> int:
        return hash(self.name)


def subjects(setting: Setting) -> list[Subject]:
    """Both settings on a net of 4 layers and on one of 8 (or on the networks that were asked for)."""
    small, large = ("32-32p-64-64p", 16, 8), ("vgg11/4", 32, 4)
    if setting.cuda:
        small, large = ("64-64p-128-128p", 16, 32), ("vgg11", 32, 32)
    if setting.quick:
        small, large = ("3-4p-5-4p", 8, 2), ("2p-3-3p-2", 8, 2)
    nets = [small, large]
    if setting.models:
        nets = [(m, size_of(setting), large[2]) for m in setting.models]
    if setting.batches:
        nets = [(m, size, b) for m, size, _ in nets for b in setting.batches]
    return [
        Subject(f"{m}, batch {b}, k {k:g}, T {s['free_steps']} + K {s['nudged_steps']}", m, size, b, k, s)
        for m, size, b in nets
        for k, s in ((0.02, FEW), (0.1, MANY))
    ]


def cases(setting: Setting) -> list[Case]:
    """A case a network and settings; and one product, to tell the form of the contrast from the rest."""
    found = [Case(s.name, partial(network_rows, setting, s), 300.0) for s in subjects(setting)]
    return [*found, Case(CONTRAST, partial(form_rows, setting))]


def attempt(name: str, make: Callable[[], Row]) -> Row:
    """A row, or the reason why there is none."""
    try:
        return {"name": name, "status": "ok", **make()}
    except Unavailable as why:
        return {"name": name, "status": "unavailable", "reason": str(why)}
    except Exception as error:
        return {"name": name, "status": "failed", "reason": short(error)}


# --- the true gradient ------------------------------------------------------------------------------------------------


class Truth:
    """True gradients of one network and batch, each computed once.

    As ``ep_train.check.true_gradients``: a network with max pooling can have several equilibria, and that of EP is the
    one which its own free phase approaches. Every free phase is continued by ``steps`` sweeps; BPTT through as many
    more follows only where that ends at an equilibrium not met before.
    """

    def __init__(self, problem: Problem, steps: int) -> None:
        self.problem, self.steps = problem, steps
        self.known: list[tuple[list[Tensor], Parameters, float]] = []

    def at(self, states: Sequence[Tensor]) -> tuple[Parameters, float]:
        """Gradient of the loss at the equilibrium near ``states`` (of any dtype), and the residual there."""
        p = self.problem
        start = [p.x, *(s.to(p.x.dtype) for s in states[1:])]
        with ep_kernels.backend("reference"), tf32(False):
            config = RelaxConfig(free_steps=self.steps)
            end = free_phase(p.network, p.parameters, p.x, config, states=start)
            settled = end.states
            for met, gradients, residual in self.known:
                if largest_error(settled[1:], met[1:]) <= torch.finfo(p.x.dtype).eps ** 0.5:
                    return gradients, residual
            gradients, _, _ = bptt_gradients(
                p.network, p.parameters, p.x, p.targets, config, steps=self.steps, free_steps=0, states=settled
            )
        residual = float(end.residual.max())
        self.known = [*self.known[-7:], (settled, gradients, residual)]
        return gradients, residual


@lru_cache(maxsize=1)
def truth_of(setting: Setting, subject: Subject) -> Truth:
    """In float64."""
    return Truth(problem(setting, subject).double(), 4 if setting.quick else SETTLE)


def problem(setting: Setting, subject: Subject) -> Problem:
    """In float32."""
    return problem_of(network_of(subject.model, subject.size, subject.gain), subject.batch, setting.device)


# --- networks ---------------------------------------------------------------------------------------------------------


def variants(setting: Setting) -> list[tuple[str, str]]:
    """Precision and backend: first what the settings alone lose, then every precision of every backend."""
    if setting.cuda or setting.backends:
        ours = [(precision, on) for precision in PRECISIONS for on in backends_of(setting)]
    else:
        ours = [(precision, on) for on, names in ON_CPU.items() for precision in names]
    exact = [] if setting.wgmma else [("float64", "reference")]
    return [*exact, *((name, on) for name, on in ours if not setting.precisions or name in setting.precisions)]


def network_rows(setting: Setting, subject: Subject) -> list[Row]:
    """A row a variant."""
    return [
        attempt(f"{precision}, {label(on, setting)}", partial(cosines, setting, subject, precision, on))
        for precision, on in variants(setting)
    ]


def estimate(setting: Setting, subject: Subject, precision: str, on: str) -> tuple[Parameters, Equilibrium]:
    """EP gradients of a variant, and where its free phase ended."""
    require_backend(on, setting)
    p = problem(setting, subject)
    if precision == "float64":
        p, config = p.double(), RelaxConfig(**subject.settings)
    else:
        config = PRECISIONS[precision].config(**subject.settings)
    with tf32(precision == "tf32"):  # what PyTorch computes of it, too
        return ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend=on)


def cosines(setting: Setting, subject: Subject, precision: str, on: str) -> Row:
    """``cosines`` and ``norms`` by tensor; ``smallest`` cosine over the weights of the connections."""
    gradients, equilibrium = estimate(setting, subject, precision, on)
    true, settled = truth_of(setting, subject).at(equilibrium.states)
    rows = compare(gradients, true)
    return {
        "model": subject.model,
        "batch": subject.batch,
        "precision": precision,
        "backend": label(on, setting),
        "smallest": smallest_cosine(rows),
        "cosines": {row.name: row.cosine for row in rows},
        "norms": {row.name: row.relative_norm for row in rows},
        "residual": float(equilibrium.residual.max()),
        "true_residual": settled,
    }


# --- the form of the contrast -----------------------------------------------------------------------------------------


def form_rows(setting: Setting) -> list[Row]:
    """Both forms with fp16 and bf16 operands; the difference form of ``contrast`` by every backend that rounds."""
    others = backends_of(setting) if setting.cuda else ()
    found = []
    for operands in ("fp16", "bf16"):
        for difference in DIFFERENCES:
            for form, on in ((FORMS[0], "PyTorch"), *((FORMS[1], on) for on in ("reference", *others))):
                name = f"{operands}, differences {difference:g}, {form}, {label(on, setting)}"
                found.append(attempt(name, partial(form_cosine, setting, operands, difference, form, on)))
    return found


def form_cosine(setting: Setting, operands: str, difference: float, form: str, on: str) -> Row:
    """``cosine`` of sum over positions of ``s+ t+ - s- t-``, [64, 64], to the same in float64.

    States are uniform in [0, 1]; their differences are normal with standard deviation ``difference``.
    """
    dtype, width = PRECISIONS[operands].operands, 8 if setting.quick else WIDTH
    generator = torch.Generator().manual_seed(0)
    shape = (64 if setting.quick else POSITIONS, width)
    states = [torch.rand(shape, generator=generator).to(setting.device) for _ in range(2)]
    steps = [(difference / 2 * torch.randn(shape, generator=generator)).to(setting.device) for _ in range(2)]
    plus, minus = ([s.double() + sign * d.double() for s, d in zip(states, steps, strict=True)] for sign in (1, -1))
    true = plus[1].T @ plus[0] - minus[1].T @ minus[0]
    with tf32(False):
        if form == FORMS[0]:
            (a, b), (c, d) = ([rounded(s.float(), dtype) for s in phase] for phase in (plus, minus))
            found = b.T @ a - d.T @ c
        else:
            require_backend(on, setting)
            scale = 2.0**13  # deltas are kept at a power of two that fits a short exponent
            deltas = [torch.cat([scale * d, -scale * d]) for d in steps]
            with ep_kernels.backend(on):
                found, _ = ep_kernels.functional.contrast(
                    states[0], deltas[0], states[1], deltas[1], (width, width),
                    source_gain=1 / scale, target_gain=1 / scale, operands=dtype,
                )  # fmt: skip
    ours, exact = found.double().flatten(), true.flatten()
    cosine = float(ours @ exact / (ours.norm() * exact.norm()))
    return {"operands": operands, "difference": difference, "form": form, "backend": on, "cosine": cosine}


# --- report -----------------------------------------------------------------------------------------------------------


def lines(rows: Sequence[Row]) -> list[str]:
    """By network the cosine of every tensor; then the forms of the contrast."""
    out: list[str] = []
    for case in names_of(rows):
        mine = good(row for row in rows if row["case"] == case)
        if not mine:
            continue
        out += [f"{case}:", "", *(form_table(mine) if "form" in mine[0] else layer_table(mine)), ""]
    return [*out[:-1], *without_figures(rows)]


def layer_table(rows: Sequence[Row]) -> list[str]:
    """A line a tensor, a column a variant."""
    cells = [[name, *(f"{row['cosines'][name]:.4f}" for row in rows)] for name in rows[0]["cosines"]]
    cells.append(["smallest over connections", *(f"{row['smallest']:.4f}" for row in rows)])
    cells.append(["residual of the true state", *(number(row["true_residual"], 1) for row in rows)])
    return table(("cosine of the gradient of", *(row["name"] for row in rows)), cells)


def form_table(rows: Sequence[Row]) -> list[str]:
    """A line an operand type and form, a column a size of the differences."""
    kinds = dict.fromkeys((row["operands"], row["form"], row["backend"]) for row in rows)
    sizes = sorted({row["difference"] for row in rows}, reverse=True)
    found = {(row["operands"], row["form"], row["backend"], row["difference"]): row["cosine"] for row in rows}
    cells = [[*kind, *(f"{found[(*kind, d)]:.4f}" if (*kind, d) in found else "" for d in sizes)] for kind in kinds]
    return table(("operands", "form", "by", *(f"differences of {d:g}" for d in sizes)), cells)


def targets(rows: Sequence[Row]) -> list[Target]:
    """Of each variant its worst network."""
    mine = [row for row in good(rows) if "smallest" in row and row["precision"] != "float64"]
    found = []
    for name in dict.fromkeys(row["name"] for row in mine):
        of_name = [row for row in mine if row["name"] == name]
        worst = min(of_name, key=lambda row: (not math.isnan(row["smallest"]), row["smallest"]))  # NaN is the worst
        found.append(Target(f"smallest cosine, {name}", worst["smallest"], ">=", LEAST, worst["case"]))
    return found


def draw(rows: Sequence[Row], figure: Any) -> None:
    """``1 - cosine`` of every connection's weight, a panel a network."""
    mine = [row for row in good(rows) if "cosines" in row]
    names = names_of(mine)
    columns = 2 if len(names) > 1 else 1
    panels = figure.subplots(max(1, -(-len(names) // columns)), columns, squeeze=False, sharey=True).flatten()
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes, case in zip(panels, names, strict=False):
        for row in (row for row in mine if row["case"] == case):
            weights = [value for name, value in row["cosines"].items() if name.startswith("connections")]
            style = "k--" if row["precision"] == "float64" else "-"
            losses = [max(1 - value, 1e-9) for value in weights]
            axes.plot(range(1, len(weights) + 1), losses, style, marker="o", markersize=3, label=row["name"])
        axes.axhline(1 - LEAST, color="#9aa5b1", linewidth=0.8)
        axes.set_yscale("log")
        axes.set_title(case, fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("layer")
        axes.set_ylabel("1 - cosine to the true gradient")
        axes.legend(fontsize=6)


QUESTION = Question(
    "precision",
    "cosine of EP gradients to BPTT, layer by layer, in every precision; the two forms of the contrast",
    cases,
    lines,
    conditions=(
        "networks of random weights, random images, k and sweeps as named; the truth is BPTT to convergence from each "
        "variant's own free phase, in float64; on a CPU the reference rounds operands as tensor cores do and "
        f"accumulates in float32 (tf32 is not rounded to there); forms: outer products of {WIDTH} x {WIDTH} over "
        f"{POSITIONS} positions"
    ),
    draw=draw,
    targets=targets,
    seconds={"cpu": 30.0, "cuda": 20.0},
    wgmma=True,
)
