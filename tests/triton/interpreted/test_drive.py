"""The kernel ``drive`` against the reference: pooling, winners, ties, unpooled neighbours, ragged tiles, NaN."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ep_kernels import reference
from ep_kernels.network import POOLS, Pool
from ep_kernels.triton import layout
from ep_kernels.triton.launch import Call, drive_call, drive_loop
from ep_kernels.triton.tiling import Tile, box_of
from tests.ops.inputs import Maker
from tests.triton.interpreted.tools import (
    ARCHS,
    close,
    control,
    filled,
    is_poison,
    nan,
    padding_is_zero,
    poisoned_map,
)

SMALL = Tile(16, 16, 16, 4, 1)
SLICED = Tile(32, 32, 16, 4, 1, 8)


@dataclass(frozen=True)
class Case:
    """One launch. ``winners``: "" (found), "own" or "shared" (frozen). ``unpool`` of an (odd) map."""

    name: str
    pool: Pool = "max"
    channels: tuple[int, int] = (3, 5)
    size: tuple[int, int] = (7, 5)
    kernel: tuple[int, int] = (3, 3)
    padding: tuple[int, int] = (1, 1)
    n: int = 2
    phases: int = 1
    winners: str = ""
    gain: float = 0.7
    unpool: bool = False
    operands: torch.dtype = torch.float32
    storage: torch.dtype = torch.float32
    tile: Tile = SMALL

    def __str__(self) -> str:
        return self.name.replace(",", "").replace(" ", "-")


LINE: dict[str, Any] = {"kernel": (1, 1), "padding": (0, 0)}
CASES = (
    Case("none, ragged", "none"),
    Case("max, ragged"),
    Case("avg, ragged", "avg"),
    Case("none, batch 1, channels 1", "none", (1, 1), n=1),
    Case("max, channels 3 to 17", channels=(3, 17), size=(4, 6), n=1),
    Case("max, channels 17 to 64", channels=(17, 64), size=(4, 2), n=1, tile=SLICED),
    Case("avg, channels 64 to 1", "avg", (64, 1), (4, 2), n=1),
    Case("none, channels 64 to 40", "none", (64, 40), (3, 2), n=1, tile=SLICED, **LINE),
    Case("max, samples in one tile", size=(3, 3), n=5, tile=replace(SMALL, rows=32)),
    Case("avg, even maps, phases", "avg", size=(4, 4), n=3, phases=2),
    Case("kernel 5x3", kernel=(5, 3), padding=(2, 0), size=(4, 6)),
    Case("kernel 2x2", kernel=(2, 2), padding=(0, 1)),
    Case("padding beyond the kernel", kernel=(1, 1), padding=(2, 1), size=(2, 3)),
    Case("kernel wider than the map", "none", kernel=(5, 5), padding=(2, 1), size=(3, 4), n=1),
    Case("one window", size=(2, 2), n=3, **LINE),
    Case("frozen", winners="own", size=(5, 7)),
    Case("frozen in both phases", winners="shared", phases=2, n=3, channels=(3, 17), **LINE),
    Case("own winners of both phases", winners="own", phases=2, n=3, **LINE),
    Case("unpooled", unpool=True, n=1),
    Case("unpooled on average", "avg", unpool=True, size=(4, 5), channels=(3, 17), **LINE),
    Case("unpooled, frozen in both phases", unpool=True, winners="shared", phases=2, n=2, **LINE),
    Case("fp16", operands=torch.float16, unpool=True, size=(5, 4), n=1, channels=(17, 3)),
    Case("fp16 storage", operands=torch.float16, storage=torch.float16, unpool=True, **LINE),
    Case("fp16 average", "avg", operands=torch.float16, storage=torch.float16, unpool=True, **LINE),
)


class Launch:
    """Tensors of a case, its buffers, and the call."""

    def __init__(self, case: Case, arch: str = "descriptors", source: Tensor | None = None):
        self.case, self.arch = case, ARCHS[arch]
        new = Maker(torch.float64)
        total, (c_src, c_dst) = case.phases * case.n, case.channels
        self.source = new(total, c_src, *case.size).to(case.operands) if source is None else source
        self.weight = (new(c_dst, c_src, *case.kernel) / (c_src * case.kernel[0] * case.kernel[1]) ** 0.5).to(
            case.operands
        )
        self.size = tuple(F.conv2d(self.source[:1], self.weight, padding=case.padding).shape[2:])
        small = self.size if case.pool == "none" else (self.size[0] // 2, self.size[1] // 2)
        self.shape = (c_dst, *small)
        self.winners = None
        if case.winners:
            self.winners = new.winners(case.n if case.winners == "shared" else total, *self.shape)
        self.state = new(total, *self.shape).to(case.storage)
        self.drive = poisoned_map(total, self.shape)
        live = case.pool == "max" and not case.winners
        self.won = poisoned_map(total, self.shape, torch.uint8) if live else None
        self.unpooled = poisoned_map(total, (c_dst, *self.size), case.operands) if case.unpool else None

    def call(self, control_: Tensor | None = None, *, stop: bool = False) -> Call:
        case = self.case
        matrix = layout.drive_matrix(self.weight, self.source.shape[1:], case.operands)
        return drive_call(
            self.arch,
            "ieee",
            drive_loop(filled(self.source), matrix, case.kernel, case.padding, case.gain),
            size=self.size,
            pool=POOLS.index(case.pool),
            phases=case.phases,
            drive=self.drive,
            control=control() if control_ is None else control_,
            winners=None if self.winners is None else filled(self.winners),
            winners_shared=case.winners == "shared",
            winners_out=self.won,
            state=filled(self.state) if case.unpool else None,
            unpooled=self.unpooled,
            stop=stop,
            tile=case.tile,
        )

    def outputs(self) -> list[Tensor]:
        return [t for t in (self.drive, self.won, self.unpooled) if t is not None]

    def check(self, tolerance: float = 1e-5) -> None:
        case, c = self.case, self.case.channels[1]
        expected, won = reference.drive(
            self.source.double(), self.weight.double(), (1, 1), case.padding, case.pool, self.winners
        )
        close("drive", layout.as_tensor(self.drive, self.shape), case.gain * expected, tolerance)
        padding_is_zero("drive", self.drive, c)
        if self.won is not None:
            assert won is not None
            assert torch.equal(layout.as_tensor(self.won, self.shape), won)
            padding_is_zero("winners", self.won, c)
        if self.unpooled is not None:
            h, w = (d // 2 * 2 for d in self.size)
            up = reference.unpool_map(self.state.float(), case.pool, (h, w), won).to(case.operands)
            assert torch.equal(layout.as_tensor(self.unpooled[:, :h, :w], (c, h, w)), up)
            padding_is_zero("unpooled", self.unpooled[:, :h, :w], c)
            assert self.unpooled[:, h:].isnan().all()  # an odd last row or column is left alone
            assert self.unpooled[:, :, w:].isnan().all()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference(case: Case, arch: str) -> None:
    launch = Launch(case, arch)
    launch.call()()
    launch.check()


def test_the_cases_are_ragged() -> None:
    kinds = set()
    for case in CASES:
        launch = Launch(case)
        pooled = case.pool != "none"
        h, w = (d // 2 * 2 for d in launch.size) if pooled else launch.size
        tn, th, tw = box_of(case.tile.rows, case.n, h, w, pooled)
        kinds |= {(pooled, "samples", tn > 1 and case.n % tn > 0), (pooled, "map", h % th + w % tw > 0)}
        kinds |= {(pooled, "tiles", h > th or w > tw), (pooled, "odd", launch.size != (h, w))}
        kinds.add((pooled, "channels", layout.padded(case.channels[1]) % case.tile.columns > 0))
    assert {(True, name, True) for name in ("samples", "map", "tiles", "odd")} <= kinds
    assert {(False, name, True) for name in ("map", "tiles", "channels")} <= kinds


@pytest.mark.parametrize("operands", [torch.float32, torch.float16])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_ties_go_to_the_first(operands: torch.dtype, levels: int) -> None:
    """Few values (one: all windows tie), whose sums are exact: winners are those of max_pool2d itself."""
    source = torch.randint(0, levels, (2, 3, 8, 8), generator=torch.Generator().manual_seed(levels)).to(operands)
    launch = Launch(Case("", channels=(3, 17), size=(8, 8), operands=operands, gain=1.0, **LINE), source=source)
    launch.weight = torch.randint(-1, 2, (17, 3, 1, 1), generator=torch.Generator().manual_seed(1)).to(operands)
    launch.call()()
    launch.check(0)
    flat = F.max_pool2d(F.conv2d(source.float(), launch.weight.float()), 2, return_indices=True)[1]
    assert launch.won is not None
    index = 2 * (flat // 8 % 2) + flat % 2
    assert torch.equal(layout.as_tensor(launch.won, launch.shape).long(), index)


@pytest.mark.usefixtures("backwards")
def test_programs_in_any_order() -> None:
    """Tiles of four samples over three of each phase: none writes into the other phase."""
    case = next(c for c in CASES if c.name == "unpooled, frozen in both phases")
    launch = Launch(replace(case, n=3, size=(2, 2)))
    call = launch.call()
    assert call.arguments["TN"] == 4
    assert call.programs == (2,)
    call()
    launch.check()


WINDOWS = [
    [0.0, -0.0, 0.0, -0.0],
    [-1.0, 2.0, 2.0, 1.0],
    [1.0, 2.0, 3.0, 3.0],
    [4.0, 2.0, 3.0, 4.0],
    [nan, 1.0, 2.0, 3.0],
    [1.0, nan, 9.0, 3.0],
    [1.0, 9.0, nan, 3.0],
    [1.0, 2.0, 9.0, nan],
    [1.0, nan, nan, 3.0],
    [1.0, nan, 9.0, nan],
]


@pytest.mark.parametrize("values", WINDOWS)
def test_nan_wins_and_the_first_takes_ties(values: list[float]) -> None:
    source = torch.tensor(values).view(1, 1, 2, 2)
    for pool in ("max", "avg"):
        launch = Launch(Case("", pool, (1, 1), (2, 2), n=1, gain=1.0, **LINE), source=source)  # type: ignore[arg-type]
        launch.weight = torch.ones(1, 1, 1, 1)
        launch.call()()
        expected = F.max_pool2d(source, 2) if pool == "max" else F.avg_pool2d(source, 2)
        found = layout.as_tensor(launch.drive, launch.shape)
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)
        if launch.won is not None:
            winner = next((i for i, v in enumerate(values) if v != v), values.index(max(values)))
            assert launch.won[0, 0, 0, 0] == winner


@pytest.mark.parametrize("pool", POOLS)
def test_nan_surfaces_where_the_reference_has_it(pool: Pool) -> None:
    launch = Launch(Case("", pool, size=(6, 5), channels=(3, 17)))
    launch.source[1, 2, 3, 4] = nan
    launch.call()()
    expected, _ = reference.drive(launch.source, launch.weight, (1, 1), (1, 1), pool)
    assert expected.isnan().any()
    assert torch.equal(layout.as_tensor(launch.drive, launch.shape).isnan(), expected.isnan())


def test_a_launch_after_the_stop_writes_nothing() -> None:
    launch = Launch(next(c for c in CASES if c.name == "unpooled"))
    launch.call(control(stop=1, sweep=3), stop=True)()
    for t in launch.outputs():
        assert is_poison(t).all()
    launch.call(control(stop=0, sweep=3), stop=True)()
    launch.check()
    again = Launch(launch.case)
    again.call(control(stop=1))()  # one that is not stoppable runs
    again.check()


def test_frozen_winners_above_three_stay_inside_the_window() -> None:
    """They are no winners: what is read is unspecified, but it is of the window; nothing is sent back."""
    launch = Launch(Case("", winners="own", size=(4, 4), unpool=True, gain=1.0, **LINE))
    assert launch.winners is not None
    assert launch.unpooled is not None
    launch.winners.fill_(255)
    launch.call()()
    z = reference.windows(F.conv2d(launch.source, launch.weight))
    found = layout.as_tensor(launch.drive, launch.shape)
    assert ((found >= z.amin(-1) - 1e-5) & (found <= z.amax(-1) + 1e-5)).all()
    assert (launch.unpooled == 0).all()
