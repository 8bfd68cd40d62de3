"""Times competitors fairly: interleaved in one process, ratios pair by pair."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Work = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds of one competitor, one entry per round, in the order of the rounds."""

    name: str
    seconds: Sequence[float]

    def quantile(self, q: float) -> float:
        """Quantile by linear interpolation."""
        ordered = sorted(self.seconds)
        at = q * (len(ordered) - 1)
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])

    @property
    def median(self) -> float:
        """The middle one."""
        return self.quantile(0.5)

    def row(self) -> dict[str, object]:
        """For reports: milliseconds at quantiles 0.2, 0.5 and 0.8."""
        return {
            "name": self.name,
            "ms": {str(q): 1e3 * self.quantile(q) for q in (0.2, 0.5, 0.8)},
            "rounds": len(self.seconds),
        }


def interleave(competitors: Mapping[str, Work], *, rounds: int, warmup: int = 1) -> dict[str, Times]:
    """Run every competitor once per round, in turn, ``rounds`` times after ``warmup`` rounds that are not counted.

    A machine whose speed drifts slows all of them alike, so ratios within a round stay fair.
    """
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for r in range(warmup + rounds):
        for name, work in competitors.items():
            began = time.perf_counter()
            work()
            took = time.perf_counter() - began
            if r >= warmup:
                seconds[name].append(took)
    return {name: Times(name, values) for name, values in seconds.items()}


def ratio(a: Times, b: Times) -> Times:
    """a / b, round by round; its ``seconds`` are ratios."""
    return Times(f"{a.name} / {b.name}", [x / y for x, y in zip(a.seconds, b.seconds, strict=True)])
