"""The kernel ``relax_step`` against the reference: forms, phases, loops, addends, ragged tiles, stop and finish."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from ep_kernels import reference
from ep_kernels.network import Pool
from ep_kernels.plan import FORMS, Form
from ep_kernels.triton import layout
from ep_kernels.triton.launch import Addend, Call, Dynamics, Loop, drive_loop, feedback_loop, step_call
from ep_kernels.triton.tiling import Tile, box_of
from tests.ops.inputs import Maker
from tests.triton.interpreted.tools import (
    ARCHS,
    ROUNDING,
    close,
    control,
    filled,
    filled_poison,
    fresh_residual,
    nan,
    padding_is_zero,
    poisoned_map,
)

SMALL = Tile(16, 16, 16, 4, 1)
SLICED = Tile(32, 32, 16, 4, 1, 8)  # two halvings of the epilogue


@dataclass(frozen=True)
class Side:
    """A neighbour still to be convolved: ``below`` it drives the node, else the node gets its feedback."""

    below: bool
    channels: int
    kernel: tuple[int, int] = (3, 3)
    padding: tuple[int, int] = (1, 1)
    gain: float = 0.8
    pool: Pool = "none"


@dataclass(frozen=True)
class Case:
    """One launch. ``n``: samples of a phase. ``addends``: gain and whether it is shared by the phases."""

    name: str
    n: int = 3
    size: tuple[int, int] = (5, 3)
    channels: int = 3
    sides: tuple[Side, ...] = ()
    addends: tuple[tuple[float, bool], ...] = ()
    form: Form = "states"
    phases: int = 1
    damping: float = 1.0
    slope: float = 1.0
    box: tuple[float, float] = (0.0, 1.0)
    scale: float = 1.0
    old: bool = True
    bias: bool = True
    nudge: str = ""  # "", "own" or "shared"
    keep: bool = True
    unpool: str = ""  # "", "max", "max shared", "avg"; of a map with an odd last row where it says "odd"
    operands: torch.dtype = torch.float32
    storage: torch.dtype = torch.float32
    tile: Tile = SMALL

    def __str__(self) -> str:
        return self.name.replace(",", "").replace(" ", "-")


BELOW, ABOVE = Side(True, 5), Side(False, 4, gain=0.6)
VECTOR = {"size": (1, 1), "channels": 17}
LINE = {"kernel": (1, 1), "padding": (0, 0)}
CASES = (
    Case("nothing", bias=False, old=False, keep=False),
    Case("bias alone, batch 1", n=1),
    Case("below", sides=(BELOW,)),
    Case("above", sides=(ABOVE,)),
    Case("below and above, batch 1", n=1, sides=(ABOVE, BELOW), size=(7, 5), channels=17),
    Case("channels 1 from 1", channels=1, sides=(replace(BELOW, channels=1), replace(ABOVE, channels=1))),
    Case("channels 64 from 17", channels=64, n=1, sides=(replace(BELOW, channels=17),), tile=SLICED),
    Case("channels 17 from 64", channels=17, n=1, sides=(replace(ABOVE, channels=64),)),
    Case("channels 40 in blocks of 32", channels=40, n=1, size=(3, 3), sides=(replace(BELOW, **LINE),), tile=SLICED),
    Case("vectors", **VECTOR, n=5, sides=(Side(True, 70, **LINE), Side(False, 33, **LINE)), nudge="own"),
    Case("samples in one tile", n=5, size=(2, 2), sides=(BELOW,), tile=replace(SMALL, rows=32)),
    Case("other kernels", sides=(Side(True, 3, (5, 3), (2, 1)), Side(False, 3, (2, 2), (0, 0)), Side(True, 2, **LINE))),
    Case("padding beyond the kernel", sides=(Side(True, 3, (3, 3), (3, 2)), Side(False, 3, (1, 1), (2, 1)))),
    Case("no padding", sides=(Side(True, 3, (3, 3), (0, 0)), Side(False, 3, (3, 3), (0, 0)))),
    Case(
        "kernel wider than the map",
        n=2,
        size=(2, 1),
        sides=(Side(True, 3, (5, 3), (2, 1)), Side(False, 3, (5, 3), (2, 1))),
    ),
    Case(
        "four loops with gains from 1e-5 to 3",
        sides=(
            replace(ABOVE, gain=1e-5),
            replace(ABOVE, gain=-3.0, **LINE),
            replace(BELOW, gain=0.01, **LINE),
            replace(BELOW, gain=2.0, **LINE),
        ),
    ),
    Case("gains of 0", sides=(replace(BELOW, gain=0.0), replace(ABOVE, **LINE), replace(ABOVE, gain=0.0))),
    Case("only gains of 0", sides=(replace(BELOW, gain=0.0),), addends=((0.0, False),), nudge="own"),
    Case("feedback of a pooled map", sides=(replace(ABOVE, pool="max"), replace(ABOVE, pool="avg", **LINE))),
    Case("one addend", addends=((0.7, False),)),
    Case("two addends, shared and not", phases=2, n=2, addends=((0.7, True), (-1.3, False))),
    Case("states, two phases", phases=2, n=5, size=(3, 2), sides=(BELOW,), nudge="shared", addends=((0.5, True),)),
    Case("two phases, own nudge", phases=2, n=3, nudge="own", sides=(replace(ABOVE, **LINE),), **VECTOR),
    Case("damped", damping=0.7, sides=(replace(BELOW, **LINE),)),
    Case("damped from nothing", damping=0.7, old=False, sides=(replace(BELOW, **LINE),)),
    Case("over-relaxed", damping=1.5, sides=(replace(BELOW, **LINE),), box=(-0.5, 2.0)),
    Case("slope and box", slope=0.5, box=(-0.5, 2.0), sides=(BELOW,), nudge="own"),
    Case("box without zero", box=(0.25, 0.75), unpool="avg", operands=torch.float16),  # padding is zero all the same
    Case("unpooled at winners", unpool="max", size=(5, 3), n=2),
    Case("unpooled at shared winners", unpool="max shared odd", size=(3, 2), n=3, phases=2, channels=17),
    Case("unpooled on average", unpool="avg odd", size=(5, 3), n=2, storage=torch.float16, operands=torch.float16),
    Case("delta", form="delta", scale=1024.0, sides=(BELOW,), old=False),
    Case("delta, two phases", form="delta", scale=64.0, phases=2, n=3, sides=(ABOVE,), nudge="own", damping=0.7),
    Case("delta, slope", form="delta", scale=4.0, slope=0.5, box=(-0.5, 2.0), addends=((3.0, False),)),
    Case("tangent", form="tangent", scale=8.0, sides=(BELOW,), nudge="own", slope=0.5, damping=0.7),
    Case("tangent, two phases", form="tangent", scale=2.0, phases=2, n=2, addends=((1.0, False),), unpool="max shared"),
    Case("fp16 operands", operands=torch.float16, sides=(ABOVE, BELOW), channels=17, n=2),
    Case("fp16 storage", storage=torch.float16, sides=(replace(BELOW, **LINE),), unpool="max"),
    Case("fp16 both", operands=torch.float16, storage=torch.float16, sides=(BELOW, ABOVE), unpool="max", damping=0.7),
    Case("fp16 delta", operands=torch.float16, storage=torch.float16, form="delta", scale=1024.0, sides=(BELOW,)),
    Case("bf16 copies, no products", operands=torch.bfloat16, addends=((1.0, False),)),
)


class Launch:
    """Tensors of a case, its buffers, and the call."""

    def __init__(self, case: Case, arch: str, seed: int = 0):
        self.case = case
        new = Maker(torch.float64, seed)
        self.total = case.phases * case.n
        self.shape = (case.channels, *case.size)

        def state(*shape: int) -> Tensor:
            return new(*shape).to(case.operands)

        self.neighbours: list[tuple[Tensor, Tensor]] = []
        self.winners: list[Tensor | None] = []
        loops: list[Loop] = []
        for side in case.sides:
            (kh, kw), (ph, pw) = side.kernel, side.padding
            if side.below:
                size = (case.size[0] + kh - 1 - 2 * ph, case.size[1] + kw - 1 - 2 * pw)
                source = state(self.total, side.channels, *size)
                weight = state(case.channels, side.channels, kh, kw) / (side.channels * kh * kw) ** 0.5
                matrix = layout.drive_matrix(weight, source.shape[1:], case.operands)
                loops.append(drive_loop(filled(source), matrix, side.kernel, side.padding, side.gain))
                won = None
            else:
                size = (case.size[0] - kh + 1 + 2 * ph, case.size[1] - kw + 1 + 2 * pw)
                small = size if side.pool == "none" else (size[0] // 2, size[1] // 2)
                source = state(self.total, side.channels, *small)
                weight = state(side.channels, case.channels, kh, kw) / (side.channels * kh * kw) ** 0.5
                won = new.winners(*source.shape) if side.pool == "max" else None
                matrix = layout.feedback_matrix(weight, self.shape, case.operands)
                top = filled(reference.unpool_map(source, side.pool, size, won))
                loops.append(feedback_loop(top, matrix, side.kernel, side.padding, side.gain))
            self.neighbours.append((source, weight))
            self.winners.append(won)
        self.old = new(self.total, *self.shape).to(case.storage) if case.old else None
        self.bias = new(case.channels).float() if case.bias and case.form == "states" else None
        self.addends = [new(case.n if shared else self.total, *self.shape).float() for _, shared in case.addends]
        self.nudge = None
        if case.nudge:
            self.nudge = new(case.n if case.nudge == "shared" else self.total, *self.shape).float()
        self.pre = None if case.form == "states" else (0.5 + 0.7 * new(case.n, *self.shape)).float()
        self.unpool_winners = None
        if "max" in case.unpool:
            self.unpool_winners = new.winners(case.n if "shared" in case.unpool else self.total, *self.shape)

        odd = int("odd" in case.unpool)
        self.new = poisoned_map(self.total, self.shape, case.storage)
        self.operand = poisoned_map(self.total, self.shape, case.operands) if case.operands != case.storage else None
        self.pre_out = poisoned_map(self.total, self.shape) if case.keep else None
        self.unpooled = None
        if case.unpool:
            large = (case.channels, 2 * case.size[0] + odd, 2 * case.size[1] + odd)
            self.unpooled = poisoned_map(self.total, large, case.operands)
        self.residual, self.control = fresh_residual(4, self.total), control(sweep=2)
        bias = None
        if self.bias is not None:
            bias = torch.zeros(layout.padded(case.channels))
            bias[: case.channels] = self.bias
        self.arguments = {
            "channels": case.channels,
            "phases": case.phases,
            "new": self.new,
            "residual": self.residual,
            "control": self.control,
            "old": None if self.old is None else filled(self.old),
            "operand": self.operand,
            "bias": bias,
            "nudge": None if self.nudge is None else filled(self.nudge),
            "nudge_gain": 0.4,
            "nudge_shared": case.nudge == "shared",
            "pre": None if self.pre is None else filled(self.pre),
            "pre_out": self.pre_out,
            "unpooled": self.unpooled,
            "winners": None if self.unpool_winners is None else filled_poison(self.unpool_winners),
            "winners_shared": "shared" in case.unpool,
            "tile": case.tile,
        }
        dynamics = Dynamics(FORMS.index(case.form), case.damping, case.slope, *case.box, case.scale)
        addends = [Addend(filled(t), *a) for t, a in zip(self.addends, case.addends, strict=True)]
        self.fixed = (ARCHS[arch], "ieee", dynamics, loops, addends)

    def call(self, **changes: object) -> Call:
        return step_call(*self.fixed, **{**self.arguments, **changes})

    def outputs(self) -> dict[str, Tensor]:
        named = {"new": self.new, "operand": self.operand, "pre_out": self.pre_out, "unpooled": self.unpooled}
        out = {name: t for name, t in named.items() if t is not None}
        return {**out, "residual": self.residual, "control": self.control}

    def tiled(self, t: Tensor) -> Tensor:
        return t.double().repeat(self.total // t.shape[0], *[1] * (t.dim() - 1))

    def expected(self) -> tuple[Tensor, Tensor]:
        """The new state and gamma a, in float64 from the same (rounded) tensors."""
        case = self.case
        a = torch.zeros(self.total, *self.shape, dtype=torch.float64)
        if self.bias is not None:
            a += self.bias.double().view(-1, 1, 1)
        for t, (gain, _) in zip(self.addends, case.addends, strict=True):
            a += gain * self.tiled(t)
        for (source, weight), won, side in zip(self.neighbours, self.winners, case.sides, strict=True):
            source, weight = source.double(), weight.double()
            if side.below:
                a += side.gain * reference.convolve(source, weight, (1, 1), side.padding)
            else:
                back = reference.feedback(source, weight, self.shape, (1, 1), side.padding, side.pool, won)
                a += side.gain * back
        if self.nudge is not None:
            sign = torch.ones(self.total, 1, 1, 1, dtype=torch.float64)
            sign[case.n :] = -1
            a += 0.4 * sign * self.tiled(self.nudge)
        old = torch.zeros_like(a) if self.old is None else self.old.double()
        pre = None if self.pre is None else self.tiled(self.pre)
        new = reference.step(old, a, case.form, case.damping, case.slope, *case.box, pre, case.scale)
        return new, case.slope * a

    def check(self) -> None:
        """Every output against the reference; the residual against what was stored, bit by bit."""
        case, c = self.case, self.case.channels
        new, pre = self.expected()
        stored = layout.as_tensor(self.new, self.shape)
        close("new", stored, new, ROUNDING[case.storage])
        padding_is_zero("new", self.new, c)
        if self.operand is not None:
            if case.operands == torch.bfloat16:  # the interpreter rounds to it towards zero
                close("operand", self.operand, self.new, 2**-7)
                padding_is_zero("operand", self.operand, c)
            else:
                assert torch.equal(self.operand, self.new.to(case.operands))
        if self.pre_out is not None:
            close("pre_out", layout.as_tensor(self.pre_out, self.shape), pre, ROUNDING[torch.float32])
        if self.unpooled is not None:
            h, w = 2 * case.size[0], 2 * case.size[1]
            pool: Pool = "avg" if "avg" in case.unpool else "max"
            expected = reference.unpool_map(stored.float(), pool, (h, w), self.unpool_winners).to(case.operands)
            assert torch.equal(layout.as_tensor(self.unpooled[:, :h, :w], (c, h, w)), expected)
            padding_is_zero("unpooled", self.unpooled[:, :h, :w], c)
            assert self.unpooled[:, h:].isnan().all()  # an odd last row or column is left alone
            assert self.unpooled[:, :, w:].isnan().all()
        before = torch.zeros_like(stored) if self.old is None else self.old
        change = (stored.float() - before.float()).abs().flatten(1).amax(1) / case.scale
        residual = self.residual.view(torch.float32)
        assert torch.equal(residual[2], change)
        assert (residual[[0, 1, 3]] == -1).all()


# loads differ in the loops alone
@pytest.mark.parametrize(
    ("case", "arch"), [(c, a) for a in ARCHS for c in CASES if c.sides or a == "descriptors"], ids=str
)
def test_equals_reference(case: Case, arch: str) -> None:
    launch = Launch(case, arch)
    launch.call()()
    launch.check()
    assert launch.control.tolist() == [0, 2, 0]


def test_the_cases_are_ragged() -> None:
    """Tiles that reach over the map, over its channels and over the batch, and tiles of several samples."""
    kinds = set()
    for case in CASES:
        h, w = case.size
        tn, th, tw = box_of(case.tile.rows, case.n, h, w)
        kinds |= {("samples", tn > 1 and case.n % tn > 0), ("rows", h % th > 0), ("columns", w % tw > 0)}
        kinds |= {("tiles", h > th), ("tiles", w > tw), ("batches", 1 < tn < case.n)}
        kinds.add(("channels", layout.padded(case.channels) % case.tile.columns > 0))
        kinds |= {("depth", layout.padded(s.channels) > case.tile.depth) for s in case.sides}
    names = ("samples", "rows", "columns", "tiles", "batches", "channels", "depth")
    assert {(name, True) for name in names} <= kinds


BUSY = replace(
    next(c for c in CASES if c.name == "delta, two phases"), operands=torch.float16, unpool="max", channels=17, n=2
)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_launch_after_the_stop_writes_nothing(arch: str) -> None:
    launch = Launch(BUSY, arch)
    launch.control[0] = 1
    before = {name: t.clone() for name, t in launch.outputs().items()}
    launch.call(stop=True, finish=True, tol=1.0)()
    for name, t in launch.outputs().items():
        assert torch.equal(t.view(torch.uint8), before[name].view(torch.uint8)), name
    launch.call()()  # one that is not stoppable runs
    launch.check()


@pytest.mark.usefixtures("backwards")
def test_programs_in_any_order() -> None:
    launch = Launch(BUSY, "descriptors")
    call = launch.call(stop=True, finish=True, tol=1e-3)
    assert call.programs[0] > 4
    call()
    launch.check()
    assert launch.control.tolist() == [0, 3, 0]


def residuals(
    values: list[float], sweep: int, tol: float, *, stop: bool = True, launches: int = 1, rows: int = 16
) -> list[int]:
    """Control after the last of a sweep's launches that change the samples by ``values``, each in many programs."""
    n = len(values)
    case = Case("", n=n, size=(1, 1), addends=((1.0, False),), bias=False, old=False, box=(-9.0, 9.0), keep=False)
    launch = Launch(replace(case, channels=17, tile=replace(SMALL, rows=rows)), "descriptors")
    launch.control[1] = sweep
    change = torch.zeros(n, 17, 1, 1)
    change[:, 16, 0, 0] = torch.tensor(values)  # in the last block of channels
    addends = [Addend(filled(change), 1.0, False)]
    launch.fixed = (*launch.fixed[:4], addends)
    for i in range(launches):
        launch.call(stop=stop, finish=i == launches - 1, tol=tol)()
    residual = launch.residual.view(torch.float32)
    assert torch.equal(residual[sweep], change.abs().amax((1, 2, 3))) or torch.tensor(values).isnan().any()
    return launch.control.tolist()


