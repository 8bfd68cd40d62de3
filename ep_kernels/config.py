"""How a relaxation is solved and its phases compared: one frozen object."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from .network import Connection, Network
from .plan import FORMS, SCHEDULES, Form, Schedule, Winners
from .precision import OPERANDS, STORAGES, Operands

Estimator = Literal["symmetric", "positive", "negative", "tangent", "five_phase", "contrastive", "coupled"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)


@dataclass(frozen=True)
class RelaxConfig:
    """How the two phases are solved and compared.

    Args:
        schedule: ``sweep`` (bottom-up free, top-down nudged), ``even_odd`` or ``sync``.
        free_steps, nudged_steps: T and K, in sweeps.
        beta: nudging strength, > 0. ``tangent`` and ``contrastive`` (which nudges local heads at strength 1) do not
            read it. In the states form the nudge moves the lowest layer by about ``beta k^(levels - 1)``,
            and what is below the rounding of the states is noise: a warning asks for 32 times the eps of their dtype,
            one-sided (one phase against the free one) for 512 times. Delta forms take any beta.
        estimator: ``symmetric`` (+beta and -beta in one batch of 2B; Laborieux et al. 2021), one-sided ``positive`` or
            ``negative`` (Scellier & Bengio 2017), ``tangent``, the limit of small beta: one linear phase, or
            ``five_phase``: free, +-beta and +-2 beta, extrapolated to an error of beta^4. For an ``mse`` readout also
            ``coupled`` (Stern et al. 2021): the output units are clamped at ``s_free + beta (y - s_free)``; and
            ``contrastive`` (Movellan 1991): they are clamped at the target y.
        form: ``delta`` relaxes ``d = s - s_free`` (needs frozen winners); ``states`` relaxes the states themselves.
        winners: of max pooling in the nudged phases: ``frozen`` at the free equilibrium's, or ``live``.
        linear_nudge: evaluate the nudge once, at the free equilibrium, instead of at every update.
        damping: eta in (0, 1].
        over_relaxation: omega in [1, 2): free sweeps after the first move every state omega times as far, within the
            box. The energy still cannot rise (successive over-relaxation, Young 1954), and a free phase of few sweeps
            ends several times closer to its equilibrium. None takes Young's optimum for the couplings that random
            networks have, ``2 / (1 + sqrt(1 - 5 k))``, at most 1.25 (docs/decisions.md). Without effect when damping is
            below 1, and in ``sync``, which it would make oscillate.
        tol: stop the free phase when the residual of every sample is at most this; 0 never stops early. The nudged
            phases always run ``nudged_steps`` sweeps: a delta is small long before it has reached the lowest layer.
        operands: precision of the operands of convolutions and matrix products, of the relaxation and of the contrast:
            None (the parameters' own), ``"tf32"`` (float32 that tensor cores round to 10 bits of mantissa; a backend
            without them computes in float32), torch.float16 or torch.bfloat16.
        storage: dtype of states and scaled deltas in memory, between launches: None (the parameters' own) or
            torch.float16. Arithmetic, preactivations, drives and residuals stay in the parameters' dtype. A residual in
            float16 may stay at the states' last digit, 5e-4 near 1: a smaller ``tol`` may never stop. Take the delta
            form with it: the states form subtracts two stored states, which leaves no digits in the lower layers.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    schedule: Schedule = "sweep"
    free_steps: int = 4
    nudged_steps: int = 3
    beta: float = 1e-3
    estimator: Estimator = "symmetric"
    form: Literal["states", "delta"] = "delta"
    winners: Winners = "frozen"
    linear_nudge: bool = False
    damping: float = 1.0
    over_relaxation: float | None = None
    tol: float = 0.0
    operands: Operands = None
    storage: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("schedule", self.schedule, SCHEDULES),
            ("estimator", self.estimator, ESTIMATORS),
            ("form", self.form, FORMS[:2]),
            ("winners", self.winners, ("live", "frozen")),
            ("operands", self.operands, OPERANDS),
            ("storage", self.storage, STORAGES),
        ):
            if value not in valid:
                names = ", ".join(str(v) for v in valid)
                raise ValueError(f"RelaxConfig: argument '{name}': expected one of {names}, got {value!r}")
        for name, ok, expected in (
            ("free_steps", isinstance(self.free_steps, int) and self.free_steps >= 1, "an integer >= 1"),
            ("nudged_steps", isinstance(self.nudged_steps, int) and self.nudged_steps >= 1, "an integer >= 1"),
            ("beta", math.isfinite(self.beta) and self.beta > 0, "a finite number > 0"),
            ("damping", math.isfinite(self.damping) and 0 < self.damping <= 1, "a number in (0, 1]"),
            (
                "over_relaxation",
                self.over_relaxation is None or 1 <= self.over_relaxation < 2,
                "a number in [1, 2)",
            ),
            ("tol", math.isfinite(self.tol) and self.tol >= 0, "a finite number >= 0"),
        ):
            if not ok:
                raise ValueError(f"RelaxConfig: argument '{name}': expected {expected}, got {getattr(self, name)!r}")
        if self.estimator == "coupled" and self.beta > 1:
            raise ValueError(
                f"RelaxConfig: argument 'beta': expected at most 1 with estimator='coupled' (1 clamps the output units "
                f"at the target), got {self.beta!r}"
            )
        if self.winners == "live" and self.nudge_form != "states":
            raise ValueError(
                "RelaxConfig: argument 'winners': expected 'frozen' with form='delta' or estimator='tangent' "
                "(deltas are relative to the free winners), got 'live'"
            )

    def free_damping(self, feedback_gain: float) -> float:
        """eta of the free sweeps after the first: over-relaxed where that is safe."""
        if self.damping != 1 or self.schedule == "sync":
            return self.damping
        if self.over_relaxation is not None:
            return self.over_relaxation
        return min(2 / (1 + math.sqrt(max(1 - 5 * feedback_gain, 0.0))), 1.25)

    @property
    def clamps(self) -> bool:
        """The nudged phase clamps the output units instead of nudging them."""
        return self.estimator in ("contrastive", "coupled")

    def clamped_nodes(self, network: Network) -> frozenset[int]:
        """Nodes that the nudged phase holds: the output units, where it clamps."""
        return frozenset({network.readout.node}) if self.clamps else frozenset()

    def keeps_drive(self, conn: Connection, *, refreshed: bool = True) -> bool:
        """The drive that the free phase leaves of this connection is that of the final states: the clamped input's;
        after bottom-up sweeps any; one that was ``refreshed`` for its winners (``free_phase(keep=True)``)."""
        return self.schedule == "sweep" or conn.src == 0 or (refreshed and conn.pool == "max")

    @property
    def phases(self) -> int:
        """Nudged phases in one batch: 2 where both signs of beta are relaxed together."""
        return 2 if self.estimator in ("symmetric", "five_phase") else 1

    @property
    def nudge_form(self) -> Form:
        """Form of the nudged phase: the tangent is a delta form of its own."""
        return "tangent" if self.estimator == "tangent" else self.form

    @staticmethod
    def classical(**changes: object) -> RelaxConfig:
        """Settings of the published codes (Laborieux et al. 2021): synchronous, states, live winners, T 250, K 30."""
        base = RelaxConfig("sync", 250, 30, beta=0.2, form="states", winners="live", over_relaxation=1.0)
        return replace(base, **changes)  # type: ignore[arg-type]
