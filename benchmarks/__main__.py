"""``python -m benchmarks list | run NAME... | report | compare REV``: EP against BPTT, backprop and other EP codes.

``run cpu`` asks every question on this CPU, ``run gpu`` on the GPU; ``python -m benchmarks.gpu`` runs the tests and the
sanitizer there too.
"""

from __future__ import annotations

import argparse
import datetime
import signal
import sys
from pathlib import Path

from benchmarks.machine import ROOT, device_name, slug
from benchmarks.problem import BACKENDS, PRECISIONS
from benchmarks.registry import SUITES, named, questions
from benchmarks.runner import RunError, Runner
from benchmarks.setting import Setting

RESULTS = ROOT / "benchmarks" / "results"


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the questions and suites")
    run = commands.add_parser("run", help="ask questions, or a suite (cpu, gpu), and keep the rows")
    run.add_argument("names", nargs="+", metavar="NAME", help=f"questions, or one of {', '.join(SUITES)}")
    add_setting(run)
    run.add_argument("--json", type=Path, metavar="OUT", help="result file; default: one in benchmarks/results")
    run.add_argument("--minutes", type=float, help="time for everything (default: what it takes)")
    run.add_argument("--restart", action="store_true", help="do not go on with a run that was stopped")
    run.add_argument("--dry-run", action="store_true", help="list the cases")
    report = commands.add_parser("report", help="tables and plots from the newest results of each device")
    report.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    report.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md", help="between its markers")
    report.add_argument("--plots", type=Path, default=ROOT / "docs" / "img", help="folder of the pictures")
    report.add_argument("--print", action="store_true", help="write nothing, print the Markdown")
    compare = commands.add_parser("compare", help="what got faster or slower since a revision, beyond the spread")
    compare.add_argument("revision", metavar="REV", help="of git: a commit, tag or branch")
    compare.add_argument("names", nargs="*", metavar="NAME", help="questions (default: those of the stored results)")
    add_setting(compare)
    compare.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    compare.add_argument(
        "--run", action="store_true",
        help="ask the questions now, of REV in a worktree that is built for it and of this tree, in turn",
    )  # fmt: skip
    return top


def add_setting(command: argparse.ArgumentParser) -> None:
    """Options that become a Setting."""
    command.add_argument("--device", default="", help="cpu or cuda (default: what the suite says, else cpu)")
    command.add_argument("--model", nargs="+", default=[], help="networks by name or widths; NAME/2: half its widths")
    command.add_argument("--batch", nargs="+", type=int, default=[], help="images")
    command.add_argument("--precision", nargs="+", default=[], choices=tuple(PRECISIONS), help="of our kernels")
    command.add_argument("--backend", nargs="+", default=[], choices=BACKENDS, help="default: what can run")
    command.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    command.add_argument("--rounds", type=int, default=5, help="rounds of all competitors in turn (default 5)")
    command.add_argument("--quick", action="store_true", help="try the code in seconds; the figures mean nothing")
    command.add_argument("--only", default="", help="cases whose name contains this")


def setting_of(args: argparse.Namespace) -> Setting:
    """The setting of a command line.

    Raises:
        RunError: a GPU is asked for, and torch sees none.
    """
    import torch

    device = args.device or ("cuda" if "gpu" in args.names else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available() and not getattr(args, "dry_run", False):
        raise RunError(f"--device {device}: torch sees no CUDA device here; --dry-run lists what would run")
    for name in ("threads", "rounds"):
        if getattr(args, name) < 1:
            raise RunError(f"--{name}: expected at least 1, got {getattr(args, name)}")
    return Setting(
        device, tuple(args.model), tuple(args.batch), tuple(args.precision), tuple(args.backend), args.threads,
        args.rounds, args.quick, args.only,
    )  # fmt: skip


def result_file(setting: Setting) -> Path:
    """Default of ``--json``: one a device and day."""
    kind = "cuda" if setting.cuda else "cpu"
    return RESULTS / f"{kind}-{slug(device_name(setting.device))}-{datetime.date.today().isoformat()}.json"


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    command = "python -m benchmarks " + " ".join(sys.argv[1:] if argv is None else argv)
    try:
        return {"list": show, "run": run, "report": report, "compare": compare}[args.command](args, command)
    except (RunError, ValueError) as error:
        print(f"python -m benchmarks {args.command}: {error}", file=sys.stderr)
        return 2


def show(_args: argparse.Namespace, _command: str) -> int:
    """Names and what they ask."""
    for question in questions().values():
        print(f"{question.name:16s}{question.what}")
    print(f"\nsuites: {', '.join(SUITES)} (all of them, on that device)")
    return 0


def run(args: argparse.Namespace, command: str) -> int:
    """Ask."""
    setting, asked = setting_of(args), named(args.names)
    if args.dry_run:
        for question in asked:
            print(f"{question.name} (about {question.seconds.get('cuda' if setting.cuda else 'cpu', 30.0):.0f} s)")
            print("\n".join(f"  {case.key}" for case in question.cases(setting) if setting.only in case.key))
        return 0
    out = args.json or result_file(setting)
    runner = Runner(setting, out, command, minutes=args.minutes, restart=args.restart)
    runner.ask(asked)
    rows = runner.written
    bad = [row for row in rows if row["status"] not in ("ok", "unavailable")]
    for row in bad:
        print(f"{row['question']}: {row['case']}: {row['name']}: {row['status']}: {row.get('reason', '')}")
    for name, note in runner.notes.items():
        print(f"{name}: {note}")
    print(f"{len(rows)} rows, {len(bad)} without figures: {out}")
    return 1 if bad or runner.notes else 0


def report(args: argparse.Namespace, _command: str) -> int:
    """Tables and plots."""
    from benchmarks.report import write

    text = write(args.results, None if args.print else args.page, None if args.print else args.plots)
    print(text if args.print else f"written: {args.page}, pictures in {args.plots}")
    return 0


def compare(args: argparse.Namespace, command: str) -> int:
    """Faster and slower."""
    from benchmarks.compare import between

    print(between(args.revision, args.results, setting_of(args), named(args.names) if args.names else [], run=args.run,
                  command=command))  # fmt: skip
    return 0


def stop_by_signal(*_: object) -> None:
    """A run that is told to end ends what it started, too."""
    raise SystemExit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop_by_signal)
    sys.exit(main())
