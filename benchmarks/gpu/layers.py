"""One full free update of every node of the network: our launches against PyTorch's convolutions.

Ours are the launches of a steady sweep (a pooled drive, then the step), bound to buffers that hold the states of a
relaxation under way; PyTorch's are ``layer_update`` of baselines on the same states. Both are captured in a CUDA
graph that goes through several input sets where one would stay in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.baselines import Pooling, layer_update
from benchmarks.gpu.problem import (
    FLOAT16_LIMIT,
    PRECISIONS,
    Options,
    Precision,
    Problem,
    layer_flops,
    network_of,
    problem_of,
    relative_error,
)
from benchmarks.gpu.rates import speed
from benchmarks.gpu.rows import Job, Row, Wrong
from benchmarks.gpu.timing import replayed, sets_beyond_cache
from ep_kernels import Network, RelaxConfig, backends, free_phase, reference
from ep_kernels.relaxation import Relaxation

SWEEPS = 3  # before the launches of the last of them are timed
OURS = ("fp16", "fp16, fp32 states", "bf16", "tf32")
COMPILE_LIMIT = 45.0  # seconds of one max-autotune


def jobs(options: Options) -> list[Job]:
    """Ours first, the largest batch first; what may take long (max-autotune) last."""
    network = network_of(options.model, options.size)
    nodes = range(1, len(network.shapes))
    batches = sorted(options.batches, reverse=True)
    found = []
    for b in batches:
        for name in OURS:
            found += [Job(f"{b}/{i}/ours {name}", partial(ours, options, PRECISIONS[name], b, i)) for i in nodes]
        found += [Job(f"{b}/{i}/eager", partial(eager, options, b, i, "indices", False)) for i in nodes]
    b = batches[0]
    for i in sorted(nodes, key=lambda i: -layer_flops(network, i, 1)):
        run = partial(eager, options, b, i, "windows", True)
        found.append(Job(f"{b}/{i}/max-autotune", run, COMPILE_LIMIT))
    return found


@dataclass(frozen=True)
class Inputs:
    """What an update of a node reads, in float64; absent neighbours are None. ``winners`` 0..3 of the drive above."""

    state: Tensor
    bias: Tensor
    below: Tensor | None
    weight: Tensor | None
    finished: Tensor | None
    above: Tensor | None
    weight_above: Tensor | None
    winners: Tensor | None
    pooled: bool
    pooled_above: bool
    damping: float
    gain: float


class _Taken(Exception):
    pass


def relaxation_of(problem: Problem, config: RelaxConfig) -> Relaxation:
    """What ``free_phase`` hands to its backend."""
    found: list[Relaxation] = []

    def take(relaxation: Relaxation, *_: object, **__: object) -> Any:
        found.append(relaxation)
        raise _Taken

    with mock.patch.object(backends, "relax", take), suppress(_Taken):
        free_phase(problem.network, problem.parameters, problem.x, config)
    return found[0]


@lru_cache(maxsize=1)
def _problem(model: str, size: int, batch: int, device: str) -> Problem:
    return problem_of(network_of(model, size), batch, device)


class Programs:
    """Programs with the same relaxation under way: one input set each, made when asked for."""

    def __init__(self, problem: Problem, precision: Precision) -> None:
        self.problem, self.precision = problem, precision
        self.config = precision.config(free_steps=SWEEPS + 1)
        self.relaxation = relaxation_of(problem, self.config)
        self.made: list[Any] = []

    def get(self, index: int) -> Any:
        from ep_kernels.triton import arch, program

        while len(self.made) <= index:
            device = self.relaxation.weights[0].device
            made = program.Program(self.relaxation, arch.arch_of(device), 64)
            made.buffers.load(self.relaxation)
            lowered = made.lower(SWEEPS + 1)
            actions = [a for launches in (lowered.prologue, *lowered.sweeps[:SWEEPS]) for a in made.actions(launches)]
            made.start()
            for action in actions:
                action()
            self.made.append(made)
        return self.made[index]

    def launches(self, index: int, node: int) -> list[Any]:
        """Bound launches of one node in a steady sweep. They do not count as the sweep's end: it would move on."""
        from ep_kernels.triton import lower

        network = self.problem.network
        made = self.get(index)
        found = []
        for launch in made.lower(SWEEPS + 1).sweeps[SWEEPS - 1]:
            if isinstance(launch, lower.StepLaunch) and launch.node == node:
                found.append(replace(launch, finish=False))
            elif isinstance(launch, lower.DriveLaunch) and network.connections[launch.connection].dst == node:
                found.append(launch)
        actions: list[Any] = made.actions(tuple(found))
        return actions

    def inputs(self, node: int) -> Inputs:
        """Copies of what the first program's launches of ``node`` read."""
        made, network = self.get(0).buffers, self.problem.network
        into, out_of = network.into[node], network.out_of[node]
        if len(into) != 1 or len(out_of) > 1:
            raise ValueError(f"node {node}: expected a chain, got {len(into)} connections in and {len(out_of)} out")
        c = into[0]
        conn = network.connections[c]
        weights = [w.double() for w in self.problem.parameters.weights]
        bias = self.problem.parameters.biases[node]
        assert bias is not None

        def state(i: int) -> Tensor:
            return _tensor(made.state(i, 0), network.shapes[i]).double()

        first = conn.src == 0
        above = out_of[0] if out_of else None
        pooled_above = above is not None and network.connections[above].pool == "max"
        return Inputs(
            state(node),
            bias.double(),
            None if first else state(conn.src),
            None if first else weights[c],
            _tensor(made.drive(c), network.shapes[node]).double() if first else None,
            None if above is None else state(network.connections[above].dst),
            None if above is None else weights[above],
            _tensor(made.winners(above), network.shapes[network.connections[above].dst]) if pooled_above else None,  # type: ignore[arg-type]
            conn.pool == "max",
            pooled_above,
            self.config.free_damping(network.feedback_gain),
            network.feedback_gain,
        )

    def state(self, node: int) -> Tensor:
        return _tensor(self.get(0).buffers.state(node, 0), self.problem.network.shapes[node])


