"""Small networks that hold every kind of connection and head, with parameters, inputs and targets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ep_kernels import Connection, Head, Network, Parameters
from tests.core.nets import VARIANTS
from tests.ops.inputs import Maker

# Chain of max, average and no pooling on ragged maps, a linear node, softmax readout.
CHAIN = Network.chain((2, 11, 9), (3, 5, 4), ("max", "avg", "none"), classes=4, hidden=(7,))
# Output units inside the dynamics.
MSE = Network.chain((1, 9, 7), (3, 4), ("max", "none"), classes=3, readout="mse", slope=0.5)
# Output units that are a map, above a max pooling.
MAP = Network(
    ((2, 9, 8), (4, 9, 8), (3, 4, 4)),
    (Connection(0, 1), Connection(1, 2, pool="max")),
    Head(2, None, "mse"),
    feedback_gain=0.5,
    linear_nodes=(2,),
)
# A strided skip connection around a pooled one, one straight from the clamped input, a linear one from a map.
SKIP = Network(
    shapes=((2, 8, 6), (3, 8, 6), (4, 4, 3), (5, 4, 3), (6,), (5,)),
    connections=(
        Connection(0, 1),
        Connection(1, 2, pool="max"),
        Connection(0, 2, (5, 3), (2, 2), (2, 1)),
        Connection(2, 3, (1, 1), padding=(0, 0)),
        Connection(1, 3, (3, 3), (2, 2), (1, 1)),
        Connection(3, 4, None),
        Connection(2, 4, None),
        Connection(4, 5, None),
    ),
    readout=Head(5, 3),
    feedback_gain=0.3,
)
# Cross-entropy and distillation heads on maps and vectors: averaged to 1 and 2, pointwise, identity.
HEADS = Network(
    shapes=((2, 9, 7), (3, 4, 3), (4, 4, 3), (6,)),
    connections=(
        Connection(0, 1, pool="max"),
        Connection(1, 2, pool="none"),
        Connection(2, 3, None),
    ),
    readout=Head(3, 3),
    local_heads=(
        Head(1, 3, pool=1, weight=0.3),
        Head(2, 3, pool=2, weight=0.2, temperature=2.0),
        Head(1, 5, "mse", pointwise=True, weight=0.1),
        Head(2, 5, pool=2, pointwise=True, weight=0.1, temperature=3.0),
        Head(2, None, "mse", weight=0.05),
        Head(2, None, pool=1, weight=0.05),
        Head(3, 4, "mse", weight=0.1),
        Head(3, None, temperature=0.5, weight=0.1),
    ),
    feedback_gain=0.5,
    slope=0.8,
    lo=-0.1,
    hi=0.9,
)
NETWORKS = {"chain": CHAIN, "mse": MSE, "skip": SKIP, "heads": HEADS, **VARIANTS}


def parameters(network: Network, dtype: torch.dtype = torch.float64, gain: float = 1.0) -> Parameters:
    """Random ones: weights of standard deviation gain / sqrt(fan-in), biases around the middle of the box."""
    new = Maker(dtype, 7)
    tensors = {}
    for name, shape in Parameters.shapes(network).items():
        if name.endswith("bias"):
            tensors[name] = 0.3 + 0.2 * new(*shape)
        else:
            tensors[name] = gain * new(*shape) / math.prod(shape[1:]) ** 0.5
    return Parameters.from_named(network, tensors)


def problem(
    network: Network, batch: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Parameters, Tensor, list[Tensor]]:
    """Parameters, clamped input and targets of every head."""
    new = Maker(dtype, 8)
    targets = []
    for head in network.heads:
        values = new(batch, *head.output_shape(network.shapes[head.node]))
        if head.loss == "cosine":
            values[:1] = 0  # without a direction
        targets.append(values.softmax(1) if head.loss == "cross_entropy" else values)
    return parameters(network, dtype), new(batch, *network.shapes[0]).sigmoid(), targets


def extra_nudges(network: Network, batch: int = 3, dtype: torch.dtype = torch.float64) -> dict[int, Tensor]:
    """On a node that has no head and on the top, which has."""
    new = Maker(dtype, 9)
    return {node: 0.1 * new(batch, *network.shapes[node]) for node in (1, len(network.shapes) - 1)}