SOME = [0.25, -0.5, 0.125]


def test_finish_counts_the_sweep_and_stops_at_the_tolerance() -> None:
    assert residuals(SOME, 2, 0.5) == [1, 3, 0]
    assert residuals(SOME, 2, 0.4999) == [0, 3, 0]
    assert residuals(SOME, 0, 0.5) == [0, 1, 0]  # the first sweep never stops
    assert residuals(SOME, 1, 0.5) == [1, 2, 0]
    assert residuals(SOME, 2, 0.5, stop=False) == [0, 3, 0]
    assert residuals([0.0], 2, 0.5) == [1, 3, 0]
    assert residuals(SOME, 2, 0.5, launches=3) == [1, 3, 0]  # the last launch of the sweep counts it, once


@pytest.mark.parametrize("at", [0, 1, 2])
def test_nan_never_stops(at: int) -> None:
    values = list(SOME)
    values[at] = nan
    assert residuals(values, 2, 100.0) == [0, 3, 0]


@pytest.mark.parametrize("at", [0, 127, 128, 259])
def test_every_sample_decides(at: int) -> None:
    """More samples than the last program looks at at once."""
    values = [0.1] * 260
    values[at] = 0.3
    assert residuals(values, 1, 0.31, rows=64) == [1, 2, 0]
    assert residuals(values, 1, 0.29, rows=64) == [0, 2, 0]


