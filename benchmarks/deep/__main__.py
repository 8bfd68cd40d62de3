"""``python -m benchmarks.deep run TABLE... [--work DIR] [--jobs N] [--teacher SPEC] | report``."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from benchmarks.deep.measure import run
from benchmarks.deep.report import key, load, report, settings
from benchmarks.deep.tables import SEEDS, TABLES, Run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="make the runs of some tables that are not there yet")
    running.add_argument("tables", nargs="+", choices=TABLES)
    running.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each (default 2)")
    running.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    running.add_argument("--only", default="", help="only rows that contain this")
    one = commands.add_parser("one", help="make one run, in this process")
    one.add_argument("table", choices=TABLES)
    one.add_argument("name")
    reporting = commands.add_parser("report", help="tables and plots from the runs that are there")
    reporting.add_argument("--plots", type=Path, help="draw into this folder")
    for command in (running, reporting):
        command.add_argument(
            "--json", type=Path, help="file of results: those in it are not run again, report adds to it"
        )
    for command in (running, one, reporting):
        command.add_argument("--work", type=Path, default=Path("runs/deep"), help="folder of the runs")
        command.add_argument("--teacher", default="", help="teacher of the distilled runs, as ep-train takes it")
        command.add_argument("--dataset", default="", help="dataset of table cifar: folder:PATH or cifar10")
    args = parser.parse_args(argv)
    if args.command == "report":
        print(report(args.work, args.json, args.plots))
        return 0
    if args.command == "one":
        (chosen,) = (r for r in TABLES[args.table].runs(args.teacher) if r.name == args.name)
        if "dataset" not in chosen.values:
            chosen = replace(chosen, values={**chosen.values, "dataset": args.dataset})
        run(chosen, args.work / chosen.name)
        return 0
    return run_all(args)


def run_all(args: argparse.Namespace) -> int:
    """Each run in a process of its own, ``--jobs`` at a time, seed by seed; returns how many failed."""
    wanted = [r for name in args.tables for r in TABLES[name].runs(args.teacher)]
    wanted = [r for r in wanted if r.seed in args.seeds and args.only in r.row]
    wanted.sort(key=lambda r: r.seed)
    done = {key(result) for result in load(args.work, args.json)}
    missing = [r for r in wanted if (r.table, r.row, r.column, r.seed, settings(r.values)) not in done]
    print(f"{len(wanted)} runs, {len(missing)} of them missing", flush=True)

    def make(chosen: Run) -> bool:
        began = time.monotonic()
        folder = args.work / chosen.name
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.deep", "one", chosen.table, chosen.name]
        with open(folder / "log", "w") as log:
            code = subprocess.run(
                [*command, "--work", str(args.work), "--teacher", args.teacher, "--dataset", args.dataset],
                stdout=log,
                stderr=log,
                check=False,
            ).returncode
        state = "done" if code == 0 else f"FAILED ({code}), see {folder / 'log'}"
        print(f"{chosen.name}: {state} in {time.monotonic() - began:.0f} s", flush=True)
        return code == 0

    with ThreadPoolExecutor(args.jobs) as pool:
        return sum(not ok for ok in pool.map(make, missing))


if __name__ == "__main__":
    sys.exit(main())
