"""The ops ``drive``, ``relax_step``, ``contrast`` and ``relax`` on tensors, arguments as of torch.ops.ep_kernels.*.

They take what PyTorch's conv2d takes: strided convolutions go through ATen (:mod:`ep_kernels.reference`), numbers of
channels that are no multiple of 16 through padded copies, float64 through the reference with a log line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import reference, relax_op
from ..graphs import context
from ..network import POOLS
from ..plan import FORMS
from ..precision import OPERANDS
from . import layout
from .arch import Arch, arch_of
from .launch import (
    MAX,
    Addend,
    Dynamics,
    Loop,
    add_up_call,
    contrast_calls,
    difference_call,
    difference_programs,
    drive_call,
    drive_loop,
    feedback_loop,
    step_call,
)
from .runner import log_dtype
from .runner import relax as relax_program

F = TypeVar("F", bound=Callable[..., Any])
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def on_its_device(op: F) -> F:
    """Run an op on the device of its first argument, whichever is current."""

    @wraps(op)
    def run(first: Tensor, *args: Any, **options: Any) -> Any:
        with context(first):
            return op(first, *args, **options)

    return run  # type: ignore[return-value]


def products() -> str:
    """How float32 operands are multiplied: as PyTorch's own matrix products are."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@on_its_device
