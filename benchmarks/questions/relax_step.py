"""relax_step: one steady free update of each layer (drive, feedback, clip), ours against the same calls in PyTorch.

*Ours* are ``functional.drive`` (where the connection pools) and ``functional.relax_step`` on tensors in channels_last
memory, copies into and out of a backend's own layout included; *our launches* are what a relaxation of the backend
triton runs, bound to its buffers (benchmarks/launches.py).
"""

from __future__ import annotations

import gc
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from benchmarks import layers
from benchmarks.baselines.plain import POOLINGS
from benchmarks.case import Timed, Unavailable
from benchmarks.launches import launches, programs
from benchmarks.layers import Layer, Make, Op, timed
from benchmarks.problem import (
    FLOAT16_LIMIT,
    Precision,
    backends_of,
    label,
    layer_flops,
    precisions,
    relative_error,
)
from benchmarks.questions.drive import DTYPES, dtype_of
from benchmarks.registry import Question
from benchmarks.updates import damping, settled_inputs, size_above, traffic, true_update
from ep_kernels import backends, functional, reference
from ep_kernels.functional import Neighbour


def flops(layer: Layer) -> int:
    """Of an update: a drive and a feedback."""
    return layer_flops(layer.network, layer.node, layer.batch)


def ours(layer: Layer, on: str, precision: Precision) -> Timed:
    """The ops of a backend."""
    dtype, network, conn = dtype_of(layer, on, precision), layer.network, layer.connection
    up = network.connections[network.out_of[layer.node][0]] if network.out_of[layer.node] else None
    eta, gain = damping(layer), network.feedback_gain

    def run(
        state: Tensor,
        bias: Tensor,
        below: Tensor | None,
        weight: Tensor | None,
        finished: Tensor | None,
        above: Tensor | None,
        weight_above: Tensor | None,
        winners: Tensor | None,
    ) -> Tensor:
        drives, sources, tops = [] if finished is None else [finished], [], []
        with backends.backend(on):
            if below is not None and weight is not None:
                if conn.pool == "max":
                    drives.append(functional.drive(below, weight, conn.stride, conn.padding, conn.pool)[0])
                else:
                    sources.append(Neighbour(below, weight, conn.stride, conn.padding, conn.pool))
            if above is not None and weight_above is not None and up is not None:
                tops.append(Neighbour(above, weight_above, up.stride, up.padding, up.pool, winners, gain))
            return functional.relax_step(
                state, bias, drives=drives, below=sources, above=tops, damping=eta, slope=network.slope, lo=network.lo,
                hi=network.hi,
            )[0]  # fmt: skip

    return timed(
        layer, run, settled_inputs(layer).cast(layer, dtype), partial(error, layer), precision.error,
        rate=precision.rate, traffic=traffic(layer),
        values={"backend": label(on, layer.setting), "precision": precision.name},
    )  # fmt: skip


def error(layer: Layer, new: Tensor) -> float:
    """Of the new state."""
    return relative_error(new, true_update(layer))


def eager(layer: Layer, mode: str | None = None) -> Timed:
    """PyTorch's calls: the winners as ``max_pool2d`` keeps them; compiled, by comparisons, which a compiler fuses."""
    network, conn = layer.network, layer.connection
    padding_above = network.connections[network.out_of[layer.node][0]].padding if network.out_of[layer.node] else (0, 0)
    pool, _, unpool = POOLINGS["indices" if mode is None else "windows"]
    size = size_above(layer) if network.out_of[layer.node] else (0, 0)
    eta, gain, slope, lo, hi = damping(layer), network.feedback_gain, network.slope, network.lo, network.hi

    def run(
        state: Tensor,
        bias: Tensor,
        below: Tensor | None,
        weight: Tensor | None,
        finished: Tensor | None,
        above: Tensor | None,
        weight_above: Tensor | None,
        winners: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        drive, won = finished, None
        if below is not None:
            drive = F.conv2d(below, weight, padding=conn.padding)
            if conn.pool == "max":
                drive, won = pool(drive)
        a = drive + bias.view(-1, 1, 1)
        if above is not None:
            top = above if winners is None else unpool(above, winners, size)
            a = a + gain * F.conv_transpose2d(top, weight_above, padding=padding_above)
        new = (a if slope == 1 else slope * a).clamp(lo, hi)
        if eta != 1:
            new = ((1 - eta) * state + eta * new).clamp(lo, hi)
        return new, won

    tensors = settled_inputs(layer).cast(layer, layer.dtype, flat=mode is None)
    limit = FLOAT16_LIMIT if layer.setting.cuda else 1e-4
    return timed(
        layer, run, tensors, lambda found: error(layer, found[0]), limit, rate=layer.rate, traffic=traffic(layer),
        mode=mode,
    )  # fmt: skip


def alone(layer: Layer) -> Timed:
    """The drive's convolution and the feedback's, of a map that is unpooled already."""
    network, conn, at = layer.network, layer.connection, settled_inputs(layer)
    _, _, below, weight, _, above, weight_above, _ = at.cast(layer, layer.dtype)
    expected: list[Tensor] = []
    up = network.connections[network.out_of[layer.node][0]] if above is not None else conn
    if above is not None:
        assert at.above is not None
        assert at.weight_above is not None
        top = reference.unpool_map(at.above, up.pool, size_above(layer), at.winners)
        above = layers.cast(top, layer.dtype)
        expected.append(F.conv_transpose2d(top, at.weight_above, padding=up.padding))
    if at.below is not None:
        assert at.weight is not None
        expected.append(F.conv2d(at.below, at.weight, padding=conn.padding))
    if not expected:
        raise Unavailable("this update has no convolution: its drive is that of the clamped input")

    def run(
        below: Tensor | None, weight: Tensor | None, above: Tensor | None, weight_above: Tensor | None
    ) -> list[Tensor]:
        found = [] if above is None else [F.conv_transpose2d(above, weight_above, padding=up.padding)]
        return found if below is None else [*found, F.conv2d(below, weight, padding=conn.padding)]

    def worst(found: list[Tensor]) -> float:
        return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))

    limit = FLOAT16_LIMIT if layer.setting.cuda else 1e-4
    tensors = (below, weight, above, weight_above)
    return timed(layer, run, tensors, worst, limit, rate=layer.rate, traffic=traffic(layer))


def our_launches(layer: Layer) -> dict[str, Make]:
    """Where triton is among the backends that were asked for, or can run."""
    if "triton" not in backends_of(layer.setting):
        return {}
    return {f"our launches, triton, {q.name}": partial(launches, layer, q) for q in precisions(layer.setting)}


def forget() -> None:
    """After a case: the buffers of its launches, and what backends keep."""
    programs.cache_clear()
    gc.collect()
    backends.release()


OP = Op("relax_step", ours, eager, alone, flops, tuple(DTYPES), our_launches, forget)
QUESTION = Question(
    "relax_step",
    "one free update of each layer: the op relax_step and our launches, against PyTorch's calls and the roofline",
    partial(layers.cases, OP),
    partial(layers.lines, "update by"),
    conditions=(
        f"{layers.CONDITIONS}; an update is the drive of the layer below (of the clamped input it is finished), the "
        "feedback of the layer above, damping and clip"
    ),
    draw=layers.draw,
    seconds={"cpu": 20.0, "cuda": 40.0},
    wgmma=True,
)
