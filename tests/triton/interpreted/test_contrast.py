"""The kernels of ``contrast`` against float64: differences and means, their products by tap, the sums in order."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ep_kernels import reference
from ep_kernels.network import POOLS, Pool
from ep_kernels.triton import layout
from ep_kernels.triton.launch import (
    Call,
    add_up_call,
    contrast_calls,
    difference_call,
    difference_programs,
)
from ep_kernels.triton.tiling import Tile
from tests.ops.inputs import Maker
from tests.triton.interpreted.tools import ARCHS, ROUNDING, close, filled, nan, padding_is_zero, poison, poisoned_map

# --- differences and means ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ends:
    """One launch over one end of a connection. ``odd``: the map before pooling has an odd last row and column."""

    name: str
    pool: Pool = "none"
    phases: int = 2
    live: bool = False
    channels: int = 3
    size: tuple[int, int] = (5, 3)
    n: int = 2
    odd: int = 0
    mean_gain: float = 0.125
    gain: float = 0.25
    stored: torch.dtype = torch.float32
    operands: torch.dtype = torch.float32
    programs: int = 2

    def __str__(self) -> str:
        return self.name.replace(",", "").replace(" ", "-")


ENDS = (
    Ends("two phases"),
    Ends("one phase", phases=1),
    Ends("tangent", phases=1, mean_gain=0.0),
    Ends("batch 1, one channel", n=1, channels=1, programs=1),
    Ends("more programs than positions", n=1, size=(1, 1), channels=17, programs=3),
    Ends("channels in two blocks", channels=70, size=(1, 3)),
    Ends("max", "max", odd=1),
    Ends("max, 17 channels, one phase", "max", channels=17, phases=1),
    Ends("max, live", "max", live=True, odd=1),
    Ends("max, live, one phase", "max", live=True, phases=1),
    Ends("avg", "avg", odd=1),
    Ends("fp16", stored=torch.float16, operands=torch.float16),
    Ends("fp16, max, live", "max", live=True, stored=torch.float16, operands=torch.float16),
)


class EndsLaunch:
    def __init__(self, case: Ends):
        self.case = case
        new = Maker(torch.float64)
        shape = (case.channels, *case.size)
        self.free = new(case.n, *shape).to(case.stored)
        self.delta = new(case.phases * case.n, *shape).to(case.stored)
        self.winners = new.winners((2 if case.live else 1) * case.n, *shape) if case.pool == "max" else None
        large = 2 if case.pool != "none" else 1
        self.large = (case.channels, *(large * d + case.odd for d in case.size))
        self.diff, self.mean = (poisoned_map(case.n, self.large, case.operands) for _ in range(2))
        self.sums = poison(case.programs, layout.padded(case.channels))

    def run(self) -> None:
        case = self.case
        difference_call(
            ARCHS["pointers"],
            layout.as_map(self.free).contiguous(),
            layout.as_map(self.delta).contiguous(),
            None if self.winners is None else layout.as_map(self.winners).contiguous(),
            self.diff,
            self.mean,
            self.sums,
            channels=case.channels,
            phases=case.phases,
            pool=POOLS.index(case.pool),
            live=case.live,
            mean_gain=case.mean_gain,
            gain=case.gain,
        )()

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        case = self.case
        free, delta = self.free.double(), self.delta.double()
        if case.phases == 1:
            d, m = delta, free + case.mean_gain * delta
        else:
            plus, minus = delta.chunk(2)
            d, m = plus - minus, free + case.mean_gain * (plus + minus)
        size = self.large[1:]
        if case.live:
            assert self.winners is not None
            signs = zip((0.5, -0.5), self.winners.chunk(2), strict=True)
            up, down = (reference.unpool_map(m + f * case.gain * d, "max", size, won) for f, won in signs)
            return (up - down) / case.gain, (up + down) / 2, d.sum((0, 2, 3))
        both = (reference.unpool_map(t, case.pool, size, self.winners) for t in (d, m))
        return (*both, d.sum((0, 2, 3)))


@pytest.mark.parametrize("case", ENDS, ids=str)
def test_differences_and_means(case: Ends) -> None:
    launch = EndsLaunch(case)
    launch.run()
    diff, mean, sums = launch.expected()
    h, w = (d - case.odd for d in launch.large[1:])
    for name, buffer, value in (("diff", launch.diff, diff), ("mean", launch.mean, mean)):
        found = layout.as_tensor(buffer, launch.large)
        close(name, found[..., :h, :w], value[..., :h, :w], ROUNDING[case.operands])
        padding_is_zero(name, buffer[:, :h, :w], case.channels)
        assert found[..., h:, :].isnan().all()  # in no window: left alone
        assert found[..., w:].isnan().all()
    total = launch.sums.double().sum(0)
    close("sums", total[: case.channels], sums, 1e-5)
    assert (total[case.channels :] == 0).all()


def test_small_differences_lose_no_digits() -> None:
    """Deltas keep their own unit: nothing of 1e-9 is added to a state of order 1 before it is multiplied."""
    launch = EndsLaunch(replace(ENDS[0], gain=1e-9, mean_gain=0.5e-9))
    launch.run()
    close("diff", layout.as_tensor(launch.diff, launch.large), launch.expected()[0], 1e-6)


def test_rows_of_partial_sums_fill_the_device() -> None:
    arch = replace(ARCHS["pointers"], processors=4)
    assert [difference_programs(arch, p) for p in (0, 1, 32, 33, 10**9)] == [1, 1, 1, 2, 16]


# --- products -----------------------------------------------------------------------------------------------------

SMALL = Tile(16, 16, 16, 4, 1)


@dataclass(frozen=True)
class Products:
    """Two maps of ``n`` samples; ``size`` is the destination's. ``both``: the second product is there."""

    name: str
    channels: tuple[int, int] = (3, 5)
    size: tuple[int, int] = (5, 3)
    kernel: tuple[int, int] = (3, 3)
    padding: tuple[int, int] = (1, 1)
    n: int = 3
    both: bool = True
    operands: torch.dtype = torch.float32
    tile: Tile = SMALL
    processors: int = 1

    def __str__(self) -> str:
        return self.name.replace(",", "").replace(" ", "-")


