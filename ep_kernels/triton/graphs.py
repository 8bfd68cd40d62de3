"""CUDA graphs of launches, streams that share buffers, and the few programs that are kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor


class Graphs:
    """Graphs by key. A key's first run launches its kernels one by one, which compiles them; the second captures."""

    def __init__(self) -> None:
        self.seen: set[Hashable] = set()
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.pool: Any = None

    def run(self, key: Hashable, launch: Callable[[], object], device: torch.device) -> None:
        """Do what ``launch`` does. On CPU tensors (the interpreter) there are no graphs."""
        if device.type != "cuda" or key not in self.seen:
            launch()
            self.seen.add(key)
            return
        if key not in self.graphs:
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                launch()
            self.graphs[key] = graph
        self.graphs[key].replay()


class Turn:
    """One user of some buffers at a time: threads wait here, streams on the device."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.last: torch.cuda.Event | None = None

    @contextmanager
    def taken(self, tensor: Tensor, *, wait: bool = True) -> Iterator[None]:
        """Within, the current stream of the tensor's device has the buffers. ``wait=False``: within a capture."""
        with self.lock:
            if tensor.device.type != "cuda" or not wait:
                yield
                return
            stream = torch.cuda.current_stream(tensor.device)
            if self.last is not None:
                stream.wait_event(self.last)
            try:
                yield
            finally:
                self.last = torch.cuda.Event()
                self.last.record(stream)

    def finish(self) -> None:
        """Wait on the host for the last user: the buffers may go."""
        if self.last is not None:
            self.last.synchronize()


class Turned(Protocol):
    """Something whose buffers are used in turn."""

    turn: Turn


T = TypeVar("T", bound=Turned)


class Kept(Generic[T]):
    """The ``most`` last used of something costly to make, by key."""

    def __init__(self, most: int):
        self.most = most
        self.lock = threading.Lock()
        self.items: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        with self.lock:
            if key not in self.items:
                self.items[key] = make()
            self.items.move_to_end(key)
            while len(self.items) > self.most:
                _, old = self.items.popitem(last=False)
                old.turn.finish()
            return self.items[key]

    def clear(self) -> None:
        with self.lock:
            for old in self.items.values():
                old.turn.finish()
            self.items.clear()


def device_context(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def capturing(tensor: Tensor) -> bool:
    """Whether the current stream is being captured by somebody's graph."""
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
