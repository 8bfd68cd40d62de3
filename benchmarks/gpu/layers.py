"""One full free update of every node of the network: our launches and our ops against PyTorch's convolutions.

All start from the states of a relaxation under way, as the reference left them, and are captured in a CUDA graph that
goes through several input sets where one would stay in the L2 cache. *Launches* are what a relaxation of the backend
triton runs in a steady sweep (a pooled drive, then the step), bound to its own buffers. *Ops* are ``functional.drive``
and ``functional.relax_step`` of a backend on tensors in channels_last memory, the copies into and out of its layout
included; PyTorch's are ``layer_update`` of baselines on the same tensors.
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
    backend_of,
    contenders,
    layer_flops,
    network_of,
    problem_of,
    relative_error,
)
from benchmarks.gpu.rates import speed
from benchmarks.gpu.rows import Job, Row, Wrong
from benchmarks.gpu.timing import replayed, sets_beyond_cache
from ep_kernels import Network, RelaxConfig, backends, free_phase, functional, reference
from ep_kernels.functional import Neighbour
from ep_kernels.relaxation import Relaxation

SWEEPS = 3  # before the launches of the last of them are timed
OURS = ("fp16", "fp16, fp32 states", "bf16", "tf32")
OPS = {"fp16": torch.float16, "bf16": torch.bfloat16}  # dtype of all tensors of an op
COMPILE_LIMIT = 45.0  # seconds of one max-autotune


def jobs(options: Options) -> list[Job]:
    """Ours first, the largest batch first; what may take long (max-autotune) last."""
    network = network_of(options.model, options.size)
    nodes = range(1, len(network.shapes))
    batches = sorted(options.batches, reverse=True)
    found = []
    for b in batches:
        for name in OURS if "triton" in contenders(options) else ():
            found += [Job(f"{b}/{i}/ours {name}", partial(ours, options, PRECISIONS[name], b, i)) for i in nodes]
        if not options.backends:
            found += [Job(f"{b}/{i}/eager", partial(eager, options, b, i, "indices", False)) for i in nodes]
        for on in contenders(options):
            for name in OPS if b == batches[0] else ():
                found += [
                    Job(f"{b}/{i}/ours {name} ops, {on}", partial(our_ops, options, b, i, name, on)) for i in nodes
                ]
    if options.backends:
        return found
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

        def state(i: int) -> Tensor:
            return _tensor(made.state(i, 0), network.shapes[i]).double()

        def winners(c: int) -> Tensor | None:
            return _tensor(made.winners(c), network.shapes[network.connections[c].dst])

        def finished(c: int) -> Tensor:
            return _tensor(made.drive(c), network.shapes[node]).double()

        return inputs_of(self.problem, node, state, winners, finished)

    def state(self, node: int) -> Tensor:
        return _tensor(self.get(0).buffers.state(node, 0), self.problem.network.shapes[node])


def inputs_of(
    problem: Problem,
    node: int,
    state: Callable[[int], Tensor],
    winners: Callable[[int], Tensor | None],
    finished: Callable[[int], Tensor],
) -> Inputs:
    """What an update reads, of states by node, and winners and finished drives by connection."""
    network = problem.network
    into, out_of = network.into[node], network.out_of[node]
    if len(into) != 1 or len(out_of) > 1:
        raise ValueError(f"node {node}: expected a chain, got {len(into)} connections in and {len(out_of)} out")
    c = into[0]
    conn = network.connections[c]
    weights = [w.double() for w in problem.parameters.weights]
    bias = problem.parameters.biases[node]
    assert bias is not None
    first = conn.src == 0
    above = out_of[0] if out_of else None
    pooled_above = above is not None and network.connections[above].pool == "max"
    return Inputs(
        state(node),
        bias.double(),
        None if first else state(conn.src),
        None if first else weights[c],
        finished(c) if first else None,
        None if above is None else state(network.connections[above].dst),
        None if above is None else weights[above],
        winners(above) if above is not None and pooled_above else None,
        conn.pool == "max",
        pooled_above,
        RelaxConfig().free_damping(network.feedback_gain),
        network.feedback_gain,
    )


@lru_cache(maxsize=2)
def settled(model: str, size: int, batch: int, device: str) -> list[Tensor]:
    """States by node after SWEEPS sweeps of the reference in float32, rounded to float16."""
    p = _problem(model, size, batch, device)
    states = free_phase(p.network, p.parameters, p.x, RelaxConfig(free_steps=SWEEPS), backend="reference").states
    return [s.half() for s in states]


def settled_inputs(options: Options, batch: int, node: int) -> tuple[Network, Inputs]:
    """The network, and what the update of a node reads in those states."""
    states = settled(options.model, options.size, batch, options.device)
    p = _problem(options.model, options.size, batch, options.device)

    def drive(c: int) -> tuple[Tensor, Tensor | None]:
        conn = p.network.connections[c]
        source, weight = states[conn.src].double(), p.parameters.weights[c].double()
        return reference.drive(source, weight, conn.stride, conn.padding, conn.pool)

    at = inputs_of(p, node, lambda i: states[i].double(), lambda c: drive(c)[1], lambda c: drive(c)[0])
    return p.network, at


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
        "variant": f"ours {precision.name}, launches of triton",
        "backend": "triton",
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


def our_ops(options: Options, batch: int, node: int, name: str, on: str) -> Row:
    """``functional.drive`` where the connection pools, then ``functional.relax_step``."""
    network, at = settled_inputs(options, batch, node)
    precision = PRECISIONS[name]
    single = _cast(at, OPS[name], "windows", network, node)
    count = sets_beyond_cache(sum(t.numel() * t.element_size() for t in single if t is not None))
    copies = [tuple(None if t is None else t.clone() for t in single) for _ in range(count)]
    conn = network.connections[network.into[node][0]]
    up = network.connections[network.out_of[node][0]] if network.out_of[node] else None

    def update(
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
        if below is not None and weight is not None:
            if at.pooled:
                drives.append(functional.drive(below, weight, conn.stride, conn.padding, conn.pool)[0])
            else:
                sources.append(Neighbour(below, weight, conn.stride, conn.padding, conn.pool))
        if above is not None and weight_above is not None and up is not None:
            tops.append(Neighbour(above, weight_above, up.stride, up.padding, up.pool, winners, at.gain))
        lo, hi, slope = network.lo, network.hi, network.slope
        return functional.relax_step(
            state, bias, drives=drives, below=sources, above=tops, damping=at.damping, slope=slope, lo=lo, hi=hi
        )[0]

    with torch.no_grad(), backends.backend(backend_of(on)):
        error = relative_error(update(*copies[0]), truth(network, node, at))  # type: ignore[arg-type]
        if not error <= precision.error:
            raise Wrong(f"relative error {error:.1e}, expected at most {precision.error:.0e}")
        works = [lambda tensors=tensors: update(*tensors) for tensors in copies]  # type: ignore[misc]
        label = f"ours {name} ops, {on}"
        times = replayed(f"node {node}, {label}", works, rounds=10 if options.quick else 25)
    return {
        **_row(options, network, node, batch, times.median, precision.rate),
        **times.row(),
        "variant": label,
        "backend": on,
        "error": error,
        "sets": count,
    }


def eager(options: Options, batch: int, node: int, pooling: Pooling, compiled: bool) -> Row:
    """PyTorch's calls in float16."""
    network, at = settled_inputs(options, batch, node)
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
