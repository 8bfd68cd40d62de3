"""Whole relaxations: ours, the same algorithm in PyTorch, and a step of autograd of the energy."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.baselines import PlainEP, Pooling
from benchmarks.gpu.problem import (
    FLOAT16_LIMIT,
    PRECISIONS,
    Options,
    Precision,
    backend_of,
    contenders,
    free_flops,
    largest_error,
    sweep_flops,
)
from benchmarks.gpu.rates import speed
from benchmarks.gpu.rows import Job, Row
from benchmarks.gpu.timing import called, replayed
from benchmarks.gpu.whole import COMPILE_LIMIT, MODES, autograd_loop, check, difference, problem, true_states
from benchmarks.timing import Times
from ep_kernels import RelaxConfig, free_phase

SHORT, LONG = 12, 28  # a sweep's time is the difference between phases of so many sweeps, over LONG - SHORT


def jobs(options: Options) -> list[Job]:
    """Ours of every precision, then the baselines; what compiles last."""
    batches = sorted(options.batches, reverse=True)
    found = []
    for b in batches:
        found += [
            Job(f"{b}/ours {name}, {on}", partial(our_sweep, options, b, p, on))
            for name, p in PRECISIONS.items()
            for on in contenders(options)
        ]
        if options.backends:
            continue
        found += [
            Job(f"{b}/eager in a CUDA graph", partial(plain_sweep, options, b, None)),
            Job(f"{b}/autograd step", partial(autograd_step, options, b)),
            Job(f"{b}/reference in a CUDA graph", partial(reference_sweep, options, b)),
        ]
    b = batches[0]
    for name, mode in MODES.items() if not options.backends else ():
        found.append(Job(f"{b}/{name} in a CUDA graph", partial(plain_sweep, options, b, mode), COMPILE_LIMIT))
    return found


def our_sweep(options: Options, batch: int, precision: Precision, on: str) -> Row:
    """``free_phase``: one sweep as a difference, and the whole phases of 2 and of 4 sweeps."""
    p = problem(options, batch)
    name = f"ours {precision.name}, {on}"

    def phase(steps: int) -> list[Tensor]:
        config = precision.config(free_steps=steps)
        return free_phase(p.network, p.parameters, p.x, config, backend=backend_of(on)).states

    error = check(largest_error(phase(4)[1:], true_states(options, batch, 4)[1:]), precision.error)
    rounds = 8 if options.quick else 15
    low, high = (SHORT, LONG) if options.device == "cuda" else (2, 4)
    times = {steps: called(name, lambda s=steps: phase(s), rounds=rounds) for steps in {2, 4, low, high}}  # type: ignore[misc]
    sweep = difference(name, times[low], times[high], high - low)
    phases = {}
    for steps in (2, 4):
        flops = free_flops(p.network, precision.config(free_steps=steps), batch)
        phases[f"T {steps}"] = {**times[steps].row(), **speed(options, flops, times[steps].median, precision.rate)}
    found = speed(options, sweep_flops(p.network, batch), sweep.median, precision.rate)
    return {"batch": batch, "variant": name, "backend": on, **sweep.row(), **found, "error": error, "phases": phases}


def plain_sweep(options: Options, batch: int, mode: str | None) -> Row:
    """A steady sweep of ``PlainEP`` in float16, eager or compiled, in a CUDA graph."""
    p = problem(options, batch)
    pooling: Pooling = "indices" if mode is None else "windows"
    plain = PlainEP(p.network, torch.float16 if options.device == "cuda" else torch.float32, pooling)
    omega = RelaxConfig().free_damping(p.network.feedback_gain)
    with torch.no_grad():
        error = largest_error(
            plain.free(p.parameters, p.x, RelaxConfig(free_steps=4))[0][1:], true_states(options, batch, 4)[1:]
        )
        check(error, FLOAT16_LIMIT)
        states, winners, _ = plain.free(p.parameters, p.x, RelaxConfig(free_steps=2))
        weights, biases = plain.cast(p.parameters.weights), plain.cast(p.parameters.biases)
        first = plain.drive(0, states[0], weights)

        def sweep(states: list[Tensor], winners: list[Tensor | None]) -> tuple[list[Tensor], list[Tensor | None]]:
            new, won, _ = plain.sweep(states, first, winners, weights, biases, omega)
            return new, won

        run = sweep
        if mode is not None:
            torch.compiler.reset()
            run = torch.compile(sweep, mode=mode, dynamic=False, fullgraph=True)
            check(largest_error(run(states, winners)[0][1:], sweep(states, winners)[0][1:]), FLOAT16_LIMIT)

        def several() -> None:
            now, won = states, winners
            for _ in range(4):
                now, won = run(now, won)

        name = "eager in a CUDA graph" if mode is None else f"torch.compile({mode}) in a CUDA graph"
        times = replayed(name, [several], rounds=8 if options.quick else 20)
    times = Times(name, [s / 4 for s in times.seconds])
    found = speed(options, sweep_flops(p.network, batch), times.median, "fp16")
    return {"batch": batch, "variant": name, **times.row(), **found, "error": error}


def reference_sweep(options: Options, batch: int) -> Row:
    """The backend ``reference`` in float32 (tf32 in cuDNN, PyTorch's default), captured; one sweep as a difference."""
    p = problem(options, batch)

    def phase(steps: int) -> list[Tensor]:
        config = RelaxConfig(free_steps=steps)
        return free_phase(p.network, p.parameters, p.x, config, backend="reference").states

    error = check(largest_error(phase(4)[1:], true_states(options, batch, 4)[1:]), FLOAT16_LIMIT)
    short, long = (replayed("reference", [lambda s=s: phase(s)], rounds=8) for s in (4, 8))  # type: ignore[misc]
    sweep = difference("backend reference in a CUDA graph", short, long, 4)
    found = speed(options, sweep_flops(p.network, batch), sweep.median, "tf32")
    return {"batch": batch, "variant": sweep.name, **sweep.row(), **found, "error": error}


def autograd_step(options: Options, batch: int) -> Row:
    """One step of all layers as published codes run it: float32 as PyTorch is set by default, default memory format."""
    loop, error = autograd_loop(options, batch)
    x = problem(options, batch).x.contiguous()
    states = loop.relax(x, 3)
    times = called("autograd step", lambda: loop.step(x, states), rounds=10)
    return {"batch": batch, "variant": "autograd step", **times.row(), "error": error}
