"""``python -m benchmarks.aot [--arch sm_90] [--json FILE] [--all]``: what the compiler makes of the Triton kernels.

(1) Registers, spills, shared memory and instructions of every tile of the table. (2) The launches of one free sweep of
VGG-11 with their tiles, and the least time that a datasheet allows them: an estimate, nothing is measured on a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import os
import platform
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

import ep_kernels
from benchmarks.machine import cpu_name, revision
from ep_kernels import Network, Parameters
from ep_kernels.plan import compile_plan
from ep_kernels.relaxation import Relaxation
from ep_train.models import build_network

try:
    import triton

    from ep_kernels.triton.aot import KINDS, PRECISIONS, Case, Compiled, arch_named, compile_case, heaviest
    from ep_kernels.triton.arch import KNOWN, Arch
    from ep_kernels.triton.launch import Call
    from ep_kernels.triton.lower import DriveLaunch
    from ep_kernels.triton.program import Program
    from ep_kernels.triton.tiling import TABLE
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    sys.exit("benchmarks.aot: expected triton to compile with (pip install 'ep-kernels[triton]'), it is not installed")

BATCH = 256
# vendor's datasheets, SXM: dense fp16 or bf16 FLOP/s, memory bytes/s
DATASHEETS = {"sm_90": {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}}
Rows = list[dict[str, object]]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.splitlines()[0])
    names = [arch.name for arch in KNOWN.values()]
    parser.add_argument("--arch", choices=names, help="only this architecture (default: all, and VGG-11 on sm_90)")
    parser.add_argument("--kernel", choices=sorted({kind.split()[0] for kind in KINDS}), help="only this kernel")
    parser.add_argument("--tiles", type=int, help="only as many tiles of each table, the largest (default: all)")
    everything = "all kinds and precisions (default: the heaviest kind of each kernel, fp16 and tf32)"
    parser.add_argument("--all", action="store_true", help=everything)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    print(f"triton {triton.__version__}, compiled for, not run on:")
    configurations = []
    for case, compiled in compile_all(cases(args), args.jobs):
        row = configuration(case, compiled)
        configurations.append(row)
        print(configuration_line(row), flush=True)
    arch = arch_named(args.arch or "sm_90")
    launches = sweep(arch)
    print(
        f"\nOne free sweep of VGG-11, CIFAR, batch {BATCH}, fp16 operands, {arch.name} ({arch.processors} processors)"
    )
    if arch.name in DATASHEETS:
        print("Least time by datasheet (dense fp16 and memory rates): an estimate, not a measurement.")
    print(sweep_table(launches))
    if args.json:
        result = {
            "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": "python -m benchmarks.aot " + " ".join(sys.argv[1:] if argv is None else argv),
            "machine": {
                "cpu": cpu_name(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "ep_kernels": ep_kernels.__version__,
                "revision": revision(),
            },
            "configurations": configurations,
            "sweep": {"network": "vgg11", "batch": BATCH, "arch": arch.name, "rows": launches},
            "datasheets": DATASHEETS,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    spilled = [row for row in configurations if row["stack"] or not row["fits"]]
    if spilled:
        print(f"\n{len(spilled)} of {len(configurations)} spill or exceed shared memory", file=sys.stderr)
    return 1 if spilled else 0


def cases(args: argparse.Namespace) -> list[Case]:
    """What to compile."""
    archs = [args.arch] if args.arch else [arch.name for arch in KNOWN.values()]
    kinds = [kind for kind in (KINDS if args.all else heaviest()) if args.kernel in (None, kind.split()[0])]
    found: list[Case] = []
    for arch in archs:
        for precision in PRECISIONS if args.all else ("fp16", "tf32"):
            for kind in kinds:
                tiles = TABLE[arch, PRECISIONS[precision].operand.itemsize]
                fitting = [case for tile in tiles if (case := Case(arch, kind, precision, tile)).fits()]
                found += fitting[: args.tiles]
    return found


def compile_all(cases: list[Case], jobs: int) -> Iterator[tuple[Case, Compiled]]:
    """In their order, by ``jobs`` processes."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield from zip(cases, pool.map(compile_case, cases), strict=True)


def configuration(case: Case, compiled: Compiled) -> dict[str, object]:
    fits = compiled.shared_memory <= arch_named(case.arch).shared_memory
    return {**asdict(case), **asdict(compiled), "fits": fits}


def configuration_line(row: dict[str, object]) -> str:
    t: dict[str, int] = row["tile"]  # type: ignore[assignment]
    instructions: dict[str, int] = row["instructions"]  # type: ignore[assignment]
    name = f"{t['rows']}x{t['columns']}x{t['depth']}, {t['warps']} warps, {t['stages']} stages"
    found = ", ".join(f"{count} {name}" for name, count in instructions.items() if count)
    flag = "" if row["fits"] and not row["stack"] else "  SPILLS OR TOO LARGE"
    return (
        f"{row['arch']:7s}{row['precision']:12s}{row['kind']:20s}{name:32s}{row['registers']:4d} registers"
        f"{row['stack']:5d} B stack{row['shared_memory'] / 1024:7.1f} KiB shared  {found}{flag}"  # type: ignore[operator]
    )


