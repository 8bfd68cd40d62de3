"""Tiles: boxes of positions, the table, the choice, and how many programs a launch has. Needs no GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from ep_kernels.triton import launch, tiling
from ep_kernels.triton.arch import INTERPRETER, KNOWN, Arch, arch_of, family
from ep_kernels.triton.launch import Dynamics, contrast_calls, drive_call, drive_loop, step_call
from ep_kernels.triton.tiling import TABLE, Problem, Tile, box_of, choose_tile, estimate, flat_box, programs

POWERS = st.sampled_from([16, 32, 64, 128, 256])
SIZES = st.integers(1, 70)
ARCHS = [*KNOWN.values(), INTERPRETER]


@pytest.fixture(autouse=True)
def nothing_tuned(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("EP_KERNELS_CACHE", str(tmp_path_factory.mktemp("cache")))


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


# --- boxes --------------------------------------------------------------------------------------------------------


@given(positions=POWERS, n=st.integers(1, 300), height=SIZES, width=SIZES, pooled=st.booleans())
def test_boxes(positions: int, n: int, height: int, width: int, pooled: bool) -> None:
    """As many positions as asked for, powers of two, no side twice as long as the map, whole windows when pooled."""
    if pooled:
        height, width = 2 * height, 2 * width
    tn, th, tw = box_of(positions, n, height, width, pooled)
    assert tn * th * tw == positions
    assert all(power_of_two(d) == d for d in (tn, th, tw))
    assert th <= power_of_two(height)
    assert tw <= power_of_two(width)
    assert tn <= 256  # a side of a TMA box
    if pooled:
        assert th % 2 == tw % 2 == 0


@given(positions=POWERS, n=st.integers(1, 300), height=SIZES, width=SIZES)
def test_boxes_waste_the_fewest_positions(positions: int, n: int, height: int, width: int) -> None:
    def covered(box: tuple[int, int, int]) -> int:
        return math.prod(math.ceil(size / side) * side for size, side in zip((n, height, width), box, strict=True))

    best = box_of(positions, n, height, width)
    sides = [1 << i for i in range(9)]
    others = [(positions // (th * tw), th, tw) for th in sides for tw in sides if th * tw <= positions]
    fitting = [
        box for box in others if box[0] <= 256 and box[1] <= power_of_two(height) and box[2] <= power_of_two(width)
    ]
    assert best in fitting
    assert covered(best) == min(map(covered, fitting))


def test_boxes_of_known_maps() -> None:
    assert box_of(128, 256, 32, 32) in ((1, 8, 16), (1, 16, 8))  # the smallest halo of those that fit
    assert box_of(128, 256, 8, 8)[0] == 2  # two samples
    assert box_of(128, 256, 1, 1) == (128, 1, 1)
    assert box_of(64, 3, 2, 2, True) == (16, 2, 2)


@given(positions=POWERS, height=SIZES, width=SIZES)
def test_flat_boxes_are_runs_in_memory(positions: int, height: int, width: int) -> None:
    """Tile i, counted along rows, columns and samples, holds positions [i P, (i + 1) P) of the whole batch."""
    box = flat_box(positions, height, width)
    if box is None:
        return
    tn, th, tw = box
    assert tn * th * tw == positions
    assert height % th == 0
    assert width % tw == 0
    rows, columns, n = height // th, width // tw, 2 * tn
    index = torch.arange(n * height * width).view(n, height, width)
    for tile in range(n // tn * rows * columns):
        x, y, z = tile % columns * tw, tile // columns % rows * th, tile // (columns * rows) * tn
        found = index[z : z + tn, y : y + th, x : x + tw].flatten()
        assert torch.equal(found, torch.arange(tile * positions, (tile + 1) * positions))


def test_flat_boxes_of_known_maps() -> None:
    assert flat_box(64, 32, 32) == (1, 2, 32)
    assert flat_box(64, 4, 4) == (4, 4, 4)
    assert flat_box(64, 1, 1) == (64, 1, 1)
    assert flat_box(64, 7, 8) is None
    assert flat_box(64, 8, 7) is None
    assert flat_box(16, 32, 32) is None


# --- the table and the choice ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", TABLE, ids=str)
def test_the_table_holds_tiles_that_launches_can_have(key: tuple[str, int]) -> None:
    tiles = TABLE[key]
    assert len(set(tiles)) == len(tiles) > 0
    for tile in tiles:
        for side in (tile.rows, tile.columns, tile.depth, tile.warps, tile.slice):
            assert power_of_two(side) == side
        assert 16 <= tile.rows <= 256
        assert 16 <= tile.columns <= 256
        assert tile.depth * key[1] >= 32  # bytes of a TMA box's inner side, and the products of 16
        assert tile.slice <= tile.columns
        assert box_of(tile.rows, 1, 1, 1) == (tile.rows, 1, 1)
    areas = [tile.rows * tile.columns for tile in tiles]
    assert areas == sorted(areas, reverse=True)


@pytest.mark.parametrize("arch", KNOWN.values(), ids=lambda a: a.name)
@pytest.mark.parametrize("size", [2, 4])
def test_operands_fit_the_shared_memory(arch: Arch, size: int) -> None:
    for tile in TABLE[arch.name, size]:
        assert tile.stages * (tile.rows + tile.columns) * tile.depth * size <= arch.shared_memory


@pytest.mark.parametrize("arch", ARCHS, ids=lambda a: a.name)
@pytest.mark.parametrize("kernel", ["step", "drive", "contrast"])
@pytest.mark.parametrize("size", [2, 4])
def test_choice(arch: Arch, kernel: tiling.Kernel, size: int) -> None:
    """One of the candidates: the smallest where nothing is multiplied, else the one of the smallest estimate."""
    problem = Problem(kernel, 256, 16, 16, 128, 1152, size, kernel == "drive")
    found = tiling.candidates(problem, arch)
    assert set(found) <= set(TABLE[arch.name, size])
    assert choose_tile(replace(problem, depth=0), arch) == found[-1]
    chosen = choose_tile(problem, arch)
    assert chosen in found
    assert estimate(problem, chosen, arch) == min(estimate(problem, tile, arch) for tile in found)


def test_small_problems_take_small_tiles() -> None:
    arch = KNOWN[90]
    large = choose_tile(Problem("drive", 256, 32, 32, 512, 4608, 2), arch)
    small = choose_tile(Problem("drive", 8, 4, 4, 32, 288, 2), arch)
    assert large.rows * large.columns >= 128 * 128
    assert small.rows * small.columns < 128 * 128


# --- programs -----------------------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 9),
    phases=st.sampled_from([1, 2]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    channels=st.sampled_from([16, 32, 48, 80]),
    pooled=st.booleans(),
    rows=POWERS,
)
def test_grids(n: int, phases: int, size: tuple[int, int], channels: int, pooled: bool, rows: int) -> None:
    """Every (sample, row, column, channel) lies in exactly one program's tile, and no tile in two phases."""
    tile = Tile(rows, 32, 16, 4, 1)
    if pooled:
        call = drive(n * phases, size, channels, phases, tile)
    else:
        call = step(n * phases, size, channels, phases, tile)
    a = call.arguments
    sides = (a["TN"], a["TH"], a["TW"])
    seen = torch.zeros(a["N"], a["H"], a["W"], channels, dtype=torch.int32)
    for pid in range(call.programs[0]):
        n0, h0, w0, c0, phase = place(pid, a["N"], a["H"], a["W"], channels, phases, sides, a["BN"])
        last = (phase + 1) * n
        assert phase * n <= n0 < last
        seen[n0 : min(n0 + sides[0], last), h0 : h0 + sides[1], w0 : w0 + sides[2], c0 : c0 + a["BN"]] += 1
    assert (seen == 1).all()
    if phases == 1:
        problem = Problem("step", n, a["H"], a["W"], channels, 16, 4, pooled)
        assert programs(problem, tile) == call.programs[0]


