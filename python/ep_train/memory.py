"""Peak memory, for the summary of a run."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def peak_memory_bytes(device: torch.device | str = "cpu") -> int | None:
    """The most memory used so far, in bytes; None where the system does not tell (Windows).

    On CUDA: torch.cuda.max_memory_allocated, since the start or the last
    torch.cuda.reset_peak_memory_stats. Elsewhere: the process's largest resident set, which includes
    the interpreter, torch and the dataset.

    On Linux that is read from /proc (VmHWM) where it exists: getrusage's ru_maxrss also counts the
    process that started this one (a child of an 800 MB parent reports 830 MB instead of 11).
    """
    chosen = torch.device(device)
    if chosen.type == "cuda":
        return int(torch.cuda.max_memory_allocated(chosen))
    high_water = _linux_high_water()
    return high_water if high_water is not None else _rusage_bytes()


def _linux_high_water() -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _rusage_bytes() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes
