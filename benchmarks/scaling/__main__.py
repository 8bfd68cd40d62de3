"""``python -m benchmarks.scaling --processes 1 2``: strong and weak scaling of data-parallel EP on this machine, and
what a cost model says of more processes and nodes.

Starts torchrun for each number of processes (gloo on a CPU, NCCL on GPUs), or runs under one that you start:
``torchrun --nproc-per-node 8 -m benchmarks.scaling --device cuda``. Before anything is timed, the mean gradient over
processes has to be the gradient of the whole batch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Row, short
from benchmarks.machine import environment
from benchmarks.problem import BACKENDS, BATCHES, PRECISIONS, network_of
from benchmarks.runner import RunError, load, run, save
from benchmarks.scaling.measure import Job, Worker
from benchmarks.scaling.model import GIGA, MICRO
from benchmarks.scaling.report import QUESTION, Links, Measured, lines, measured_rows, predicted_rows
from ep_kernels import backends

TAIL = 30  # lines of a run that failed


class Died(RunError):
    """A run whose processes did not all end well."""


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    add = top.add_argument
    add("--processes", nargs="+", type=int, default=[], help="start torchrun for each number (default: 1 2 ...)")
    add("--model", default="", help="name or widths; NAME/2: half its widths (default laborieux/2; on a GPU vgg11)")
    add("--batch", type=int, default=0, help="images a process, in strong scaling of all (default 32; on a GPU 256)")
    add("--global-batch", type=int, default=0, help="of the predictions of strong scaling (default 16 batches)")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--precision", default="", choices=tuple(PRECISIONS), help="default fp32; on a GPU fp16")
    add("--backend", default=None, choices=BACKENDS, help="of our kernels (default: the fastest that can run)")
    add("--setting", default=next(iter(BATCHES)), choices=tuple(BATCHES), help="sweeps and estimator")
    add("--steps", type=int, default=0, help="timed steps (default 10)")
    add("--warmup", type=int, default=2, help="steps before those (default 2)")
    add("--threads", type=int, default=0, help="of a process (default: cores / processes)")
    add("--bucket", type=float, default=25.0, help="MiB of gradients that travel together (default 25)")
    add("--tolerance", type=float, default=1e-5, help="relative error of the mean gradient in float32 (default 1e-5)")
    add("--gpus-per-node", type=int, default=8, help="of the predictions for GPUs (default 8)")
    add("--node-bandwidth", type=float, help="GB/s a process inside a node (default: measured, or 70 %% of NVLink 4)")
    add("--node-latency", type=float, help="us a message inside a node (default: the same)")
    add("--network-bandwidth", type=float, help="GB/s a direction and process between nodes (default: 70 %% of NDR "
        "InfiniBand; between CPUs 10 Gb/s Ethernet)")  # fmt: skip
    add("--network-latency", type=float, help="us a message between nodes")
    add("--minutes", type=float, default=10.0, help="that one torchrun may take (default 10)")
    add("--json", type=Path, metavar="OUT", help="write the rows here; of other cases in it the rows stay")
    add("--quick", action="store_true", help="try the code in seconds; the figures mean nothing")
    add("--measured", type=Path, help=argparse.SUPPRESS)  # a child's result, for the process that reports
    return top


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def asked(args: argparse.Namespace) -> list[int]:
    """Numbers of processes of the runs."""
    if under_torchrun():
        return [int(os.environ["WORLD_SIZE"])]
    if args.processes:
        return sorted(set(args.processes))
    most = torch.cuda.device_count() if args.device == "cuda" else min(cores(), 2)
    return [n for n in (1, 2, 4, 8) if n <= most]


def check(args: argparse.Namespace) -> None:
    """Raise RunError for options that cannot run here, before anything starts."""
    if under_torchrun() and args.processes:
        raise RunError("--processes: expected none under torchrun, whose --nproc-per-node says it")
    for name in ("steps", "batch", "global_batch", "threads", "warmup"):
        if getattr(args, name) < 0:
            raise RunError(f"--{name.replace('_', '-')}: expected at least 0, got {getattr(args, name)}")
    for name in ("bucket", "gpus_per_node", "node_bandwidth", "network_bandwidth", "minutes"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise RunError(f"--{name.replace('_', '-')}: expected more than 0, got {value:g}")
    for name in ("node_latency", "network_latency", "tolerance"):
        value = getattr(args, name)
        if value is not None and not value >= 0:
            raise RunError(f"--{name.replace('_', '-')}: expected at least 0, got {value:g}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: torch sees no CUDA device here")
    what, most = ("CUDA devices", torch.cuda.device_count()) if args.device == "cuda" else ("cores", cores())
    local = [int(os.environ["LOCAL_WORLD_SIZE"])] if under_torchrun() else asked(args)
    for n in local:
        if not 1 <= n <= most:
            raise RunError(f"--processes: expected 1 to {most} ({what} here), got {n}")
    if args.json:
        load(args.json)  # RunError: another kind of file
    job = job_of(args, 1)
    network_of(job.model, job.size)  # ValueError: an unknown name
    for n in asked(args):
        if job.batch < 4 or job.batch % n:
            raise RunError(f"--batch: expected at least 4, and a multiple of {n} (processes), got {job.batch}")
    reason = backends.why_not(job.backend, torch.device(job.device), torch.float32) if job.backend else None
    if reason is not None:
        raise RunError(f"--backend {job.backend}: {reason}")


def job_of(args: argparse.Namespace, local: int) -> Job:
    """What each of ``local`` processes on this machine does."""
    cuda = args.device == "cuda"
    return Job(
        model=args.model or ("3p-4" if args.quick else "vgg11" if cuda else "laborieux/2"),
        batch=args.batch or (4 if args.quick else 256 if cuda else 32),
        size=8 if args.quick else 32,
        device=args.device,
        precision=args.precision or ("fp16" if cuda else "fp32"),
        backend=args.backend,
        setting=args.setting,
        steps=args.steps or (3 if args.quick else 10),
        warmup=min(args.warmup, 1) if args.quick else args.warmup,
        bucket=round(args.bucket * 2**20),
        tolerance=args.tolerance,
        threads=args.threads or max(1, cores() // local),
        quick=args.quick,
    )


def work(job: Job) -> Measured | None:
    """In a process of torchrun: what was measured, in the first one of them."""
    with Worker(job) as worker:
        found = worker.measure()
        return found if worker.rank == 0 else None


def launch(processes: int, arguments: Sequence[str], *, seconds: float, threads: int = 1) -> None:
    """``torchrun --standalone`` (a free port of its own) with ``arguments``: a module and its options, or a script.

    Raises:
        Died: a process died or the time was over, with the end of what they printed; none is left behind.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        code = run([*command, *arguments], log, seconds, {"OMP_NUM_THREADS": str(threads)})
        if code == 0:
            return
        printed = log.read_text(errors="replace").splitlines()
    own = [line for line in printed if line.startswith("rank ")]
    why = f"stopped after {seconds:.0f} s" if code is None else f"ended with exit code {code}"
    end = "\n".join(own or printed[-TAIL:])
    raise Died(f"the run with {processes} processes {why}:\n{end}")