PLACES = ("old", "addend", "nudge", "bias", "below", "above", "weight", "pre")


def nan_cases() -> Iterator[tuple[Form, str]]:
    for form in FORMS:
        for place in PLACES:
            if (place == "bias" and form != "states") or (place == "pre" and form != "delta"):
                continue  # not read; and a NaN lies outside the box, where the tangent lets nothing pass
            yield form, place


@pytest.mark.parametrize(("form", "place"), list(nan_cases()))
def test_nan_surfaces(form: Form, place: str) -> None:
    """Wherever the reference has one, the state has, and the residual of its sample; the padding stays zero."""
    sides = (replace(BELOW, **LINE), replace(ABOVE, **LINE))
    case = Case(
        "", form=form, channels=17, sides=sides, addends=((0.5, False),), nudge="own", damping=0.7, unpool="avg"
    )
    launch = Launch(case, "pointers" if place in ("old", "below") else "descriptors")
    tensors = {
        "old": launch.old,
        "addend": launch.addends[0],
        "nudge": launch.nudge,
        "below": launch.neighbours[0][0],
        "above": launch.neighbours[1][0],
        "weight": launch.neighbours[1][1],
        "pre": launch.pre,
        "bias": launch.bias,
    }
    t = tensors[place]
    assert t is not None
    t[(1, 2, 4, 2) if t.dim() == 4 and place != "weight" else (1, 2, 0, 0) if t.dim() == 4 else (2,)] = nan
    loops = list(launch.fixed[3])
    loops[0] = replace(loops[0], a=filled(launch.neighbours[0][0]))
    matrix = layout.feedback_matrix(launch.neighbours[1][1], launch.shape, torch.float32)
    loops[1] = replace(loops[1], a=filled(launch.neighbours[1][0]), b=matrix)
    addend = Addend(filled(launch.addends[0]), 0.5, False)
    launch.fixed = (*launch.fixed[:3], loops, [addend])
    changes = {name: None if (x := tensors[name]) is None else filled(x) for name in ("old", "nudge", "pre")}
    if launch.bias is not None:
        launch.arguments["bias"][:17] = launch.bias
    launch.call(**changes)()
    expected, _ = launch.expected()
    found = layout.as_tensor(launch.new, launch.shape)
    assert expected.isnan().any()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(launch.residual[2].view(torch.float32).isnan(), expected.flatten(1).isnan().any(1))
    padding_is_zero("new", launch.new, 17)
    assert launch.unpooled is not None
    padding_is_zero("unpooled", launch.unpooled, 17)
    assert torch.equal(launch.unpooled[..., ::2, ::2, :17].isnan(), launch.new[..., :17].isnan())


