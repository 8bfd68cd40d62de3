"""What a free phase ends in: states, residuals, whether it converged, and what to change when it did not."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import RelaxConfig
from .convergence import allowed, proposals
from .network import Network

log = logging.getLogger("ep_kernels")
SEEN = 4  # last sweeps from which the factor per sweep is taken
_warned: dict[tuple[Network, RelaxConfig], None] = {}


class ConvergenceError(RuntimeError):
    """A free phase ended above ``tol``, with ``on_fail="raise"``. The message says what to change.

    Attributes:
        equilibrium: what was found all the same.
    """

    def __init__(self, equilibrium: Equilibrium) -> None:
        super().__init__(equilibrium.message)
        self.equilibrium = equilibrium

    def __reduce__(self) -> tuple[type[ConvergenceError], tuple[Equilibrium]]:
        return ConvergenceError, (self.equilibrium,)


@dataclass(frozen=True)
class Equilibrium:
    """Result of the free phase.

    ``steps``, ``trace``, ``converged`` and ``message`` are made when they are asked for: with a ``tol`` each of them
    then waits for a GPU, which decides itself when to stop. Nothing else here does.

    Attributes:
        states: per node, [B, ...]; index 0 is the clamped input, the others are float16 if that is the ``storage``.
        preactivations: per node, gamma a of its last update ([] when not kept).
        drives, winners: by connection: drives that are those of the final states, winners of the last ones computed
            (those of the final states if kept).
        residuals: [T, B], max over units of |s_{t+1} - s_t| in every sweep; -1 in those that an early stop left out.
        network, config: what was relaxed, and how.
    """

    states: list[Tensor]
    preactivations: list[Tensor | None]
    drives: dict[int, Tensor]
    winners: dict[int, Tensor]
    residuals: Tensor
    network: Network = field(repr=False)
    config: RelaxConfig

    @property
    def residual(self) -> Tensor:
        """[B], of the last sweep that ran."""
        rows = self.residuals
        if self.config.tol == 0 or not rows.numel():
            return rows[-1]
        numbers = torch.arange(len(rows), device=rows.device)
        last = torch.where(rows[:, 0] != -1, numbers, 0).amax(0, keepdim=True)
        return rows.index_select(0, last)[0]

    @property
    def steps(self) -> int:
        """Sweeps that ran."""
        return len(self.residuals) if self._all_ran else int((self.residuals[:, 0] != -1).sum())

    @property
    def trace(self) -> Tensor:
        """[steps, B], the residual of every sweep that ran."""
        return self.residuals if self._all_ran else self.residuals[self.residuals[:, 0] != -1]

    @property
    def converged(self) -> bool | None:
        """Every sample's residual is at most ``tol``; None when that is 0, which never tests. NaN is not."""
        return bool((self.residual <= self.config.tol).all()) if self.config.tol > 0 else None

    @property
    def rate(self) -> float | None:
        """Factor per sweep of the worst sample's residual, over the last (at most) four of its sweeps but the first,
        which starts from afar. None: too few sweeps to tell, or residuals that are zero or not finite."""
        trace = self.trace
        if len(trace) < 3 or not trace.numel():
            return None
        worst = trace[:, int(trace[-1].argmax())].tolist()[1:][-1 - SEEN :]
        first, last = worst[0], worst[-1]
        if not (math.isfinite(first) and math.isfinite(last) and first > 0 and last > 0):
            return None
        return float((last / first) ** (1 / (len(worst) - 1)))

    @property
    def message(self) -> str:
        """One line for people: whether it converged, with the numbers, and what to change if not.

        With ``tol`` 0 nothing was tested: for residuals above 0.1 it says what would lower them. The gradient may be
        good all the same (docs/concepts.md).
        """
        config, tol = self.config, self.config.tol
        steps, residual = self.steps, self.residual
        if not residual.numel():
            return "converged: there are no samples"
        finite = residual.isfinite()
        samples = len(residual)
        if not bool(finite.all()):
            bad = samples - int(finite.sum())
            return (
                f"the free phase has states that are not finite, in {bad} of {samples} samples after {steps} sweeps: "
                "look at inputs and parameters; if training made them so, lower its learning rate or feedback_gain"
            )
        worst, goal = float(residual.max()), allowed(config)
        within = f"residual {worst:.1e} after {steps} sweep{'s' if steps != 1 else ''}"
        if worst <= goal:
            return f"converged: {within} (tol {tol:g})" if tol else f"not tested (tol is 0): {within}"
        above = int((residual > goal).sum())
        rate = self.rate
        seen = "" if rate is None else f", changing by a factor of {rate:.2f} per sweep"
        changes = "; ".join(proposals(self.network, config, residual=worst, rate=rate, steps=steps))
        if not tol:
            return (
                f"not tested (tol is 0): {within}, above {goal:g} in {above} of {samples} samples{seen}. The gradient "
                f"may be good all the same; to lower the residual: {changes}"
            )
        return (
            f"the free phase has not converged: {within} (allowed {goal:.0e}) in {above} of {samples} samples{seen}: "
            f"{changes}"
        )

    @property
    def _all_ran(self) -> bool:
        return self.config.tol == 0 or not self.residuals.numel()


def tested(equilibrium: Equilibrium) -> Equilibrium:
    """The same, after what ``on_fail`` asks for: with a ``tol``, raise or warn when it is above that.

    Raises:
        ConvergenceError: see there.
    """
    network, config = equilibrium.network, equilibrium.config
    if config.on_fail == "ignore" or config.tol == 0 or equilibrium.converged:
        return equilibrium
    if config.on_fail == "raise":
        raise ConvergenceError(equilibrium)
    if (network, config) not in _warned:  # once for each network and setting: a training has thousands of batches
        if len(_warned) >= 64:
            _warned.pop(next(iter(_warned)))
        _warned[network, config] = None
        log.warning("%s (said once for these settings; on_fail='ignore' silences it)", equilibrium.message)
    return equilibrium
