"""EP gradients of every precision against the true gradient (BPTT to convergence, float64), layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.gpu.problem import PRECISIONS, Options, Problem, backend_of, contenders, network_of, problem_of
from benchmarks.gpu.rows import Job, Row
from ep_kernels import Parameters, RelaxConfig, ep_gradients
from ep_train.check import compare, smallest_cosine, true_gradients

SETTLE = 30  # sweeps to convergence, and again as many through which BPTT goes


@dataclass(frozen=True)
class Case:
    """A network and the settings of EP on it."""

    name: str
    model: str
    size: int
    batch: int
    gain: float
    settings: dict[str, Any]


def cases(options: Options) -> list[Case]:
    """Both settings on a net of 4 layers and on one of 8."""
    many = {"free_steps": 6, "nudged_steps": 4, "estimator": "symmetric"}
    few = {"free_steps": 2, "nudged_steps": 1, "estimator": "tangent"}
    small = ("64-64p-128-128p", 16, 32) if options.device == "cuda" else ("3-4p-5-4p", 8, 2)
    large = (options.model, options.size, 32 if options.device == "cuda" else 2)
    return [
        Case("4 layers, k 0.1, T 6 + K 4", *small, 0.1, many),
        Case("8 layers, k 0.02, T 2 + K 1", *large, 0.02, few),
        Case("4 layers, k 0.02, T 2 + K 1", *small, 0.02, few),
        Case("8 layers, k 0.1, T 6 + K 4", *large, 0.1, many),
    ]


def jobs(options: Options) -> list[Job]:
    """Every case in float64 by the reference (what the settings alone lose), then in every precision."""
    ours = [(precision, on) for precision in PRECISIONS for on in contenders(options)]
    return [
        Job(f"{case.name}/{_variant(precision, on)}", partial(cosines, options, case, precision, on))
        for case in cases(options)
        for precision, on in (("float64", "reference"), *ours)
    ]


def _variant(precision: str, on: str) -> str:
    return "float64 reference" if on == "reference" else f"{precision}, {on}"


def _run(problem: Problem, case: Case, precision: str, on: str) -> tuple[Parameters, Any]:
    backend = backend_of(on)
    if on == "reference":
        problem = problem.double()
        config = RelaxConfig(**case.settings)
    else:
        config = PRECISIONS[precision].config(**case.settings)
    return ep_gradients(problem.network, problem.parameters, problem.x, problem.targets, config, backend=backend)


def cosines(options: Options, case: Case, precision: str, on: str) -> Row:
    """The true gradient is that of the equilibrium which this very free phase approaches."""
    problem = problem_of(network_of(case.model, case.size, case.gain), case.batch, options.device)
    gradients, equilibrium = _run(problem, case, precision, on)
    exact = problem.double()
    states = [exact.x, *(s.double() for s in equilibrium.states[1:])]
    true, settled = true_gradients(problem.network, exact.parameters, states, exact.targets, steps=SETTLE)
    rows = compare(gradients, true)
    return {
        "case": case.name,
        "precision": precision,
        "backend": on,
        "variant": _variant(precision, on),
        "batch": case.batch,
        "smallest": smallest_cosine(rows),
        "cosines": {row.name: row.cosine for row in rows},
        "norms": {row.name: row.relative_norm for row in rows},
        "residual": float(equilibrium.residual.max()),
        "true_residual": settled,
    }


def compiled(options: Options, precision: str) -> Row:
    """Run every case once with Triton, so that its kernels are in its cache."""
    for case in cases(options):
        _run(
            problem_of(network_of(case.model, case.size, case.gain), case.batch, options.device),
            case,
            precision,
            "triton",
        )
    return {}