def drive(
    source: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    pool: int,
    winners: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`ep_kernels.reference.drive`; the second result is empty unless winners are found."""
    none = source.new_empty(0, dtype=torch.uint8)
    if not _fuses(source, stride, linear=weight.dim() == 2):
        pooled, won = reference.drive(source, weight, stride, padding, POOLS[pool], winners)
        return pooled, none if won is None or winners is not None else won
    arch = arch_of(source.device)
    shape, size, loop = _drive(source, weight, padding, pool)
    n = source.shape[0]
    out = layout.new_map(n, shape, torch.float32, source.device)
    live = pool == MAX and winners is None
    won = layout.new_map(n, shape, torch.uint8, source.device) if live else None
    given = _padded(_repeated(winners, n), torch.uint8) if winners is not None and pool == MAX else None
    control = torch.zeros(3, dtype=torch.int32, device=source.device)
    drive_call(
        arch,
        products(),
        loop,
        size=size,
        pool=pool,
        phases=1,
        drive=out,
        control=control,
        winners=given,
        winners_out=won,
    )()
    return _result(out, shape, source.dtype), none if won is None else _result(won, shape, torch.uint8)


@on_its_device
def relax_step(
    state: Tensor,
    bias: Tensor | None,
    drives: Sequence[Tensor],
    drive_gains: Sequence[float],
    below: Sequence[Tensor],
    below_weights: Sequence[Tensor],
    below_geometry: Sequence[int],
    below_gains: Sequence[float],
    above: Sequence[Tensor],
    above_weights: Sequence[Tensor],
    above_winners: Sequence[Tensor],
    above_geometry: Sequence[int],
    above_gains: Sequence[float],
    nudge: Tensor | None,
    nudge_gain: float,
    preactivation: Tensor | None,
    form: int,
    phases: int,
    damping: float,
    slope: float,
    lo: float,
    hi: float,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One relaxation step of one node: the new state, the residual [n] and gamma a (empty unless ``keep``)."""
    n, shape, device = state.shape[0], tuple(state.shape[1:]), state.device
    arch = arch_of(device)
    terms = [(t, gain) for t, gain in zip(drives, drive_gains, strict=True)]
    loops: list[Loop] = []
    for i, (source, weight, gain) in enumerate(zip(below, below_weights, below_gains, strict=True)):
        stride, padding, pool = _geometry(below_geometry, i)
        if pool == 0 and source.shape[0] == n and len(loops) < 4 and _fuses(source, stride, linear=weight.dim() == 2):
            loops.append(_drive(source, weight, padding, pool, gain)[2])
        else:
            terms.append((drive(source, weight, stride, padding, pool)[0], gain))
    for i, (top, weight, gain) in enumerate(zip(above, above_weights, above_gains, strict=True)):
        stride, padding, pool = _geometry(above_geometry, i)
        won = above_winners[i] if POOLS[pool] == "max" else None
        if (
            len(loops) < 4
            and _fuses(state, stride, linear=weight.dim() == 2)
            and not (weight.dim() == 2 and state.dim() == 4)
        ):
            loops.insert(0, _feedback(top, weight, shape, padding, pool, won, gain))
        else:
            back = reference.feedback(top, weight, shape, stride, padding, POOLS[pool], won)
            terms.append((back, gain))
    if preactivation is not None and phases == 2 and preactivation.shape[0] * 2 != n:
        if nudge is not None:  # the kernel reads preactivations of one phase: make it one phase of n samples
            nudge = torch.cat([_repeated(nudge, n)[: n // 2], -_repeated(nudge, n)[n // 2 :]])
        phases = 1
    addends = [_addend(t, gain, n, phases) for t, gain in terms]
    while len(addends) > 2:
        a, b = addends.pop(), addends.pop()
        addends.append(Addend(a.gain * _all(a, n) + b.gain * _all(b, n), 1.0, False))
    pushed = None if nudge is None else _addend(nudge, nudge_gain, n, phases)
    new = layout.new_map(n, shape, state.dtype, device)
    pre_out = layout.new_map(n, shape, torch.float32, device) if keep else None
    residual = torch.zeros(1, n, dtype=torch.int32, device=device)
    step_call(
        arch,
        products(),
        Dynamics(form, damping, slope, lo, hi, scale),
        loops,
        addends,
        channels=shape[0],
        phases=phases,
        new=new,
        residual=residual,
        control=torch.zeros(3, dtype=torch.int32, device=device),
        old=_padded(state, state.dtype),
        bias=None if bias is None or FORMS[form] != "states" else _padded(bias[None], torch.float32).view(-1),
        nudge=None if pushed is None else pushed.tensor,
        nudge_gain=nudge_gain,
        nudge_shared=pushed is not None and pushed.shared,
        pre=None
        if preactivation is None or FORMS[form] == "states"
        else _padded(_repeated(preactivation, n // phases), torch.float32),
        pre_out=pre_out,
    )()
    return (
        _result(new, shape, state.dtype),
        residual.view(torch.float32)[0].to(state.dtype),
        state.new_empty(0) if pre_out is None else _result(pre_out, shape, state.dtype),
    )


@on_its_device
def contrast(
    source: Tensor,
    source_delta: Tensor | None,
    target: Tensor,
    target_delta: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    pool: int,
    winners: Tensor | None,
    source_gain: float,
    target_gain: float,
    centre: float,
    scale: float,
    operands: int = 0,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`ep_kernels.reference.contrast`: gradients of the weight and the bias, in ``dtype`` (None: the source's).

    Two passes make ``d`` and ``m`` of the two ends (at the winners, in the operands' dtype), one launch multiplies
    them, split over positions, and one adds the parts up in a fixed order.
    """
    kind = OPERANDS[operands]
    if not _fuses(source, stride, linear=len(weight_shape) == 2):
        if dtype is not None:
            source, target, target_delta = source.to(dtype), target.to(dtype), target_delta.to(dtype)
            source_delta = None if source_delta is None else source_delta.to(dtype)
        return reference.contrast(
            source, source_delta, target, target_delta, weight_shape, stride, padding, POOLS[pool], winners,
            source_gain=source_gain, target_gain=target_gain, centre=centre, scale=scale, operands=kind,
        )  # fmt: skip
    arch, device = arch_of(source.device), source.device
    linear = len(weight_shape) == 2
    kernel = (1, 1) if linear else (weight_shape[2], weight_shape[3])
    pads = (0, 0) if linear else (padding[0], padding[1])
    size = [1, 1] if linear else [d + 2 * p - k + 1 for d, p, k in zip(source.shape[2:], pads, kernel, strict=True)]
    out = dtype or source.dtype
    operand = kind if isinstance(kind, torch.dtype) else out
    live = pool == MAX and winners is not None and winners.shape[0] == 2 * target.shape[0]
    diff_t, mean_t, sums = _ends(arch, target, target_delta, target_gain, centre, pool, winners, size, operand, live)
    diff_s: Tensor | None = None
    if source_delta is None:
        mean_s = _padded(source, operand)
    else:
        diff_s, mean_s, _ = _ends(
            arch, source, source_delta, source_gain, centre, 0, None, source.shape[2:], operand, False
        )
    if linear:
        mean_s = mean_s.view(mean_s.shape[0], 1, 1, -1)
        diff_s = None if diff_s is None else diff_s.view(mean_s.shape)
    real = mean_s.shape[3] if linear else source.shape[1]
    weight = torch.empty(weight_shape[0], kernel[0] * kernel[1], real, dtype=torch.float32, device=device)
    last_gain = target_gain if source_delta is None else source_gain
    for call in contrast_calls(
        arch,
        "tf32" if kind == "tf32" else "ieee",
        diff_t,
        mean_s,
        None if diff_s is None else mean_t,
        diff_s,
        kernel,
        pads,
        target_gain / last_gain,
        scale * last_gain,
        weight,
    ):
        call()
    bias = torch.empty(weight_shape[0], dtype=torch.float32, device=device)
    add_up_call(sums, bias, weight_shape[0], sums.shape[1], scale * target_gain)()
    if linear:
        shape = source.shape[1:]
        h, w, c = layout.map_shape(shape)
        flat = weight.view(weight_shape[0], h, w, -1)[..., :c].permute(0, 3, 1, 2).reshape(*weight_shape)
        return flat.to(out), bias.to(out)
    return weight.view(weight_shape[0], *kernel, real).permute(0, 3, 1, 2).to(out), bias.to(out)


def relax(*args: object) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """The op ``relax`` on its flat arguments."""
    r = relax_op.relaxation_of(*args)  # type: ignore[arg-type]
    return relax_op.flatten(relax_program(r), r)


def _ends(
    arch: Arch,
    free: Tensor,
    delta: Tensor,
    gain: float,
    centre: float,
    pool: int,
    winners: Tensor | None,
    size: Sequence[int],
    dtype: torch.dtype,
    live: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``d`` and ``m`` of one end, [B, H, W, padded C], unpooled where the connection pools; partial sums of ``d``."""
    b, channels = free.shape[0], free.shape[1]
    shape = (channels, *size) if free.dim() == 4 else (channels,)
    odd = pool and (size[0] % 2 or size[1] % 2)  # a last row or column that is in no window stays zero
    make = layout.new_map if odd else layout.empty_map
    diff, mean = make(b, shape, dtype, free.device), make(b, shape, dtype, free.device)
    states, deltas = layout.as_map(free).contiguous(), layout.as_map(delta).contiguous()
    won = None
    if winners is not None and pool == MAX:
        won = layout.as_map(_repeated(winners, 2 * b if live else b)).contiguous()
    positions = states.shape[0] * states.shape[1] * states.shape[2]
    rows = difference_programs(arch, positions)
    sums = torch.empty(rows, diff.shape[3], dtype=torch.float32, device=free.device)
    difference_call(
        arch,
        states,
        deltas,
        won,
        diff,
        mean,
        sums,
        channels=channels,
        phases=deltas.shape[0] // b,
        pool=pool,
        live=live,
        mean_gain=centre * gain,
        gain=gain,
    )()
    return diff, mean, sums


def _fuses(source: Tensor, stride: Sequence[int], *, linear: bool) -> bool:
    """Whether the kernels take this connection; else it goes through ATen (a dtype says so once)."""
    if source.dtype not in DTYPES:
        log_dtype(str(source.dtype))
        return False
    return source.numel() > 0 and (linear or tuple(stride) == (1, 1))


def _geometry(flat: Sequence[int], i: int) -> tuple[Sequence[int], Sequence[int], int]:
    return flat[5 * i : 5 * i + 2], flat[5 * i + 2 : 5 * i + 4], flat[5 * i + 4]


def _drive(
    source: Tensor, weight: Tensor, padding: Sequence[int], pool: int, gain: float = 1.0
) -> tuple[tuple[int, ...], tuple[int, int], Loop]:
    """Shape of the pooled drive without batch, the map's size before pooling, and the K loop."""
    shape = tuple(source.shape[1:])
    matrix = layout.drive_matrix(weight, shape, source.dtype)
    operand = _padded(source, source.dtype)
    if weight.dim() == 2:
        flat = operand.view(operand.shape[0], 1, 1, -1)
        return (weight.shape[0],), (1, 1), drive_loop(flat, matrix, (1, 1), (0, 0), gain)
    kernel = weight.shape[2:]
    h, w = (d + 2 * p - k + 1 for d, p, k in zip(shape[1:], padding, kernel, strict=True))
    out = (weight.shape[0], h // 2, w // 2) if pool else (weight.shape[0], h, w)
    return out, (h, w), drive_loop(operand, matrix, kernel, padding, gain)


def _feedback(
    top: Tensor,
    weight: Tensor,
    shape: tuple[int, ...],
    padding: Sequence[int],
    pool: int,
    winners: Tensor | None,
    gain: float,
) -> Loop:
    matrix = layout.feedback_matrix(weight, shape, top.dtype)
    if weight.dim() == 2:
        return feedback_loop(_padded(top, top.dtype), matrix, (1, 1), (0, 0), gain)
    kernel = weight.shape[2:]
    if pool:
        size = [d + 2 * p - k + 1 for d, p, k in zip(shape[1:], padding, kernel, strict=True)]
        top = reference.unpool_map(top, POOLS[pool], size, winners)
    return feedback_loop(_padded(top, top.dtype), matrix, kernel, padding, gain)


def _padded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, H, W, padded C]: the tensor itself where it is laid out so, else a copy."""
    view = layout.as_map(x)
    if view.dtype == dtype and view.shape[3] % layout.PAD == 0 and view.is_contiguous() and view.data_ptr() % 16 == 0:
        return view
    out = layout.new_map(x.shape[0], tuple(x.shape[1:]), dtype, x.device)
    layout.fill(out, x)
    return out


def _result(buffer: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A fresh buffer as the op's dense output."""
    view = layout.as_tensor(buffer, shape)
    if buffer.shape[3] != shape[0]:
        view = layout.take(buffer, shape)
    return view.to(dtype)


def _repeated(x: Tensor, n: int) -> Tensor:
    return x if x.shape[0] == n else x.repeat(n // x.shape[0], *[1] * (x.dim() - 1))


def _addend(t: Tensor, gain: float, n: int, phases: int) -> Addend:
    """Float32 in the kernels' layout; of one phase's samples, or of all."""
    shared = phases == 2 and t.shape[0] * 2 == n
    return Addend(_padded(t if shared else _repeated(t, n), torch.float32), gain, shared)


def _all(a: Addend, n: int) -> Tensor:
    return _repeated(a.tensor, n)
