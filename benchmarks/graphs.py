"""Launches as a CUDA graph, so that what is timed is the device and not Python; without a GPU, the same calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.case import check

Work = Callable[[], object]


def captured(
    works: Sequence[Work], verify: Callable[[Any], float], limit: float, *, least: float = 2e-3
) -> tuple[Work, int]:
    """``works`` one after the other as one call, and how many of them that call runs.

    Args:
        works: the same work on different inputs (see :func:`sets_beyond_cache`).
        verify: relative error of what a work returns, asked of what the first replay leaves there (a capture computes
            nothing): a graph that missed something must not look fast.
        limit: above which it is wrong.
        least: seconds that a replay lasts at least (the works are captured repeatedly).

    Raises:
        Wrong: the replay's error is above ``limit``.
    """
    if not torch.cuda.is_available():
        return (lambda: [work() for work in works]), len(works)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for work in works:
                work()
    torch.cuda.current_stream().wait_stream(side)
    graph, outputs = _capture(works, 1)
    graph.replay()
    torch.cuda.synchronize()
    for output in outputs:
        check(verify(output), limit)
    del outputs
    once = min(_replay_seconds(graph) for _ in range(3))
    passes = max(1, min(math.ceil(least / max(once, 1e-7)), 2000 // len(works)))
    if passes > 1:
        graph, _ = _capture(works, passes)
    return graph.replay, passes * len(works)


def _capture(works: Sequence[Work], passes: int) -> tuple[torch.cuda.CUDAGraph, list[object]]:
    """The graph, and what the works of its last pass returned."""
    torch.cuda.synchronize()
    graph, outputs = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for _ in range(passes):
            outputs = [work() for work in works]
    return graph, outputs


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def sets_beyond_cache(size: int, *, limit: int = 24) -> int:
    """How many input sets of ``size`` bytes to rotate among, so that one is not found in the L2 cache."""
    if not torch.cuda.is_available():
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(math.ceil(2.5 * cache / max(size, 1)), limit)) if size < 2.5 * cache else 1
