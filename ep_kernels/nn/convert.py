"""An ``EquilibriumNet`` from an ``nn.Sequential``, with its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NoReturn

import torch
from torch import Tensor, nn

from ..config import RelaxConfig
from ..network import Connection, Head, Network, Pool, Shape
from .module import EquilibriumNet

# the clip of the states stands in their place
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
    nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Sigmoid, nn.Tanh,
)  # fmt: skip
KINDS = (
    nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity, *ACTIVATIONS
)  # fmt: skip
WHY_NOT: dict[type[nn.Module], str] = {
    nn.modules.batchnorm._NormBase: "it has no place in the energy; fold it into the convolution before it "
    "(torch.nn.utils.fusion.fuse_conv_bn_eval), or leave it out",
    nn.modules.dropout._DropoutNd: "its mask would have to stay the same through both phases; leave it out",
    nn.Softmax: "the net returns logits; leave it out and use a loss on logits, as nn.CrossEntropyLoss",
    nn.LogSoftmax: "the net returns logits; leave it out and use a loss on logits, as nn.CrossEntropyLoss",
}


@dataclass
class _Chain:
    """What has been read so far."""

    shapes: list[Shape]
    connections: list[Connection] = field(default_factory=list)
    layers: list[nn.Conv2d | nn.Linear] = field(default_factory=list)
    flat: bool = False  # an nn.Flatten came after the last map
    fresh: bool = False  # a pooling may follow: the last layer is a convolution without one
    active: bool = True  # the last layer had its activation
    pooled: int | None = None  # adaptive average pooling before the readout


def convert(
    module: nn.Sequential,
    input_shape: Sequence[int],
    *,
    readout: Literal["softmax", "mse"] = "softmax",
    feedback_gain: float = 0.1,
    box: tuple[float, float] = (0.0, 1.0),
    config: RelaxConfig | None = None,
) -> EquilibriumNet:
    """An ``EquilibriumNet`` with the layers of a sequential network and copies of its weights.

    Each Conv2d or Linear becomes a connection with its bias on the node above. Its states are clipped to ``box``
    instead of the activation behind the layer, whichever that was (at most one each; it may be missing). A 2x2
    MaxPool2d or AvgPool2d behind a convolution, before or after its activation, becomes the connection's pooling: the
    clip comes after it. ``AdaptiveAvgPool2d`` may stand between the last map and the readout. As ``feedback_gain`` goes
    to zero, the outputs become those of the sequential network with ``nn.Hardtanh(*box)`` behind each pooling.

    Args:
        module: of Conv2d, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d, Flatten, Linear, Identity, activations, and
            sequential networks of these: no subclasses, which may compute something else, and without hooks,
            parametrizations, a ``forward`` put in the place of their own, and weights that are computed from others
            (weight_norm, spectral_norm, pruning).
        input_shape: (C, H, W) or (F,) of one sample.
        readout: ``softmax``: the last module is a Linear and becomes the readout, which returns logits, outside the
            dynamics; ``mse``: every layer is in the dynamics, and the outputs are the states of the last one.
        feedback_gain: k of the network.
        box: lo and hi of the states.
        config: of :class:`EquilibriumNet`.

    Returns:
        A net in the dtype and on the device of the module. Where a layer has no bias, the net's is zero and does not
        require a gradient; parameters that do not require one here do not there.

    Raises:
        ValueError: naming the module that has no counterpart, with the reason.
    """
    if not isinstance(module, nn.Sequential):
        raise ValueError(f"convert: argument 'module': expected an nn.Sequential, got {type(module).__name__}")
    if readout not in ("softmax", "mse"):
        raise ValueError(f"convert: argument 'readout': expected 'softmax' or 'mse', got {readout!r}")
    shape = tuple(int(n) for n in input_shape)
    if len(shape) not in (1, 3) or min(shape) < 1:
        raise ValueError(f"convert: argument 'input_shape': expected (C, H, W) or (F,), positive, got {shape}")
    chain = _Chain([shape], flat=len(shape) == 1)
    parts = [(name, part) for name, part in _leaves(module) if type(part) is not nn.Identity]
    last = parts[-1] if readout == "softmax" and parts else None
    if last is not None:
        if type(last[1]) is not nn.Linear:
            _check_kind(*last)
            _fail(*last, "a Linear at the end, the readout; readout='mse' makes the last states the outputs")
        parts.pop()
    for name, part in parts:
        _read(chain, name, part)
    if not chain.layers:
        expected = "a Conv2d or Linear" + (" below the last Linear, the readout" if readout == "softmax" else "")
        raise ValueError(f"convert: argument 'module': expected {expected}, got none")
    top = len(chain.shapes) - 1
    head = Head(top, None, "mse")
    if last is not None and isinstance(last[1], nn.Linear):
        _check_own(chain, last[0], last[1])
        head = replace(Head(top, last[1].out_features), pool=chain.pooled)
        _check_features(chain, last[0], last[1], head.feature_shape(chain.shapes[top]))
    elif chain.pooled is not None:
        raise ValueError("convert: argument 'module': expected a Linear after AdaptiveAvgPool2d, the readout, got none")
    network = Network(tuple(chain.shapes), tuple(chain.connections), head, (), feedback_gain, lo=box[0], hi=box[1])
    weight = chain.layers[0].weight
    net = EquilibriumNet(network, config, seed=0, device=weight.device, dtype=weight.dtype)
    for i, layer in enumerate(chain.layers):
        _copy(layer, net.get_parameter(f"connections.{i}.weight"), net.get_parameter(f"nodes.{i + 1}.bias"))
    if last is not None and isinstance(last[1], nn.Linear):
        _copy(last[1], net.get_parameter("heads.0.weight"), net.get_parameter("heads.0.bias"))
    return net.train(module.training)


def _leaves(module: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules in the order of their calls, once it is known that nothing else happens on the way."""
    _check_plain(prefix[:-1], module)
    if type(module).forward is not nn.Sequential.forward:
        _fail(prefix[:-1], module, "the forward of nn.Sequential: put its modules into a plain one")
    for name, child in module._modules.items():  # named_children leaves out what comes a second time
        assert child is not None
        if isinstance(child, nn.Sequential):
            yield from _leaves(child, f"{prefix}{name}.")
        else:
            _check_plain(prefix + name, child)
            yield prefix + name, child


