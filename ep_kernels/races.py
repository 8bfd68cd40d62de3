"""Which backend is the fastest on a GPU: relaxations and contrasts timed on each by ``ep-kernels tune``, and kept.

    {"format": 1, "device": "NVIDIA H200", "ep_kernels": "0.1.0", "triton": "3.9.0", "cuda": "13.0 9.0a",
     "races": {"relax n=128 ...": {"winner": "cuda", "microseconds": {"cuda": 610.2, "triton": 655.0}}}}

A key holds what the time depends on: shapes and connections, batch, phases, form, precision; not the values. Choosing
is in :mod:`ep_kernels.backends`; nothing here needs a device but :func:`event_timer`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from . import cache
from .network import Connection, Network
from .relaxation import Contrast, Relaxation

FORMAT = 2
ROUNDS = 9
ROUND_SECONDS = 5e-3  # length of one timed round
WARMUP = 3  # calls: the first launches (and compiles), the second captures, the third replays

Run = Callable[[], object]
Timer = Callable[[Run], float]


@dataclass(frozen=True)
class Machine:
    """Whose times these are: the device's name, and the versions of what ran on it."""

    device: str
    ep_kernels: str
    triton: str
    cuda: str = ""  # of the compiled kernels: toolkit, architectures

    def identity(self) -> dict[str, object]:
        return {"format": FORMAT, **asdict(self)}


@dataclass(frozen=True)
class Race:
    """Times in seconds by backend, and why the others have none."""

    seconds: Mapping[str, float]
    errors: Mapping[str, str]

    @property
    def winner(self) -> str | None:
        """The fastest; None when none ran, or one alone (it won against nobody)."""
        return min(self.seconds, key=lambda name: self.seconds[name]) if len(self.seconds) > 1 else None


def race(contenders: Mapping[str, Run], timer: Timer) -> Race:
    """Time every contender; one that raises is out, with what it said."""
    found = {name: _timed(run, timer) for name, run in contenders.items()}
    seconds = {name: time for name, time in found.items() if isinstance(time, float)}
    return Race(seconds, {name: error for name, error in found.items() if isinstance(error, str)})


def _timed(run: Run, timer: Timer) -> float | str:
    try:
        return timer(run)
    except Exception as error:  # of any kind: the compiler's, the driver's, out of memory
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def event_timer(run: Run) -> float:
    """Seconds of a call as the user makes it, host included: median of rounds of calls between two CUDA events."""
    for _ in range(WARMUP):
        run()
    count = max(1, min(100, round(ROUND_SECONDS / max(_seconds(run, 1), 1e-6))))
    return statistics.median(_seconds(run, count) for _ in range(ROUNDS))


def _seconds(run: Run, count: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / count


# --- what a time depends on -------------------------------------------------------------------------------------------


def relaxation_key(r: Relaxation) -> str:
    """A relaxation as text. Its number of sweeps is no part of it: all of them cost about the same."""
    return (
        f"relax n={r.batch} phases={r.phases} form={r.form}{' nudged' if r.targets or r.extra else ''} "
        f"operands={_name(r.operands)} storage={_name(r.storage)} "
        f"frozen={r.frozen} order={_by(r.plan.order)}{' deferred' if r.plan.deferred else ''} {_network(r.network)}"
    )


def contrasts_key(jobs: Sequence[Contrast]) -> str:
    """The contrasts of some connections as text."""
    first = jobs[0]
    n, of_delta = first.target.shape[0], first.target_delta.shape[0]
    shapes = tuple((job.connection, tuple(job.source.shape[1:]), tuple(job.target.shape[1:])) for job in jobs)
    return (
        f"contrasts n={n} phases={of_delta // max(n, 1)} operands={_name(first.operands)} "
        f"storage={_name(first.target.dtype)} {_connections(shapes)}"
    )


def key_of(job: Relaxation | Sequence[Contrast]) -> str:
    """Of either."""
    return relaxation_key(job) if isinstance(job, Relaxation) else contrasts_key(job)


@lru_cache(maxsize=64)
def _network(network: Network) -> str:
    shapes = network.shapes
    heads = "".join(f" {h.loss}{h.outputs}@{h.node}" for h in network.heads)
    return _connections(tuple((c, shapes[c.src], shapes[c.dst]) for c in network.connections)) + heads


@lru_cache(maxsize=64)
def _connections(shapes: tuple[tuple[Connection, tuple[int, ...], tuple[int, ...]], ...]) -> str:
    return " ".join(_connection(*each) for each in shapes)


def _connection(conn: Connection, source: Sequence[int], target: Sequence[int]) -> str:
    ends = f"{conn.src}:{_by(source)}>{conn.dst}:{_by(target)}"
    if conn.kernel_size is None:
        return ends
    return f"{ends}/{_by(conn.kernel_size)}s{_by(conn.stride)}p{_by(conn.padding)}{conn.pool}"


def _by(numbers: Sequence[int]) -> str:
    return "x".join(map(str, numbers))


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")


# --- the cache --------------------------------------------------------------------------------------------------------


def winner(key: Callable[[], str], machine: Machine) -> str | None:
    """The backend that won this race here, or None. Never raises.

    Args:
        key: not called where nothing was measured.
    """
    found = _winners(machine)
    return found.get(key()) if found else None


def forget() -> None:
    """Read the cache again when it is next needed."""
    _winners.cache_clear()


def store(races: Mapping[str, Race], machine: Machine, folder: Path | None = None) -> Path:
    """Add the races that somebody won to the cache; returns the file.

    Args:
        races: by key. folder: None is the user's (:func:`ep_kernels.cache.cache_folder`).

    Raises:
        OSError: it cannot be written.
    """
    path = cache_file(machine.device, folder)
    entries = _read(path, machine)
    for key, held in races.items():
        if held.winner is not None:
            times = {name: round(1e6 * seconds, 3) for name, seconds in held.seconds.items()}
            entries[key] = {"winner": held.winner, "microseconds": times}
    cache.write(path, "races", machine.identity(), entries)
    forget()
    return path


def cache_file(device: str, folder: Path | None = None) -> Path:
    """Where the races of a device are kept."""
    return (cache.cache_folder() if folder is None else folder) / f"races-{cache.slug(device)}.json"


@lru_cache(maxsize=16)
def _winners(machine: Machine) -> dict[str, str]:
    """Winners by key, read once."""
    try:
        path = cache_file(machine.device)
    except RuntimeError:  # no home folder
        return {}
    return {key: entry["winner"] for key, entry in _read(path, machine).items()}


def _read(path: Path, machine: Machine) -> dict[str, Any]:
    """Valid entries of a file by key."""
    entries = cache.read(path, "races", machine.identity(), "measured backends")
    return {key: e for key, e in entries.items() if isinstance(e, dict) and e.get("winner") in ("cuda", "triton")}
