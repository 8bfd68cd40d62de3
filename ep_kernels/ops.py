"""The ops ``torch.ops.ep_kernels.*`` as PyTorch sees them: loading, fake implementations, autograd.

Schemas are in csrc/schemas.h. On CUDA tensors they run the library's own kernels where it was built with them, else
Triton's. ``triton_drive``, ``triton_relax_step``, ``triton_contrast`` and ``triton_relax`` have the same schemas and
always run Triton's: on CUDA tensors, and under TRITON_INTERPRET on those of the CPU.

Fake implementations give shapes to torch.compile and FakeTensor; ``drive`` is differentiable (its adjoint is the
feedback), the others refuse to be differentiated and say what to use instead. Under torch.autocast they compute in
float32: the precision of a relaxation is chosen by ``RelaxConfig.operands``.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _library, reference
from .network import POOLS
from .precision import STORAGES

NAMES = ("drive", "relax_step", "contrast", "relax")

_lock = threading.RLock()
_ready = False
_native: bool | None = None  # known once the library is loaded


def ensure() -> None:
    """Load the compiled library and register what Python adds to its ops, once.

    Raises:
        ImportError: the library cannot be loaded, with the reason. RuntimeError: EP_KERNELS_ISA names no instruction
            set that this processor and build run.
    """
    global _ready
    if _ready:
        return
    with _lock:
        if not _ready:
            has_cuda()
            torch.ops.ep_kernels.cpu_isa()  # a wrong EP_KERNELS_ISA is an error now, not at the first pass
            _register()
            _ready = True


def has_cuda() -> bool:
    """Whether the compiled library (loaded now if it was not) has CUDA kernels of its own.

    Raises:
        ImportError: the library cannot be loaded, with the reason.
    """
    global _native
    with _lock:
        if _native is None:  # asked before Python registers anything for that key
            _library.load()
            _native = torch._C._dispatch_has_kernel_for_dispatch_key("ep_kernels::relax", "CUDA")
        return _native


def drive(*args: Any) -> tuple[Tensor, Tensor]:
    """``torch.ops.ep_kernels.drive``."""
    ensure()
    return torch.ops.ep_kernels.drive(*args)  # type: ignore[no-any-return]


def relax_step(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.ops.ep_kernels.relax_step``."""
    ensure()
    return torch.ops.ep_kernels.relax_step(*args)  # type: ignore[no-any-return]


def contrast(*args: Any) -> tuple[Tensor, Tensor]:
    """``torch.ops.ep_kernels.contrast``."""
    ensure()
    return torch.ops.ep_kernels.contrast(*args)  # type: ignore[no-any-return]


