"""Whole training batches: ours, the same algorithm in PyTorch, backprop, and autograd of the energy; with memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines import FeedForward
from benchmarks.gpu.baselines import PlainEP, Pooling
from benchmarks.gpu.problem import (
    BATCHES,
    PRECISIONS,
    Options,
    Precision,
    backend_of,
    batch_flops,
    contenders,
    largest_error,
    relative_error,
    tf32,
)
from benchmarks.gpu.rates import speed
from benchmarks.gpu.rows import Job, Row
from benchmarks.gpu.timing import called, peak_memory, replayed
from benchmarks.gpu.whole import COMPILE_LIMIT, MODES, autograd_loop, check, difference, problem
from benchmarks.timing import Times
from ep_kernels import Parameters, RelaxConfig, backends, ep_gradients, free_phase, readout

LOOP = (250, 30)  # T and K of the autograd loop, as published


def jobs(options: Options) -> list[Job]:
    """Ours of every precision, then the baselines; what compiles last."""
    batches = sorted(options.batches, reverse=True)
    found = []
    for b in batches:
        for s in BATCHES:
            found += [
                Job(f"{b}/{s}/ours {name}, {on}", partial(our_batch, options, b, s, p, on))
                for name, p in PRECISIONS.items()
                for on in contenders(options)
            ]
            if options.backends:
                continue
            found += [
                Job(f"{b}/{s}/eager", partial(plain_batch, options, b, s, None, False)),
                Job(f"{b}/{s}/eager in a CUDA graph", partial(plain_batch, options, b, s, None, True)),
            ]
        if options.backends:
            continue
        for kind in ("fp16 autocast", "tf32", "fp32"):
            found += [
                Job(f"{b}/backprop {kind}", partial(backprop, options, b, kind, False)),
                Job(f"{b}/backprop {kind} in a CUDA graph", partial(backprop, options, b, kind, True)),
            ]
        found.append(Job(f"{b}/autograd loop", partial(autograd_batch, options, b)))
    b, least = batches[0], batches[-1]
    sixty = f"{least}/memory of 60 sweeps"
    found += [Job(f"{sixty}, ours, {on}", partial(long_memory, options, least, on)) for on in contenders(options)]
    if options.backends:
        return found
    found.append(Job(f"{sixty}, BPTT", partial(long_memory, options, least, None)))
    kind = "fp16 autocast"
    compiled = partial(backprop, options, b, kind, True, compiled=True)
    found.append(Job(f"{b}/backprop {kind} compiled in a CUDA graph", compiled, COMPILE_LIMIT))
    for name, mode in MODES.items():
        for s in BATCHES:
            run = partial(plain_batch, options, b, s, mode, True)
            found.append(Job(f"{b}/{s}/{name} in a CUDA graph", run, COMPILE_LIMIT))
    return found


@lru_cache(maxsize=2)
def true_batch(options: Options, batch: int, setting: str) -> Parameters:
    """Gradients of the same settings in float64."""
    exact = problem(options, batch).double()
    config = RelaxConfig(**BATCHES[setting])  # type: ignore[arg-type]
    return ep_gradients(exact.network, exact.parameters, exact.x, exact.targets, config, backend="reference")[0]


def our_batch(options: Options, batch: int, setting: str, precision: Precision, on: str) -> Row:
    """``ep_gradients``."""
    p = problem(options, batch)
    config = precision.config(**BATCHES[setting])

    def work() -> Parameters:
        return ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend=backend_of(on))[0]

    expected = true_batch(options, batch, setting)
    memory = peak_memory(lambda: [work() for _ in range(3)], fresh=backends.release)
    error = check(_gradient_error(work(), expected), precision.gradient_error)
    times = called(f"ours {precision.name}, {on}", work, rounds=8 if options.quick else 15)
    found = speed(options, batch_flops(p.network, config, batch), times.median, precision.rate)
    return {"batch": batch, "setting": setting, "variant": times.name, "backend": on, **times.row(), **found,
            "error": error, "memory": memory}  # fmt: skip


def _gradient_error(found: Parameters, expected: Parameters) -> float:
    a, b = found.named(), expected.named()
    return largest_error([a[name] for name in b], list(b.values()))


def plain_batch(options: Options, batch: int, setting: str, mode: str | None, captured: bool) -> Row:
    """``PlainEP.gradients`` in float16, eager or compiled, in a CUDA graph or called."""
    p = problem(options, batch)
    pooling: Pooling = "indices" if mode is None else "windows"
    plain = PlainEP(p.network, torch.float16 if options.device == "cuda" else torch.float32, pooling)
    config = RelaxConfig(**BATCHES[setting])  # type: ignore[arg-type]
    scales = plain.scales(config)
    function: Callable[..., Parameters] = plain.gradients
    if mode is not None:
        torch.compiler.reset()
        function = torch.compile(plain.gradients, mode=mode, dynamic=False)

    def work() -> Parameters:
        return function(p.parameters, p.x, p.targets[0], config, scales)

    error = check(_gradient_error(work(), true_batch(options, batch, setting)), 0.3)
    memory = peak_memory(lambda: [work() for _ in range(3)])
    name = "eager" if mode is None else f"torch.compile({mode})"
    name += " in a CUDA graph" if captured else ""
    rounds = 8 if options.quick else 15
    times = replayed(name, [work], rounds=rounds) if captured else called(name, work, rounds=rounds)
    found = speed(options, batch_flops(p.network, config, batch), times.median, "fp16")
    return {"batch": batch, "setting": setting, "variant": name, **times.row(), **found,
            "error": error, "memory": memory}  # fmt: skip


def backprop(options: Options, batch: int, kind: str, captured: bool, *, compiled: bool = False) -> Row:
    """Forward and backward of the feed-forward net of the same shape, channels_last, without the optimizer's step."""
    p = problem(options, batch)
    model: nn.Module = FeedForward(p.network, p.parameters).to(options.device, memory_format=torch.channels_last)
    weights = list(model.parameters())
    exact = p.double()
    first = free_phase(exact.network, exact.parameters, exact.x, RelaxConfig(free_steps=1), backend="reference")
    expected = readout(exact.network, exact.parameters, first)
    if compiled:
        torch.compiler.reset()
        model = torch.compile(model, mode="max-autotune-no-cudagraphs", dynamic=False)

    def forward() -> Tensor:
        with torch.autocast(p.x.device.type, torch.float16, enabled=kind == "fp16 autocast", cache_enabled=False):
            out: Tensor = model(p.x)
        return out

    def work() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(forward().float(), p.labels), weights)

    with tf32(kind == "tf32"):
        error = check(relative_error(forward(), expected), 1e-4 if kind == "fp32" else 2e-2)
        memory = peak_memory(lambda: [work() for _ in range(3)])
        name = f"backprop {kind}" + (" compiled" if compiled else "") + (" in a CUDA graph" if captured else "")
        rounds = 8 if options.quick else 15
        times = replayed(name, [work], rounds=rounds) if captured else called(name, work, rounds=rounds)
    return {"batch": batch, "variant": name, **times.row(), "error": error, "memory": memory}


