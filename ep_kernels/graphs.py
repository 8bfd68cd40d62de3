"""CUDA graphs of launches, copies into their buffers, streams that share them, and the few programs that are kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

one_capture = threading.Lock()  # torch allows one at a time in a process


class Graphs:
    """Graphs by key. A key's first run launches its kernels one by one, which compiles them; the second captures."""

    def __init__(self) -> None:
        self.seen: set[Hashable] = set()
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.pool: Any = None
        self.stream: torch.cuda.Stream | None = None  # not torch's default: that is of whichever device came first

    def run(self, key: Hashable, launch: Callable[[], object], device: torch.device) -> None:
        """Do what ``launch`` does. On CPU tensors (the interpreter) there are no graphs."""
        if device.type != "cuda" or key not in self.seen:
            launch()
            self.seen.add(key)
            return
        if key not in self.graphs:
            self.graphs[key] = self._captured(launch, device)
        self.graphs[key].replay()

    def _captured(self, launch: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
        if self.stream is None:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        graph = torch.cuda.CUDAGraph()
        with (
            one_capture,
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            launch()
        return graph


class Turn:
    """One user of some buffers at a time: threads wait here, streams on the device."""

    def __init__(self, device: torch.device, *, wait: bool = True) -> None:
        """After the buffers were made; ``wait=False``: within a capture, where there is one user only."""
        self.lock = threading.Lock()
        self.last: torch.cuda.Event | None = None
        self.waits = wait and device.type == "cuda"
        if self.waits:
            self._mark(torch.cuda.current_stream(device))

    @contextmanager
    def taken(self, tensor: Tensor) -> Iterator[None]:
        """Within, the current stream of the tensor's device has the buffers."""
        with self.lock:
            if not self.waits:
                yield
                return
            stream = torch.cuda.current_stream(tensor.device)
            if self.last is not None:
                stream.wait_event(self.last)
            try:
                yield
            finally:
                self._mark(stream)

    def finish(self) -> None:
        """Wait on the host for the last user: the buffers may go."""
        with self.lock:
            if self.last is not None:
                self.last.synchronize()

    def _mark(self, stream: torch.cuda.Stream) -> None:
        self.last = torch.cuda.Event()
        self.last.record(stream)


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


@contextmanager
def context(tensor: Tensor) -> Iterator[None]:
    """How kernels run: on the tensor's device, which Triton takes from torch; and without the caller's modes. Buffers
    outlive inference mode, and what goes through ATen must not follow autocast."""
    device = torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
    with device, torch.inference_mode(False), torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
        yield


def capturing(tensor: Tensor) -> bool:
    """Whether the current stream is being captured by somebody's graph."""
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair into the first: those of the same layout in one launch for each pair of dtypes."""
    alike: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for to, values in pairs:
        if to.stride() == values.stride():
            group = alike.setdefault((to.dtype, values.dtype), ([], []))
            group[0].append(to)
            group[1].append(values)
        else:
            to.copy_(values)
    for destinations, sources in alike.values():
        torch._foreach_copy_(destinations, sources)