def test_nan_of_the_old_state_is_in_the_residual_without_damping() -> None:
    """With eta = 1 the old state is not part of the new one, so the state recovers; the residual still tells."""
    launch = Launch(Case("", addends=((1.0, False),)), "descriptors")
    old = filled(launch.old)
    old[1, 2, 1, 0] = nan
    launch.call(old=old)()
    assert not launch.new.isnan().any()
    assert launch.residual[2].view(torch.float32).isnan().tolist() == [False, True, False]


SPECIAL = [float("inf"), -float("inf"), nan, 0.0, -0.0, 1e30, -1e30, 0.3, -0.3, 5.0, -5.0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("form", FORMS)
def test_special_values_as_in_the_reference(form: Form) -> None:
    values = torch.tensor(SPECIAL)
    pres = torch.tensor([-float("inf"), -0.5, 0.0, 0.5, 1.0, 1.5, float("inf"), nan])
    case = Case("", form=form, n=len(pres), size=(1, 1), channels=len(SPECIAL), addends=((1.0, False),), bias=False)
    launch = Launch(replace(case, old=False, scale=2.0, keep=False), "descriptors")
    launch.addends = [values.expand(len(pres), -1)[..., None, None]]
    launch.fixed = (*launch.fixed[:4], [Addend(filled(launch.addends[0]), 1.0, False)])
    if form != "states":
        launch.pre = pres.view(-1, 1, 1, 1).expand(-1, len(SPECIAL), -1, -1)
    launch.call(pre=None if launch.pre is None else filled(launch.pre))()
    new, _ = launch.expected()
    torch.testing.assert_close(layout.as_tensor(launch.new, launch.shape).double(), new, equal_nan=True, rtol=0, atol=0)


def test_small_increments_keep_their_digits() -> None:
    """Inside the box the delta is the increment itself: nothing is rounded against the free preactivation."""
    increment = torch.tensor([[1e-9, -3e-12, 7e-20]])[..., None, None]
    case = Case("", n=1, size=(1, 1), form="delta", addends=((1.0, False),), old=False)
    launch = Launch(case, "descriptors")
    launch.fixed = (*launch.fixed[:4], [Addend(filled(increment), 1.0, False)])
    launch.call(pre=torch.full_like(launch.new, 0.7))()
    assert torch.equal(layout.as_tensor(launch.new, launch.shape), increment)


def test_the_second_phase_is_the_mirror_of_the_first() -> None:
    """Opposite nudges on the same states, and nothing else that differs."""
    case = Case("", n=2, phases=2, form="tangent", nudge="shared", old=False)
    launch = Launch(case, "descriptors")
    launch.call()()
    assert torch.equal(launch.new[:2], -launch.new[2:])
    assert (launch.new != 0).any()


def test_as_many_loops_and_addends_as_the_kernel_takes() -> None:
    launch = Launch(Case("", addends=((1.0, False),) * 2, sides=(replace(BELOW, **LINE),) * 4), "pointers")
    launch.call()()
    launch.check()
