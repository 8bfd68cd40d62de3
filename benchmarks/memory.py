"""Peak memory of a call: torch's counters on a GPU; on a CPU that of a process of its own, from the kernel.

``python -m benchmarks.memory MODULE:FUNCTION ARGUMENTS`` (JSON) is that process.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.case import Unavailable, short

ROOT = Path(__file__).resolve().parents[1]
Work = Callable[[], object]
# Freed tensors go back to the system at once, and one thread's arena is not another's.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


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

    Args:
        function: ``module:name`` of what prepares the work and returns it; the preparation does not count.
        arguments: as JSON can carry them.

    Raises:
        Unavailable: no /proc, or the process failed or took longer than ``timeout`` seconds.
    """
    command = [sys.executable, "-m", "benchmarks.memory", function, json.dumps(arguments)]
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **ALLOCATOR, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"peak memory of {function}: stopped after {timeout:.0f} s") from error
    if done.returncode != 0:
        raise Unavailable(f"peak memory of {function}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise Unavailable(f"/proc/self/status has no {field}")


def main(function: str, arguments: str) -> None:
    """The child: prints the peak as JSON."""
    module, name = function.split(":")
    work = getattr(importlib.import_module(module), name)(*json.loads(arguments))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    work()
    print(json.dumps({"peak": max(0, _status("VmHWM") - before)}))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (OSError, Unavailable, AttributeError) as error:
        sys.exit(short(error))