def _check_plain(name: str, part: nn.Module) -> None:
    """Refuse a module that does more than its class says: the net would not."""
    if nn.utils.parametrize.is_parametrized(part):
        _fail(name, part, "no parametrization (torch.nn.utils.parametrize.remove_parametrizations)")
    if part._forward_pre_hooks or part._forward_hooks:
        _fail(name, part, "no forward hooks, which the net would not run: take them off by their handles; those of "
            "weight_norm, spectral_norm and pruning with torch.nn.utils.remove_weight_norm, remove_spectral_norm and "
            "prune.remove")  # fmt: skip
    if part._backward_pre_hooks or part._backward_hooks:
        _fail(name, part, "no backward hooks, which the net would not run: take them off by their handles")
    if "forward" in part.__dict__:
        _fail(name, part, "the forward of its class, not one put in its place, which the net would not run: delete the "
            "module's attribute")  # fmt: skip
    for leaf in ("weight", "bias"):
        if isinstance(getattr(part, leaf, None), Tensor) and leaf not in part._parameters:
            _fail(name, part, f"a {leaf} that is a parameter of its own, not one computed from others: assign it as an "
                "nn.Parameter")  # fmt: skip


def _check_kind(name: str, part: nn.Module) -> None:
    """Refuse a subclass of what has a counterpart."""
    if type(part) in KINDS:
        return
    for kind in KINDS:
        if isinstance(part, kind):
            own = kind.__name__
            _fail(name, part, f"{own} itself, not a subclass, which may compute something else: replace it by a {own}")


def _read(chain: _Chain, name: str, part: nn.Module) -> None:
    if chain.pooled is not None and not isinstance(part, nn.Flatten):
        _fail(name, part, "a Flatten and the readout after AdaptiveAvgPool2d")
    if type(part) is nn.Conv2d:
        _check_own(chain, name, part)
        _convolution(chain, name, part)
    elif type(part) is nn.Linear:
        _check_own(chain, name, part)
        _check_features(chain, name, part, chain.shapes[-1])
        chain.connections.append(Connection(len(chain.shapes) - 1, len(chain.shapes), None))
        chain.shapes.append((part.out_features,))
        chain.layers.append(part)
        chain.fresh, chain.active = False, False
    elif type(part) is nn.MaxPool2d or type(part) is nn.AvgPool2d:
        _pooling(chain, name, part)
    elif type(part) is nn.AdaptiveAvgPool2d:
        size = part.output_size if isinstance(part.output_size, tuple) else (part.output_size,) * 2
        if chain.flat or size[0] is None or size[0] != size[1]:
            _fail(name, part, "a square output of a map")
        chain.pooled = int(size[0])
    elif type(part) is nn.Flatten:
        if (part.start_dim, part.end_dim) != (1, -1):
            _fail(name, part, "start_dim=1, end_dim=-1")
        chain.flat, chain.fresh = True, False
    elif type(part) in ACTIVATIONS:
        if chain.active:
            _fail(name, part, "one activation behind each Conv2d or Linear, and none before the first")
        chain.active = True
    else:
        _check_kind(name, part)
        for kind, reason in WHY_NOT.items():
            if isinstance(part, kind):
                _fail(name, part, f"no such module: {reason}")
        _fail(
            name, part, "Conv2d, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d, Flatten, Linear, Identity or an activation "
            f"({', '.join(kind.__name__ for kind in ACTIVATIONS)})"
        )  # fmt: skip


