"""What a result was measured on."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import ep_kernels
from ep_kernels import _library, backends, ops

ROOT = Path(__file__).resolve().parents[1]


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def revision() -> str:
    """Commit of the working tree, with ``+`` when it holds other changes (but of results); empty outside a checkout."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def device_name(device: str) -> str:
    """Of the GPU, or of the CPU with its instruction set and number of cores."""
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    isa = ops.cpu_isa() if _library.load_error() is None else "no library"
    return f"{cpu_name()}, {isa}, {os.cpu_count()} cores"


def slug(text: str) -> str:
    """For file names."""
    return re.sub("[^A-Za-z0-9]+", "-", text).strip("-").lower()


def environment(device: str, threads: int, command: str) -> dict[str, object]:
    """What every row carries."""
    found: dict[str, object] = {
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "device": device_name(device),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "ep_kernels": ep_kernels.__version__,
        "revision": revision(),
    }
    if device.startswith("cuda"):
        p = torch.cuda.get_device_properties(device)
        found |= {
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_gib": round(p.total_memory / 2**30),
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            "driver": query("driver_version"),
            "clocks": query("clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.draw,power.limit,temperature.gpu"),
            "library": backends.status()["cuda"] or str(_library.build_info().get("summary", "yes")),
        }
    return found


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def query(fields: str) -> str:
    """Read-only question to nvidia-smi; empty when it does not answer."""
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