def relax(*args: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """``torch.ops.ep_kernels.relax``."""
    ensure()
    return torch.ops.ep_kernels.relax(*args)  # type: ignore[no-any-return]


def triton_drive(*args: Any) -> tuple[Tensor, Tensor]:
    """``torch.ops.ep_kernels.triton_drive``."""
    ensure()
    return torch.ops.ep_kernels.triton_drive(*args)  # type: ignore[no-any-return]


def triton_relax_step(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.ops.ep_kernels.triton_relax_step``."""
    ensure()
    return torch.ops.ep_kernels.triton_relax_step(*args)  # type: ignore[no-any-return]


def triton_contrast(*args: Any) -> tuple[Tensor, Tensor]:
    """``torch.ops.ep_kernels.triton_contrast``."""
    ensure()
    return torch.ops.ep_kernels.triton_contrast(*args)  # type: ignore[no-any-return]


def triton_relax(*args: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """``torch.ops.ep_kernels.triton_relax``."""
    ensure()
    return torch.ops.ep_kernels.triton_relax(*args)  # type: ignore[no-any-return]


def _one_device(op: str, first: Tensor, **others: Tensor | Sequence[Tensor | None] | None) -> None:
    """The dispatcher takes meta tensors beside real ones to the fake implementations, and no further."""
    for name, group in others.items():
        for t in group if isinstance(group, (list, tuple)) else (group,):
            if isinstance(t, Tensor) and t.device != first.device:
                raise RuntimeError(f"{op}: argument '{name}': expected device {first.device}, got {t.device}")


def _dense_empty(like: Tensor, shape: list[int], dtype: torch.dtype | None = None) -> Tensor:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def drive_shape(source: Tensor, weight: Tensor, stride: list[int], padding: list[int], pool: int) -> list[int]:
    """Shape of a connection's drive, batch included; ``pool`` is an index into POOLS."""
    if weight.dim() == 2:
        return [source.shape[0], weight.shape[0]]
    size = [
        (n + 2 * p - k) // s + 1 for n, k, s, p in zip(source.shape[2:], weight.shape[2:], stride, padding, strict=True)
    ]
    return [source.shape[0], weight.shape[0], *(n // 2 if pool else n for n in size)]


def _fake_drive(
    source: Tensor, weight: Tensor, stride: list[int], padding: list[int], pool: int, winners: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _one_device("drive", source, weight=weight, winners=winners)
    shape = drive_shape(source, weight, stride, padding, pool)
    live = POOLS[pool] == "max" and winners is None
    return _dense_empty(source, shape), _dense_empty(source, shape if live else [0], torch.uint8)


def _fake_relax_step(
    state: Tensor,
    bias: Tensor | None,
    drives: list[Tensor],
    drive_gains: list[float],
    below: list[Tensor],
    below_weights: list[Tensor],
    below_geometry: list[int],
    below_gains: list[float],
    above: list[Tensor],
    above_weights: list[Tensor],
    above_winners: list[Tensor],
    above_geometry: list[int],
    above_gains: list[float],
    nudge: Tensor | None,
    nudge_gain: float,
    preactivation: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    _one_device("relax_step", state, bias=bias, drives=drives, below=below, below_weights=below_weights)
    _one_device("relax_step", state, above=above, above_weights=above_weights, above_winners=above_winners)
    _one_device("relax_step", state, nudge=nudge, preactivation=preactivation)
    keep = args[-1]
    shape = list(state.shape)
    return _dense_empty(state, shape), state.new_empty(shape[0]), _dense_empty(state, shape if keep else [0])


def _fake_contrast(
    source: Tensor,
    source_delta: Tensor | None,
    target: Tensor,
    target_delta: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    pool: int,
    winners: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    _one_device(
        "contrast", source, source_delta=source_delta, target=target, target_delta=target_delta, winners=winners
    )
    return _dense_empty(source, weight_shape), source.new_empty(weight_shape[:1])


def _fake_relax(
    states: list[Tensor],
    weights: list[Tensor],
    feedback_weights: list[Tensor],
    biases: list[Tensor],
    drives: list[Tensor],
    winners: list[Tensor],
    free: list[Tensor],
    preactivations: list[Tensor],
    heads: list[Tensor],
    extra: list[Tensor],
    shapes: list[int],
    connections: list[int],
    head_spec: list[int],
    program: list[int],
    linear_nodes: list[int],
    drive_gains: list[float],
    feedback_gains: list[float],
    nudge_gains: list[float],
    scales: list[float],
    head_scalars: list[float],
    batch: int,
    phases: int,
    steps: int,
    form: int,
    frozen: bool,
    deferred: bool,
    operands: int,
    storage: int,
    keep: bool,
    *_: Any,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
    like = weights[0]
    _one_device("relax", like, states=states, weights=weights, biases=biases, drives=drives, winners=winners)
    _one_device("relax", like, free=free, preactivations=preactivations, heads=heads, extra=extra)
    _one_device("relax", like, feedback_weights=feedback_weights)
    full = [[batch, *(n for n in shapes[3 * i : 3 * i + 3] if n)] for i in range(len(states))]
    driven, stepped = _written(program, refresh=keep)
    out_drives, out_winners = [], []
    for c in range(len(weights)):
        dst, pool = connections[7 * c + 1], connections[7 * c + 6]
        out_drives.append(_dense_empty(like, full[dst] if c in driven else [0]))
        won = c in driven and POOLS[pool] == "max" and not frozen
        out_winners.append(_dense_empty(like, full[dst] if won else [0], torch.uint8))
    return (
        [_dense_empty(like, shape, STORAGES[storage]) for shape in full[1:]],
        [_dense_empty(like, shape if keep and i in stepped else [0]) for i, shape in enumerate(full) if i],
        out_drives,
        out_winners,
        like.new_empty(steps, batch),
    )


def _written(program: list[int], *, refresh: bool) -> tuple[set[int], set[int]]:
    """Connections driven and nodes stepped by an encoded program."""
    driven, stepped = set(), set()
    at = 0

    def section() -> None:
        nonlocal at
        count = program[at]
        at += 1
        for _ in range(count):
            op, index = program[at], program[at + 1]
            at += 2
            if op == 0:
                driven.add(index)
            elif op == 2:
                stepped.add(index)
                at += 1
                for _ in range(3):
                    at += 1 + program[at]

    section()
    sweeps = program[at]
    at += 1
    for _ in range(sweeps):
        section()
    if refresh:
        section()
    return driven, stepped


def _register() -> None:
    fakes = (_fake_drive, _fake_relax_step, _fake_contrast, _fake_relax)
    for name, fake in zip(NAMES, fakes, strict=True):
        if not has_cuda():
            torch.library.impl(f"ep_kernels::{name}", "CUDA", _on_cuda(name))
        _complete(name, name, fake)
        schema = str(getattr(torch.ops.ep_kernels, name).default._schema).removeprefix(f"ep_kernels::{name}")
        torch.library.define(f"ep_kernels::triton_{name}", schema)
        for key in ("CPU", "CUDA"):
            torch.library.impl(f"ep_kernels::triton_{name}", key, _with_triton(name, key.lower()))
        _complete(f"triton_{name}", name, fake)


def _complete(op: str, name: str, fake: Any) -> None:
    """What Python adds to an op that computes what ``name`` does."""
    torch.library.register_fake(f"ep_kernels::{op}", fake)
    for device in ("cpu", "cuda"):  # without it the convolutions inside would be cast, behind the op's back
        torch.library.register_autocast(f"ep_kernels::{op}", device, torch.float32)
    if name == "drive":
        torch.library.register_autograd(f"ep_kernels::{op}", _drive_backward, setup_context=_drive_context)
    else:
        torch.library.register_autograd(f"ep_kernels::{op}", _refuse(op))


def _on_cuda(name: str) -> Any:
    """The op on CUDA tensors where the library has no kernels for them: Triton's."""

    def run(*args: Any) -> Any:
        from . import backends

        missing = backends.status()
        if missing["triton"] is not None:
            raise RuntimeError(
                f"ep_kernels::{name} on CUDA tensors needs the backend triton or the backend cuda, and neither can "
                f"run. triton: {missing['triton']}. cuda: {missing['cuda']}"
            )
        return _triton(name)(*args)

    return run


def _with_triton(name: str, device: str) -> Any:
    """The op with Triton's kernels on tensors of a kind of device."""

    def run(*args: Any) -> Any:
        from . import backends

        reason = backends.why_not("triton", device)
        if reason is not None:
            raise RuntimeError(f"ep_kernels::triton_{name} cannot run: {reason}")
        return _triton(name)(*args)

    return run


def _triton(name: str) -> Any:
    from .triton import ops as kernels

    return getattr(kernels, name)


def _drive_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    source, weight, ctx.stride, ctx.padding, ctx.pool, winners = inputs
    won = output[1] if winners is None else winners
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(source, weight, won)


def _drive_backward(ctx: Any, above: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    source, weight, winners = ctx.saved_tensors
    pool = POOLS[ctx.pool]
    grad_source = grad_weight = None
    if ctx.needs_input_grad[0]:
        shape = list(source.shape[1:])
        won = winners if pool == "max" else None
        grad_source = reference.feedback(above, weight, shape, ctx.stride, ctx.padding, pool, won)
    if ctx.needs_input_grad[1]:
        size = [] if weight.dim() == 2 else drive_shape(source, weight, ctx.stride, ctx.padding, 0)[2:]
        if weight.dim() == 2:
            grad_weight = above.t() @ source.flatten(1)
        else:
            up = reference.unpool_map(above, pool, size, winners if pool == "max" else None)
            grad_weight = reference.convolve_weight(up, source, weight.shape, ctx.stride, ctx.padding)
    return grad_source, grad_weight, None, None, None, None


def _refuse(name: str) -> Any:
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"ep_kernels::{name} has no derivative: EP gradients come from ep_kernels.ep_gradients, and "
            "backpropagation through the relaxation from ep_train.bptt.bptt_gradients"
        )

    return backward


def cpu_isa() -> str:
    """Instruction set that the CPU passes use on this processor: ``baseline``, ``avx2`` or ``avx512``."""
    ensure()
    return ("baseline", "avx2", "avx512")[math.trunc(torch.ops.ep_kernels.cpu_isa())]
