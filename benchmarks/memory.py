"""Peak memory of a call: torch's counters on a GPU; on a CPU that of a process of its own, from the kernel."""

from __future__ import annotations

import ctypes
import gc
import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.case import Unavailable, short

ROOT = Path(__file__).resolve().parents[1]
Work = Callable[[], object]
_CONTEXT = multiprocessing.get_context("forkserver")
# Freed tensors go back to the system at once, and one thread's arena is not another's.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
MADV_POPULATE_READ = 22  # <asm-generic/mman-common.h>


def gpu_peak(work: Work, *, fresh: Work | None = None) -> int:
    """Largest number of bytes allocated during ``work`` beyond those before it. ``fresh`` is called first."""
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


def cpu_peak(function: str, *arguments: object, timeout: float = 600) -> int:
    """Bytes that ``FUNCTION(*ARGUMENTS)()`` needs at its peak beyond those before it, in a process of its own.

    The first call starts a server that has torch loaded and has run nothing; every process is forked from it.

    Args:
        function: ``module:name`` of what prepares the work and returns it; the preparation does not count.
        arguments: what can be pickled.

    Raises:
        Unavailable: no /proc, or the process failed or took longer than ``timeout`` seconds.
    """
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_child, args=(sender, function, arguments), daemon=True)
    with _server_environment(function.split(":")[0]):
        process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            raise Unavailable(f"peak memory of {function}: stopped after {timeout:.0f} s")
        found = receiver.recv()
    except EOFError:
        process.join()
        raise Unavailable(f"peak memory of {function}: its process ended with code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if isinstance(found, str):
        raise Unavailable(f"peak memory of {function}: {found}")
    return int(found)


@contextmanager
def _server_environment(module: str) -> Iterator[None]:
    """What the server is started in: the allocator's settings, and this checkout on the path."""
    _CONTEXT.set_forkserver_preload(["torch", "ep_kernels", module])
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    changes = {**ALLOCATOR, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _child(sender: Connection, function: str, arguments: Sequence[object]) -> None:
    """Sends the peak in bytes, or as text why there is none."""
    try:
        sender.send(_peak(function, arguments))
    except Exception as error:
        sender.send(short(error))


def _peak(function: str, arguments: Sequence[object]) -> int:
    module, name = function.split(":")
    work = getattr(importlib.import_module(module), name)(*arguments)
    _load_libraries()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, code = _status("VmRSS"), _status("RssFile")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    work()
    return max(0, _status("VmHWM") - before - max(0, _status("RssFile") - code))


def _load_libraries() -> None:
    """Maps every page of the libraries, so that code which the work is the first to call does not count.

    Before Linux 5.14 madvise refuses; what is mapped by the end is then taken off the peak, and can be too much by
    what was mapped after the peak.
    """
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, access, *_, path = line.split()
        if access.startswith("r") and path.startswith("/"):
            first, last = (int(address, 16) for address in span.split("-"))
            madvise(first, last - first, MADV_POPULATE_READ)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise Unavailable(f"/proc/self/status has no {field}")
