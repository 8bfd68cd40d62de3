"""What a relaxation of the backend triton launches for one layer in a steady sweep, bound to its own buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Timed, check
from benchmarks.graphs import captured, sets_beyond_cache
from benchmarks.layers import SETS, SWEEPS, Layer
from benchmarks.problem import Precision, Problem, relative_error, require_backend
from benchmarks.updates import Inputs, inputs_of, traffic, truth
from ep_kernels import backends, free_phase
from ep_kernels.relaxation import Relaxation


class Programs:
    """Programs with the same relaxation under way, after ``SWEEPS`` sweeps: one input set each, made when asked for."""

    def __init__(self, problem: Problem, precision: Precision) -> None:
        self.problem = problem
        config = precision.config(free_steps=SWEEPS + 1)
        with backends.recorded() as jobs:  # what free_phase hands to its backend
            free_phase(problem.network, problem.parameters, problem.x, config, backend="reference")
        (relaxation,) = jobs
        assert isinstance(relaxation, Relaxation)
        self.relaxation = relaxation
        self.made: list[Any] = []

    def get(self, index: int) -> Any:
        """A program, by number."""
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

    def state(self, node: int, index: int = 0) -> Tensor:
        """A copy of a node's state in a program."""
        return _tensor(self.get(index).buffers.state(node, 0), self.problem.network.shapes[node])

    def clear(self, node: int, index: int) -> None:
        """Zero a node's state in a program."""
        self.get(index).buffers.state(node, 0).zero_()

    def inputs(self, layer: Layer) -> Inputs:
        """Copies of what the first program's launches of the layer read, in float64."""
        buffers, network = self.get(0).buffers, self.problem.network

        def winners(c: int) -> Tensor:
            return _tensor(buffers.winners(c), network.shapes[network.connections[c].dst])

        def finished(c: int) -> Tensor:
            return _tensor(buffers.drive(c), network.shapes[layer.node]).double()

        return inputs_of(layer, lambda i: self.state(i).double(), winners, finished)


def _tensor(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    from ep_kernels.triton import layout

    return layout.as_tensor(buffer, shape).clone()


@lru_cache(maxsize=1)  # whole networks' buffers: what a competitor needs of them, its launches hold
def programs(problem: Problem, precision: Precision) -> Programs:
    """Made once."""
    return Programs(problem, precision)


def launches(layer: Layer, precision: Precision) -> Timed:
    """Those of a layer, checked against float64 from what they read."""
    require_backend("triton", layer.setting)
    sets = programs(layer.problem, precision)
    before = sets.inputs(layer)
    calls = sets.launches(0, layer.node)
    for call in calls:
        call()
    error = check(relative_error(sets.state(layer.node), truth(layer, before)), precision.error)
    count = sets_beyond_cache(_bytes(calls), limit=SETS)
    works = [_run(sets.launches(index, layer.node)) for index in range(count)]
    replay, times = captured(works, lambda _: 0.0, precision.error)  # they return nothing: replayed says what they did
    error = max(error, replayed(sets, layer, before, replay, times // count, count))
    tiles = [f"{a.get('TN')}x{a.get('TH')}x{a.get('TW')} x {a.get('BN')} x {a.get('BK')}" for a in _arguments(calls)]
    state, weight = (2 if precision.storage else 4), (2 if precision.rate in ("fp16", "bf16") else 4)
    values = {
        "backend": "triton", "precision": precision.name, "rate": precision.rate, "sets": count, "tiles": tiles,
        "moved": traffic(layer).moved(state, weight),
    }  # fmt: skip
    return Timed(replay, lambda: error, precision.error, times, values)


def replayed(
    sets: Programs, layer: Layer, before: Inputs, replay: Callable[[], object], passes: int, count: int
) -> float:
    """Error of the states that a replay leaves where there were zeros: ``passes`` updates in place of each program's.

    The neighbours stay as they are, so the updates approach a state (over-relaxation is at most 1.25), and the truth
    is computed until it is there.
    """
    for index in range(count):
        sets.clear(layer.node, index)
    replay()
    at = replace(before, state=torch.zeros_like(before.state))
    for _ in range(passes):
        new = truth(layer, at)
        still = relative_error(at.state, new) < 1e-9
        at = replace(at, state=new)
        if still:
            break
    return max(relative_error(sets.state(layer.node, index), at.state) for index in range(count))


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
