"""drive: convolution and 2x2 pooling of each layer, against PyTorch's two calls and the convolution alone."""

from __future__ import annotations

from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import layers
from benchmarks.baselines.plain import POOLINGS, flat_indices, gather_indices
from benchmarks.case import Timed, Unavailable
from benchmarks.layers import Layer, Op, Tensors, Traffic, cast, settled, timed
from benchmarks.problem import FLOAT16_LIMIT, Precision, label, relative_error, require_backend
from benchmarks.registry import Question
from ep_kernels import backends, functional, reference

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}


def dtype_of(layer: Layer, on: str, precision: Precision) -> torch.dtype:
    """Of all tensors of an op in this precision. tf32: float32 tensors, where PyTorch's products are allowed tf32.

    Raises:
        Unavailable: the backend cannot run, or its op has no such precision.
    """
    dtype = DTYPES[precision.name]
    require_backend(on, layer.setting, dtype)
    if on == "cuda" and precision.name == "tf32":
        raise Unavailable("the backend cuda multiplies float32 as tf32 within relaxations and contrasts only")
    return dtype


def inputs(layer: Layer, dtype: torch.dtype) -> Tensors:
    """The source's state and the weight, [B, C_src, H, W] and [C_dst, C_src, 3, 3]."""
    p = layer.problem
    return cast(settled(p)[layer.connection.src], dtype), cast(p.parameters.weights[layer.below], dtype)


@lru_cache(maxsize=1)
def truth(layer: Layer) -> tuple[Tensor, Tensor]:
    """The map before pooling and the drive, in float64."""
    source, weight = inputs(layer, torch.float64)
    assert source is not None
    assert weight is not None
    conn = layer.connection
    z = reference.convolve(source, weight, conn.stride, conn.padding)
    return z, reference.pool_map(z, conn.pool)[0]


def error(layer: Layer, found: tuple[Tensor, Tensor | None]) -> float:
    """Of the drive, and of the true map at the winners (0..3, or positions in the map) that were found."""
    z, expected = truth(layer)
    drive, winners = found
    worst = [relative_error(drive, expected)]
    if layer.connection.pool == "max":
        assert winners is not None
        positions = winners if winners.dtype == torch.int64 else flat_indices(winners, z.shape[3])
        worst.append(relative_error(gather_indices(z, positions), expected))
    return next((e for e in worst if e != e), max(worst))


def traffic(layer: Layer) -> Traffic:
    """Read: source and weight. Written: the drive and its winners."""
    network, conn = layer.network, layer.connection
    source, drive = (layer.batch * torch.Size(network.shapes[i]).numel() for i in (conn.src, conn.dst))
    weight = layer.problem.parameters.weights[layer.below].numel()
    return Traffic(source + drive, weight, drive if conn.pool == "max" else 0)


def ours(layer: Layer, on: str, precision: Precision) -> Timed:
    """``functional.drive`` of a backend."""
    dtype, conn = dtype_of(layer, on, precision), layer.connection

    def run(source: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        with backends.backend(on):
            return functional.drive(source, weight, conn.stride, conn.padding, conn.pool)

    return timed(
        layer, run, inputs(layer, dtype), partial(error, layer), precision.error, rate=precision.rate,
        traffic=traffic(layer), values={"backend": label(on, layer.setting), "precision": precision.name},
    )  # fmt: skip


def eager(layer: Layer, mode: str | None = None) -> Timed:
    """``max_pool2d(conv2d(...), return_indices=True)``; compiled, winners by comparisons, which a compiler fuses."""
    conn = layer.connection
    pool = POOLINGS["indices" if mode is None else "windows"][0]

    def run(source: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        z = F.conv2d(source, weight, padding=conn.padding)
        return pool(z) if conn.pool == "max" else (z, None)

    limit = FLOAT16_LIMIT if layer.setting.cuda else 1e-4
    return timed(
        layer, run, inputs(layer, layer.dtype), partial(error, layer), limit, rate=layer.rate, traffic=traffic(layer),
        mode=mode,
    )  # fmt: skip


def alone(layer: Layer) -> Timed:
    """``conv2d``."""
    conn = layer.connection

    def run(source: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(source, weight, padding=conn.padding)

    limit = FLOAT16_LIMIT if layer.setting.cuda else 1e-4
    return timed(
        layer, run, inputs(layer, layer.dtype), lambda z: relative_error(z, truth(layer)[0]), limit, rate=layer.rate,
        traffic=traffic(layer),
    )  # fmt: skip


OP = Op("drive", ours, eager, alone, Layer.flops, tuple(DTYPES))
QUESTION = Question(
    "drive",
    "convolution and pooling of each layer: the op drive, against PyTorch's calls and the roofline",
    partial(layers.cases, OP),
    partial(layers.lines, "drive by"),
    conditions=f"{layers.CONDITIONS}; the drive comes with the winners of max pooling",
    draw=layers.draw,
    seconds={"cpu": 20.0, "cuda": 15.0},
    wgmma=True,
)
