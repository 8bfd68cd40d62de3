"""Networks and problems on which the mathematics is tested: one of each kind of connection, head and geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ep_kernels import Connection, Equilibrium, Head, Network, Parameters, RelaxConfig

BACKENDS = ("reference", "cpu")


def _skips(pool: str) -> Network:
    """Seven nodes: strided, pooled, 1x1 and 5x3 convolutions, skip connections over one and two levels, linear ends."""
    shapes = ((2, 9, 7), (3, 9, 7), (4, 4, 3), (3, 4, 3), (3, 4, 3), (5,), (4,))
    connections = (
        Connection(0, 1),
        Connection(1, 2, pool=pool),  # 9x7 -> 4x3: the odd row and column are dropped
        Connection(0, 2, (5, 3), (2, 2), (1, 0)),
        Connection(2, 3, (1, 1), padding=(0, 0)),
        Connection(1, 3, (3, 2), (2, 2), (0, 0)),
        Connection(3, 4, (5, 3), padding=(2, 1)),
        Connection(1, 4, (1, 1), (1, 1), (0, 0), pool),  # over two levels
        Connection(4, 5, None),
        Connection(2, 5, None),
        Connection(5, 6, None),
    )
    local = (
        Head(1, 3, pool=2, weight=0.3),
        Head(4, 2, loss="mse", pool=3, pointwise=True, weight=0.5),
        Head(5, 4, weight=0.7, temperature=2.0),
    )
    return Network(shapes, connections, Head(6, None, loss="mse"), local, feedback_gain=0.5)


NETWORKS: dict[str, Network] = {
    "max": Network.chain((2, 8, 8), [3, 4, 5, 4], ["none", "max", "none", "max"], classes=3, feedback_gain=0.5),
    "max everywhere, odd maps": Network.chain((1, 15, 11), [3, 4, 3], ["max"] * 3, classes=3, feedback_gain=0.7),
    "average, odd maps": Network.chain((2, 11, 9), [4, 3, 4], ["avg", "none", "avg"], classes=3, feedback_gain=0.25),
    "no pooling, mse": Network.chain(
        (2, 6, 5), [4, 3], ["none"] * 2, classes=3, hidden=[6], readout="mse", feedback_gain=1.0
    ),
    "slope 1/2, local heads": Network.chain(
        (2, 8, 8),
        [3, 4, 4],
        ["max", "none", "avg"],
        classes=3,
        hidden=[5],
        local_heads=[1, 3],
        local_weight=0.4,
        feedback_gain=0.6,
        slope=0.5,
    ),
    "5x5, no padding": Network.chain(
        (2, 13, 13), [3, 4], ["max", "none"], classes=3, kernel_size=5, padding=[0, 1], feedback_gain=0.9
    ),
    "skips, max": _skips("max"),
    "skips, average": replace(_skips("avg"), feedback_gain=0.8),
}
# what an energy does not cover, and losses that some kernels leave to others
VARIANTS: dict[str, Network] = {
    "separate, linear top": replace(_skips("max"), feedback_gain=0.05, feedback="separate", linear_nodes=(6,)),
    "separate, tied head": replace(
        Network.chain((2, 11, 9), [4, 3, 4], ["avg", "none", "avg"], classes=3, hidden=[5], feedback_gain=0.25),
        local_heads=(Head(4, 3, weight=0.5, temperature=2.0, tied=0),),
        feedback="separate",
    ),
    "cosine": Network(
        ((2, 9, 7), (3, 4, 3), (4, 4, 3), (6,), (3,)),
        (Connection(0, 1, pool="max"), Connection(1, 2), Connection(2, 3, None), Connection(3, 4, None)),
        Head(4, None, loss="mse"),
        (
            Head(1, None, loss="cosine", weight=0.3),
            Head(1, 4, loss="cosine", pool=2, weight=0.3),
            Head(2, 5, loss="cosine", pointwise=True, weight=0.2),
            Head(3, 4, loss="cosine", weight=0.5),
        ),
        feedback_gain=0.3,
        lo=0.1,  # no vector is so short that rounding turns it
        linear_nodes=(4,),
    ),
}
# those with a winner that can change: max pooling of a hidden node
POOLED = {name: net for name, net in NETWORKS.items() if any(c.pool == "max" and c.src for c in net.connections)}


@dataclass(frozen=True)
class Problem:
    """Random parameters, a random batch and targets, in float64."""

    network: Network
    parameters: Parameters
    x: Tensor
    targets: list[Tensor]

    def states(self, seed: int = 0) -> list[Tensor]:
        """Random states within the box, on the clamped input."""
        generator = torch.Generator().manual_seed(9_000 + seed)
        net = self.network
        return [
            self.x,
            *(
                net.lo + (net.hi - net.lo) * torch.rand(len(self.x), *shape, generator=generator, dtype=self.x.dtype)
                for shape in net.shapes[1:]
            ),
        ]


def problem(
    network: Network,
    seed: int = 0,
    *,
    batch: int = 3,
    gain: float = 1.0,
    bias: float = 0.0,
    bias_spread: float = 0.3,
) -> Problem:
    """Weights of standard deviation ``gain / sqrt(fan-in)``, biases around ``bias``, inputs in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {}
    for name, shape in Parameters.shapes(network).items():
        if name.endswith("bias"):
            tensors[name] = bias_spread * normal(*shape) + (bias if name.startswith("nodes") else 0.0)
        else:
            tensors[name] = normal(*shape) * gain / float(torch.tensor(shape[1:]).prod()) ** 0.5
    targets = []
    for head in network.heads:
        target = normal(batch, *head.output_shape(network.shapes[head.node]))
        if head.loss == "cosine":
            target[:1] = 0  # without a direction
        targets.append(target.softmax(1) if head.loss == "cross_entropy" else target)
    x = torch.rand(batch, *network.shapes[0], generator=generator, dtype=torch.float64)
    return Problem(network, Parameters.from_named(network, tensors), x, targets)


def at(states: Sequence[Tensor], winners: dict[int, Tensor] | None = None) -> Equilibrium:
    """``states`` dressed up as an equilibrium with its winners; of what network does not matter."""
    residuals = states[0].new_zeros(1, len(states[0]))
    network = next(iter(NETWORKS.values()))
    return Equilibrium(list(states), list(states), {}, winners or {}, residuals, network, RelaxConfig(free_steps=1))


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two tensors as vectors, in float64."""
    u, v = a.flatten().double(), b.flatten().double()
    return float(u @ v / (u.norm() * v.norm()))


def fitting(network: Network, config: RelaxConfig) -> Network:
    """The network, with tied feedback where the winners are live: separate weights need frozen ones. In the states form
    with a gain whose powers do not multiply rounding."""
    if config.nudge_form == "states":
        network = replace(network, feedback_gain=max(network.feedback_gain, 0.25))
    return replace(network, feedback="tied") if config.winners == "live" else network
