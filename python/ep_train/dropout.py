"""Dropout for networks that relax: one mask per batch, the same in the free and in every nudged phase.

A batch trains a thinned network (Srivastava et al. 2014): units that are left out have no weights, so their states stay
zero through all phases, and the energy is that of the smaller network. It is made of masked weights, so that every
backend runs it as it is. What is left sends its drive times 1 / (1 - rate), so that drives keep their expectation and
nothing has to be scaled when all units are there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_kernels import Head, Network, Parameters


@dataclass(frozen=True)
class Masks:
    """Which units a batch leaves out.

    Attributes:
        kept: per node, [C] (channels of a map) or [F], 1 or 0; None where nothing is left out.
        rates: per node.
    """

    network: Network
    kept: tuple[Tensor | None, ...]
    rates: tuple[float, ...]

    def apply(self, parameters: Parameters) -> Parameters:
        """Parameters of the thinned network, which runs in place of the whole one."""
        return self._times(parameters)

    def gradients(self, gradients: Parameters) -> Parameters:
        """Gradients by the whole network's parameters from those by the thinned network's: the chain rule."""
        return self._times(gradients)  # each masked parameter is a product with a constant

    def _times(self, parameters: Parameters) -> Parameters:
        weights: list[Tensor] = []
        feedback_weights: list[Tensor | None] = []
        for c, conn in enumerate(self.network.connections):
            factors = self._rows(conn.dst, parameters.weights[c]), self._columns(conn.src, parameters.weights[c])
            weights.append(_product(parameters.weights[c], factors))
            own = parameters.feedback_weights[c] if parameters.feedback_weights else None
            feedback_weights.append(None if own is None else _product(own, factors))
        biases = [
            None if bias is None else _product(bias, (self._rows(i, bias),)) for i, bias in enumerate(parameters.biases)
        ]
        head_weights: list[Tensor | None] = []
        for h, head in enumerate(self.network.heads):
            weight = parameters.head_weights[h]
            if weight is not None and head.tied is not None:  # of parameters the same tensor; of gradients None
                head_weights.append(head_weights[head.tied])
            else:
                head_weights.append(None if weight is None else self._head(head, weight))
        return Parameters(
            weights,
            biases,
            head_weights,
            parameters.head_biases,
            feedback_weights if parameters.feedback_weights else (),
        )

    def _head(self, head: Head, weight: Tensor) -> Tensor:
        return _product(weight, (self._columns(head.node, weight),))

    def _rows(self, node: int, like: Tensor) -> Tensor | None:
        kept = self.kept[node]
        return None if kept is None else kept.to(like).view(-1, *[1] * (like.dim() - 1))

    def _columns(self, node: int, like: Tensor) -> Tensor | None:
        """Of a weight from ``node``: [1, C, 1, 1], or [1, features] with C channels of so many pixels each."""
        kept = self.kept[node]
        if kept is None:
            return None
        scaled = kept.to(like) / (1 - self.rates[node])
        if like.dim() == 2:
            scaled = scaled.repeat_interleave(like.shape[1] // len(scaled))
        return scaled.view(1, -1, *[1] * (like.dim() - 2))


class Dropout:
    """Draws the masks of each batch.

    Args:
        rates: probability that a channel of a map, or a unit of a vector, is left out: one number for all hidden nodes,
            or one for each. The clamped input and the output units of an ``mse`` readout are always there.

    Raises:
        ValueError: a rate outside [0, 1), the wrong number of them; a box without 0, where units that are left out
            could not rest; or a rate on a node whose states a head compares directly, without a map of its own.
    """

    def __init__(self, network: Network, rates: Sequence[float]) -> None:
        readout = network.readout
        hidden = [i for i in range(1, len(network.shapes)) if i != readout.node or readout.outputs is not None]
        if len(rates) not in (1, len(hidden)):
            raise ValueError(
                f"Dropout: argument 'rates': expected one, or {len(hidden)} (one per hidden layer), got {len(rates)}"
            )
        for rate in rates:
            if not (math.isfinite(rate) and 0 <= rate < 1):
                raise ValueError(f"Dropout: argument 'rates': expected numbers in [0, 1), got {rate!r}")
        if any(rates) and not network.lo <= 0 <= network.hi:
            raise ValueError(
                f"Dropout: argument 'network': expected a box that holds 0, got [{network.lo}, {network.hi}]"
            )
        by_node = [0.0] * len(network.shapes)
        for node, rate in zip(hidden, rates if len(rates) > 1 else [*rates] * len(hidden), strict=True):
            by_node[node] = rate
        for h, head in enumerate(network.heads):
            if head.outputs is None and by_node[head.node] > 0:
                raise ValueError(
                    f"Dropout: argument 'rates': expected 0 for node {head.node}, whose states head {h} compares with "
                    f"a target directly, got {by_node[head.node]}"
                )
        self.network, self.rates = network, tuple(by_node)

    def draw(self, generator: torch.Generator) -> Masks:
        """Masks of one batch, from a CPU generator: the same seed, the same masks on every device."""
        kept = tuple(
            (torch.rand(shape[0], generator=generator) >= rate).float() if rate > 0 else None
            for shape, rate in zip(self.network.shapes, self.rates, strict=True)
        )
        return Masks(self.network, kept, self.rates)


def _product(tensor: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    for factor in factors:
        if factor is not None:
            tensor = tensor * factor
    return tensor
