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

from ep_kernels import Network, Parameters


@dataclass(frozen=True)
class Masks:
    """Which units a batch leaves out.

    Attributes:
        kept: per node, [C] (channels of a map) or [F], 1 or 0; None where nothing is left out.
        scaled: the same over 1 - rate: what the node's units send is multiplied by it.
    """

    network: Network
    kept: tuple[Tensor | None, ...]
    scaled: tuple[Tensor | None, ...]

    def apply(self, parameters: Parameters) -> Parameters:
        """Parameters of the thinned network, which runs in place of the whole one: each times its constants."""
        weights: list[Tensor] = []
        feedback_weights: list[Tensor | None] = []
        for c, conn in enumerate(self.network.connections):
            weights.append(self._sent(conn.src, self._received(conn.dst, parameters.weights[c])))
            own = parameters.feedback_weights[c] if parameters.feedback_weights else None
            feedback_weights.append(None if own is None else self._sent(conn.src, self._received(conn.dst, own)))
        biases = [None if bias is None else self._received(i, bias) for i, bias in enumerate(parameters.biases)]
        head_weights: list[Tensor | None] = []
        for h, head in enumerate(self.network.heads):
            weight = parameters.head_weights[h]
            if weight is not None and head.tied is not None:  # of parameters the same tensor; of gradients None
                head_weights.append(head_weights[head.tied])
            else:
                head_weights.append(None if weight is None else self._sent(head.node, weight))
        return Parameters(
            weights,
            biases,
            head_weights,
            parameters.head_biases,
            feedback_weights if parameters.feedback_weights else (),
        )

    def gradients(self, gradients: Parameters) -> Parameters:
        """Gradients by the whole network's parameters from those by the thinned network's.

        By the chain rule: a thinned parameter is the whole one's times constants, so its gradient is multiplied by the
        same constants. The same function as :meth:`apply`, of other things.
        """
        return self.apply(gradients)

    def _received(self, node: int, tensor: Tensor) -> Tensor:
        """A weight into ``node``, or its bias, by rows."""
        kept = self.kept[node]
        return tensor if kept is None else tensor * kept.to(tensor).view(-1, *[1] * (tensor.dim() - 1))

    def _sent(self, node: int, tensor: Tensor) -> Tensor:
        """A weight from ``node`` by columns: [out, C, h, w], or [out, features] of C channels with as many pixels."""
        scaled = self.scaled[node]
        if scaled is None:
            return tensor
        scaled = scaled.to(tensor)
        if tensor.dim() == 2:
            by_channel = tensor.view(len(tensor), len(scaled), -1)
            return (by_channel * scaled.view(1, -1, 1)).view(tensor.shape)
        return tensor * scaled.view(1, -1, *[1] * (tensor.dim() - 2))


class Dropout:
    """Draws the masks of each batch.

    Args:
        network: whose channels are left out.
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

    def draw(
        self,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Masks:
        """Masks of one batch, from a CPU generator: the same seed, the same masks on every device.

        Args:
            generator: of the CPU.
            device: where the parameters are (default: the CPU). All masks go there in one copy, which does not wait for
                a GPU; what :class:`Masks` does with them later is views of it.
            dtype: of the parameters.

        Returns:
            Masks, whose ``apply`` gives the thinned network's tensors and whose ``gradients`` brings theirs back.
        """
        nodes = [i for i, rate in enumerate(self.rates) if rate > 0]
        sizes = [self.network.shapes[i][0] for i in nodes]
        drawn = [
            (torch.rand(size, generator=generator) >= self.rates[i]).to(dtype)
            for i, size in zip(nodes, sizes, strict=True)
        ]
        scaled = [mask / (1 - self.rates[i]) for i, mask in zip(nodes, drawn, strict=True)]
        flat = torch.cat([*drawn, *scaled]) if nodes else torch.zeros(0, dtype=dtype)
        if device is not None and torch.device(device).type != "cpu":
            pinned = flat.pin_memory() if torch.device(device).type == "cuda" else flat
            flat = pinned.to(device, non_blocking=True)
        parts = flat.split([*sizes, *sizes])
        kept: list[Tensor | None] = [None] * len(self.rates)
        sent: list[Tensor | None] = [None] * len(self.rates)
        for place, node in enumerate(nodes):
            kept[node], sent[node] = parts[place], parts[len(nodes) + place]
        return Masks(self.network, tuple(kept), tuple(sent))
