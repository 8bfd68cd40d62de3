"""One steady free update of one layer: what it reads, and what it must give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from benchmarks.baselines.plain import flat_indices
from benchmarks.layers import Layer, Tensors, Traffic, cast, settled
from ep_kernels import RelaxConfig, reference


@dataclass(frozen=True)
class Inputs:
    """What an update reads, in float64; absent neighbours are None. ``winners`` 0..3 of the drive above.

    The lowest layer has a ``finished`` drive, that of the clamped input; the others convolve the state ``below``.
    """

    state: Tensor
    bias: Tensor
    below: Tensor | None
    weight: Tensor | None
    finished: Tensor | None
    above: Tensor | None
    weight_above: Tensor | None
    winners: Tensor | None

    def cast(self, layer: Layer, dtype: torch.dtype, *, flat: bool = False) -> Tensors:
        """In the order of the fields, channels_last; with ``flat`` winners as ``max_unpool2d`` takes them."""
        winners = self.winners
        if winners is not None and flat:
            winners = flat_indices(winners, size_above(layer)[1])
        tensors = (self.state, self.bias, self.below, self.weight, self.finished, self.above, self.weight_above)
        return tuple(cast(t, dtype) for t in (*tensors, winners))


def damping(layer: Layer) -> float:
    """Of free sweeps after the first."""
    return RelaxConfig().free_damping(layer.network.feedback_gain)


def size_above(layer: Layer) -> tuple[int, int]:
    """Of the map of the connection above, before it pools."""
    conn = layer.network.connections[layer.network.out_of[layer.node][0]]
    return conn.map_size(*layer.network.shapes[layer.node][1:])


def inputs_of(
    layer: Layer,
    state: Callable[[int], Tensor],
    winners: Callable[[int], Tensor | None],
    finished: Callable[[int], Tensor],
) -> Inputs:
    """What the update reads, of states by node, and winners and finished drives by connection."""
    network, parameters = layer.network, layer.problem.parameters
    c, conn = layer.below, layer.connection
    bias = parameters.biases[layer.node]
    assert bias is not None
    first = conn.src == 0
    up = network.out_of[layer.node][0] if network.out_of[layer.node] else None
    pooled_above = up is not None and network.connections[up].pool == "max"
    return Inputs(
        state(layer.node),
        bias.double(),
        None if first else state(conn.src),
        None if first else parameters.weights[c].double(),
        finished(c) if first else None,
        None if up is None else state(network.connections[up].dst),
        None if up is None else parameters.weights[up].double(),
        winners(up) if up is not None and pooled_above else None,
    )


@lru_cache(maxsize=1)
def settled_inputs(layer: Layer) -> Inputs:
    """Of a relaxation under way, as the reference left it."""
    p = layer.problem
    states = settled(p)

    def drive(c: int) -> tuple[Tensor, Tensor | None]:
        conn = p.network.connections[c]
        source, weight = states[conn.src].double(), p.parameters.weights[c].double()
        return reference.drive(source, weight, conn.stride, conn.padding, conn.pool)

    return inputs_of(layer, lambda i: states[i].double(), lambda c: drive(c)[1], lambda c: drive(c)[0])


def truth(layer: Layer, at: Inputs) -> Tensor:
    """The new state in float64, by the reference."""
    network = layer.network
    a = at.bias.view(-1, 1, 1)
    if at.below is not None:
        conn = layer.connection
        assert at.weight is not None
        a = a + reference.drive(at.below, at.weight, conn.stride, conn.padding, conn.pool)[0]
    else:
        assert at.finished is not None
        a = a + at.finished
    if at.above is not None:
        conn = network.connections[network.out_of[layer.node][0]]
        assert at.weight_above is not None
        shape = network.shapes[layer.node]
        back = reference.feedback(at.above, at.weight_above, shape, conn.stride, conn.padding, conn.pool, at.winners)
        a = a + network.feedback_gain * back
    return reference.update(at.state, a, damping(layer), network.slope, network.lo, network.hi)


@lru_cache(maxsize=1)
def true_update(layer: Layer) -> Tensor:
    """Of :func:`settled_inputs`."""
    return truth(layer, settled_inputs(layer))


def traffic(layer: Layer) -> Traffic:
    """Read: the state, the neighbours and their weights (or a finished drive). Written: the state, winners it found."""
    network, weights = layer.network, layer.problem.parameters.weights
    conn = layer.connection

    def states(i: int) -> int:
        return layer.batch * torch.Size(network.shapes[i]).numel()

    total, read, winners = 2 * states(layer.node), 0, 0
    if conn.src == 0:
        total += states(layer.node)
    else:
        total += states(conn.src)
        read += weights[layer.below].numel()
        winners += states(layer.node) if conn.pool == "max" else 0
    for c in network.out_of[layer.node]:
        above = network.connections[c]
        total += states(above.dst)
        read += weights[c].numel()
        winners += states(above.dst) if above.pool == "max" else 0
    return Traffic(total, read, winners)
