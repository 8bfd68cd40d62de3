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
        """For reports: milliseconds at quantiles 0.2, 0.5 and 0.8."""
        return {"name": self.name, "ms": self.quantiles(1e3), "rounds": len(self.seconds)}


def interleave(
    competitors: Mapping[str, Work],
    *,
    rounds: int,
    warmup: int = 1,
    least: float = 0.0,
    device: str = "cpu",
    share: Mapping[str, int] | None = None,
    most: Mapping[str, int] | None = None,
) -> dict[str, Times]:
    """Run every competitor once per round, in turn, ``rounds`` times after ``warmup`` rounds that are not counted.

    A machine whose speed drifts slows all of them alike, so ratios within a round stay fair.

    Args:
        least: seconds that an entry lasts at least: a competitor is called repeatedly, and the time divided.
        device: on ``cuda`` events take the time, after a pass through the L2 cache that leaves nothing of the
            competitors in it.
        share: divide a competitor's times by this.
        most: rounds that a competitor takes part in, from the first; it is not warmed up.
    """
    clock = gpu_seconds if device.startswith("cuda") else cpu_seconds
    share, most = share or {}, most or {}
    for _ in range(warmup):
        for name, work in competitors.items():
            if name not in most:
                work()
    calls = dict.fromkeys(competitors, 1)
    if least:
        for name, work in competitors.items():
            if name not in most:
                calls[name] = max(1, min(math.ceil(least / max(clock(work, 1), 1e-7)), 10_000))
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for r in range(rounds):
        for name, work in competitors.items():
            if r < most.get(name, rounds):
                seconds[name].append(clock(work, calls[name]) / share.get(name, 1))
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
    """The same by events, on a device that has finished everything else and forgotten the inputs."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush_cache()
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def flush_cache() -> None:
    """Write more than the L2 cache of the GPU holds."""
    _beyond_cache().zero_()


@lru_cache(maxsize=1)
def _beyond_cache() -> torch.Tensor:
    size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device="cuda")