# --- VGG-11 -----------------------------------------------------------------------------------------------------------


def relaxation(network: Network) -> Relaxation:
    """A free phase on meta tensors."""
    named = {name: torch.empty(shape, device="meta") for name, shape in Parameters.shapes(network).items()}
    parameters = Parameters.from_named(network, named)
    nodes, connections = len(network.shapes), len(network.connections)
    x = torch.empty(BATCH, *network.shapes[0], device="meta")
    return Relaxation(
        network,
        compile_plan(network, "sweep", "free", steps=4),
        4,
        parameters.weights,
        parameters.biases,
        [x, *[None] * (nodes - 1)],
        BATCH,
        drive_gains=[1.0] * connections,
        feedback_gains=[network.feedback_coefficient(c) for c in range(connections)],
        nudge_gains=[0.0] * nodes,
        scales=[1.0] * nodes,
        operands=torch.float16,
    )


def sweep(arch: Arch) -> Rows:
    """Launches of one steady free sweep, as they are on ``arch``."""
    network = build_network("vgg11", (3, 32, 32), 10)
    r = relaxation(network)
    program = Program(r, arch, 64)
    program.buffers.load(r)
    rows = []
    for launch in program.lower(4).sweeps[2]:
        name = f"drive {launch.connection}" if isinstance(launch, DriveLaunch) else f"step {launch.node}"
        rows += [estimate(name, call, arch) for call in program.actions((launch,)) if isinstance(call, Call)]
    return rows


def estimate(name: str, call: Call, arch: Arch) -> dict[str, object]:
    """The matrix product of a launch, and the least time for its operations and its bytes (each tensor once)."""
    a = call.arguments
    m, n = a["N"] * a["H"] * a["W"], a["CO"]
    if "TAPS" in a:
        k = a["TAPS"] * a["CA"]
    else:
        k = sum(a[f"TAPS{i}"] * a[f"C{i}"] for i in range(4) if a[f"a{i}"] is not None)
    tensors = [getattr(v, "base", v) for key, v in a.items() if key not in ("residual", "control")]
    moved = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
    flops = 2 * m * n * k
    rates = DATASHEETS.get(arch.name, {})
    return {
        "launch": name,
        "m": m,
        "n": n,
        "k": k,
        "flops": flops,
        "bytes": moved,
        "intensity": flops / moved,
        "tile": [a["TN"] * a["TH"] * a["TW"], a["BN"], a["BK"]] if k else [a["TN"] * a["TH"] * a["TW"], a["BN"]],
        "box": [a["TN"], a["TH"], a["TW"]],
        "warps": call.warps,
        "programs": math.prod(call.programs),
        "rounds": math.ceil(math.prod(call.programs) / arch.processors),
        "microseconds": {device: 1e6 * max(flops / rate, moved / memory) for device, (rate, memory) in rates.items()},
    }


def sweep_table(rows: Rows) -> str:
    """For people."""
    left = f"{'launch':10s}{'M':>8s}{'N':>6s}{'K':>7s}{'GFLOP':>9s}{'MB':>8s}{'FLOP/B':>8s}  "
    right = f"{'tile':14s}{'warps':>6s}{'programs':>10s}{'rounds':>8s}"
    devices: list[str] = list(rows[0]["microseconds"])  # type: ignore[call-overload]
    lines = [left + right + "".join(f"{device + ' us':>10s}" for device in devices)]
    for r in rows:
        left = f"{r['launch']:10s}{r['m']:8d}{r['n']:6d}{r['k']:7d}{work(r['flops'], r['bytes'])}"
        right = f"{'x'.join(map(str, r['tile'])):14s}{r['warps']:6d}{r['programs']:10d}{r['rounds']:8d}"  # type: ignore[call-overload]
        lines.append(left + right + "".join(f"{us:10.1f}" for us in r["microseconds"].values()))  # type: ignore[attr-defined]
    flops, moved = (sum(row[key] for row in rows) for key in ("flops", "bytes"))  # type: ignore[misc]
    total = [sum(row["microseconds"][device] for row in rows) for device in devices]  # type: ignore[index,misc]
    lines.append(f"{'sum':31s}{work(flops, moved)}{'':38s}" + "".join(f"{us:10.1f}" for us in total))
    return "\n".join(lines)


def work(flops: object, moved: object) -> str:
    assert isinstance(flops, int)
    assert isinstance(moved, int)
    return f"{flops / 1e9:9.2f}{moved / 1e6:8.1f}{flops / moved:8.0f}  "


if __name__ == "__main__":
    sys.exit(main())
