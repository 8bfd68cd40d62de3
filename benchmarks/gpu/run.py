"""``python -m benchmarks.gpu``: what to run first where there is a GPU; one command, at most eight minutes.

The tests with marker ``gpu``, compute-sanitizer on the small ones, then the figures: matmul and copy rates, every layer
of VGG-11, whole relaxations and training batches against their baselines, and gradient cosines of every precision.
Each section runs in a process of its own with a share of the time. Every row is in ``rows.jsonl`` as soon as it exists;
``results.json`` and ``results.md`` are written again after every section.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import commands, report
from benchmarks.gpu.problem import SECTIONS, WGMMA, Options, wgmma_runs
from benchmarks.gpu.rows import BROKEN, Job, close_started, read
from benchmarks.machine import cpu_name, revision
from ep_kernels import _library

ROOT = Path(__file__).resolve().parents[2]
SHARES = {"tests": 120, "sanitizer": 90, "rates": 15, "layers": 115, "relaxation": 65, "batch": 75, "cosine": 40}
WARM_LIMIT = 170.0  # seconds that compiling in the background may take before the first figures
WGMMA_SECTIONS = ("layers", "relaxation", "batch")
WGMMA_SHARE = 0.15  # of their time
GRACE = 5.0  # seconds after a section's deadline, then its process is stopped


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results (default: $OUT, or one in benchmarks/results)")
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 256], help="images (default 128 256)")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything (default 8)")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, no compiling ahead of time")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--model", default="vgg11", help="network (default vgg11)")
    parser.add_argument("--size", type=int, default=32, help="side of its images (default 32)")
    parser.add_argument("--dry-run", action="store_true", help="list what would run")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu tries this command with TRITON_INTERPRET=1 on tiny networks; its figures mean nothing",
    )  # fmt: skip
    args = parser.parse_args(argv)
    args.sections = [name for name in args.sections.split(",") if name]
    unknown = [name for name in args.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"argument --sections: expected some of {','.join(SECTIONS)}, got {','.join(unknown)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if str(ROOT / "python") not in sys.path:
        sys.path.append(str(ROOT / "python"))  # a checkout that is not installed
    if args.dry_run:
        print(dry_run(args))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and torch sees none here; --dry-run lists what it would run",
              file=sys.stderr)  # fmt: skip
        return 2
    error = _library.load_error()
    if args.device == "cuda" and error is not None:  # the checkout's package hides an installed one
        print(f"benchmarks.gpu needs the compiled library in this checkout: {error}", file=sys.stderr)
        return 2
    out = folder(args)
    out.mkdir(parents=True, exist_ok=True)
    (out / "rows.jsonl").write_text("")
    run = Run(args, out, " ".join(sys.argv[1:] if argv is None else argv))
    run.everything()
    print(run.summary())
    return 0


def folder(args: argparse.Namespace) -> Path:
    """Where the results go."""
    if args.out is not None:
        return Path(args.out)
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    today = datetime.date.today().isoformat()
    return ROOT / "benchmarks" / "results" / f"gpu-{today}-{re.sub('[^A-Za-z0-9]+', '-', name).strip('-').lower()}"


def options_of(args: argparse.Namespace, section: str, out: Path, deadline: float) -> Options:
    return Options(
        section, str(out), deadline, tuple(args.batch), args.device, args.model, args.size, args.quick, args.only
    )


def jobs_of(options: Options) -> list[Job]:
    """The jobs of a section (imported late: ep_train may be importable through the checkout only)."""
    from benchmarks.gpu.section import jobs_of as jobs

    return jobs(options)


def dry_run(args: argparse.Namespace) -> str:
    """Sections, and the rows of each."""
    lines = [f"network {args.model}, images 3x{args.size}x{args.size}, batches {args.batch}, {args.minutes:g} minutes"]
    for section in args.sections:
        lines += ["", f"{section} (about {SHARES[section]} s)"]
        if section == "tests":
            lines += ["  " + " ".join(commands.tests_command(commands.workers(), name)) for name in ("cuda", "triton")]
        elif section == "sanitizer":
            lines += ["  " + " ".join(commands.sanitizer_command(*run)) for run in commands.sanitizer_runs()]
        else:
            jobs = jobs_of(options_of(args, section, Path(), 0.0))
            lines += [f"  {job.key}" for job in jobs if args.only in job.key]
    return "\n".join(lines)


class Run:
    """One run of the command: the sections in turn, each within what is left of its share."""

    def __init__(self, args: argparse.Namespace, out: Path, command: str) -> None:
        self.args, self.out = args, out
        self.began = time.time()
        self.deadline = self.began + 60 * args.minutes
        self.notes: dict[str, str] = {}
        self.environment = environment(args.device, command)

    def everything(self) -> None:
        with ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 2) // 2)) as pool:
            warm = [] if self.args.quick or self.args.device == "cpu" else self.start_warming(pool)
            for number, section in enumerate(self.args.sections):
                if warm and section not in ("tests", "sanitizer"):
                    self.finish_warming(warm)
                    warm = []
                self.section(section, self.args.sections[number:])
                self.write()
            self.finish_warming(warm)
        self.write()

    def section(self, section: str, later: Sequence[str]) -> None:
        """One section; ``later`` is it and what comes after it."""
        left = self.deadline - time.time()
        seconds = left * SHARES[section] / sum(SHARES[name] for name in later)
        if seconds < 3:
            self.notes[section] = "skipped: the time was over"
            return
        began = time.time()
        try:
            if section == "tests":
                commands.run_tests(self.out, seconds)
            elif section == "sanitizer":
                commands.run_sanitizer(self.out, seconds)
            else:
                wgmma = section in WGMMA_SECTIONS and wgmma_runs(self.args.device)
                self.in_process(section, (1 - WGMMA_SHARE) * seconds if wgmma else seconds)
                if wgmma:
                    self.in_process(section, WGMMA_SHARE * seconds, wgmma=True)
        except Exception as error:  # whatever it is, the other sections go on
            self.notes[section] = f"{type(error).__name__}: {error}"
        print(f"{section}: {time.time() - began:.0f} s of {seconds:.0f} s", flush=True)

    def in_process(self, section: str, seconds: float, *, wgmma: bool = False) -> None:
        """Run a section's jobs in a child, again after one that broke it; with ``wgmma`` the rows that need it."""
        deadline = time.time() + seconds
        options = options_of(self.args, section, self.out, deadline)
        if wgmma:
            options = replace(options, backends=(WGMMA,))
        extra = {"EP_KERNELS_WGMMA": "1" if wgmma else "0"}
        command = [sys.executable, "-m", "benchmarks.gpu.section", options.json()]
        for _ in range(6):
            left = deadline - time.time()
            if left < 3:
                break
            code, _ = commands.run(command, self.out / "log.txt", left + GRACE, extra)
            if code is None:
                close_started(options.rows, section, "stopped: the section's time was over")
            elif code != 0:
                close_started(options.rows, section, f"the process ended with exit code {code}")
            if code is not None and 0 <= code != BROKEN:
                if code == 1:
                    self.notes[section] = "the section did not run: see log.txt"
                break

    # --- compiling ahead ----------------------------------------------------------------------------------------------

    def start_warming(self, pool: ThreadPoolExecutor) -> list[Future[object]]:
        """Compile what the timed sections launch, beside the tests, in several processes."""
        self.warm_until = time.time() + WARM_LIMIT
        options = options_of(self.args, "warm", self.out, self.warm_until)
        futures: list[Future[object]] = []
        for job in jobs_of(options):
            of_cosine = job.key.startswith("cosine")
            if of_cosine and "cosine" not in self.args.sections:
                continue
            if not of_cosine and not {"layers", "relaxation", "batch"} & set(self.args.sections):
                continue
            text = replace(options, only=job.key).json()
            futures.append(pool.submit(self._warm, [sys.executable, "-m", "benchmarks.gpu.section", text]))
        return futures

    def _warm(self, command: list[str]) -> None:
        left = self.warm_until - time.time()
        if left > 5:
            commands.run(command, self.out / "warm.log", left)

    def finish_warming(self, futures: Sequence[Future[object]]) -> None:
        """Figures are taken on a device that does nothing else."""
        for future in futures:
            future.result()
        if futures:
            self.notes["compiled ahead"] = f"until {time.time() - self.began:.0f} s after the start"

    # --- results ------------------------------------------------------------------------------------------------------

    def result(self) -> dict[str, Any]:
        rows = [row for row in read(self.out / "rows.jsonl") if row["section"] != "warm"]
        return {
            "environment": {**self.environment, "clocks after": clocks()},
            "seconds": time.time() - self.began,
            "notes": self.notes,
            "targets": report.targets(rows),
            "rows": rows,
        }

    def write(self) -> None:
        result = self.result()
        (self.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
        try:
            (self.out / "results.md").write_text(report.markdown(result))
        except Exception as error:  # figures are in the JSON; a table is no reason to lose the rest
            self.notes["results.md"] = f"{type(error).__name__}: {error}"

    def summary(self) -> str:
        """What to read first."""
        result = self.result()
        lines = [f"{result['seconds']:.0f} s; results in {self.out}"]
        for row in result["rows"]:
            if row["section"] in ("tests", "sanitizer"):
                lines.append(f"{row['key']}: {row['status']} {row.get('counts', '')} {row.get('reason', '')}".rstrip())
            elif row["section"] == "rates" and row["status"] == "ok":
                rate = f"{row['tflops']:.1f} TFLOP/s" if "tflops" in row else f"{row['tb_per_s']:.2f} TB/s"
                lines.append(f"{row['key']}: {rate}")
        bad = [row for row in result["rows"] if row["status"] in ("failed", "wrong") and row["section"] in SECTIONS[2:]]
        lines += [f"{row['section']}: {row['key']}: {row['status']}: {row.get('reason', '')}" for row in bad[:30]]
        skipped = sum(row["status"] == "skipped" for row in result["rows"])
        lines.append(f"{len(result['rows'])} rows, {len(bad)} failed, {skipped} skipped")
        lines += [f"{name}: {note}" for name, note in self.notes.items()]
        lines += report.targets_table(result["targets"])
        return "\n".join(lines)


def environment(device: str, command: str) -> dict[str, str]:
    """Where this was measured."""
    import ep_kernels
    from ep_kernels import _library, backends

    found = {
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": f"python -m benchmarks.gpu {command}".strip(),
        "ep_kernels": f"{ep_kernels.__version__}, revision {revision()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "cuda": backends.status()["cuda"] or str(_library.build_info().get("summary", "yes")),
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        "CPU": f"{cpu_name()}, {os.cpu_count()} cores",
    }
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        found["GPU"] = (
            f"{p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors, "
            f"{p.total_memory / 2**30:.0f} GiB, L2 cache {p.L2_cache_size / 2**20:.0f} MiB"
        )
        found["driver"] = query("driver_version")
        found["clocks before"] = clocks()
    return found


def triton_version() -> str:
    """Of the installed package."""
    try:
        import triton
    except ImportError as error:
        return f"none ({error})"
    return str(triton.__version__)


def clocks() -> str:
    """As they are: SM and memory clock with their maxima, power, temperature."""
    return query("clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.draw,power.limit,temperature.gpu")


def query(fields: str) -> str:
    """Read-only question to nvidia-smi; empty when it does not answer."""
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