LINE: dict[str, Any] = {"kernel": (1, 1), "padding": (0, 0)}
PRODUCTS = (
    Products("3x3"),
    Products("one product", both=False),
    Products("batch 1, channels 1", (1, 1), n=1, size=(7, 5)),
    Products("channels 3 to 17, samples in one tile", (3, 17), (2, 3), n=5, **LINE),
    Products("channels 17 to 64", (17, 64), (3, 3), n=1, tile=Tile(32, 16, 32, 4, 1), **LINE),
    Products("channels 64 to 1", (64, 1), (2, 2), n=1, kernel=(2, 2)),
    Products("channels 70 to 40", (70, 40), (1, 1), n=5, tile=Tile(32, 32, 16, 4, 1), **LINE),
    Products("5x3, no padding", kernel=(5, 3), padding=(0, 0), n=1),
    Products("padding beyond the kernel", kernel=(1, 1), padding=(2, 1)),
    Products("kernel wider than the map", size=(2, 1), kernel=(5, 3), padding=(2, 1)),
    Products("split over positions", processors=8, **LINE),
    Products("a split with fewer tiles", (17, 17), (5, 3), processors=8, n=4, both=False, **LINE),
    Products("a run of positions, part of a map", size=(8, 4), n=2, processors=3, **LINE),
    Products("a run of positions, maps of two samples", (3, 17), (2, 4), n=3, kernel=(2, 2)),
    Products("a run of vectors", (17, 5), (1, 1), n=21, **LINE),
    Products("fp16", operands=torch.float16, kernel=(2, 2), n=2),
)