def autograd_batch(options: Options, batch: int) -> Row:
    """The loop's batch at T 250, K 30, scaled up from shorter ones: its time is linear in the number of steps."""
    loop, error = autograd_loop(options, batch)
    p = problem(options, batch)
    x = p.x.contiguous()

    def work(free_steps: int, nudged_steps: int) -> Callable[[], object]:
        return lambda: loop.batch(x, p.labels, free_steps, nudged_steps, 0.2)

    short = called("short", work(4, 2), rounds=5, most=3, warmup=1)
    long = called("long", work(16, 6), rounds=5, most=4, warmup=1)
    memory = peak_memory(work(16, 6))
    step = difference("step", short, long, (16 + 2 * 6) - (4 + 2 * 2))
    steps = LOOP[0] + 2 * LOOP[1] - (4 + 2 * 2)
    pairs = zip(short.seconds, step.seconds, strict=False)
    times = Times(f"autograd loop, T {LOOP[0]} + K {LOOP[1]} (scaled)", [a + steps * b for a, b in pairs])
    return {"batch": batch, "variant": times.name, **times.row(), "error": error, "memory": memory}


def long_memory(options: Options, batch: int, on: str | None) -> Row:
    """Peak memory of gradients after 60 sweeps on a backend, or (None) through them, in float32."""
    from ep_train.bptt import bptt_gradients

    p = problem(options, batch)
    config = RelaxConfig(free_steps=60, nudged_steps=1, estimator="tangent", operands="tf32")

    def work() -> object:
        if on is None:
            return bptt_gradients(p.network, p.parameters, p.x, p.targets, config, steps=60)
        return ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend=backend_of(on))

    memory = peak_memory(work, fresh=backends.release)
    times = called("BPTT" if on is None else f"ours tf32, {on}", work, rounds=3, warmup=1)
    found = {} if on is None else {"backend": on}
    return {"batch": batch, "setting": "60 sweeps", "variant": times.name, **found, **times.row(), "memory": memory}