def place(
    pid: int, n: int, h: int, w: int, c: int, phases: int, box: tuple[int, int, int], bn: int
) -> tuple[int, int, int, int, int]:
    """kernels/tiles.py, ``place``."""
    blocks, columns, rows, samples = math.ceil(c / bn), math.ceil(w / box[2]), math.ceil(h / box[1]), n // phases
    tile = pid // blocks
    part = tile // (columns * rows)
    phase = part // math.ceil(samples / box[0])
    n0 = phase * samples + part % math.ceil(samples / box[0]) * box[0]
    return n0, tile // columns % rows * box[1], tile % columns * box[2], pid % blocks * bn, phase


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def step(n: int, size: tuple[int, int], channels: int, phases: int, tile: Tile | None) -> launch.Call:
    return step_call(
        KNOWN[80],
        "ieee",
        Dynamics(launch.STATES, 1.0, 1.0, 0.0, 1.0),
        [drive_loop(meta(n, *size, 16), meta(channels, 144), (3, 3), (1, 1))],
        [],
        channels=channels,
        phases=phases,
        new=meta(n, *size, channels),
        residual=meta(1, n, dtype=torch.int32),
        control=meta(3, dtype=torch.int32),
        tile=tile,
    )


def drive(n: int, size: tuple[int, int], channels: int, phases: int, tile: Tile | None) -> launch.Call:
    full = (2 * size[0] + 1, 2 * size[1] + 1)  # an odd last row and column, in no window
    return drive_call(
        KNOWN[80],
        "ieee",
        drive_loop(meta(n, *full, 16), meta(channels, 144), (3, 3), (1, 1)),
        size=full,
        pool=launch.MAX,
        phases=phases,
        drive=meta(n, *size, channels),
        control=meta(3, dtype=torch.int32),
        winners_out=meta(n, *size, channels, dtype=torch.uint8),
        tile=tile,
    )


