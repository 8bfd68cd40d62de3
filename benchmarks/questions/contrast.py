"""contrast: weight and bias gradients of each connection from both phases, against conv2d_weight in PyTorch."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from benchmarks import layers
from benchmarks.baselines.plain import POOLINGS, PlainEP, flat_indices
from benchmarks.case import Timed
from benchmarks.layers import Layer, Op, Tensors, Traffic, cast, timed
from benchmarks.problem import FLOAT16_LIMIT, Precision, Problem, label, largest_error, relative_error, require_backend
from benchmarks.registry import Question
from ep_kernels import RelaxConfig, backends, ep_gradients, reference
from ep_kernels.graphs import context
from ep_kernels.relaxation import Contrast

Gradients = tuple[Tensor, Tensor]


@lru_cache(maxsize=2)
def recorded(p: Problem) -> tuple[Contrast, ...]:
    """What a training batch with the default settings contrasts, by connection: two nudged phases, scaled deltas."""
    with backends.recorded() as jobs:
        ep_gradients(p.network, p.parameters, p.x, p.targets, RelaxConfig(), backend="reference")
    (found,) = (job for job in jobs if isinstance(job, tuple))
    return found


def job_of(layer: Layer) -> Contrast:
    """Of the connection into the layer."""
    return next(job for job in recorded(layer.problem) if job.connection == layer.connection)


def tensors_of(job: Contrast, dtype: torch.dtype) -> Tensors:
    """Source, its delta, target, its delta, winners; deltas hold both phases, [2B, ...]."""
    tensors = (job.source, job.source_delta, job.target, job.target_delta, job.winners)
    return tuple(cast(t, dtype) for t in tensors)


def on_tensors(job: Contrast, tensors: Tensors) -> Contrast:
    """The same contrast of other tensors."""
    source, source_delta, target, target_delta, winners = tensors
    assert source is not None
    assert target is not None
    assert target_delta is not None
    return replace(
        job, source=source, source_delta=source_delta, target=target, target_delta=target_delta, winners=winners
    )


@lru_cache(maxsize=1)
def truth(layer: Layer) -> Gradients:
    """In float64, by the reference."""
    job = job_of(layer)
    exact = replace(on_tensors(job, tensors_of(job, torch.float64)), weight=job.weight.double())
    return backends.contrasts([exact], "reference")[0]


def error(layer: Layer, found: Gradients) -> float:
    """The larger one of weight and bias."""
    return largest_error(found, truth(layer))


def flops(layer: Layer) -> int:
    """Two products; one where the source is the clamped input, which has no delta."""
    return (2 if layer.connection.src else 1) * layer.flops()


def traffic(layer: Layer) -> Traffic:
    """Read: both ends with their deltas, winners. Written: the gradient of the weight."""
    job = job_of(layer)
    states = sum(t.numel() for t in (job.source, job.source_delta, job.target, job.target_delta) if t is not None)
    return Traffic(states, job.weight.numel(), 0 if job.winners is None else job.winners.numel())


def one(job: Contrast, on: str) -> Gradients:
    """A single contrast. On a GPU ``backends.contrasts`` copies its tensors into a graph of its own, and within a
    capture of ours launches what is launched here."""
    if on not in backends.ON_GPU:
        return backends.contrasts([job], on)[0]
    if on == "triton":
        from ep_kernels.triton.gradients import contrasts
    else:
        contrasts = backends._cuda_contrasts
    with context(job.weight):
        return contrasts.contrast(job)


def ours(layer: Layer, on: str, precision: Precision) -> Timed:
    """One connection, as the contrast of a training batch runs it; the backend cpu does not round its operands."""
    require_backend(on, layer.setting)
    job = replace(job_of(layer), operands=precision.operands)

    def run(*tensors: Tensor | None) -> Gradients:
        return one(on_tensors(job, tensors), on)

    return timed(
        layer, run, tensors_of(job, precision.storage or torch.float32), partial(error, layer), precision.error,
        rate=precision.rate, traffic=traffic(layer),
        values={"backend": label(on, layer.setting), "precision": precision.name},
    )  # fmt: skip


def eager(layer: Layer, mode: str | None = None) -> Timed:
    """Differences and means, unpooling, and ``conv2d_weight`` of each product."""
    job, conn = job_of(layer), layer.connection
    shape, size, padding = tuple(job.weight.shape), layer.map_size, conn.padding
    unpool = POOLINGS["indices" if mode is None else "windows"][2]
    from_target, from_source = job.scale * job.target_gain, job.scale * job.source_gain
    centre_target, centre_source = job.centre * job.target_gain, job.centre * job.source_gain

    def run(
        source: Tensor, source_delta: Tensor | None, target: Tensor, target_delta: Tensor, winners: Tensor | None
    ) -> Gradients:
        diff, mean = PlainEP.difference(target, target_delta, centre_target)
        bias = from_target * diff.sum((0, 2, 3), dtype=torch.float32)
        if winners is not None:
            diff, mean = unpool(diff, winners, size), unpool(mean, winners, size)
        if source_delta is None:
            return from_target * conv2d_weight(source, shape, diff, padding=padding).float(), bias
        diff_source, mean_source = PlainEP.difference(source, source_delta, centre_source)
        weight = from_target * conv2d_weight(mean_source, shape, diff, padding=padding).float()
        return weight + from_source * conv2d_weight(diff_source, shape, mean, padding=padding).float(), bias

    tensors = tensors_of(job, layer.dtype)
    if tensors[-1] is not None and mode is None:
        tensors = (*tensors[:-1], cast(flat_indices(tensors[-1], size[1]), layer.dtype))
    limit = FLOAT16_LIMIT if layer.setting.cuda else 1e-3
    return timed(layer, run, tensors, partial(error, layer), limit, rate=layer.rate, traffic=traffic(layer), mode=mode)


def alone(layer: Layer) -> Timed:
    """Both products as one ``conv2d_weight`` over a doubled batch of maps that are ready for it."""
    job, conn = job_of(layer), layer.connection
    source, source_delta, target, target_delta, winners = tensors_of(job, torch.float64)
    assert source is not None
    assert target is not None
    assert target_delta is not None
    diff, mean = PlainEP.difference(target, target_delta, job.centre * job.target_gain)
    above, below = [reference.unpool_map(t, conn.pool, layer.map_size, winners) for t in (diff, mean)], [source]
    if source_delta is None:
        above = above[:1]
    else:
        diff_source, mean_source = PlainEP.difference(source, source_delta, job.centre * job.source_gain)
        below = [mean_source, diff_source * (job.source_gain / job.target_gain)]
    shape = tuple(job.weight.shape)

    def run(above: Tensor, below: Tensor) -> Tensor:
        return conv2d_weight(below, shape, above, padding=conn.padding)

    def worst(weight: Tensor) -> float:
        return relative_error(job.scale * job.target_gain * weight.double(), truth(layer)[0])

    tensors = (cast(torch.cat(above), layer.dtype), cast(torch.cat(below), layer.dtype))
    limit = FLOAT16_LIMIT if layer.setting.cuda else 1e-3
    return timed(layer, run, tensors, worst, limit, rate=layer.rate, traffic=traffic(layer))


OP = Op("contrast", ours, eager, alone, flops)
QUESTION = Question(
    "contrast",
    "weight and bias gradients of each connection from both phases: the op contrast, against PyTorch's calls",
    partial(layers.cases, OP),
    partial(layers.lines, "contrast by"),
    conditions=(
        f"{layers.CONDITIONS}; the phases are those of T 4 + K 3 symmetric sweeps; both products count (one where the "
        "source is the clamped input)"
    ),
    draw=layers.draw,
    seconds={"cpu": 25.0, "cuda": 20.0},
    wgmma=True,
)
