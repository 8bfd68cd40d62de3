"""What to change when a free phase has not converged: derived from its residual and from the factor per sweep."""

from __future__ import annotations

import math

import torch

from .config import RelaxConfig
from .network import Network

ENOUGH = 0.1  # a residual up to which the gradient is taken for good, when no tolerance is set (docs/concepts.md)
AIM = 0.5  # factor per sweep that a change is meant to reach
MANY = 100  # more sweeps than this are not worth proposing
FLOAT16 = 2e-3  # residuals that rounded states may keep: some times 5e-4, the last digit of one near 1
AGAIN = "start again with smaller initial weights or more weight decay"


def allowed(config: RelaxConfig) -> float:
    """The residual up to which a free phase counts as converged: ``tol``, or 0.1 where that is 0."""
    return config.tol or ENOUGH


def proposals(
    network: Network,
    config: RelaxConfig,
    *,
    residual: float,
    rate: float | None,
    steps: int,
    again: str = AGAIN,
) -> list[str]:
    """Changes that should make the free phase converge, the first ones first; at least one.

    Args:
        residual: finite, and above what is allowed.
        rate: factor by which a residual shrinks per sweep: seen, or the spectral radius. None: unknown.
        steps: sweeps that were run.
        again: what to do about weights that are too large.

    Returns:
        Short texts with the names of :class:`RelaxConfig`'s and :class:`Network`'s fields.
    """
    goal, k = allowed(config), network.feedback_gain
    longer = f"raise free_steps from {config.free_steps} to "
    if config.storage == torch.float16 and residual <= FLOAT16 and rate is not None and rate < 1:
        return [f"states in float16 move by their last digit: raise tol to {FLOAT16:g}"]
    changes = []
    if config.schedule == "sync" and config.damping == 1:
        descends = " (it cannot raise the energy)" if _descends(network) else ""
        changes.append(f"use schedule sweep{descends}")
    if rate is None:
        return [*changes, f"{longer}{2 * config.free_steps}"]
    sweeps = None
    if 0 < rate < 1:
        sweeps = steps + math.ceil(math.log(goal / residual) / math.log(rate))
        if sweeps <= MANY:
            changes.append(f"{longer}{max(sweeps, config.free_steps + 1)}")
    if rate >= AIM and (rate >= 1 or sweeps is None or sweeps > 2 * steps):
        # damping by eta makes an eigenvalue rho one of 1 - eta + eta rho
        eta = config.damping
        undamped = max((rate - (1 - eta)) / eta, 0.0)
        if eta < 1 and undamped < 1:
            changes.append(f"raise damping from {eta:g} to 1 (the spectral radius is then about {undamped:.2g})")
        if undamped >= AIM:
            # the radius of a sweep in turn goes with k and with the weights' square; that of sync with its root. What
            # over-relaxation, which follows k, makes of it is not in this
            factor = AIM / undamped
            gain = k * (factor**2 if config.schedule == "sync" else factor)
            if f"{gain:.2g}" != f"{k:.2g}":
                changes.append(f"lower feedback_gain from {k:g} (try about {gain:.2g})")
            changes.append(f"or {again}" if changes else again)
    return changes or [f"{longer}{config.free_steps + 1}"]


def _descends(network: Network) -> bool:
    """Updates in turn cannot raise the energy: there is one, and what is above max pooling is never negative, so that
    fixed winners bound it from above."""
    above = {conn.dst for conn in network.connections if conn.pool == "max" and conn.src}
    return network.feedback == "tied" and all(network.box(node)[0] >= 0 for node in above)
