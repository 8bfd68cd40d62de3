"""Times work on a GPU with events: replayed graphs for single launches, back-to-back calls for whole operations."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.timing import Times

Work = Callable[[], object]


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def replayed(name: str, works: Sequence[Work], *, rounds: int = 25, least: float = 2e-3) -> Times:
    """Seconds of one of ``works``, which are captured one after the other in a CUDA graph and replayed.

    Args:
        works: the same work on different inputs (see :func:`sets_beyond_cache`).
        rounds: replays that count. least: seconds that a replay lasts at least (the works are captured repeatedly).
    """
    if not torch.cuda.is_available():
        return called(name, lambda: [work() for work in works], rounds=rounds, least=0, share=len(works))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for work in works:
                work()
    torch.cuda.current_stream().wait_stream(side)
    graph = _capture(works, 1)
    graph.replay()
    once = min(_replay_seconds(graph, 3))
    passes = max(1, min(math.ceil(least / max(once, 1e-7)), 2000 // len(works)))
    if passes > 1:
        graph = _capture(works, passes)
    for _ in range(2):
        graph.replay()
    seconds = _replay_seconds(graph, rounds)
    return Times(name, [s / (passes * len(works)) for s in seconds])


def _capture(works: Sequence[Work], passes: int) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(passes):
            for work in works:
                work()
    return graph


def _replay_seconds(graph: torch.cuda.CUDAGraph, rounds: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    torch.cuda.synchronize()
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def called(
    name: str,
    work: Work,
    *,
    rounds: int = 15,
    least: float = 20e-3,
    most: float = 3.0,
    warmup: int = 3,
    share: int = 1,
) -> Times:
    """Seconds of ``work`` called back to back, the host's time included where the device waits for it.

    Args:
        least: seconds of one round. most: seconds of all rounds, about; at least three are made.
        share: divide by this.
    """
    if not torch.cuda.is_available():  # the command is being tried: one call a round
        rounds, least, warmup = 2, 0, 0
    for _ in range(warmup):
        work()
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    once = max(time.perf_counter() - began, 1e-7)
    calls = max(1, min(math.ceil(least / once), 100))
    rounds = max(3, min(rounds, int(most / (once * calls))))
    seconds = []
    for _ in range(rounds):
        if torch.cuda.is_available():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(calls):
                work()
            end.record()
            end.synchronize()
            took = begin.elapsed_time(end) / 1e3
        else:
            began = time.perf_counter()
            for _ in range(calls):
                work()
            took = time.perf_counter() - began
        seconds.append(took / calls / share)
    return Times(name, seconds)


def sets_beyond_cache(size: int, *, limit: int = 24) -> int:
    """How many input sets of ``size`` bytes to rotate among, so that one is not found in the L2 cache."""
    if not torch.cuda.is_available():
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(math.ceil(2.5 * cache / max(size, 1)), limit)) if size < 2.5 * cache else 1


def peak_memory(work: Work, *, fresh: Work | None = None) -> int | None:
    """Largest number of bytes allocated during ``work`` beyond those before it; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    if fresh is not None:
        fresh()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