def measured(args: argparse.Namespace, argv: Sequence[str]) -> list[Measured]:
    """A torchrun for each number of processes."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for n in asked(args):
            job, out = job_of(args, n), Path(folder) / f"{n}.json"
            on = job.processes_of({"processes": n, "threads": job.threads})
            print(f"{on}: {job.model}, batch {job.batch}, {job.steps} steps", flush=True)
            options = [*without_processes(argv), "--measured", str(out)]
            launch(n, ["-m", "benchmarks.scaling", *options], seconds=60 * args.minutes, threads=job.threads)
            found.append(json.loads(out.read_text()))
    return found


def without_processes(argv: Sequence[str]) -> list[str]:
    """The options of a child: all but ``--processes N ...`` and ``--json OUT``."""
    kept, skip = [], False
    for word in argv:
        if word.startswith("--"):
            skip = word.split("=")[0] in ("--processes", "--json")
        if not skip:
            kept.append(word)
    return kept


def scaled(value: float | None, unit: float) -> float | None:
    """In SI units."""
    return None if value is None else value * unit


def report(args: argparse.Namespace, runs: Sequence[Measured], command: str) -> None:
    """Print the tables; write the rows."""
    job = job_of(args, 1)
    rows: list[Row] = []
    for found in runs:
        about = environment(job.device, found["threads"], command)
        rows += [{"question": QUESTION, **row, "environment": about} for row in measured_rows(job, found)]
    links = Links(
        scaled(args.node_bandwidth, GIGA),
        scaled(args.node_latency, MICRO),
        scaled(args.network_bandwidth, GIGA),
        scaled(args.network_latency, MICRO),
        args.gpus_per_node,
    )
    more, notes = predicted_rows(job, runs, links, args.global_batch or 16 * job.batch)
    about = environment(job.device, min(runs, key=lambda r: r["processes"])["threads"], command)
    more.append({"case": more[0]["case"], "name": "assumptions", "status": "ok", "assumptions": notes})
    rows += [{"question": QUESTION, **row, "environment": about} for row in more]
    for found in (r for r in runs if r["processes"] > 1):
        print(f"mean gradient of {found['processes']} processes against that of the whole batch: relative error "
              f"{found['error']:.1e} in float32 (at most {job.tolerance:.0e})")  # fmt: skip
    print("\n".join(["", *lines(rows)]))
    if job.device == "cpu" and len(runs) > 1:
        print("* processes on one machine share its memory bandwidth: the first prediction reckons with the "
              "computation of one process alone, the second with that of all at once")  # fmt: skip
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        new = {(row["question"], row["case"]) for row in rows}
        save(args.json, [*(r for r in load(args.json) if (r["question"], r["case"]) not in new), *rows])
        print(f"{len(rows)} rows: {args.json}")


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(given)
    command = "python -m benchmarks.scaling " + " ".join(given)
    try:
        check(args)
        if not under_torchrun():
            report(args, measured(args, given), command)
            return 0
    except (RunError, ValueError) as error:
        print(f"python -m benchmarks.scaling: {error}", file=sys.stderr)
        return 1 if isinstance(error, Died) else 2
    return child(args, command)


def child(args: argparse.Namespace, command: str) -> int:
    """Under torchrun. A process that fails says who and why, and torchrun ends the others."""
    try:
        found: Any = work(job_of(args, int(os.environ["LOCAL_WORLD_SIZE"])))
    except Exception as error:
        print(f"rank {os.environ['RANK']}: {short(error)}", file=sys.stderr, flush=True)
        return 1
    if found is not None and args.measured:
        args.measured.write_text(json.dumps(found))
    elif found is not None:
        report(args, [found], command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