@given(
    n=st.integers(1, 40),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    channels=st.tuples(st.sampled_from([16, 48, 80]), st.sampled_from([16, 32, 144])),
    processors=st.integers(1, 200),
    depth=st.sampled_from([16, 32, 64]),
)
def test_splits_of_the_contrast(
    n: int, size: tuple[int, int], channels: tuple[int, int], processors: int, depth: int
) -> None:
    """Every tile of positions is in one split, and no split is empty."""
    c_src, c_dst = channels
    arch = replace(KNOWN[80], processors=processors)
    maps = meta(n, *size, c_dst), meta(n, *size, c_src)
    tile = Tile(64, 32, depth, 4, 1)
    first, last = contrast_calls(arch, "tf32", *maps, None, None, (3, 3), (1, 1), 1.0, 1.0, meta(c_dst, 9, c_src), tile)
    a = first.arguments
    splits = a["partial"].shape[0]
    assert (splits - 1) * a["share"] < a["tiles"] <= splits * a["share"]
    assert a["TN"] * a["TH"] * a["TW"] == depth
    assert a["tiles"] * depth >= n * size[0] * size[1]
    assert first.programs[0] == splits * 9 * math.ceil(c_dst / a["BM"]) * math.ceil(c_src / a["BN"])
    assert last.arguments["rows"] == splits
    assert last.arguments["stride"] == c_dst * 9 * c_src
    assert last.programs[0] * last.arguments["BLOCK"] >= c_dst * 9 * c_src


def test_loops_of_gain_zero_are_left_out() -> None:
    """The accumulator is multiplied by gain over next gain after each loop, so that each gets its own gain."""
    call = step(2, (3, 3), 16, 1, Tile(16, 16, 16, 4, 1))
    assert (call.arguments["a0"] is None, call.arguments["a1"] is None) == (False, True)
    loops = [
        drive_loop(meta(2, 3, 3, 16), meta(16, 16), (1, 1), (0, 0), gain) for gain in (0.5, 0.0, -2.0, 0.0, 1e-6, 4.0)
    ]
    arguments = step_call(
        KNOWN[80],
        "ieee",
        Dynamics(launch.STATES, 1.0, 1.0, 0.0, 1.0),
        loops,
        [],
        channels=16,
        phases=1,
        new=meta(2, 3, 3, 16),
        residual=meta(1, 2, dtype=torch.int32),
        control=meta(3, dtype=torch.int32),
        tile=Tile(16, 16, 16, 4, 1),
    ).arguments
    factors = [arguments[f"m{i}"] for i in range(4)]
    for i, gain in enumerate((0.5, -2.0, 1e-6, 4.0)):
        assert math.prod(factors[i:]) == pytest.approx(gain)


# --- architectures ------------------------------------------------------------------------------------------------


def test_families() -> None:
    found = {c: family(c) for c in (80, 86, 87, 89, 90, 100, 103, 110, 120, 121, 130)}
    assert found == {80: 80, 86: 86, 87: 86, 89: 86, 90: 90, 100: 100, 103: 100, 110: 100, 120: 120, 121: 120, 130: 120}
    with pytest.raises(ValueError, match=r"need compute capability 8\.0 or newer, this device has 7\.5"):
        family(75)
    assert arch_of(torch.device("cpu")) == INTERPRETER
    assert all((arch.name, size) in TABLE for arch in ARCHS for size in (2, 4))
