"""Which tile a launch uses: one table per architecture, a choice by shape, and what ``ep-kernels tune`` measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from .arch import Arch

Kernel = Literal["step", "drive", "contrast"]


@dataclass(frozen=True)
class Tile:
    """Of a launch. For ``step`` and ``drive``: positions x channels of the output, ``depth`` input channels a step of
    the K loop. For ``contrast``: output x input channels of the gradient, ``depth`` positions.

    ``warps`` and ``stages`` are Triton's num_warps and num_stages; ``slice`` is the number of channels that the
    epilogue handles at a time (fewer need fewer registers).
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    slice: int = 16


def _tiles(*rows: tuple[int, ...]) -> tuple[Tile, ...]:
    return tuple(Tile(*row) for row in rows)


# By architecture and bytes of an operand. Every entry is compiled in the tests for its architecture and must not spill
# (python -m benchmarks.aot prints registers and shared memory). Order: largest first.
TABLE: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("sm_80", 2): _tiles(
        (128, 128, 32, 8, 4), (128, 64, 32, 4, 4), (64, 128, 32, 4, 4), (64, 64, 64, 4, 3), (64, 32, 32, 4, 4),
        (32, 32, 64, 2, 3),
    ),
    ("sm_80", 4): _tiles((128, 64, 32, 8, 3), (64, 64, 32, 4, 3), (64, 32, 32, 4, 3), (32, 32, 32, 2, 3)),
    ("sm_86", 2): _tiles(
        (128, 128, 32, 8, 3), (128, 64, 32, 4, 3), (64, 64, 64, 4, 3), (64, 32, 64, 4, 3), (32, 32, 64, 2, 3)
    ),
    ("sm_86", 4): _tiles((128, 64, 32, 8, 2), (64, 64, 32, 4, 3), (64, 32, 32, 4, 3), (32, 32, 32, 2, 3)),
    ("sm_90", 2): _tiles(
        (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4),
        (64, 64, 64, 4, 4), (32, 64, 64, 4, 4),
    ),
    ("sm_90", 4): _tiles((128, 128, 32, 8, 4), (128, 64, 32, 4, 4), (64, 64, 32, 4, 4), (32, 64, 32, 4, 4)),
    ("sm_100", 2): _tiles(
        (128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 64, 64, 4, 4), (64, 64, 64, 4, 4), (32, 64, 64, 4, 4)
    ),
    ("sm_100", 4): _tiles((128, 128, 32, 8, 4), (128, 64, 32, 8, 4), (64, 64, 32, 4, 4), (32, 64, 32, 4, 4)),
    ("sm_120", 2): _tiles((128, 128, 32, 8, 3), (128, 64, 32, 4, 3), (64, 64, 64, 4, 3), (64, 32, 64, 4, 3)),
    ("sm_120", 4): _tiles((128, 64, 32, 8, 2), (64, 64, 32, 4, 3), (64, 32, 32, 4, 3)),
    ("interpreter", 2): _tiles((64, 32, 32, 4, 1), (32, 16, 16, 4, 1)),
    ("interpreter", 4): _tiles((64, 32, 32, 4, 1), (32, 16, 16, 4, 1)),
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Shape of a launch, all that the choice depends on: the output map [n, height, width, channels] and the summed
    length of its K loops. For ``contrast``: n, height, width of the positions, channels = C_dst, depth = taps C_src."""

    kernel: Kernel
    n: int
    height: int
    width: int
    channels: int
    depth: int
    element_size: int
    pooled: bool = False
    products: str = "ieee"  # of float32 operands: on tensor cores if "tf32"


Box = tuple[int, int, int]


@lru_cache(maxsize=4096)
def box_of(positions: int, n: int, height: int, width: int, pooled: bool = False) -> Box:
    """TN x TH x TW = ``positions`` with the fewest positions outside the map; several samples where maps are small."""
    least = 2 if pooled else 1
    best: tuple[tuple[int, int], Box] | None = None
    tw = least
    while tw <= min(positions // least, max(least, _power_of_two(width))):
        th = least
        while th * tw <= positions and th <= max(least, _power_of_two(height)):
            tn = positions // (th * tw)
            padded = _up(n, tn) * _up(height, th) * _up(width, tw)
            halo = (th + 2) * (tw + 2) * tn  # positions that a 3x3 kernel reads
            if tn <= 256 and (best is None or (padded, halo) < best[0]):
                best = ((padded, halo), (tn, th, tw))
            th *= 2
        tw *= 2
    assert best is not None
    return best[1]


def flat_box(positions: int, height: int, width: int) -> Box | None:
    """A box whose positions are a run in memory, wherever it lies; None where there is none."""
    if width & (width - 1) or width > positions:
        return None
    rows = positions // width
    if height % rows == 0:
        return (1, rows, width)
    if rows % height == 0:
        return (rows // height, height, width)
    return None


def programs(problem: Problem, tile: Tile) -> int:
    """Number of programs of a ``step`` or ``drive`` launch (one sign of the nudge at a time: see place in tiles.py)."""
    tn, th, tw = box_of(tile.rows, problem.n, problem.height, problem.width, problem.pooled)
    spatial = math.ceil(problem.n / tn) * math.ceil(problem.height / th) * math.ceil(problem.width / tw)
    return spatial * math.ceil(problem.channels / tile.columns)


def estimate(problem: Problem, tile: Tile, arch: Arch) -> float:
    """Relative time (of launches with products): rounds of programs over the multiprocessors, times a tile's work,
    over its efficiency.

    A tile of r x c loads (r + c) operands for r c products, so small ones are limited by the L2 cache.
    """
    if problem.kernel == "contrast":
        blocks = math.ceil(problem.channels / tile.rows) * math.ceil(problem.depth / tile.columns)
        work = blocks * tile.rows * tile.columns
    else:
        rounds = math.ceil(programs(problem, tile) / arch.processors)
        work = rounds * tile.rows * tile.columns
    return work * (1 + 48 * (1 / tile.rows + 1 / tile.columns))


def choose_tile(problem: Problem, arch: Arch) -> Tile:
    """The tuned tile for this shape if there is one, else the one with the smallest estimate."""
    from .tune import tuned  # reads the user's cache once

    found = tuned(problem, arch)
    return found if found is not None else _estimated(problem, arch)


@lru_cache(maxsize=4096)
def _estimated(problem: Problem, arch: Arch) -> Tile:
    if problem.depth == 0:  # nothing to multiply: memory wants many programs
        return candidates(problem, arch)[-1]
    return min(candidates(problem, arch), key=lambda tile: estimate(problem, tile, arch))


def candidates(problem: Problem, arch: Arch) -> tuple[Tile, ...]:
    """Tiles of the table that fit the problem, largest first.

    The epilogue of a drive leaves registers for 128 accumulators a thread, that of others for 64; products without
    tensor cores hold their operands in registers too and leave room for 32.
    """
    tiles = TABLE[arch.name, problem.element_size]
    most = 128 if problem.kernel == "drive" else 64
    if problem.element_size == 4 and problem.products == "ieee":
        most = 32
    return tuple(tile for tile in tiles if tile.rows * tile.columns <= most * 32 * tile.warps)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _up(n: int, step: int) -> int:
    return -(-n // step) * step
