"""What this machine can run, and why not the rest: ``python -m ep_kernels.info [--json]``.

The JSON object has these keys, always all of them; what is unknown or absent is null, empty or a reason:

    versions      {ep_kernels, torch, python, triton, os}
    cpu           {model, capability (what torch found), kernels (instruction set that the kernels use), threads}
    devices       [{index, name, memory_gib, capability}], one for each CUDA device
    backends      {name: {available: bool, reason: null or why not}}
    auto          the backend that ``auto`` picks for CPU tensors
    library       {path, error: null or why it cannot be used}
    environment   {variable: value or null}
    build         what build_info.json says: version, build (cpu or cuda), compiler, torch, torch_target_version, isas,
                  cuda (version of nvcc, or null), cuda_archs, note (why there is no CUDA although it was wanted, or
                  null), commit, date, summary; empty where nothing was built
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import ep_kernels
from ep_kernels import _library, backends

ISAS = ("baseline", "avx2", "avx512")  # in the order of the op cpu_isa
ENVIRONMENT = (
    "EP_KERNELS_BACKEND",
    "EP_KERNELS_CACHE",
    "EP_KERNELS_ISA",
    "EP_KERNELS_BUILD",
    "MAX_JOBS",
    "TORCH_CUDA_ARCH_LIST",
    "CUDA_VISIBLE_DEVICES",
    "ATEN_CPU_CAPABILITY",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "XDG_CACHE_HOME",
    "TRITON_INTERPRET",
)


def _isa() -> str:
    """Instruction set of the kernels, or why EP_KERNELS_ISA is refused."""
    try:
        return ISAS[torch.ops.ep_kernels.cpu_isa()]
    except RuntimeError as error:
        return str(error).splitlines()[0]


def collect() -> dict[str, Any]:
    """Everything that the module prints, as one JSON-ready object (keys: see the module's docstring)."""
    error = _library.load_error()
    return {
        "versions": {
            "ep_kernels": ep_kernels.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "triton": _version("triton"),
            "os": platform.platform(),
        },
        "cpu": {
            "model": _cpu_model(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "kernels": None if error else _isa(),
            "threads": torch.get_num_threads(),
        },
        "devices": _devices(),
        "backends": {name: {"available": why is None, "reason": why} for name, why in backends.status().items()},
        "auto": backends.choose(name="auto"),
        "library": {"path": str(_library.LIBRARY), "error": error},
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "build": _library.build_info(),
    }


def as_text(info: dict[str, Any]) -> str:
    """The same, for people: aligned columns, absent things left out."""
    rows = [(name, value or "not installed") for name, value in info["versions"].items()]
    cpu = info["cpu"]
    rows.append(("cpu", f"{cpu['model']}, {cpu['threads']} threads, torch: {cpu['capability']}"))
    rows.append(("kernels", cpu["kernels"] or "not loaded"))
    rows += [
        (f"cuda:{d['index']}", f"{d['name']}, {d['memory_gib']} GiB, capability {d['capability']}")
        for d in info["devices"]
    ] or [("cuda", "no device")]
    rows.append(("build", info["build"].get("summary", "none")))
    if info["build"].get("note"):
        rows.append(("build note", info["build"]["note"]))
    rows += [(name, value) for name, value in info["environment"].items() if value is not None]
    for name, backend in info["backends"].items():
        chosen = ", the choice of auto" if name == info["auto"] else ""
        rows.append((f"backend {name}", f"yes{chosen}" if backend["available"] else f"no: {backend['reason']}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report; ``arguments`` default to the command line's."""
    parser = argparse.ArgumentParser(prog="python -m ep_kernels.info", description="What ep_kernels can run here.")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    asked = parser.parse_args(arguments)
    info = collect()
    print(json.dumps(info, indent=2) if asked.json else as_text(info))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _devices() -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found.append(
            {
                "index": index,
                "name": device.name,
                "memory_gib": round(device.total_memory / 2**30, 1),
                "capability": f"{device.major}.{device.minor}",
            }
        )
    return found


if __name__ == "__main__":
    main()
