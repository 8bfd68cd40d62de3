"""convert: which sequential networks have a counterpart, and what becomes of each module."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from ep_kernels import EquilibriumNet, RelaxConfig
from ep_kernels.nn import convert

TANGENT = RelaxConfig(estimator="tangent")


def plain(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding="same"), activation(), nn.MaxPool2d(2)),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), bias=False),
        nn.Identity(),
        nn.AvgPool2d(2, 2),
        activation(),
        nn.Flatten(),
        nn.Linear(6, 5),
        nn.Linear(5, 3),
    )


def test_layers_become_connections_with_their_weights() -> None:
    module = plain().double()
    net = convert(module, (2, 8, 9), feedback_gain=0.3, box=(-1.0, 2.0), config=TANGENT)
    network = net.network
    assert network.shapes == ((2, 8, 9), (4, 4, 4), (6, 1, 1), (5,))
    geometry = [(c.kernel_size, c.stride, c.padding, c.pool) for c in network.connections]
    assert geometry[:2] == [((3, 3), (1, 1), (1, 1), "max"), ((3, 2), (2, 1), (1, 0), "avg")]
    assert network.connections[2].kernel_size is None
    assert (network.feedback_gain, network.lo, network.hi, network.readout.outputs) == (0.3, -1.0, 2.0, 3)
    assert net.config is TANGENT
    layers = [module[0][0], module[1], module[6], module[7]]
    names = ["connections.0", "connections.1", "connections.2", "heads.0"]
    for name, layer in zip(names, layers, strict=True):
        weight = net.get_parameter(f"{name}.weight")
        assert weight.dtype == torch.float64
        assert torch.equal(weight, layer.weight)
        assert weight.data_ptr() != layer.weight.data_ptr()
    assert torch.equal(net.get_parameter("nodes.1.bias"), module[0][0].bias)
    none = net.get_parameter("nodes.2.bias")  # of the convolution without one
    assert not none.any()
    assert not none.requires_grad


def hardtanh(module: nn.Sequential) -> nn.Sequential:
    """What the net becomes without feedback: a clip behind each pooling."""
    return nn.Sequential(
        module[0][0], nn.MaxPool2d(2), nn.Hardtanh(0, 1), module[1], nn.AvgPool2d(2), nn.Hardtanh(0, 1), nn.Flatten(),
        module[6], nn.Hardtanh(0, 1), module[7],
    )  # fmt: skip


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.Hardtanh, nn.GELU])
def test_without_feedback_it_is_the_feed_forward_network(activation: type[nn.Module]) -> None:
    """Outputs and gradients, whichever activation it had."""
    module = plain(activation).double()
    net = convert(module, (2, 8, 9), feedback_gain=1e-6, config=TANGENT)
    x, y = torch.rand(4, 2, 8, 9, dtype=torch.float64), torch.arange(4) % 3
    reference = hardtanh(module)
    torch.testing.assert_close(net(x), reference(x), rtol=1e-5, atol=1e-6)
    F.cross_entropy(net(x), y).backward()
    F.cross_entropy(reference(x), y).backward()
    for name, layer in (("connections.0", module[0][0]), ("connections.1", module[1]), ("heads.0", module[7])):
        torch.testing.assert_close(net.get_parameter(f"{name}.weight").grad, layer.weight.grad, rtol=1e-4, atol=1e-7)


def test_states_as_outputs_and_vectors_as_inputs() -> None:
    net = convert(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)), (5,), readout="mse")
    assert (net.network.shapes, net.network.readout.outputs) == (((5,), (7,), (4,)), None)
    assert net(torch.rand(3, 5)).shape == (3, 4)
    features = convert(nn.Sequential(nn.Conv2d(1, 2, 3)), (1, 5, 5), readout="mse")
    assert features(torch.rand(3, 1, 5, 5)).shape == (3, 2, 3, 3)


def test_adaptive_pooling_belongs_to_the_readout() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    net = convert(module, (1, 6, 6))
    state = net.states(x := torch.rand(2, 1, 6, 6))[1]
    torch.testing.assert_close(net(x), F.linear(state.mean((2, 3)), module[4].weight, module[4].bias))


def test_modules_without_weights_may_come_twice() -> None:
    pool, act = nn.MaxPool2d(2), nn.ReLU()
    module = nn.Sequential(nn.Conv2d(1, 2, 3), act, pool, nn.Conv2d(2, 3, 2), pool, act, nn.Flatten(), nn.Linear(3, 2))
    assert convert(module, (1, 8, 8)).network.shapes == ((1, 8, 8), (2, 3, 3), (3, 1, 1))


def test_frozen_layers_stay_frozen_and_modes_are_kept() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).eval()
    module[0].requires_grad_(False)
    net = convert(module, (3,))
    assert isinstance(net, EquilibriumNet)
    assert not net.training
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {"heads.0.weight", "heads.0.bias"}


class Strange(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Strange2d(nn.Conv2d):
    pass


class StrangeLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class StrangePool(nn.MaxPool2d):
    pass


class StrangeReLU(nn.ReLU):
    pass


class StrangeFlatten(nn.Flatten):
    pass


class StrangeIdentity(nn.Identity):
    pass


class StrangeSequential(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return -out


def old(norm: Any, module: nn.Module) -> nn.Module:
    """With one of torch's older norms, which says that it is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: nn.Module = norm(module)
    return made


