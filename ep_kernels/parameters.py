"""The tensors of a network, by role and by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .network import Network, Shape


@dataclass(frozen=True)
class Parameters:
    """Tensors of a network, or their gradients: the same structure.

    Attributes:
        weights: per connection, ``Connection.weight_shape``.
        biases: per node, [C] or [F]; index 0 (the clamped input) is None.
        head_weights, head_biases: per head (readout first); None for the identity.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    head_weights: Sequence[Tensor | None]
    head_biases: Sequence[Tensor | None]

    def named(self) -> dict[str, Tensor]:
        """Tensors by name: ``connections.0.weight``, ``nodes.1.bias``, ``heads.0.weight``, ``heads.0.bias``."""
        groups = (
            ("connections.{}.weight", self.weights),
            ("nodes.{}.bias", self.biases),
            ("heads.{}.weight", self.head_weights),
            ("heads.{}.bias", self.head_biases),
        )
        return {pattern.format(i): t for pattern, group in groups for i, t in enumerate(group) if t is not None}

    @staticmethod
    def shapes(network: Network) -> dict[str, Shape]:
        """Names and shapes that a network needs."""
        out: dict[str, Shape] = {}
        for c, conn in enumerate(network.connections):
            out[f"connections.{c}.weight"] = conn.weight_shape(network.shapes[conn.src], network.shapes[conn.dst])
        for i, shape in enumerate(network.shapes[1:], 1):
            out[f"nodes.{i}.bias"] = shape[:1]
        for h, head in enumerate(network.heads):
            weight = head.weight_shape(network.shapes[head.node])
            if weight is not None:
                out[f"heads.{h}.weight"], out[f"heads.{h}.bias"] = weight, weight[:1]
        return out

    @staticmethod
    def from_named(network: Network, tensors: Mapping[str, Tensor]) -> Parameters:
        """The inverse of :meth:`named`. Raises ValueError for a missing name or a wrong shape."""
        for name, shape in Parameters.shapes(network).items():
            if name not in tensors:
                raise ValueError(f"Parameters: expected a tensor '{name}' of shape {list(shape)}, got none")
            if tuple(tensors[name].shape) != tuple(shape):
                raise ValueError(f"Parameters: '{name}': expected shape {list(shape)}, got {list(tensors[name].shape)}")
        heads = range(len(network.heads))
        return Parameters(
            [tensors[f"connections.{c}.weight"] for c in range(len(network.connections))],
            [None, *(tensors[f"nodes.{i}.bias"] for i in range(1, len(network.shapes)))],
            [tensors.get(f"heads.{h}.weight") for h in heads],
            [tensors.get(f"heads.{h}.bias") for h in heads],
        )
