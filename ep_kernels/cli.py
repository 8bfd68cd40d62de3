"""The command ``ep-kernels``: ``tune`` measures on this GPU, ``info`` says what can run.

Tuning is in two parts: tiles of the Triton kernels, then races between the backends that can run (:mod:`.races`).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import backends, cache, info, races
from .architectures import ARCHITECTURES, architecture_of
from .config import ESTIMATORS, RelaxConfig
from .network import Network
from .parameters import Parameters
from .plan import SCHEDULES
from .precision import Operands
from .solver import ep_gradients, targets_for

if TYPE_CHECKING:
    from .triton.arch import Arch
    from .triton.measure import Measured
    from .triton.tiling import Problem, Tile

OPERANDS: dict[str, Operands] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "tf32": "tf32",
    "float32": None,
}
CLASSES = 10
KEY_WORDS = 4  # of a race's key: what it is, samples, phases, and form or operands
KEY_WIDTH = 50
GPUS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120")  # rows of ep_kernels/triton/tiling.py


class TuneError(Exception):
    """Tuning cannot start: what is missing."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 failed, 2 bad arguments or nothing to run on, 130 interrupted."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    if asked.command is None:
        parser.print_help()
        return 0
    if asked.command == "info":
        info.main(["--json"] if asked.json else [])
        return 0
    try:
        return tune(asked)
    except (TuneError, ValueError) as error:
        print(f"ep-kernels tune: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:
        print(f"ep-kernels tune: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ep-kernels tune: stopped by Ctrl-C; what was measured is kept", file=sys.stderr)
        return 130


def tune(asked: argparse.Namespace) -> int:
    """Measure tiles and backends, or with ``--dry-run`` list the tiles' problems; see ``ep-kernels tune --help``.

    Raises:
        TuneError, ValueError: before anything ran. OSError: the cache cannot be written. RuntimeError: the device
            is lost.
    """
    tiles = importlib.util.find_spec("triton") is not None and not asked.races_only
    if asked.dry_run and not tiles:
        why = "nothing to list with --races-only" if asked.races_only else "triton is not installed: pip install triton"
        raise TuneError(f"argument --dry-run lists tiles of the Triton kernels: {why}")
    if asked.arch is not None and not asked.dry_run:
        raise TuneError("argument --arch: only with --dry-run; tiles are measured on the GPU that is there")
    if not asked.dry_run and not torch.cuda.is_available():
        raise TuneError("torch sees no CUDA device to measure on; --dry-run lists what would be measured")
    if not asked.dry_run and os.environ.get("TRITON_INTERPRET") == "1":
        raise TuneError("TRITON_INTERPRET=1 runs the kernels in Python, where no time means anything: unset it")
    if asked.batch < 1:
        raise TuneError(f"argument --batch: expected a number >= 1, got {asked.batch}")
    network = network_of(asked.network, asked.input)
    storage = torch.float16 if asked.storage == "float16" else None
    config = RelaxConfig(
        schedule=asked.schedule, estimator=asked.estimator, operands=OPERANDS[asked.precision], storage=storage
    )
    what = f"{asked.network}, input {'x'.join(map(str, asked.input))}, batch {asked.batch}, {asked.precision} operands"
    failed = 0
    if tiles:
        from .triton.problems import training_problems

        problems = training_problems(network, config, asked.batch)
        arch = _arch(asked.arch)
        if asked.dry_run:
            _print_plan(what, problems, arch)
            return 0
        failed = _measure_all(what, problems, arch, asked)
    contenders = _contenders()
    if len(contenders) > 1:
        return _race_all(what, network, config, asked, contenders) or failed
    if not tiles:
        missing = [f"{name}: {_why_not(name)}" for name in backends.ON_GPU if name not in contenders]
        print(f"nothing to race, it takes two backends for this GPU: {'; '.join(missing)}")
    return failed


def network_of(spec: str, input_shape: Sequence[int]) -> Network:
    """A network for a name of ARCHITECTURES or a spec such as ``64p-128p-256`` (p: max pooling).

    Raises:
        ValueError: neither; or an input that it pools to nothing.
    """
    architecture = architecture_of(spec, "argument --network")
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(f"argument --input: expected three numbers >= 1 (C H W), got {list(input_shape)}")
    channels, height, width = input_shape
    widths, hidden, connections = architecture.layout((channels, height, width))
    return Network.graph((channels, height, width), widths, connections, classes=CLASSES, hidden=hidden)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ep-kernels", description="Equilibrium Propagation kernels for PyTorch.")
    commands = parser.add_subparsers(dest="command", metavar="command")
    report = commands.add_parser("info", help="what can run here, and why the rest cannot")
    report.add_argument("--json", action="store_true", help="one JSON object instead of text")
    tuning = commands.add_parser(
        "tune",
        help="measure tiles of the Triton kernels and the backends on this GPU, and keep the winners",
        description="Measures, for every kernel launch of a training batch, each tile of the architecture's table; "
        "then races the batch's relaxations and contrasts on every backend that can run on the GPU. The winners are "
        "kept in the user's cache, where the backends triton and auto find them.",
    )
    names = ", ".join(ARCHITECTURES)
    add = tuning.add_argument
    add("--network", default="vgg11", help=f"{names}, or widths as 64p-128p-256, p: 2x2 max pooling (default: vgg11)")
    add("--input", type=int, nargs=3, default=[3, 32, 32], metavar=("C", "H", "W"), help="shape (default: 3 32 32)")
    add("--batch", type=int, default=128, help="samples of a training batch; tiles hold for this number (default: 128)")
    add("--precision", choices=OPERANDS, default="float16", help="of the products' operands (default: float16)")
    add("--storage", choices=("float16", "float32"), default="float32", help="of the states (default: float32)")
    add("--schedule", choices=SCHEDULES, default=RelaxConfig.schedule, help="default: %(default)s")
    add("--estimator", choices=ESTIMATORS, default=RelaxConfig.estimator, help="default: %(default)s")
    add("--races-only", action="store_true", help="only race the backends; tiles stay as they are")
    add("--dry-run", action="store_true", help="list problems and tiles; needs no GPU")
    add("--arch", choices=GPUS, help="of --dry-run (default: this GPU's, else sm_90)")
    add("--cache", type=Path, metavar="DIR", help="write to this folder (default: the user's cache)")
    return parser


def _arch(name: str | None) -> Arch:
    from .triton.arch import KNOWN, arch_of

    if name is None and torch.cuda.is_available():
        return arch_of(torch.device("cuda", torch.cuda.current_device()))
    return next(arch for arch in KNOWN.values() if arch.name == (name or "sm_90"))


def _print_plan(what: str, problems: Sequence[Problem], arch: Arch) -> None:
    from .triton.tiling import _estimated, candidates

    print(f"{what}, on {arch.name}: {len(problems)} problems")
    for size in sorted({p.element_size for p in problems}):
        tiles = dict.fromkeys(t for p in problems if p.element_size == size for t in candidates(p, arch))
        print(f"tiles for operands of {size} bytes: {', '.join(map(_tile, tiles))}")
    for problem in problems:
        tiles = dict.fromkeys(candidates(problem, arch))
        print(f"{_problem(problem)}  {len(tiles)} tiles, the estimate takes {_tile(_estimated(problem, arch))}")


def _measure_all(what: str, problems: Sequence[Problem], arch: Arch, asked: argparse.Namespace) -> int:
    from .triton import tune as tuned
    from .triton.measure import RandomBench, cuda_timer, measure

    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    storage = torch.float16 if asked.storage == "float16" else torch.float32
    tuned.store({}, name, arch, asked.cache)  # fails now if it cannot be written
    print(f"{what}, on {name} ({arch.name}): {len(problems)} problems")
    failed = 0
    for problem in problems:
        try:
            bench = RandomBench(problem, arch, device, asked.precision, storage)
        except torch.OutOfMemoryError:
            failed += 1
            print(f"{_problem(problem)}  skipped: its operands do not fit into memory", flush=True)
            continue
        measured = measure(problem, arch, bench, cuda_timer)
        del bench
        print(_result(measured), flush=True)
        winner = measured.winner
        if winner is None or winner.seconds is None:
            failed += 1
            continue
        tuned.store({problem: (winner.tile, winner.seconds)}, name, arch, asked.cache)
    _say_where(tuned.cache_file(name, asked.cache), asked.cache)
    return 1 if failed else 0


def _say_where(file: Path, folder: Path | None) -> None:
    print(f"kept in {file}")
    if folder is not None and folder.expanduser().resolve() != cache.cache_folder().resolve():
        print(f"to use them: {cache.ENVIRONMENT}={folder}")


# --- races ------------------------------------------------------------------------------------------------------------


def _why_not(name: str) -> str | None:
    return backends.why_not(name, torch.device("cuda", torch.cuda.current_device()))


def _contenders() -> list[str]:
    names = [name for name in backends.ON_GPU if backends.status()[name] is None]
    return [name for name in names if _why_not(name) is None] if len(names) > 1 else names


def _race_all(
    what: str, network: Network, config: RelaxConfig, asked: argparse.Namespace, contenders: Sequence[str]
) -> int:
    """Every relaxation and the contrasts of a training batch, on every backend; the exit code."""
    device = torch.device("cuda", torch.cuda.current_device())
    machine = backends.machine(device)
    file = races.store({}, machine, asked.cache)  # fails now if it cannot be written
    print(f"{what}, on {machine.device}: {' against '.join(contenders)}")
    parameters, x, targets = _training_batch(network, asked.batch, device)
    with backends.recorded() as jobs:
        ep_gradients(network, parameters, x, targets, config, backend="reference")
    failed = False
    for key, job in {races.key_of(job): job for job in jobs}.items():
        runs = {name: partial(backends.run_job, job, name) for name in contenders}
        held = races.race(runs, races.event_timer)
        print(_race(key, held), flush=True)
        failed = failed or bool(held.errors)
        races.store({key: held}, machine, asked.cache)
    _say_where(file, asked.cache)
    return 1 if failed else 0


def _training_batch(network: Network, batch: int, device: torch.device) -> tuple[Parameters, Tensor, list[Tensor]]:
    """Random parameters of the size that training starts with, random images and labels."""
    generator = torch.Generator(device).manual_seed(0)
    named = {}
    for name, shape in Parameters.shapes(network).items():
        fan_in = math.prod(shape[1:])
        made = torch.randn(shape, device=device, generator=generator) * fan_in**-0.5
        named[name] = made.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else made
    x = torch.rand(batch, *network.shapes[0], device=device, generator=generator)
    labels = torch.randint(0, CLASSES, (batch,), device=device, generator=generator)
    return Parameters.from_named(network, named), x, targets_for(network, labels, CLASSES, torch.float32)


def _race(key: str, held: races.Race) -> str:
    """One line of the table: what ran, the times, the winner; below it who could not run."""
    times = "  ".join(f"{name} {1e6 * seconds:9.1f} us" for name, seconds in held.seconds.items())
    errors = "".join(f"\n    {name} did not run: {error}" for name, error in held.errors.items())
    ratio = ""
    if held.winner is not None:
        ratio = f"  {held.winner} by {max(held.seconds.values()) / min(held.seconds.values()):.2f}x"
    return f"{' '.join(key.split()[:KEY_WORDS]):<{KEY_WIDTH}}{times}{ratio}{errors}"


def _result(measured: Measured) -> str:
    rejected = [f"\n    {_tile(c.tile)} rejected: {c.error}" for c in measured.candidates if c.error is not None]
    winner = measured.winner
    if winner is None or winner.seconds is None:
        return "".join([f"{_problem(measured.problem)}  no tile ran", *rejected])
    gain = "the table's choice did not run" if measured.gain is None else f"{measured.gain:.2f}x"
    if winner.tile == measured.estimated:
        gain = "the table's choice"
    return (
        f"{_problem(measured.problem)}  {_tile(winner.tile)}  {1e6 * winner.seconds:9.1f} us  {gain}{''.join(rejected)}"
    )


def _problem(problem: Problem) -> str:
    p = problem
    shape = f"{p.n}x{p.height}x{p.width}x{p.channels}"
    return f"{p.kernel + (' pooled' if p.pooled else ''):<13}{shape:<18}K {p.depth:<6}{p.element_size} bytes"


def _tile(tile: Tile) -> str:
    """Rows x columns x depth, warps and stages; the epilogue's slice where it is not the usual one."""
    text = f"{tile.rows}x{tile.columns}x{tile.depth} w{tile.warps} s{tile.stages}"
    return text if tile == replace(tile, slice=type(tile).slice) else f"{text} e{tile.slice}"


if __name__ == "__main__":
    sys.exit(main())
