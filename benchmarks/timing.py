"""Times competitors fairly: interleaved in one process, ratios pair by pair."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

Work = Callable[[], object]
QUANTILES = (0.2, 0.5, 0.8)


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

    def quantiles(self, factor: float = 1.0) -> dict[str, float]:
        """At 0.2, 0.5 and 0.8."""
        return {str(q): factor * self.quantile(q) for q in QUANTILES}

    def row(self) -> dict[str, object]:
        """For reports: milliseconds at quantiles 0.2, 0.5 and 0.8, and of every round."""
        samples = [1e3 * s for s in self.seconds]
        return {"name": self.name, "ms": self.quantiles(1e3), "rounds": len(samples), "samples": samples}


def interleave(
    competitors: Mapping[str, Work],
    *,
    rounds: int,
    warmup: int = 1,
    least: float = 0.0,
    device: str = "cpu",
    share: Mapping[str, int] | None = None,
    most: Mapping[str, int] | None = None,
    failed: dict[str, Exception] | None = None,
) -> dict[str, Times]:
    """Run every competitor once per round, in turn, ``rounds`` times after ``warmup`` rounds that are not counted.

    A machine whose speed drifts slows all of them alike, so ratios within a round stay fair. Each round begins with
    another one, so that nobody always follows the same.

    Args:
        least: seconds that an entry lasts at least: a competitor is called repeatedly, and the time divided.
        device: on ``cuda`` events take the time of every call, after a pass through the L2 cache that leaves nothing
            of the competitors in it.
        share: divide a competitor's times by this.
        most: rounds that a competitor takes part in, from the first; it is not warmed up.
        failed: gets the exception of a competitor that raises, which takes part no more; without it, it is raised.
    """
    clock = gpu_seconds if device.startswith("cuda") else cpu_seconds
    share, most = share or {}, most or {}
    calls = dict.fromkeys(competitors, 1)
    seconds: dict[str, list[float]] = {name: [] for name in competitors}

    def enter(name: str, kind: str) -> None:
        if name not in seconds:
            return
        try:
            took = clock(competitors[name], calls[name])
        except Exception as error:
            if failed is None:
                raise
            failed[name] = error
            del seconds[name]
            return
        if kind == "calibrate":
            calls[name] = max(1, min(math.ceil(least / max(took, 1e-7)), 10_000))
        elif kind == "count":
            seconds[name].append(took / share.get(name, 1))

    names = list(competitors)
    quick = [name for name in names if name not in most]
    for kind in [*["warm"] * warmup, *(["calibrate"] if least else [])]:
        for name in quick:
            enter(name, kind)
    for r in range(rounds):
        first = r % max(len(names), 1)
        for name in [*names[first:], *names[:first]]:
            if r < most.get(name, rounds):
                enter(name, "count")
    return {name: Times(name, values) for name, values in seconds.items()}


def ratio(a: Times, b: Times) -> Times:
    """a / b, round by round (of the rounds that both have); its ``seconds`` are ratios."""
    return Times(f"{a.name} / {b.name}", [x / y for x, y in zip(a.seconds, b.seconds, strict=False)])


def cpu_seconds(work: Work, calls: int) -> float:
    """Of one of ``calls`` calls, one after the other."""
    began = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - began) / calls


def gpu_seconds(work: Work, calls: int) -> float:
    """The same by events, each call on a device that has finished everything else and forgotten the inputs."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    total = 0.0
    for _ in range(calls):
        flush_cache()
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        end.synchronize()
        total += begin.elapsed_time(end) / 1e3
    return total / calls


def flush_cache() -> None:
    """Write more than the L2 cache of the GPU holds."""
    _beyond_cache().zero_()


@lru_cache(maxsize=1)
def _beyond_cache() -> torch.Tensor:
    size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device="cuda")
