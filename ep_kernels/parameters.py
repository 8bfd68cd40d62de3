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
        head_weights, head_biases: per head (readout first); None for the identity; a tied head's are those of the head
            that it is tied to (the same tensors; of gradients None, as they are part of that head's).
        feedback_weights: per connection, in the shape of its weight, where ``Network.feedback`` is ``separate``; else
            empty, or None for a connection from the clamped input.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    head_weights: Sequence[Tensor | None]
    head_biases: Sequence[Tensor | None]
    feedback_weights: Sequence[Tensor | None] = ()

    def named(self) -> dict[str, Tensor]:
        """Tensors by name: ``connections.0.weight``, ``connections.1.feedback``, ``nodes.1.bias``, ``heads.0.weight``,
        ``heads.0.bias``; of tensors that several heads share the first alone."""
        groups = (
            ("connections.{}.weight", self.weights),
            ("connections.{}.feedback", self.feedback_weights),
            ("nodes.{}.bias", self.biases),
            ("heads.{}.weight", _without_repeats(self.head_weights)),
            ("heads.{}.bias", _without_repeats(self.head_biases)),
        )
        return {pattern.format(i): t for pattern, group in groups for i, t in enumerate(group) if t is not None}

    @staticmethod
    def shapes(network: Network) -> dict[str, Shape]:
        """Names and shapes that a network needs: what :meth:`named` gives of its tensors."""
        out: dict[str, Shape] = {}
        for c, conn in enumerate(network.connections):
            out[f"connections.{c}.weight"] = conn.weight_shape(network.shapes[conn.src], network.shapes[conn.dst])
        for c in range(len(network.connections)):
            if network.has_feedback_weight(c):
                out[f"connections.{c}.feedback"] = out[f"connections.{c}.weight"]
        for i, shape in enumerate(network.shapes[1:], 1):
            out[f"nodes.{i}.bias"] = shape[:1]
        for h, head in enumerate(network.heads):
            weight = head.weight_shape(network.shapes[head.node])
            if weight is not None and head.tied is None:
                out[f"heads.{h}.weight"], out[f"heads.{h}.bias"] = weight, weight[:1]
        return out

    @staticmethod
    def from_named(network: Network, tensors: Mapping[str, Tensor]) -> Parameters:
        """The inverse of :meth:`named`.

        Args:
            network: whose tensors these are.
            tensors: by name; others than the network's are not read.

        Returns:
            The same tensors, not copied.

        Raises:
            ValueError: a missing name or a wrong shape.
        """
        for name, shape in Parameters.shapes(network).items():
            if name not in tensors:
                raise ValueError(f"Parameters: expected a tensor '{name}' of shape {list(shape)}, got none")
            if tuple(tensors[name].shape) != tuple(shape):
                raise ValueError(f"Parameters: '{name}': expected shape {list(shape)}, got {list(tensors[name].shape)}")
        heads = [h if head.tied is None else head.tied for h, head in enumerate(network.heads)]
        separate = network.feedback == "separate"
        return Parameters(
            [tensors[f"connections.{c}.weight"] for c in range(len(network.connections))],
            [None, *(tensors[f"nodes.{i}.bias"] for i in range(1, len(network.shapes)))],
            [tensors.get(f"heads.{h}.weight") for h in heads],
            [tensors.get(f"heads.{h}.bias") for h in heads],
            [tensors.get(f"connections.{c}.feedback") for c in range(len(network.connections))] if separate else (),
        )


def _without_repeats(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """None in place of a tensor that came before."""
    seen: set[int] = set()
    out: list[Tensor | None] = []
    for tensor in tensors:
        out.append(None if tensor is None or id(tensor) in seen else tensor)
        seen.add(id(tensor))
    return out
