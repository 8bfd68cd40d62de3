"""The module that holds a network's parameters, and the numbers that they start from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..network import Network
from ..parameters import Parameters


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


class ParameterHolder(nn.Module):
    """The parameters of a network, as ordinary torch parameters: for optimizers, ``state_dict`` and ``to``.

    Names: ``connections.0.weight``, ``connections.1.feedback``, ``nodes.1.bias``, ``heads.0.weight``, ``heads.0.bias``.

    Args:
        tensors: by name, what :meth:`Parameters.shapes` asks for; they become the parameters.
        memory_format: of the weights of convolutions.
    """

    def __init__(
        self,
        network: Network,
        tensors: dict[str, Tensor],
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__()
        self.network = network
        Parameters.from_named(network, tensors)  # checks names and shapes
        for name in Parameters.shapes(network):
            tensor, holder = tensors[name], self
            *path, leaf = name.split(".")
            for part in path:
                if part not in holder._modules:
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)  # type: ignore[assignment]
            if tensor.dim() == 4:
                tensor = tensor.contiguous(memory_format=memory_format)
            holder.register_parameter(leaf, nn.Parameter(tensor))

    def tensors(self) -> Parameters:
        """The parameters as :class:`ep_kernels.Parameters`, detached: EP computes no graph."""
        return Parameters.from_named(self.network, {name: p.detach() for name, p in self.named_parameters()})

    def set_gradients(self, gradients: Parameters) -> None:
        """Store gradients in ``.grad`` for an optimizer, in the parameters' own memory layout; parameters that are none
        of the network are left alone.

        torch's fused optimizers pair the numbers of a parameter and its gradient as they lie in memory.
        """
        named = gradients.named()
        for name, parameter in self.named_parameters():
            if name in named:
                parameter.grad = laid_out_as(parameter, named[name])


def laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient, in the memory layout of its parameter."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, requires_grad=False).copy_(gradient)
