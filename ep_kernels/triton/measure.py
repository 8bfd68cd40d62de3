"""Measures tiles: launches of one problem on random operands, once with every tile of the table that fits it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .arch import Arch
from .launch import MAX, NONE, STATES, Addend, Call, Dynamics, Loop, contrast_calls, drive_call, drive_loop, step_call
from .tiling import Problem, Tile, _estimated, candidates

Launch = Callable[[], None]
Timer = Callable[[Launch], float]

TOLERANCE = 5e-3  # relative L2 error to the first tile's result: sums in another order, stored in float16
MARGIN = 0.02  # a tile must be this much faster than the table's choice to replace it: less is noise
GRAPH_SECONDS = 2e-3  # length of one timed graph
ROUNDS = 9
PRECISIONS: dict[str, tuple[torch.dtype, str]] = {  # operands, and PRODUCTS in the kernels
    "float16": (torch.float16, "ieee"),
    "bfloat16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "float32": (torch.float32, "ieee"),
}


class Bench(Protocol):
    """Operands of one problem: ``launch`` binds them with a tile, ``outputs`` are the tensors that it writes."""

    @property
    def outputs(self) -> Sequence[Tensor]: ...

    def launch(self, tile: Tile) -> Launch: ...


@dataclass(frozen=True)
class Candidate:
    """One tile: its time in seconds, or why it has none."""

    tile: Tile
    seconds: float | None
    error: str | None = None


@dataclass(frozen=True)
class Measured:
    """Every candidate of a problem.

    Attributes:
        estimated: the table's choice without measurements.
        winner: the fastest correct tile (``estimated``, unless another is faster by MARGIN); None when none ran.
    """

    problem: Problem
    candidates: tuple[Candidate, ...]
    estimated: Tile
    winner: Candidate | None

    @property
    def gain(self) -> float | None:
        """Time of the table's choice over the winner's; None when one of them did not run."""
        before = next((c.seconds for c in self.candidates if c.tile == self.estimated), None)
        after = self.winner.seconds if self.winner else None
        return before / after if before is not None and after is not None else None


def measure(problem: Problem, arch: Arch, bench: Bench, timer: Timer) -> Measured:
    """Run and time every candidate; one that raises, or disagrees with the first that ran, is rejected and says why.

    Raises:
        RuntimeError: the device is lost after a candidate's error; later ones could not run.
    """
    found: list[Candidate] = []
    expected: list[Tensor] | None = None
    for tile in candidates(problem, arch):
        for output in bench.outputs:
            output.fill_(math.nan if output.is_floating_point() else 0)
        try:
            launch = bench.launch(tile)
            launch()
            off = _error(bench.outputs, bench.outputs if expected is None else expected)
            if not off <= TOLERANCE:  # NaN: something was left unwritten
                found.append(Candidate(tile, None, f"wrong: relative error {off:.1e} to the first tile's result"))
                continue
            if expected is None:
                expected = [output.clone() for output in bench.outputs]
            found.append(Candidate(tile, timer(launch)))
        except Exception as error:  # of any kind: the compiler's, the driver's, out of memory
            _check_alive(bench.outputs[0].device, error)
            found.append(Candidate(tile, None, _first_line(error)))
    estimated = _estimated(problem, arch)
    return Measured(problem, tuple(found), estimated, _winner(found, estimated))


def _winner(found: Sequence[Candidate], estimated: Tile) -> Candidate | None:
    timed = [(c.seconds, i) for i, c in enumerate(found) if c.seconds is not None]
    if not timed:
        return None
    fastest, at = min(timed)
    safe = next((c for c in found if c.tile == estimated), None)
    if safe is not None and safe.seconds is not None and safe.seconds <= (1 + MARGIN) * fastest:
        return safe
    return found[at]


def _error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest relative L2 error; NaN if any is."""
    norm = torch.linalg.vector_norm
    errors = []
    for got, want in zip(outputs, expected, strict=True):
        off, scale = norm(got.float() - want).item(), norm(want, dtype=torch.float32).item()
        errors.append(off / (scale or 1.0))
    return math.nan if any(math.isnan(e) for e in errors) else max(errors)