def hooked(module: nn.Module, kind: str = "forward_pre_hook") -> nn.Module:
    getattr(module, f"register_{kind}")(lambda *_: None)
    return module


def replaced(module: nn.Module) -> nn.Module:
    """With a forward of its own, as some libraries put it there."""
    module.forward = lambda x: 2 * x  # type: ignore[method-assign]
    return module


def computed() -> nn.Module:
    """A weight that is no parameter, as norms of other libraries leave it."""
    module = nn.Linear(2 * 6 * 6, 3)
    weight = module.weight.detach()
    del module.weight
    module.weight = weight  # type: ignore[assignment]
    return module


SQUARE = nn.Conv2d(1, 1, 1)
CONV, LINEAR = nn.Conv2d(1, 2, 3), nn.Linear(2 * 6 * 6, 3)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([Strange(), LINEAR], "at '0': expected Conv2d, MaxPool2d, AvgPool2d, .* got Strange"),
        ([CONV, nn.BatchNorm2d(2), nn.Flatten(), LINEAR], "at '1': .*fuse_conv_bn_eval.* got BatchNorm2d"),
        ([CONV, nn.Dropout(), nn.Flatten(), LINEAR], "at '1': expected no such module: its mask .* got Dropout"),
        ([CONV, nn.Flatten(), LINEAR, nn.LogSoftmax(1)], "at '3': expected a Linear at the end, .* got LogSoftmax"),
        ([CONV, nn.Softmax(1), nn.Flatten(), LINEAR], "at '1': .*returns logits.* got Softmax"),
        ([nn.ReLU(), CONV, nn.Flatten(), LINEAR], "at '0': expected one activation behind each"),
        ([CONV, nn.ReLU(), nn.ReLU(), nn.Flatten(), LINEAR], "at '2': expected one activation behind each"),
        ([CONV, LINEAR], "at '1': expected an nn.Flatten between the last map and it"),
        ([CONV, nn.Flatten(), nn.Linear(7, 3)], r"at '2': expected in_features=72 \(of 2x6x6\), got Linear"),
        ([nn.Conv2d(3, 2, 3), nn.Flatten(), LINEAR], "at '0': expected in_channels=1, as the map before it has"),
        ([nn.Conv2d(1, 2, 9), nn.Flatten(), LINEAR], "at '0': expected a map that it leaves something of, not 8x8"),
        ([nn.Conv2d(1, 2, 3, dilation=2), LINEAR], "at '0': expected groups=1, dilation=1, padding_mode='zeros'"),
        ([nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), LINEAR], "at '0': expected groups=1, dilation=1"),
        ([nn.Conv2d(1, 2, 2, padding="same"), LINEAR], "at '0': expected an odd kernel_size with padding='same'"),
        ([CONV, nn.MaxPool2d(3), LINEAR], "at '1': expected kernel_size=2, stride=2, padding=0"),
        ([CONV, nn.MaxPool2d(2, 1), LINEAR], "at '1': expected kernel_size=2, stride=2, padding=0"),
        ([CONV, nn.AvgPool2d(2, divisor_override=3), LINEAR], "at '1': expected kernel_size=2, stride=2"),
        ([CONV, nn.MaxPool2d(2), nn.MaxPool2d(2), LINEAR], "at '2': expected one pooling behind a Conv2d"),
        ([nn.MaxPool2d(2), CONV, LINEAR], "at '0': expected one pooling behind a Conv2d"),
        ([nn.Flatten(), CONV, LINEAR], "at '1': expected a map, not a vector, before a Conv2d"),
        ([CONV, nn.Flatten(2), LINEAR], "at '1': expected start_dim=1, end_dim=-1"),
        ([CONV, nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), LINEAR], "at '1': expected a square output of a map"),
        ([CONV, nn.AdaptiveAvgPool2d(1), nn.ReLU(), LINEAR], "at '2': expected a Flatten and the readout after Adapt"),
        ([nn.Flatten(), nn.Linear(64, 3)], "expected a Conv2d or Linear below the last Linear, the readout, got none"),
        ([], "expected a Conv2d or Linear below the last Linear, the readout, got none"),
        ([nn.Sequential(CONV, Strange()), LINEAR], "at '0.1': expected"),
        ([SQUARE, SQUARE, nn.Flatten(), LINEAR], "at '1': expected weights of its own, not those of an earlier layer"),
        ([nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 2, 3)), LINEAR], "at '0': expected no parametrization"),
        ([Strange2d(1, 2, 3), LINEAR], "at '0': expected Conv2d itself, not a subclass.* by a Conv2d, got Strange2d"),
        ([CONV, StrangePool(2), LINEAR], "at '1': expected MaxPool2d itself, not a subclass.* got StrangePool"),
        ([CONV, StrangeReLU(), nn.Flatten(), LINEAR], "at '1': expected ReLU itself, not a subclass"),
        ([CONV, StrangeFlatten(), LINEAR], "at '1': expected Flatten itself, not a subclass"),
        ([CONV, StrangeIdentity(), nn.Flatten(), LINEAR], "at '1': expected Identity itself, not a subclass"),
        ([CONV, nn.Flatten(), StrangeLinear(72, 3)], "at '2': expected Linear itself, .* by a Linear, got"),
        ([StrangeSequential(CONV, nn.ReLU()), nn.Flatten(), LINEAR], "at '0': expected the forward of nn.Sequential: "),
        ([old(nn.utils.weight_norm, nn.Conv2d(1, 2, 3)), LINEAR], "at '0': expected no forward .*remove_weight_norm"),
        ([CONV, nn.Flatten(), old(nn.utils.spectral_norm, nn.Linear(72, 3))], "at '2': .* remove_spectral_norm"),
        ([CONV, nn.Flatten(), prune.l1_unstructured(nn.Linear(72, 3), "weight", 0.5)], "at '2': .* prune.remove"),
        ([hooked(nn.Conv2d(1, 2, 3)), nn.Flatten(), LINEAR], "at '0': expected no forward hooks.* got Conv2d"),
        ([CONV, hooked(nn.Identity(), "forward_hook"), nn.Flatten(), LINEAR], "at '1': expected no forward hooks"),
        ([hooked(nn.Sequential(CONV, nn.ReLU())), nn.Flatten(), LINEAR], "at '0': expected no forward hooks"),
        ([hooked(nn.Conv2d(1, 2, 3), "full_backward_hook"), LINEAR], "at '0': expected no backward hooks.* got Conv2d"),
        ([CONV, hooked(nn.ReLU(), "full_backward_pre_hook"), LINEAR], "at '1': expected no backward hooks.* got ReLU"),
        ([replaced(nn.Conv2d(1, 2, 3)), LINEAR], "at '0': expected the forward of its class, not one put in its place"),
        ([CONV, replaced(nn.Identity()), nn.Flatten(), LINEAR], "at '1': expected the forward of its class"),
        ([replaced(nn.Sequential(CONV)), nn.Flatten(), LINEAR], "at '0': expected the forward of its class"),
        ([CONV, nn.Flatten(), computed()], "at '2': expected a weight that is a parameter of its own, .* nn.Parameter"),
    ],
)  # fmt: skip
def test_the_offending_module_is_named(modules: list[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=f"convert: argument 'module': {message}"):
        convert(nn.Sequential(*modules), (1, 8, 8))


def test_what_was_taken_off_is_no_hindrance() -> None:
    module = plain().double()
    want = convert(module, (2, 8, 9))(x := torch.rand(2, 2, 8, 9, dtype=torch.float64))
    for put, remove in (
        (nn.utils.weight_norm, nn.utils.remove_weight_norm),
        (lambda layer: prune.identity(layer, "weight"), lambda layer: prune.remove(layer, "weight")),
    ):
        remove(old(put, module[7]))
        torch.testing.assert_close(convert(module, (2, 8, 9))(x), want)


def test_arguments_that_do_not_fit() -> None:
    wrong: Any = nn.ModuleList()
    with pytest.raises(ValueError, match=r"argument 'module': expected an nn\.Sequential, got ModuleList"):
        convert(wrong, (1, 8, 8))
    with pytest.raises(ValueError, match=r"argument 'module': expected no forward hooks.* got Sequential"):
        convert(hooked(plain()), (2, 8, 9))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="argument 'readout': expected 'softmax' or 'mse', got 'logits'"):
        convert(plain(), (2, 8, 9), readout="logits")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"argument 'input_shape': expected \(C, H, W\) or \(F,\), positive"):
        convert(plain(), (8, 9))
    with pytest.raises(ValueError, match="argument 'feedback_gain': expected"):
        convert(plain(), (2, 8, 9), feedback_gain=2.0)
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1))
    with pytest.raises(ValueError, match="expected a Linear after AdaptiveAvgPool2d, the readout, got none"):
        convert(module, (1, 8, 8), readout="mse")
