"""One comparison: competitors that compute the same thing, each checked, then timed in turn in one process.

A question (``benchmarks/questions``) is a list of cases. A case becomes rows, one for each competitor.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.setting import Setting
from benchmarks.timing import Times, interleave, ratio

Row = dict[str, Any]
Work = Callable[[], object]


class Wrong(RuntimeError):
    """A result that differs from the truth: it is not timed."""


class Unavailable(RuntimeError):
    """A competitor that cannot run here; the message says why."""


@dataclass(frozen=True)
class Timed:
    """What a competitor hands over.

    Args:
        work: the call that is timed.
        verify: its largest relative error against the truth, called once before the timing.
        limit: above which it is wrong.
        calls: ``work`` does the job this often.
        values: columns of its row.
    """

    work: Work
    verify: Callable[[], float]
    limit: float
    calls: int = 1
    values: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Competitor:
    """``make`` does everything that is not timed. ``rounds``: takes part in the first so many only (slow ones)."""

    name: str
    make: Callable[[], Timed]
    rounds: int | None = None


@dataclass(frozen=True)
class Case:
    """Named rows to be. ``run`` makes them; ``limit``: the longest that it may take, in seconds."""

    key: str
    run: Callable[[], list[Row]]
    limit: float = 120.0


def check(error: float, limit: float) -> float:
    """Raise Wrong unless ``error`` is at most ``limit`` (NaN is not)."""
    if not error <= limit:
        raise Wrong(f"relative error {error:.1e}, expected at most {limit:.0e}")
    return error


def compete(
    setting: Setting,
    competitors: Sequence[Competitor],
    *,
    against: str,
    least: float = 0.0,
    warmup: int = 1,
    after: Callable[[str, Times], Row] | None = None,
) -> list[Row]:
    """Check every competitor, time them in turn, and divide by ``against`` round by round.

    Args:
        against: the competitor that times are divided by; without its figures there are no ratios.
        least: seconds that one timed entry lasts at least (the work is called repeatedly).
        after: more columns, from a competitor's name and times (rates, say).

    Returns:
        A row a competitor: status ``ok``, ``wrong``, ``failed`` or ``unavailable`` (with the reason); ``ms`` and
        ``ratio`` at quantiles 0.2, 0.5, 0.8; ``error`` and ``limit``.
    """
    rows: dict[str, Row] = {c.name: {"name": c.name} for c in competitors}
    ready: dict[str, Timed] = {}
    for c in competitors:
        try:
            timed = c.make()
            error = check(timed.verify(), timed.limit)  # may add to the values
            rows[c.name] |= {**timed.values, "error": error, "limit": timed.limit}
            ready[c.name] = timed
        except Unavailable as why:  # noqa: PERF203 - one that fails loses no other
            rows[c.name] |= {"status": "unavailable", "reason": str(why)}
        except Wrong as why:
            rows[c.name] |= {"status": "wrong", "reason": short(why)}
        except Exception as why:
            traceback.print_exc()
            rows[c.name] |= {"status": "failed", "reason": short(why)}
    gc.collect()
    broke: dict[str, Exception] = {}
    times = interleave(
        {name: timed.work for name, timed in ready.items()},
        rounds=2 if setting.quick else setting.rounds,
        warmup=warmup,
        least=0.0 if setting.quick else least,
        device=setting.device,
        share={name: timed.calls for name, timed in ready.items()},
        most={c.name: c.rounds for c in competitors if c.rounds is not None},
        failed=broke,
    )
    for name, why in broke.items():
        rows[name] |= {"status": "failed", "reason": short(why)}
    for name, found in times.items():
        row = rows[name]
        row |= {"status": "ok", **found.row(), "name": name}
        if against in times and name != against:
            row["ratio"] = {"to": against, **ratio(found, times[against]).quantiles()}
        if after is not None:
            row |= after(name, found)
    return list(rows.values())


def short(error: BaseException) -> str:
    """Type and first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
