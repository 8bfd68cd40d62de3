"""Networks by name, and the module that holds a network's parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ep_kernels import Network, Parameters
from ep_kernels.architectures import architecture_of
from ep_kernels.network import Pool


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
) -> Network:
    """A named network for inputs of ``input_shape``.

    Args:
        model: a name of ``ARCHITECTURES``, or a spec: widths with ``p`` after the pooled ones, as ``32-32p-64-64p``.
        width: factor of every width (rounded, at least 1).
        pool: kind of the 2x2 pooling.
        local_heads: nodes (1 is the first) with a local cross-entropy head of weight ``local_weight``.

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
    channels = [max(1, round(width * c)) for c in architecture.channels]
    pools: list[Pool] = [pool if i in architecture.pooled else "none" for i in range(1, len(channels) + 1)]
    return Network.chain(
        input_shape,
        channels,
        pools,
        classes=classes,
        readout=readout,
        local_heads=local_heads,
        local_weight=local_weight,
        feedback_gain=feedback_gain,
        slope=slope,
    )


def initial_parameters(
    network: Network, *, weight_gain: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Normal weights of standard deviation ``weight_gain / sqrt(fan-in)`` (LeCun et al. 1998), heads with gain 1;
    zero biases. Drawn in float64 from ``seed``, so every dtype starts from the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in Parameters.shapes(network).items():
        if name.endswith("bias"):
            tensors[name] = torch.zeros(shape, dtype=dtype)
            continue
        gain = 1.0 if name.startswith("heads") else weight_gain
        draw = torch.randn(shape, generator=generator, dtype=torch.float64)
        tensors[name] = (draw * (gain / math.sqrt(math.prod(shape[1:])))).to(dtype)
    return tensors


class Model(nn.Module):
    """The parameters of a network, as ordinary torch parameters: for optimizers, ``state_dict`` and ``to``.

    Names: ``connections.0.weight``, ``nodes.1.bias``, ``heads.0.weight``, ``heads.0.bias``.
    """

    def __init__(self, network: Network, *, weight_gain: float = 1.0, seed: int = 0) -> None:
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

    def forward(self, *_: object) -> None:
        """EP has no forward pass of its own. Raises TypeError that says what to call."""
        raise TypeError("Model is not called: use ep_train.predict(model, x, RelaxConfig()) or ep_train.ep_step")

    def tensors(self) -> Parameters:
        """The parameters as :class:`ep_kernels.Parameters`, detached: EP computes no graph."""
        return Parameters.from_named(self.network, {name: p.detach() for name, p in self.named_parameters()})

    def set_gradients(self, gradients: Parameters) -> None:
        """Store gradients in ``.grad`` for an optimizer, in the parameters' own memory layout.

        torch's fused optimizers pair the numbers of a parameter and its gradient as they lie in memory.
        """
        named = gradients.named()
        for name, parameter in self.named_parameters():
            gradient = named[name]
            if gradient.stride() != parameter.stride():
                gradient = torch.empty_like(parameter, requires_grad=False).copy_(gradient)
            parameter.grad = gradient

    def layer_of(self, name: str) -> int:
        """Layer of a parameter, for per-layer learning rates: its node, or one past the last for the readout."""
        kind, index = name.split(".")[:2]
        if kind == "connections":
            return self.network.connections[int(index)].dst
        if kind == "nodes":
            return int(index)
        return len(self.network.shapes) if index == "0" else self.network.heads[int(index)].node