def _convolution(chain: _Chain, name: str, part: nn.Conv2d) -> None:
    shape = chain.shapes[-1]
    if chain.flat or len(shape) != 3:
        _fail(name, part, "a map, not a vector, before a Conv2d")
    if part.groups != 1 or set(part.dilation) != {1} or part.padding_mode != "zeros":
        _fail(name, part, "groups=1, dilation=1, padding_mode='zeros'")
    if part.in_channels != shape[0]:
        _fail(name, part, f"in_channels={shape[0]}, as the map before it has")
    kernel, stride, padding = part.kernel_size, part.stride, part.padding
    if padding == "valid":
        padding = (0, 0)
    if padding == "same":
        if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
            _fail(name, part, "an odd kernel_size with padding='same'")
        padding = (kernel[0] // 2, kernel[1] // 2)
    assert not isinstance(padding, str)
    conn = Connection(
        len(chain.shapes) - 1,
        len(chain.shapes),
        (kernel[0], kernel[1]),
        (stride[0], stride[1]),
        (padding[0], padding[1]),
    )
    height, width = conn.map_size(shape[1], shape[2])
    if min(height, width) < 1:
        _fail(name, part, f"a map that it leaves something of, not {shape[1]}x{shape[2]}")
    chain.connections.append(conn)
    chain.shapes.append((part.out_channels, height, width))
    chain.layers.append(part)
    chain.fresh, chain.active = True, False


def _pooling(chain: _Chain, name: str, part: nn.MaxPool2d | nn.AvgPool2d) -> None:
    if not chain.fresh:
        _fail(name, part, "one pooling behind a Conv2d (before or after its activation), and nowhere else")
    plain = _pair(part.kernel_size) == (2, 2) and _pair(part.stride) == (2, 2) and _pair(part.padding) == (0, 0)
    plain = plain and not part.ceil_mode
    if isinstance(part, nn.MaxPool2d):
        plain = plain and _pair(part.dilation) == (1, 1) and not part.return_indices
    else:
        plain = plain and part.divisor_override is None
    if not plain:
        _fail(name, part, "kernel_size=2, stride=2, padding=0, ceil_mode=False and no other option")
    pool: Pool = "max" if isinstance(part, nn.MaxPool2d) else "avg"
    channels, height, width = chain.shapes[-1]
    if min(height, width) < 2:
        _fail(name, part, f"a map of at least 2x2, not {height}x{width}")
    chain.connections[-1] = replace(chain.connections[-1], pool=pool)
    chain.shapes[-1] = (channels, height // 2, width // 2)
    chain.fresh = False


def _check_own(chain: _Chain, name: str, part: nn.Conv2d | nn.Linear) -> None:
    if any(part.weight is layer.weight for layer in chain.layers):
        _fail(name, part, "weights of its own, not those of an earlier layer")


def _check_features(chain: _Chain, name: str, part: nn.Linear, shape: Shape) -> None:
    if len(shape) == 3 and not chain.flat:
        _fail(name, part, "an nn.Flatten between the last map and it")
    features = 1
    for n in shape:
        features *= n
    if part.in_features != features:
        _fail(name, part, f"in_features={features} (of {'x'.join(map(str, shape))})")


def _pair(value: int | tuple[int, ...] | None) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (int(value or 0),) * 2


@torch.no_grad()
def _copy(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor) -> None:
    weight.copy_(layer.weight)
    weight.requires_grad_(layer.weight.requires_grad)
    bias.zero_() if layer.bias is None else bias.copy_(layer.bias)
    bias.requires_grad_(layer.bias is not None and layer.bias.requires_grad)


def _fail(name: str, part: nn.Module, expected: str) -> NoReturn:
    kind = type(part).__name__
    where = f"at '{name}': " if name else ""  # else the argument itself
    raise ValueError(f"convert: argument 'module': {where}expected {expected}, got {kind}({part.extra_repr()})")