def _tensor(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    from ep_kernels.triton import layout

    return layout.as_tensor(buffer, shape).clone()


@lru_cache(maxsize=2)
def programs(model: str, size: int, batch: int, device: str, precision: str) -> Programs:
    return Programs(_problem(model, size, batch, device), PRECISIONS[precision])


def truth(network: Network, node: int, at: Inputs) -> Tensor:
    """The update in float64, by the reference."""
    a = at.bias.view(-1, 1, 1)
    if at.below is not None:
        conn = network.connections[network.into[node][0]]
        assert at.weight is not None
        a = a + reference.drive(at.below, at.weight, conn.stride, conn.padding, conn.pool)[0]
    else:
        assert at.finished is not None
        a = a + at.finished
    if at.above is not None:
        conn = network.connections[network.out_of[node][0]]
        assert at.weight_above is not None
        shape = network.shapes[node]
        back = reference.feedback(at.above, at.weight_above, shape, conn.stride, conn.padding, conn.pool, at.winners)
        a = a + at.gain * back
    return reference.update(at.state, a, at.damping, network.slope, network.lo, network.hi)


def ours(options: Options, precision: Precision, batch: int, node: int) -> Row:
    """Our launches: checked against float64, then timed."""
    sets = programs(options.model, options.size, batch, options.device, precision.name)
    network = sets.problem.network
    before = sets.inputs(node)
    calls = sets.launches(0, node)
    for call in calls:
        call()
    error = relative_error(sets.state(node), truth(network, node, before))
    if not error <= precision.error:
        raise Wrong(f"relative error {error:.1e}, expected at most {precision.error:.0e}")
    count = sets_beyond_cache(_bytes(calls))
    works = [_run(sets.launches(index, node)) for index in range(count)]
    times = replayed(f"node {node}, ours {precision.name}", works, rounds=10 if options.quick else 25)
    tiles = [f"{a.get('TN')}x{a.get('TH')}x{a.get('TW')} x {a.get('BN')} x {a.get('BK')}" for a in _arguments(calls)]
    return {
        **_row(options, network, node, batch, times.median, precision.rate),
        **times.row(),
        "variant": f"ours {precision.name}",
        "error": error,
        "sets": count,
        "tiles": tiles,
    }


def _run(calls: list[Any]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _arguments(calls: list[Any]) -> list[dict[str, Any]]:
    return [call.arguments for call in calls if hasattr(call, "arguments")]


def _bytes(calls: list[Any]) -> int:
    """Of the distinct tensors that launches read and write."""
    sizes = {}
    for arguments in _arguments(calls):
        for value in arguments.values():
            tensor = getattr(value, "base", value)  # of a tensor descriptor
            if isinstance(tensor, Tensor):
                sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(sizes.values())


def eager(options: Options, batch: int, node: int, pooling: Pooling, compiled: bool) -> Row:
    """PyTorch's calls in float16 on the states of our float16 relaxation."""
    sets = programs(options.model, options.size, batch, options.device, "fp16")
    network, at = sets.problem.network, sets.inputs(node)
    expected = truth(network, node, at)
    dtype = torch.float16 if options.device == "cuda" else torch.float32
    single = _cast(at, dtype, pooling, network, node)
    size = sum(t.numel() * t.element_size() for t in single if isinstance(t, Tensor))
    count = sets_beyond_cache(size)
    copies = [tuple(t.clone() if isinstance(t, Tensor) else t for t in single) for _ in range(count)]

    def update(*tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return layer_update(*tensors, pooled=at.pooled, pooling=pooling, gain=at.gain, damping=at.damping)  # type: ignore[arg-type]

    with torch.no_grad():
        function: Callable[..., tuple[Tensor, Tensor | None]] = update
        if compiled:
            torch.compiler.reset()
            function = torch.compile(update, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True)
        error = relative_error(function(*copies[0])[0], expected)
        if not error <= FLOAT16_LIMIT:
            raise Wrong(f"relative error {error:.1e}, expected at most {FLOAT16_LIMIT:.0e}")
        works = [lambda tensors=tensors: function(*tensors) for tensors in copies]  # type: ignore[misc]
        name = "torch.compile(max-autotune) in a CUDA graph" if compiled else "eager in a CUDA graph"
        times = replayed(name, works, rounds=10 if options.quick else 25)
    return {
        **_row(options, network, node, batch, times.median, "fp16"),
        **times.row(),
        "variant": name,
        "error": error,
        "sets": count,
    }


def _cast(at: Inputs, dtype: torch.dtype, pooling: Pooling, network: Network, node: int) -> tuple[Tensor | None, ...]:
    """Arguments of ``layer_update``, channels_last."""

    def cast(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        layout = torch.channels_last if t.dim() == 4 else torch.contiguous_format
        return t.to(dtype).contiguous(memory_format=layout)

    winners = at.winners
    if winners is not None and pooling == "indices":
        conn = network.connections[network.out_of[node][0]]
        winners = flat_indices(winners, conn.map_size(*network.shapes[node][1:])[1])
    if winners is not None:
        winners = winners.contiguous(memory_format=torch.channels_last)
    tensors = (at.state, at.bias, at.below, at.weight, at.finished, at.above, at.weight_above)
    return (*(cast(t) for t in tensors), winners)


def flat_indices(winners: Tensor, width: int) -> Tensor:
    """Winners 0..3 as positions in a map of ``width`` columns, as ``max_pool2d`` returns them."""
    rows = torch.arange(winners.shape[2], device=winners.device).view(-1, 1)
    columns = torch.arange(winners.shape[3], device=winners.device)
    q = winners.long()
    return (2 * rows + q // 2) * width + 2 * columns + q % 2


def _row(options: Options, network: Network, node: int, batch: int, seconds: float, rate: str) -> Row:
    row = speed(options, layer_flops(network, node, batch), seconds, rate)
    shape = "x".join(map(str, network.shapes[node]))
    return {"batch": batch, "node": node, "shape": shape, **row}
