"""``ep-train check``: EP gradients against the true gradient, layer by layer.

The true gradient is BPTT to convergence: the relaxation is continued from EP's own free phase until nothing moves, then
the loss is differentiated through enough further sweeps. Continuing from EP's own states matters: a network with max
pooling can have several equilibria, and the gradient that EP estimates is that of the one it approaches.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import ep_kernels
from ep_kernels import Network, Parameters, RelaxConfig
from ep_kernels.nn import initial_parameters

from . import device as devices
from .bptt import bptt_gradients
from .models import build_network
from .run_folder import to_json


@dataclass(frozen=True)
class CheckConfig:
    """Compare EP gradients with the true gradient (BPTT to convergence) on random networks and random images."""

    model: str = "32-32p-64-64p"
    """Network: a name (digits, vgg5, ...) or widths as 32-32p-64-64p (p: pooled)."""
    size: int = 16
    """Side of the square input, 3 channels."""
    batch_size: int = 16
    """Images."""
    seeds: int = 5
    """Networks and batches."""
    pool: Literal["max", "avg"] = "max"
    """Kind of the 2x2 pooling."""
    feedback_gain: float = 0.1
    """k of the defaults' side."""
    weight_gain: float = 1.0
    """Weights have standard deviation weight_gain / sqrt(fan-in)."""
    free_steps: int = 4
    """T."""
    nudged_steps: int = 3
    """K."""
    beta: float = RelaxConfig.beta
    """Nudging strength."""
    over_relaxation: float | None = None
    """omega of the free sweeps (default: by the feedback gain)."""
    estimator: Literal["symmetric", "positive", "negative", "tangent"] = "symmetric"
    """Which phases are contrasted."""
    schedule: Literal["sweep", "even_odd", "sync"] = "sweep"
    """Order of the updates."""
    precision: Literal["float64", "float32"] = "float64"
    """Of EP; the true gradient is always computed in float64."""
    classical: bool = True
    """Show classical EP (gain 1, sync, states, live winners, T 60, K 30, beta 0.2) beside it."""
    converge_steps: int = 60
    """Sweeps to convergence, and again as many through which BPTT goes."""
    device: str = "auto"
    """auto (a GPU where torch sees one, else the CPU), cpu, cuda, or cuda:N."""
    json: bool = False
    """Print JSON instead of a table."""
    out: Path | None = None
    """Write the plot (PNG) here."""

    def __post_init__(self) -> None:
        devices.check_name(self.device, "CheckConfig")
        for name in ("size", "batch_size", "seeds", "free_steps", "nudged_steps", "converge_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"CheckConfig: argument '{name}': expected an integer >= 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class LayerCheck:
    """One tensor's gradient: its name, cosine to the true one, and norm relative to it."""

    name: str
    cosine: float
    relative_norm: float


@dataclass(frozen=True)
class Check:
    """One network's: per tensor, the smallest cosine over connection weights, residuals of EP and of the true state."""

    layers: list[LayerCheck]
    smallest: float
    residual: float
    true_residual: float


def true_gradients(
    network: Network,
    parameters: Parameters,
    states: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    steps: int,
    schedule: Literal["sweep", "even_odd", "sync"] = "sweep",
) -> tuple[Parameters, float]:
    """Gradient of the loss at the equilibrium near ``states``, and the residual there.

    The relaxation goes on from ``states`` for ``steps`` sweeps, and BPTT goes through as many more.
    """
    config = RelaxConfig(schedule=schedule, free_steps=steps)
    settled = ep_kernels.free_phase(network, parameters, states[0], config, states=states)
    gradients, _, _ = bptt_gradients(
        network, parameters, states[0], targets, config, steps=steps, free_steps=0, states=settled.states
    )
    return gradients, float(settled.residual.max())


def compare(gradients: Parameters, true: Parameters) -> list[LayerCheck]:
    """Cosine and relative norm of every tensor's gradient."""
    rows = []
    for (name, ours), theirs in zip(gradients.named().items(), true.named().values(), strict=True):
        a, b = ours.flatten().double(), theirs.flatten().double()
        norm = float(b.norm())
        cosine = float(a @ b / (a.norm() * b.norm()).clamp_min(1e-300))
        rows.append(LayerCheck(name, cosine, float(a.norm()) / norm if norm else float("inf")))
    return rows


def smallest_cosine(rows: Sequence[LayerCheck]) -> float:
    """Over the weights of the connections."""
    return min(row.cosine for row in rows if row.name.startswith("connections"))


def check_network(
    network: Network,
    config: RelaxConfig,
    *,
    batch_size: int,
    seed: int,
    weight_gain: float = 1.0,
    precision: torch.dtype = torch.float64,
    converge_steps: int = 60,
    images: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Check:
    """EP against the true gradient on one random network and batch.

    Args:
        network: what is relaxed; its parameters are drawn.
        config: of EP.
        batch_size: images, if they are drawn too.
        seed: of parameters, images and labels.
        weight_gain: weights have standard deviation ``weight_gain / sqrt(fan-in)``.
        precision: dtype that EP computes in; the true gradient is computed in float64.
        converge_steps: sweeps after EP's own free phase that BPTT unrolls.
        images: [B, ...] in place of uniform noise in [0, 1].
        device: where both are computed; the random numbers are the same on every one.

    Returns:
        Cosine and ratio of the norms for every tensor, and how well both relaxations had converged.
    """
    generator = torch.Generator().manual_seed(1_000 + seed)
    x = images if images is not None else torch.rand(batch_size, *network.shapes[0], generator=generator)
    classes = network.readout.output_shape(network.shapes[network.readout.node])[0]
    x, labels = x.to(device), torch.randint(0, classes, (x.shape[0],), generator=generator).to(device)
    drawn = initial_parameters(network, weight_gain=weight_gain, seed=seed, dtype=torch.float64)
    start = {name: t.to(device) for name, t in drawn.items()}
    exact = Parameters.from_named(network, start)
    rounded = Parameters.from_named(network, {name: t.to(precision) for name, t in start.items()})
    targets = ep_kernels.targets_for(network, labels, classes, precision)
    gradients, equilibrium = ep_kernels.ep_gradients(network, rounded, x.to(precision), targets, config)
    states = [x.double(), *(s.double() for s in equilibrium.states[1:])]
    true, settled = true_gradients(network, exact, states, [t.double() for t in targets], steps=converge_steps)
    rows = compare(gradients, true)
    return Check(rows, smallest_cosine(rows), float(equilibrium.residual.max()), settled)


def run_check(config: CheckConfig) -> int:
    """The command; returns its exit code."""
    network = build_network(
        config.model, (3, config.size, config.size), 10, pool=config.pool, feedback_gain=config.feedback_gain
    )
    ours = RelaxConfig(
        schedule=config.schedule,
        free_steps=config.free_steps,
        nudged_steps=config.nudged_steps,
        beta=config.beta,
        estimator=config.estimator,
        over_relaxation=config.over_relaxation,
    )
    sides = {
        f"k {config.feedback_gain:g}, {config.schedule} {config.free_steps} + {config.nudged_steps}": (network, ours)
    }
    if config.classical:
        classical = RelaxConfig.classical(free_steps=60, nudged_steps=30)
        sides["classical: k 1, sync 60 + 30"] = (replace(network, feedback_gain=1.0), classical)
    device = devices.resolve(config.device, "CheckConfig")
    said = f"{config.seeds} networks of random weights, BPTT to convergence for each of {', '.join(sides)}"
    print(f"ep-train check: {said}; this takes a minute or more on a CPU", file=sys.stderr)
    with devices.in_force(device, tf32=False):
        results = {
            name: [
                check_network(
                    net,
                    relax,
                    batch_size=config.batch_size,
                    seed=seed,
                    weight_gain=config.weight_gain,
                    precision=getattr(torch, config.precision),
                    converge_steps=config.converge_steps,
                    device=device,
                )
                for seed in range(config.seeds)
            ]
            for name, (net, relax) in sides.items()
        }
    report = {name: _summary(checks) for name, checks in results.items()}
    if config.json:
        print(json.dumps(to_json({"config": _plain(config), "results": report}), indent=2, allow_nan=False))
    else:
        print(_table(config, report))
    if config.out is not None:
        plot(report, config.out)
    return 0


def _summary(checks: Sequence[Check]) -> dict[str, Any]:
    names = [row.name for row in checks[0].layers]
    return {
        "smallest_cosine": {
            "median": statistics.median(c.smallest for c in checks),
            "min": min(c.smallest for c in checks),
        },
        "residual": statistics.median(c.residual for c in checks),
        "true_residual": statistics.median(c.true_residual for c in checks),
        "layers": {
            name: {
                "cosine": statistics.median(c.layers[i].cosine for c in checks),
                "relative_norm": statistics.median(c.layers[i].relative_norm for c in checks),
            }
            for i, name in enumerate(names)
        },
    }


def _plain(config: CheckConfig) -> dict[str, Any]:
    values = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return {**values, "out": None if config.out is None else str(config.out)}


def _table(config: CheckConfig, report: dict[str, dict[str, Any]]) -> str:
    title = (
        f"EP against BPTT to convergence: {config.model}, {config.size}x{config.size}x3, batch {config.batch_size}, "
        f"weight gain {config.weight_gain:g}, {config.precision}; medians of {config.seeds} seeds"
    )
    lines = [
        title,
        f"{'':24s}" + "".join(f"{name:>36s}" for name in report),
        f"{'gradient of':24s}" + f"{'cosine':>24s}{'|EP|/|BPTT|':>12s}" * len(report),
    ]
    for layer in next(iter(report.values()))["layers"]:
        cells = [side["layers"][layer] for side in report.values()]
        lines.append(f"{layer:24s}" + "".join(f"{c['cosine']:24.4f}{c['relative_norm']:12.3f}" for c in cells))
    picks: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
        ("smallest over weights", lambda s: f"{s['smallest_cosine']['median']:.4f}"),
        ("the same, worst seed", lambda s: f"{s['smallest_cosine']['min']:.4f}"),
        ("residual, free phase", lambda s: f"{s['residual']:.1e}"),
        ("residual, true state", lambda s: f"{s['true_residual']:.1e}"),
    )
    for title, pick in picks:
        lines.append(f"{title:24s}" + "".join(f"{pick(side):>24s}{'':12s}" for side in report.values()))
    if any(side["true_residual"] > 1e-6 for side in report.values()):
        lines.append("A true state that still moves has no equilibrium gradient: raise --converge-steps to be sure.")
    return "\n".join(lines)


def plot(report: dict[str, dict[str, Any]], path: Path) -> None:
    """Cosine and relative norm per layer, one line for each side, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 1, sharex=True)
    for name, side in report.items():
        layers = list(side["layers"])
        axes[0].plot(layers, [side["layers"][i]["cosine"] for i in layers], marker="o", label=name)
        axes[1].plot(layers, [side["layers"][i]["relative_norm"] for i in layers], marker="o", label=name)
    axes[0].set_ylabel("cosine to the true gradient")
    axes[1].set_ylabel("|EP| / |BPTT|")
    axes[1].set_yscale("log")
    axes[0].axhline(1.0, color="grey", linewidth=0.8)
    axes[1].axhline(1.0, color="grey", linewidth=0.8)
    axes[0].legend()
    axes[1].tick_params(axis="x", rotation=60)
    figure.savefig(path, dpi=120)
