"""One kernel launch as an object: arguments, grid and tile, made once and called many times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .arch import INTERPRETER, Arch
from .kernels import contrast as contrast_kernels
from .kernels import drive as drive_kernels
from .kernels import head as head_kernels
from .kernels import step as step_kernels
from .tiling import Problem, Tile, box_of, choose_tile, flat_box

NONE, MAX, AVG = range(3)  # POOL in the kernels: the order of network.POOLS
STATES, DELTA, TANGENT = range(3)  # FORM in the kernels: the order of plan.FORMS


@dataclass(frozen=True)
class Call:
    """A kernel, bound to its arguments. The current device and stream are those of the call."""

    kernel: Any
    programs: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Of the compiler. ``enable_fp_fusion`` is its default, but triton 3.9 warns unless it is named. ``maxnreg`` is
        what the hardware has: without it, ptxas spills a few registers when one more program fits that way."""
        return {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": True,
            "maxnreg": registers(self.warps),
        }

    def __call__(self) -> None:
        self.kernel[self.programs](**self.arguments, **self.options)


def registers(warps: int) -> int:
    """The most that a thread can have: 65,536 for all of a program, 255 for one."""
    return min(255, 65536 // (32 * warps))


@dataclass(frozen=True)
class Loop:
    """One K loop: the map ``a`` [N, H, W, C], the matrix ``b`` [C_out, taps C], and where a tap reads (tiles.py)."""

    a: Tensor
    b: Tensor
    kernel: tuple[int, int]
    offset: tuple[int, int]
    flip: bool
    gain: float = 1.0


def drive_loop(a: Tensor, b: Tensor, kernel: Sequence[int], padding: Sequence[int], gain: float = 1.0) -> Loop:
    """A drive: tap (r, s) of an output position (h, w) reads (h + r - padding, ...)."""
    return Loop(a, b, (kernel[0], kernel[1]), (-padding[0], -padding[1]), False, gain)


def feedback_loop(a: Tensor, b: Tensor, kernel: Sequence[int], padding: Sequence[int], gain: float = 1.0) -> Loop:
    """A feedback: a correlation with the flipped kernel."""
    return Loop(a, b, (kernel[0], kernel[1]), (padding[0] - kernel[0] + 1, padding[1] - kernel[1] + 1), True, gain)


@dataclass(frozen=True)
class Addend:
    """A finished drive or feedback, float32; ``shared``: of the samples of one phase."""

    tensor: Tensor
    gain: float
    shared: bool


@dataclass(frozen=True)
class Dynamics:
    """Constants of an update."""

    form: int
    damping: float
    slope: float
    lo: float
    hi: float
    scale: float = 1.0


def step_call(
    arch: Arch,
    products: str,
    dynamics: Dynamics,
    loops: Sequence[Loop],
    addends: Sequence[Addend],
    *,
    channels: int,
    phases: int,
    new: Tensor,
    residual: Tensor,
    control: Tensor,
    old: Tensor | None = None,
    operand: Tensor | None = None,
    bias: Tensor | None = None,
    nudge: Tensor | None = None,
    nudge_gain: float = 0.0,
    nudge_shared: bool = False,
    pre: Tensor | None = None,
    pre_out: Tensor | None = None,
    unpooled: Tensor | None = None,
    winners: Tensor | None = None,
    winners_shared: bool = False,
    stop: bool = False,
    finish: bool = False,
    tol: float = 0.0,
    tile: Tile | None = None,
) -> Call:
    """kernels/step.py on buffers: ``new`` [n, H, W, padded C] of ``channels`` real ones, ``residual`` int32 [sweeps,
    n], ``control`` int32 [3]. At most four loops and two addends."""
    loops = [loop for loop in loops if loop.gain != 0]
    n, h, w, c = new.shape
    size = loops[0].a.element_size() if loops else 4
    depth = sum(loop.b.shape[1] for loop in loops)
    tile = tile or choose_tile(Problem("step", n, h, w, c, depth, size, False, products if loops else "ieee"), arch)
    tile = _short_steps(tile, products, size, arch)
    tn, th, tw = box_of(tile.rows, n // phases, h, w)
    bk = _depth(tile, [loop.a.shape[3] for loop in loops])
    arguments: dict[str, Any] = {}
    for i in range(4):
        loop = loops[i] if i < len(loops) else None
        after = loops[i + 1].gain if i + 1 < len(loops) else 1.0
        arguments[f"m{i}"] = loop.gain / after if loop else 1.0
        arguments |= _loop(i, loop, (tn, th, tw, bk), (tile.columns, bk), arch)
    first, second = [*addends, None, None][:2]
    arguments |= dict(
        bias=bias,
        finished0=first and first.tensor,
        finished1=second and second.tensor,
        f0=first.gain if first else 0.0,
        f1=second.gain if second else 0.0,
        nudge=nudge,
        nudge_gain=nudge_gain,
        old=old,
        pre=pre,
        winners=winners,
        new=new,
        operand=operand,
        unpooled=unpooled,
        pre_out=pre_out,
        residual=residual,
        control=control,
        N=n,
        H=h,
        W=w,
        CO=c,
        C=channels,
        HU=unpooled.shape[1] if unpooled is not None else 0,
        WU=unpooled.shape[2] if unpooled is not None else 0,
        damping=float(dynamics.damping),
        slope=float(dynamics.slope),
        lo=float(dynamics.lo),
        hi=float(dynamics.hi),
        scale=float(dynamics.scale),
        tol=float(tol),
        FORM=dynamics.form,
        PHASES=phases,
        ETA=1 if dynamics.damping == 1 else 2 if dynamics.damping > 1 else 0,
        SHARED0=bool(first and first.shared),
        SHARED1=bool(second and second.shared),
        NUDGE_SHARED=nudge_shared,
        WINNERS_SHARED=winners_shared,
        STOP=stop,
        FINISH=finish,
        TN=tn,
        TH=th,
        TW=tw,
        BN=tile.columns,
        BK=bk,
        SLICE=min(tile.slice, tile.columns),
        TMA=arch.tma,
        PRODUCTS=products,
    )
    grid = _grid(n, h, w, c, phases, (tn, th, tw), tile.columns)
    return Call(step_kernels.relax_step, (grid,), arguments, tile.warps, tile.stages)


def drive_call(
    arch: Arch,
    products: str,
    loop: Loop,
    *,
    size: Sequence[int],
    pool: int,
    phases: int,
    drive: Tensor,
    control: Tensor,
    winners: Tensor | None = None,
    winners_shared: bool = False,
    winners_out: Tensor | None = None,
    state: Tensor | None = None,
    unpooled: Tensor | None = None,
    stop: bool = False,
    tile: Tile | None = None,
) -> Call:
    """kernels/drive.py on buffers. ``size`` is the map before pooling; ``winners`` are frozen ones; ``loop.gain`` is
    the drive's. With ``unpooled``, P^-1 of ``state`` is written there."""
    n, hp, wp, c = drive.shape
    h, w = (2 * hp, 2 * wp) if pool != NONE else size  # an odd last row or column is in no window
    problem = Problem("drive", n, h, w, c, loop.b.shape[1], loop.a.element_size(), pool != NONE, products)
    tile = _short_steps(tile or choose_tile(problem, arch), products, problem.element_size, arch)
    tn, th, tw = box_of(tile.rows, n // phases, h, w, pool != NONE)
    bk = _depth(tile, [loop.a.shape[3]])
    sides = _loop(0, loop, (tn, th, tw, bk), (tile.columns, bk), arch)
    arguments = {name.removesuffix("0"): value for name, value in sides.items()}
    arguments = {("HA" if k == "H" else "WA" if k == "W" else "CA" if k == "C" else k): v for k, v in arguments.items()}
    arguments |= dict(
        winners=winners,
        drive=drive,
        winners_out=winners_out,
        state=state,
        unpooled=unpooled,
        control=control,
        N=n,
        H=h,
        W=w,
        CO=c,
        HP=hp,
        WP=wp,
        HU=unpooled.shape[1] if unpooled is not None else 0,
        WU=unpooled.shape[2] if unpooled is not None else 0,
        gain=float(loop.gain),
        POOL=pool,
        FROZEN=winners is not None,
        PHASES=phases,
        SHARED=winners_shared,
        STOP=stop,
        TN=tn,
        TH=th,
        TW=tw,
        BN=tile.columns,
        BK=bk,
        SLICE=min(tile.slice, tile.columns),
        TMA=arch.tma,
        PRODUCTS=products,
    )
    grid = _grid(n, h, w, c, phases, (tn, th, tw), tile.columns)
    return Call(drive_kernels.drive, (grid,), arguments, tile.warps, tile.stages)


def head_call(
    state: Tensor | None,
    free: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    total: Tensor,
    control: Tensor,
    *,
    phases: int,
    softmax: bool,
    weight_of_loss: float,
    temperature: float,
    inverse_scale: float,
    add: bool,
    stop: bool = False,
) -> Call:
    """kernels/head.py on buffers: ``total`` [n, H, W, padded C], ``weight`` [O, H W padded C]."""
    n, features = total.shape[0], weight.shape[1]
    outputs = weight.shape[0]
    padded = max(16, _power_of_two(outputs))
    samples, wide, warps = (16, 64, 4) if padded <= 16 else (16, 16, 8)  # weights of all outputs lie in registers
    arguments = dict(
        state=state,
        free=free,
        weight=weight,
        bias=bias,
        target=target,
        total=total,
        control=control,
        N=n,
        F=features,
        O=outputs,
        inverse_scale=float(inverse_scale),
        factor=float(weight_of_loss * (temperature if softmax else 1.0)),
        temperature=float(temperature),
        PHASES=phases,
        SOFTMAX=softmax,
        ADD=add,
        STOP=stop,
        BS=samples,
        BF=wide,
        BO=padded,
    )
    return Call(head_kernels.head_gradient, (math.ceil(n / samples), math.ceil(features / wide)), arguments, warps, 2)


def contrast_calls(
    arch: Arch,
    products: str,
    diff_above: Tensor,
    mean_below: Tensor,
    mean_above: Tensor | None,
    diff_below: Tensor | None,
    kernel: tuple[int, int],
    padding: tuple[int, int],
    ratio: float,
    scale: float,
    out: Tensor,
    tile: Tile | None = None,
) -> list[Call]:
    """kernels/contrast.py on buffers, then the sum over splits into ``out`` [C_dst, taps, C_src] (real channels)."""
    n, h, w, co = diff_above.shape
    _, hb, wb, ci = mean_below.shape
    taps = kernel[0] * kernel[1]
    problem = Problem("contrast", n, h, w, co, taps * ci, diff_above.element_size(), False, products)
    tile = _short_steps(tile or choose_tile(problem, arch), products, problem.element_size, arch)
    bm, bn = min(tile.rows, _power_of_two(co)), min(tile.columns, _power_of_two(ci))
    flat = flat_box(tile.depth, h, w)
    tn, th, tw = flat or box_of(tile.depth, n, h, w)
    tiles = math.ceil(n / tn) * math.ceil(h / th) * math.ceil(w / tw)
    blocks = math.ceil(co / bm) * taps * math.ceil(ci / bn)
    share = math.ceil(tiles / splits_of(blocks, tiles, arch))
    splits = math.ceil(tiles / share)
    partial = torch.empty(splits, co, taps, ci, dtype=torch.float32, device=out.device)
    above, below = (tile.depth, bm) if flat else (tn, th, tw, bm), (tn, th, tw, bn)
    if flat:
        diff_above = diff_above.view(-1, co)
        mean_above = None if mean_above is None else mean_above.view(-1, co)
    arguments = dict(
        diff_above=_operand(diff_above, above, arch),
        mean_below=_operand(mean_below, below, arch),
        mean_above=None if mean_above is None else _operand(mean_above, above, arch),
        diff_below=None if diff_below is None else _operand(diff_below, below, arch),
        partial=partial,
        N=n,
        H=h,
        W=w,
        CO=co,
        HB=hb,
        WB=wb,
        CI=ci,
        OH=-padding[0],
        OW=-padding[1],
        tiles=tiles,
        share=share,
        ratio=float(ratio),
        TAPS=taps,
        KW=kernel[1],
        FLAT=flat is not None,
        TN=tn,
        TH=th,
        TW=tw,
        BM=bm,
        BN=bn,
        TMA=arch.tma,
        PRODUCTS=products,
    )
    products_call = Call(contrast_kernels.contrast, (blocks * splits,), arguments, tile.warps, tile.stages)
    return [products_call, add_up_call(partial.view(splits, -1), out, out.shape[2], ci, scale)]


def splits_of(blocks: int, tiles: int, arch: Arch) -> int:
    """Into how many parts the positions go: the fewest rounds over the multiprocessors times tiles of a part."""
    most = min(tiles, max(1, 4 * arch.processors // blocks))
    return min(range(1, most + 1), key=lambda s: (math.ceil(blocks * s / arch.processors) * math.ceil(tiles / s), s))


def add_up_call(partial: Tensor, out: Tensor, columns: int, padded_columns: int, scale: float) -> Call:
    """``out = scale * partial.sum(0)`` without padding columns; ``out`` may have fewer rows than ``partial``."""
    rows = min(32, _power_of_two(partial.shape[0]))
    block = 1024 // rows
    arguments = dict(
        partial=partial,
        out=out,
        rows=partial.shape[0],
        size=out.numel(),
        stride=partial.shape[1],
        C=columns,
        CP=padded_columns,
        scale=float(scale),
        ROWS=rows,
        BLOCK=block,
    )
    return Call(contrast_kernels.add_up, (math.ceil(out.numel() / block),), arguments, 4, 1)


def difference_call(
    arch: Arch,
    free: Tensor,
    delta: Tensor,
    winners: Tensor | None,
    diff: Tensor,
    mean: Tensor,
    bias: Tensor,
    *,
    channels: int,
    phases: int,
    pool: int,
    live: bool,
    mean_gain: float,
    gain: float,
) -> Call:
    """kernels/contrast.py, ``difference_and_mean``: ``free`` [B, H, W, C] dense, ``bias`` [programs, padded C]."""
    b, h, w, _ = free.shape
    rows, wide = 32, 64
    _, hu, wu, cp = diff.shape
    arguments = dict(
        free=free,
        delta=delta,
        winners=winners,
        diff=diff,
        mean=mean,
        bias=bias,
        second=b * h * w * channels,
        P=b * h * w,
        H=h,
        W=w,
        C=channels,
        CP=cp,
        HU=hu,
        WU=wu,
        mean_gain=float(mean_gain),
        gain=float(gain),
        PHASES=phases,
        POOL=pool,
        LIVE=live,
        BP=rows,
        BC=wide,
    )
    return Call(contrast_kernels.difference_and_mean, (bias.shape[0], math.ceil(cp / wide)), arguments, 8, 1)


def difference_programs(arch: Arch, positions: int) -> int:
    """Rows of partial bias sums: enough programs to fill the device, each over many positions."""
    return max(1, min(math.ceil(positions / 32), 4 * arch.processors))


def _loop(i: int, loop: Loop | None, box: tuple[int, ...], block: tuple[int, int], arch: Arch) -> dict[str, Any]:
    if loop is None:
        ints = dict.fromkeys((f"H{i}", f"W{i}", f"C{i}", f"OH{i}", f"OW{i}"), 0)
        return {f"a{i}": None, f"b{i}": None, **ints, f"TAPS{i}": 1, f"KW{i}": 1, f"FLIP{i}": False}
    _, h, w, c = loop.a.shape
    return {
        f"a{i}": _operand(loop.a, box, arch),
        f"b{i}": _operand(loop.b, block, arch),
        f"H{i}": h,
        f"W{i}": w,
        f"C{i}": c,
        f"OH{i}": loop.offset[0],
        f"OW{i}": loop.offset[1],
        f"TAPS{i}": loop.kernel[0] * loop.kernel[1],
        f"KW{i}": loop.kernel[1],
        f"FLIP{i}": loop.flip,
    }


def _operand(tensor: Tensor, box: Sequence[int], arch: Arch) -> Any:
    """What a kernel loads tiles of ``box`` through. Descriptors are made on the host: a captured launch keeps them."""
    if not arch.tma:
        return tensor
    strides = [math.prod(tensor.shape[i + 1 :]) for i in range(tensor.dim())]  # of sizes of 1 torch may say anything
    return TensorDescriptor(tensor, list(tensor.shape), strides, list(box))


def _short_steps(tile: Tile, products: str, size: int, arch: Arch) -> Tile:
    """The tile, shallower where products have no tensor cores: they hold a whole step's operands in registers."""
    if products != "ieee" or size != 4 or arch.name == INTERPRETER.name:
        return tile
    return replace(tile, depth=min(tile.depth, 16))  # the least that tl.dot takes before triton 3.9


def _depth(tile: Tile, channels: Sequence[int]) -> int:
    """Input channels a step of the K loop: no more than the widest map has."""
    return min(tile.depth, _power_of_two(max(channels, default=16)))


def _grid(n: int, h: int, w: int, c: int, phases: int, box: tuple[int, int, int], columns: int) -> int:
    tn, th, tw = box
    return phases * math.ceil(n // phases / tn) * math.ceil(h / th) * math.ceil(w / tw) * math.ceil(c / columns)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
