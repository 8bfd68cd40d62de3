"""Networks by name, and the module that holds a network's parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ep_kernels import Network, Parameters
from ep_kernels.architectures import architecture_of
from ep_kernels.network import Feedback

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


def initial_parameters(
    network: Network,
    *,
    weight_gain: float | Sequence[float] = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Normal weights of standard deviation ``gain / sqrt(fan-in)`` (LeCun et al. 1998); zero biases. Drawn in float64
    from ``seed``, so every dtype starts from the same numbers.

    Args:
        weight_gain: one gain for all connections, or one for each; a last one more is that of a softmax readout. Heads
            have gain 1 otherwise. Feedback weights are drawn apart, with the gain of their connection.

    Raises:
        ValueError: another number of gains.
    """
    count = len(network.connections)
    gains = [float(weight_gain)] * count if isinstance(weight_gain, (int, float)) else [float(g) for g in weight_gain]
    most = count + (network.readout.outputs is not None)
    if not count <= len(gains) <= most:
        expected = f"{count} (one per connection)" + (f" or {most} (then the readout)" if most > count else "")
        raise ValueError(f"initial_parameters: argument 'weight_gain': expected {expected}, got {len(gains)}")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in Parameters.shapes(network).items():
        kind, index, leaf = name.split(".")
        if leaf == "bias":
            tensors[name] = torch.zeros(shape, dtype=dtype)
            continue
        gain = 1.0
        if kind == "connections":
            gain = gains[int(index)]
        elif index == "0" and len(gains) > count:
            gain = gains[-1]
        draw = torch.randn(shape, generator=generator, dtype=torch.float64)
        tensors[name] = (draw * (gain / math.sqrt(math.prod(shape[1:])))).to(dtype)
    return tensors


class Model(nn.Module):
    """The parameters of a network, as ordinary torch parameters: for optimizers, ``state_dict`` and ``to``.

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
        super().__init__()
        self.network = network
        for name, tensor in initial_parameters(network, weight_gain=weight_gain, seed=seed).items():
            holder: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in holder._modules:
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            if tensor.dim() == 4:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            holder.register_parameter(leaf, nn.Parameter(tensor))
        self.loss: AugmentedLoss | None = loss

    def forward(self, *_: object) -> None:
        """EP has no forward pass of its own. Raises TypeError that says what to call."""
        raise TypeError("Model is not called: use ep_train.predict(model, x, RelaxConfig()) or ep_train.ep_step")

    def tensors(self) -> Parameters:
        """The parameters as :class:`ep_kernels.Parameters`, detached: EP computes no graph."""
        return Parameters.from_named(self.network, {name: p.detach() for name, p in self.named_parameters()})

    def set_gradients(self, gradients: Parameters) -> None:
        """Store gradients in ``.grad`` for an optimizer, in the parameters' own memory layout; those of ``loss`` are
        its own business.

        torch's fused optimizers pair the numbers of a parameter and its gradient as they lie in memory.
        """
        named = gradients.named()
        for name, parameter in self.named_parameters():
            if name not in named:
                continue
            gradient = named[name]
            if gradient.stride() != parameter.stride():
                gradient = torch.empty_like(parameter, requires_grad=False).copy_(gradient)
            parameter.grad = gradient

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
