"""How well the free phase converges, layer by layer, and what to change when it does not.

EP's gradient is that of an equilibrium. Three numbers say whether there is one: the residual of every layer, the share
of its units at an edge of the box, and the spectral radius of the free sweep's Jacobian. By the last one an error is
multiplied per sweep in the long run: below 1 the relaxation converges, and how fast; above 1 it cannot.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ep_kernels import Network, Parameters, RelaxConfig, free_phase, reference
from ep_kernels.convergence import allowed, proposals
from ep_kernels.plan import update_order

FIELDS = re.compile(r"\b(schedule|free_steps|damping|feedback_gain|tol)\b")  # named in advice; options have their names


@dataclass(frozen=True)
class Stability:
    """Of one batch, where its free phase ended. Lists are per node, 1 and up.

    Attributes:
        residual: largest change of a unit in one further sweep, over the batch and all nodes.
        layer_residual: the same per node.
        at_lo, at_hi: share of the units at the lower and the upper edge of the box (0 for a linear node).
        spectral_radius: largest over some images, of the sweep that is used: its schedule, damping and over-relaxation.
        steps: sweeps that the free phase took.
    """

    residual: float
    layer_residual: list[float]
    at_lo: list[float]
    at_hi: list[float]
    spectral_radius: float
    steps: int

    def row(self) -> dict[str, Any]:
        """Plain numbers and lists for metrics.jsonl; None in place of what is not finite."""
        return {
            "layer_residual": [_finite(r) for r in self.layer_residual],
            "at_lo": self.at_lo,
            "at_hi": self.at_hi,
            "spectral_radius": _finite(self.spectral_radius),
        }


@torch.no_grad()
def diagnose(
    network: Network,
    parameters: Parameters,
    x: Tensor,
    config: RelaxConfig,
    *,
    states: Sequence[Tensor | None] | None = None,
    iterations: int = 20,
    samples: int = 4,
) -> Stability:
    """Residual, saturation and spectral radius of one batch.

    Costs ``free_steps + 1`` sweeps of the batch on the backend in force, and ``iterations`` sweeps of ``samples``
    images in plain PyTorch.

    Args:
        network: what is relaxed.
        parameters: its tensors.
        x: the clamped input, [B, ...].
        config: of the free phase.
        states: where the free phase starts, as for :func:`ep_kernels.free_phase`.
        iterations: of the power iteration, an even number; the radius is the growth over its second half.
        samples: images of the batch, from its first on, whose radius is estimated.

    Returns:
        What was measured.

    Raises:
        ValueError: ``iterations`` is not even or less than 2; an argument that ``free_phase`` refuses.
    """
    if iterations < 2 or iterations % 2:
        raise ValueError(f"diagnose: argument 'iterations': expected an even number >= 2, got {iterations}")
    config = replace(config, on_fail="ignore")  # what is wrong is what this finds out
    found = free_phase(network, parameters, x, config, states=states, keep=True)
    further = replace(config, free_steps=1, tol=0.0)
    after = free_phase(network, parameters, x, further, states=found.states, keep=True)
    moved, at_lo, at_hi = [], [], []
    for node, (before, new) in enumerate(zip(found.states[1:], after.states[1:], strict=True), 1):
        lo, hi = network.box(node)
        change = (new.to(x.dtype) - before.to(x.dtype)).abs()
        moved.append(float(change.max()) if change.numel() else 0.0)
        at_lo.append(float((new <= lo).double().mean()) if new.numel() else 0.0)
        at_hi.append(float((new >= hi).double().mean()) if new.numel() else 0.0)
    worst = max(moved, key=lambda r: r if math.isfinite(r) else math.inf)
    inside = []
    for node, a in enumerate(after.preactivations[1:], 1):
        lo, hi = network.box(node)
        assert a is not None
        passes = ((a > lo) & (a < hi))[:samples].to(x.dtype)
        inside.append(torch.where(a[:samples].isnan(), math.nan, passes))
    # a plain sweep, the first of a phase, is never over-relaxed; the later ones are
    damping = config.free_damping(network.feedback_gain)
    winners = {c: won[:samples] for c, won in after.winners.items()}
    radius = spectral_radius(network, parameters, inside, winners, config, damping, iterations)
    return Stability(worst, moved, at_lo, at_hi, radius, found.steps)


@torch.no_grad()
def spectral_radius(
    network: Network,
    parameters: Parameters,
    inside: Sequence[Tensor],
    winners: dict[int, Tensor],
    config: RelaxConfig,
    damping: float,
    iterations: int = 20,
) -> float:
    """Largest absolute eigenvalue of the free sweep's Jacobian, over samples, by power iteration.

    The growth is measured in the norm ``sum_l k^l |d^l|^2``, in which the Jacobian of a ``sync`` sweep is symmetric, as
    the geometric mean over the second half: eigenvalues of both signs, or in complex pairs, average out.

    Args:
        inside: per node from 1 on, [B, ...]: 1 where the unit is strictly inside the box, 0 where it is saturated.
        winners: of max pooling by connection, [B, ...].

    Returns:
        The radius; NaN where a parameter or a state is.
    """
    batch = inside[0].shape[0]
    if batch == 0:
        return 0.0
    generator = torch.Generator().manual_seed(0)
    gains = [network.feedback_gain ** network.levels[i] for i in range(len(network.shapes))]
    d: list[Tensor] = [inside[0].new_zeros(())]  # of the clamped input, which is never read
    for i, passes in enumerate(inside, 1):
        start = torch.randn(passes.shape, generator=generator).to(passes) / math.sqrt(gains[i])
        d.append(start if damping < 1 else start * passes)
    growth = d[1].new_zeros(batch, dtype=torch.float64)
    alive = torch.ones(batch, dtype=torch.bool, device=growth.device)
    for t in range(iterations + 1):
        squares = [gain * s.flatten(1).double().square().sum(1) for gain, s in zip(gains[1:], d[1:], strict=True)]
        size = torch.stack(squares).sum(0).sqrt()
        alive &= size != 0  # so a NaN lives
        if t > iterations // 2:
            growth += torch.where(alive, size, torch.ones_like(size)).log()
        size = torch.where(alive, size, torch.ones_like(size))
        d = [d[0], *(s / size.to(s).view(-1, *[1] * (s.dim() - 1)) for s in d[1:])]
        if t < iterations:
            d = tangent_sweep(network, parameters, d, inside, winners, config, damping)
    rates = torch.where(alive, (growth / (iterations // 2)).exp(), torch.zeros_like(growth))
    return float(rates.max())


def tangent_sweep(
    network: Network,
    parameters: Parameters,
    d: Sequence[Tensor],
    inside: Sequence[Tensor],
    winners: dict[int, Tensor],
    config: RelaxConfig,
    damping: float,
) -> list[Tensor]:
    """One free sweep of a small change ``d`` of the states (per node, index 0 is not read): the Jacobian times ``d``.

    Winners stay. Units strictly inside the box pass on what they are told; saturated ones do not, and keep the part
    ``1 - eta`` of their own change that damping leaves. Over-relaxed, the box takes that part from them too.
    """
    new = list(d)
    read = d if config.schedule == "sync" else new
    for node in update_order(network, config.schedule, "free"):
        a = torch.zeros_like(d[node])
        for c in network.into[node]:
            conn = network.connections[c]
            if conn.src:
                a = (
                    a
                    + reference.drive(
                        read[conn.src], parameters.weights[c], conn.stride, conn.padding, conn.pool, winners.get(c)
                    )[0]
                )
        for c in network.out_of[node]:
            conn = network.connections[c]
            own = parameters.feedback_weights[c] if parameters.feedback_weights else None
            a = a + network.feedback_coefficient(c) * reference.feedback(
                read[conn.dst],
                parameters.weights[c] if own is None else own,
                network.shapes[node],
                conn.stride,
                conn.padding,
                conn.pool,
                winners.get(c),
            )
        passes = inside[node - 1]
        if damping > 1:
            new[node] = passes * reference.damp(read[node], network.slope * a, damping)
        else:
            new[node] = reference.damp(read[node], passes * (network.slope * a), damping)
    return new


def advice(stability: Stability, config: RelaxConfig, network: Network) -> str | None:
    """What to change when the free phase has not converged, derived from the numbers; None when it has.

    Converged: the residual is at most ``config.tol``, or 0.1 where that is 0.

    Args:
        stability: what :func:`diagnose` measured.
        config: the settings that it was measured with.
        network: likewise.

    Returns:
        One line that names options of ``ep-train`` and numbers for them; or None.
    """
    goal, r, rho = allowed(config), stability.residual, stability.spectral_radius
    if r <= goal:
        return None
    if not math.isfinite(r) or math.isnan(rho):
        return "the free phase has states that are not finite: lower --lr, --weight-gain or --feedback-gain"
    worst = 1 + max(range(len(stability.layer_residual)), key=lambda i: stability.layer_residual[i])
    changes = proposals(
        network,
        config,
        residual=r,
        rate=rho,
        steps=stability.steps,
        again="start again with a lower --weight-gain or more --weight-decay",
    )
    options = FIELDS.sub(lambda field: f"--{field[0].replace('_', '-')}", "; ".join(changes))
    return (
        f"the free phase has not converged: residual {r:.1e} after {stability.steps} sweeps (allowed {goal:.0e}), "
        f"largest in layer {worst}; spectral radius {rho:.2f}: {options}"
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