def _check_alive(device: torch.device, error: Exception) -> None:
    """An illegal access ends the CUDA context: say so, instead of rejecting all that follows."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        raise RuntimeError(f"the device is lost: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def cuda_timer(launch: Launch) -> float:
    """Seconds of one launch: median over replays of a CUDA graph that holds several, after a warm-up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch()
        once = _seconds(launch)  # with the cost of launching from Python: an upper bound
        count = max(1, min(200, math.ceil(GRAPH_SECONDS / max(once, 1e-6))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(count):
                launch()
        for _ in range(3):
            graph.replay()
        rounds = [_seconds(graph.replay) for _ in range(ROUNDS)]
    torch.cuda.current_stream().wait_stream(stream)
    return statistics.median(rounds) / count


def _seconds(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


class RandomBench:
    """Random operands of a problem: one K loop of its length, 3x3 where that divides it, and a usual epilogue.

    The problem does not say how its K loops divide into taps and channels; their cost depends on it little.

    Args:
        precision: a key of PRECISIONS. storage: dtype of stored states.

    Raises:
        ValueError: operands of another size than the problem's.
    """

    def __init__(
        self, problem: Problem, arch: Arch, device: torch.device, precision: str, storage: torch.dtype = torch.float32
    ):
        self.problem, self.arch, self.device = problem, arch, device
        self.dtype, self.products = PRECISIONS[precision]
        if problem.depth == 0:
            self.dtype = torch.float32  # nothing is multiplied
        if self.dtype.itemsize != problem.element_size:
            raise ValueError(
                f"RandomBench: argument 'precision': expected operands of {problem.element_size} bytes, got {precision}"
            )
        self.generator = torch.Generator(device).manual_seed(0)
        self.control = torch.zeros(3, dtype=torch.int32, device=device)
        p = problem
        side = _side(p)
        self.kernel, self.padding = (side, side), (side // 2, side // 2)
        below = p.depth // side**2
        self.outputs: list[Tensor] = []
        self._launch: Callable[[Tile], list[Call]]
        if p.kernel == "contrast":
            self._contrast(below)
        elif p.kernel == "drive":
            self._drive(below)
        else:
            self._step(below, storage)

    def launch(self, tile: Tile) -> Launch:
        """What runs the problem with this tile."""
        calls = self._launch(tile)
        if len(calls) == 1:
            return calls[0]

        def run() -> None:
            for call in calls:
                call()

        return run

    def _step(self, below: int, storage: torch.dtype) -> None:
        p = self.problem
        shape = (p.n, p.height, p.width, p.channels)
        loops = [self._loop(below)] if p.depth else []
        new, old = self._empty(*shape, dtype=storage), self._random(*shape, dtype=storage)
        operand = self._empty(*shape, dtype=self.dtype) if storage != self.dtype else None
        residual = torch.zeros(1, p.n, dtype=torch.int32, device=self.device)
        bias = self._random(p.channels, dtype=torch.float32)
        finished = Addend(self._random(*shape, dtype=torch.float32), 1.0, False)
        self.outputs = [new] if operand is None else [new, operand]

        def launch(tile: Tile) -> list[Call]:
            call = step_call(
                self.arch,
                self.products,
                Dynamics(STATES, 1.0, 1.0, 0.0, 1.0),
                loops,
                [finished],
                channels=p.channels,
                phases=1,
                new=new,
                residual=residual,
                control=self.control,
                old=old,
                operand=operand,
                bias=bias,
                tile=tile,
            )
            return [call]

        self._launch = launch

    def _drive(self, below: int) -> None:
        p = self.problem
        h, w = (p.height // 2, p.width // 2) if p.pooled else (p.height, p.width)
        loop = self._loop(below)
        out = self._empty(p.n, h, w, p.channels, dtype=torch.float32)
        winners = self._empty(p.n, h, w, p.channels, dtype=torch.uint8) if p.pooled else None
        self.outputs = [out]  # winners of near ties depend on the order of the sum

        def launch(tile: Tile) -> list[Call]:
            call = drive_call(
                self.arch,
                self.products,
                loop,
                size=(p.height, p.width),
                pool=MAX if p.pooled else NONE,
                phases=1,
                drive=out,
                control=self.control,
                winners_out=winners,
                tile=tile,
            )
            return [call]

        self._launch = launch

    def _contrast(self, below: int) -> None:
        p = self.problem
        diff_above, mean_above, diff_below, mean_below = (
            self._random(p.n, p.height, p.width, c, dtype=self.dtype) for c in (p.channels, p.channels, below, below)
        )
        out = self._empty(p.channels, self.kernel[0] * self.kernel[1], below, dtype=torch.float32)
        self.outputs = [out]

        def launch(tile: Tile) -> list[Call]:
            return contrast_calls(
                self.arch, self.products, diff_above, mean_below, mean_above, diff_below, self.kernel, self.padding,
                1.0, 1.0, out, tile,
            )  # fmt: skip

        self._launch = launch

    def _loop(self, below: int) -> Loop:
        p = self.problem
        source = self._random(p.n, p.height, p.width, below, dtype=self.dtype)
        matrix = self._random(p.channels, p.depth, dtype=self.dtype, scale=p.depth**-0.5)
        return drive_loop(source, matrix, self.kernel, self.padding)

    def _random(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        made = torch.randn(shape, dtype=dtype, device=self.device, generator=self.generator)
        return made if scale == 1.0 else made.mul_(scale)

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


def _side(problem: Problem) -> int:
    """Side of the convolution that stands for the problem's K loops; channels come in multiples of 16."""
    if problem.height * problem.width == 1:
        return 1
    return next((k for k in (3, 5, 7) if problem.depth % (16 * k * k) == 0), 1)
