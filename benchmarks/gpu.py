"""``python -m benchmarks.gpu``: what to run first where there is a GPU; one command, about eight minutes.

The tests with marker ``gpu``, compute-sanitizer on the small ones, every question of the suite, and the report. Needs
no network: torch with CUDA, the library of this checkout, and pytest. Every case is on disk as soon as it ends, and the
same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.__main__ import RESULTS, add_setting, result_file, setting_of, stop_by_signal
from benchmarks.registry import Question, named
from benchmarks.runner import RunError, Runner, run
from benchmarks.setting import Setting
from ep_kernels import _library

CHECKS = ("gpu_tests", "sanitizer")
WARM_LIMIT = 170.0  # seconds that compiling in the background may take before the first figures
PAGE = "# GPU benchmark\n\n<!-- benchmarks: begin -->\n<!-- benchmarks: end -->\n"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["gpu"], metavar="NAME", help="questions (default: all)")
    add_setting(parser)
    parser.set_defaults(threads=os.cpu_count() or 2)
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results; copied to $OUT if that is set)")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything (default 8)")
    parser.add_argument("--restart", action="store_true", help="do not go on with a run that was stopped")
    parser.add_argument("--dry-run", action="store_true", help="list the cases")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.device = args.device or "cuda"
    command = "python -m benchmarks.gpu " + " ".join(sys.argv[1:] if argv is None else argv)
    try:
        setting, asked = setting_of(args), named(args.names)
        if args.dry_run:
            print(dry_run(setting, asked))
            return 0
        return everything(args, setting, asked, command.strip())
    except (RunError, ValueError) as error:
        print(f"python -m benchmarks.gpu: {error}", file=sys.stderr)
        return 2


def dry_run(setting: Setting, asked: Sequence[Question]) -> str:
    """Questions, and the cases of each."""
    lines = []
    for question in asked:
        lines += [f"{question.name} (about {question.seconds['cuda']:.0f} s)"]
        lines += [f"  {case.key}" for case in question.cases(setting) if setting.only in case.key]
    return "\n".join(lines)


def everything(args: argparse.Namespace, setting: Setting, asked: list[Question], command: str) -> int:
    """The run; returns 0 where every row has its figures."""
    error = _library.load_error()
    if setting.cuda and error is not None:  # the checkout's package hides an installed one
        raise RunError(f"the compiled library of this checkout is needed: {error}")
    out = args.out or RESULTS
    runner = Runner(setting, out / result_file(setting).name, command, minutes=args.minutes, restart=args.restart)
    with ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 2) // 2)) as pool:
        names = [question.name for question in asked]
        compiles = setting.cuda and not setting.quick
        warming = Warming(setting, names, pool, out / "warm.log") if compiles else None

        def before(question: Question) -> None:
            if warming is not None and question.name not in CHECKS:
                warming.finish()

        runner.ask(asked, before)
    given = os.environ.get("OUT")  # a machine that gives back this folder only
    if given:
        copy_into(Path(given), runner)
    report_into(Path(given) if given else out, out)
    print(summary(runner))
    return 1 if any(row["status"] in ("failed", "wrong") for row in runner.written) else 0


class Warming:
    """Compiling beside the tests, in several processes: figures are taken on a device that does nothing else."""

    def __init__(self, setting: Setting, asked: Sequence[str], pool: ThreadPoolExecutor, log: Path) -> None:
        from benchmarks.warm import names

        self.log, self.until = log, time.time() + WARM_LIMIT
        self.text = setting.json()
        self.futures: list[Future[None]] = [pool.submit(self._one, name) for name in names(setting, asked)]

    def _one(self, name: str) -> None:
        left = self.until - time.time()
        if left > 5:
            run([sys.executable, "-m", "benchmarks.warm", self.text, name], self.log, left)

    def finish(self) -> None:
        for future in self.futures:
            future.result()
        self.futures = []


def copy_into(folder: Path, runner: Runner) -> None:
    """The results and the logs; a run under way stays where the same command looks for it."""
    folder.mkdir(parents=True, exist_ok=True)
    logs = [path for path in runner.out.parent.glob("*.log") if path.stat().st_mtime >= runner.began]
    for path in (runner.out, *logs):
        if path.exists():
            shutil.copy(path, folder)


def report_into(folder: Path, results: Path) -> None:
    """Tables and pictures beside the results; figures are in the JSON, so a table is no reason to lose the rest."""
    from benchmarks.report import write

    try:
        page = folder / "report.md"
        page.write_text(PAGE)
        write(results, page, folder / "img")
    except Exception as error:
        print(f"report: {type(error).__name__}: {error}")


def summary(runner: Runner) -> str:
    """What to read first."""
    rows = runner.written
    lines = []
    for row in rows:
        if row["question"] in CHECKS:
            lines.append(f"{row['case']}: {row['status']} {row.get('counts', '')} {row.get('reason', '')}".rstrip())
        elif row["status"] in ("failed", "wrong", "skipped"):
            lines.append(f"{row['question']}: {row['case']}: {row['name']}: {row['status']}: {row.get('reason', '')}")
    lines += [f"{name}: {note}" for name, note in runner.notes.items()]
    good = sum(row["status"] == "ok" for row in rows)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return "\n".join([*lines, f"{len(rows)} rows, {good} with figures, on {device}: {runner.out}"])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop_by_signal)
    sys.exit(main())
