"""Networks by name, and the module that holds a network's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from ep_kernels import Network
from ep_kernels.architectures import architecture_of
from ep_kernels.network import Feedback
from ep_kernels.nn import ParameterHolder, initial_parameters

if TYPE_CHECKING:
    from .losses import AugmentedLoss


def build_network(
    model: str,
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    width: float = 1.0,
    pool: Literal["max", "avg"] = "max",
    readout: Literal["softmax", "mse"] = "softmax",
    local_heads: Sequence[int] = (),
    local_weight: float = 0.2,
    feedback_gain: float = 0.1,
    slope: float = 1.0,
    box: tuple[float, float] = (0.0, 1.0),
    linear_output: bool = False,
    feedback: Feedback = "tied",
) -> Network:
    """A named network for inputs of ``input_shape``.

    Args:
        model: a name of ``ARCHITECTURES``, or a spec: widths with ``p`` after the pooled ones, as ``32-32p-64-64p``,
            then linear layers as ``fc128``.
        input_shape: (C, H, W) of the images.
        classes: outputs of the readout.
        width: factor of every width (rounded, at least 1).
        pool: kind of the 2x2 pooling.
        readout: ``softmax`` (outside the dynamics, cross-entropy) or ``mse`` (output units inside).
        feedback_gain: k in (0, 1].
        slope: gamma of ``clip(gamma a, lo, hi)``.
        box: lo and hi, the bounds of the states.
        linear_output: the output units of an ``mse`` readout are not clipped.
        feedback: ``tied``, or ``separate``: through weights of its own.
        local_heads: nodes (1 is the first) with a local cross-entropy head.
        local_weight: lambda of those heads.

    Returns:
        The network.

    Raises:
        ValueError: an unknown name, or an input too small for the pools.
    """
    architecture = architecture_of(model, "build_network: argument 'model'")
    side = min(input_shape[1:])
    if side < architecture.least:
        raise ValueError(
            f"build_network: argument 'model': {model} pools to nothing below {architecture.least}x"
            f"{architecture.least} inputs, got {input_shape[1]}x{input_shape[2]}"
        )
    channels, hidden, connections = architecture.layout(input_shape, width=width, pool=pool)
    return Network.graph(
        input_shape,
        channels,
        connections,
        classes=classes,
        hidden=hidden,
        readout=readout,
        local_heads=local_heads,
        local_weight=local_weight,
        feedback_gain=feedback_gain,
        slope=slope,
        lo=box[0],
        hi=box[1],
        linear_output=linear_output,
        feedback=feedback,
    )


class Model(ParameterHolder):
    """The parameters of a network, for the trainer: :class:`ep_kernels.nn.ParameterHolder` with a loss.

    Names: ``connections.0.weight``, ``nodes.1.bias``, ``heads.0.weight``, ``heads.0.bias``.

    Args:
        network: whose parameters these are.
        weight_gain: initial weights are normal with standard deviation ``weight_gain / sqrt(fan-in)``: one gain, or one
            for each connection, then the readout if given; biases start at zero.
        seed: of the initial weights.
        loss: L_aug, whose network this is; None: the labels on every head.
    """

    def __init__(
        self,
        network: Network,
        *,
        weight_gain: float | Sequence[float] = 1.0,
        seed: int = 0,
        loss: AugmentedLoss | None = None,
    ) -> None:
        tensors = initial_parameters(network, weight_gain=weight_gain, seed=seed)
        super().__init__(network, tensors, torch.channels_last)
        self.loss: AugmentedLoss | None = loss

    def forward(self, *_: object) -> None:
        """EP has no forward pass of its own. Raises TypeError that says what to call."""
        raise TypeError("Model is not called: use ep_train.predict(model, x, RelaxConfig()) or ep_train.ep_step")

    def layer_of(self, name: str) -> int:
        """Layer of a parameter, for per-layer learning rates: its node, or one past the last for the readout (and for
        what a loss trains besides the network)."""
        kind, index = name.split(".")[:2]
        if kind == "loss":
            return len(self.network.shapes) - int(self.network.readout.outputs is None)
        if kind == "connections":
            return self.network.connections[int(index)].dst
        if kind == "nodes":
            return int(index)
        return len(self.network.shapes) if index == "0" else self.network.heads[int(index)].node
