"""How a relaxation is solved and its phases compared: one frozen object."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch

from .network import Connection, Network
from .plan import FORMS, SCHEDULES, Form, Schedule, Winners
from .precision import OPERANDS, STORAGES, Operands

Estimator = Literal["symmetric", "positive", "negative", "tangent", "five_phase", "contrastive", "coupled"]
OnFail = Literal["raise", "warn", "ignore"]
Start = Literal["zero", "feedforward"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
ON_FAILS: tuple[OnFail, ...] = get_args(OnFail)
STARTS: tuple[Start, ...] = get_args(Start)


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
        on_fail: what a free phase does that ends above ``tol``: ``warn`` logs it, with what to change, once for each
            network and setting; ``raise`` raises :class:`ConvergenceError`; ``ignore`` does nothing, so that a GPU need
            not be waited for. With ``tol`` 0 nothing is tested: ``warn`` has nothing to say, and ``raise`` is refused.
        start: where a free phase starts that is not given states: ``zero`` ones, or ``feedforward``, those of one
            bottom-up pass without feedback, which is no sweep of the ``free_steps``. In ``sweep`` the first sweep from
            zero is that pass, so there both are the same.
        early_operands, early_steps: precision of the operands of the first so many of the ``free_steps``, whose
            rounding the later sweeps forget. The last sweep always has ``operands``. It is two relaxations in a row,
            each with its own buffers on a GPU; the first sweep of the second is not over-relaxed.

    The settings that other solvers call steps, gain and precision are ``free_steps`` and ``nudged_steps``, the
    network's ``feedback_gain``, and ``operands`` and ``storage``.

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
    on_fail: OnFail = "warn"
    start: Start = "zero"
    early_operands: Operands = None
    early_steps: int = 0

    def __post_init__(self) -> None:
        names: tuple[tuple[str, object, Collection[object]], ...] = (
            ("schedule", self.schedule, SCHEDULES),
            ("estimator", self.estimator, ESTIMATORS),
            ("form", self.form, FORMS[:2]),
            ("winners", self.winners, ("live", "frozen")),
            ("operands", self.operands, OPERANDS),
            ("storage", self.storage, STORAGES),
            ("on_fail", self.on_fail, ON_FAILS),
            ("start", self.start, STARTS),
            ("early_operands", self.early_operands, OPERANDS),
            ("linear_nudge", self.linear_nudge, (True, False)),
        )
        for name, value, valid in names:
            if not any(value is v or (isinstance(value, str) and value == v) for v in valid):
                listed = ", ".join(str(v) for v in valid)
                raise ValueError(f"RelaxConfig: argument '{name}': expected one of {listed}, got {value!r}")
        for name, least in (("free_steps", 1), ("nudged_steps", 1), ("early_steps", 0)):
            count = getattr(self, name)
            if not isinstance(count, Integral) or isinstance(count, bool) or count < least:
                raise ValueError(f"RelaxConfig: argument '{name}': expected an integer >= {least}, got {count!r}")
            object.__setattr__(self, name, operator.index(count))
        omega = 1.0 if self.over_relaxation is None else _number(self.over_relaxation)
        for name, ok, expected in (
            ("beta", 0 < _number(self.beta) < math.inf, "a finite number > 0"),
            ("damping", 0 < _number(self.damping) <= 1, "a number in (0, 1]"),
            ("over_relaxation", 1 <= omega < 2, "a number in [1, 2)"),
            ("tol", 0 <= _number(self.tol) < math.inf, "a finite number >= 0"),
        ):
            value = getattr(self, name)
            if not ok:
                raise ValueError(f"RelaxConfig: argument '{name}': expected {expected}, got {value!r}")
            if value is not None:
                object.__setattr__(self, name, float(value))
        if self.on_fail == "raise" and self.tol == 0:
            raise ValueError(
                "RelaxConfig: argument 'on_fail': expected a tol > 0 with 'raise' (with tol 0 convergence is not "
                f"tested), got tol {self.tol!r}"
            )
        if (self.early_operands is None) != (self.early_steps == 0):
            raise ValueError(
                "RelaxConfig: argument 'early_steps': expected early_operands and early_steps > 0 together, got "
                f"{self.early_operands!r} and {self.early_steps!r}"
            )
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
        """Settings of the published codes (Laborieux et al. 2021): synchronous, states, live winners, T 250, K 30.

        Raises:
            ValueError: see :class:`RelaxConfig`; an unknown name, with the valid ones.
        """
        base = RelaxConfig("sync", 250, 30, beta=0.2, form="states", winners="live", over_relaxation=1.0)
        return replace(base, **_known("RelaxConfig.classical", changes))

    @staticmethod
    def from_dict(values: Mapping[str, object]) -> RelaxConfig:
        """From a mapping, of a JSON file say; what it lacks has its default. Dtypes may be named: ``"float16"``.

        Raises:
            ValueError: see :class:`RelaxConfig`; an unknown name, with the valid ones.
        """
        dtypes = {"float16": torch.float16, "bfloat16": torch.bfloat16}
        found = _known("RelaxConfig.from_dict", values)
        for name in ("operands", "storage", "early_operands"):
            if isinstance(found.get(name), str):
                found[name] = dtypes.get(found[name].removeprefix("torch."), found[name])
        return RelaxConfig(**found)

    def to_dict(self) -> dict[str, object]:
        """Plain values for a JSON file, dtypes by name: what :meth:`from_dict` reads."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for name, value in values.items()
        }


def _number(value: object) -> float:
    """NaN, which no range holds, for what is no real number."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def _known(where: str, values: Mapping[str, object]) -> dict[str, Any]:
    """The values, unless a name is none of RelaxConfig's."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: argument 'values': expected a mapping of names to values, got {values!r}")
    valid = [f.name for f in fields(RelaxConfig)]
    unknown = [name for name in values if name not in valid]
    if unknown:
        raise ValueError(f"{where}: expected names among {', '.join(valid)}; got {', '.join(map(repr, unknown))}")
    return dict(values)