def contrasted(case: Products, arch: str, seed: int = 0) -> tuple[list[Call], Tensor, Tensor]:
    """The calls, the gradient that they write, and what it should be."""
    new = Maker(torch.float64, seed)
    (c_src, c_dst), (kh, kw), (ph, pw) = case.channels, case.kernel, case.padding
    below = (case.n, c_src, case.size[0] + kh - 1 - 2 * ph, case.size[1] + kw - 1 - 2 * pw)
    above = (case.n, c_dst, *case.size)
    d_up, m_up = new(*above).to(case.operands), new(*above).to(case.operands)
    m_low, d_low = new(*below).to(case.operands), new(*below).to(case.operands)
    out = poison(c_dst, kh * kw, c_src)
    calls = contrast_calls(
        replace(ARCHS[arch], processors=case.processors),
        "ieee",
        filled(d_up),
        filled(m_low),
        filled(m_up) if case.both else None,
        filled(d_low) if case.both else None,
        case.kernel,
        case.padding,
        0.5,
        -0.25,
        out,
        case.tile,
    )
    shape = [c_dst, c_src, kh, kw]
    expected = 0.5 * conv2d_weight(m_low.double(), shape, d_up.double(), padding=case.padding)
    if case.both:
        expected += conv2d_weight(d_low.double(), shape, m_up.double(), padding=case.padding)
    return calls, out, -0.25 * expected.permute(0, 2, 3, 1).reshape(c_dst, kh * kw, c_src)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_products(case: Products, arch: str) -> None:
    calls, out, expected = contrasted(case, arch)
    assert calls[0].arguments["partial"].isnan().all()
    for call in calls:
        call()
    assert not calls[0].arguments["partial"].isnan().any()
    close("gradient", out, expected, 1e-5)


def test_the_cases_are_ragged() -> None:
    kinds = set()
    for case in PRODUCTS:
        call = contrasted(case, "pointers")[0][0]
        tn, th, tw = (call.arguments[name] for name in ("TN", "TH", "TW"))
        flat = call.arguments["FLAT"]
        assert tn * th * tw == case.tile.depth
        splits, share, tiles = call.arguments["partial"].shape[0], call.arguments["share"], call.arguments["tiles"]
        kinds |= {("splits", splits > 1), ("uneven", splits > 1 and tiles % share > 0), ("share", share > 1)}
        kinds |= {("flat", flat and tn == 1), ("flat samples", flat and case.n % tn > 0)}
        kinds |= {("samples", not flat and case.n % tn > 0), ("map", case.size[0] % th + case.size[1] % tw > 0)}
        kinds.add(("out", layout.padded(case.channels[1]) % call.arguments["BM"] > 0))
        kinds.add(("in", layout.padded(case.channels[0]) % call.arguments["BN"] > 0))
        assert tiles == math.ceil(case.n / tn) * math.ceil(case.size[0] / th) * math.ceil(case.size[1] / tw)
    assert {(name, True) for name in ("splits", "uneven", "share", "samples", "map", "out", "in")} <= kinds
    assert {("flat", True), ("flat samples", True)} <= kinds


@pytest.mark.parametrize("rows", [1, 2, 7, 70])
def test_parts_are_added_up(rows: int) -> None:
    """Without padding columns and without further rows; more columns than a program has."""
    new = Maker(torch.float32)
    partial, out = new(rows, 6, 50, 16), poison(4, 50, 13)
    call = add_up_call(partial.view(rows, -1), out, 13, 16, -0.5)
    assert call.programs[0] > 1
    call()
    close("sum", out, -0.5 * partial.double().sum(0)[:4, :, :13], 1e-6)
    again = poison(4, 50, 13)
    add_up_call(partial.view(rows, -1), again, 13, 16, -0.5)()
    assert torch.equal(out, again)


@pytest.mark.parametrize("place", [0, 1])
def test_nan_surfaces(place: int) -> None:
    """In the rows of a destination's channel, or in the columns of a source's."""
    case = replace(PRODUCTS[0], both=False, channels=(17, 3), **LINE)
    calls, out, _ = contrasted(case, "pointers")
    name = ("diff_above", "mean_below")[place]
    buffer = calls[0].arguments[name]
    buffer.view(3, 5, 3, -1)[1, 2, 1, 2] = nan
    for call in calls:
        call()
    bad = torch.zeros_like(out, dtype=torch.bool)
    bad[(2, slice(None)) if place == 0 else (slice(None), slice(None), 2)] = True
    assert torch.equal(out.isnan(), bad)
