"""Named networks, specs, initial parameters and the module that holds them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ep_kernels import Network, Parameters, RelaxConfig, backend
from ep_kernels.architectures import ARCHITECTURES
from ep_train.models import Model, build_network, initial_parameters
from ep_train.step import ep_step


@pytest.mark.parametrize("classes", [10, 100, 200])
@pytest.mark.parametrize("side", [28, 32, 64])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_network_builds(name: str, side: int, classes: int) -> None:
    network = build_network(name, (3, side, side), classes)
    assert network.readout.outputs == classes
    assert network.shapes[0] == (3, side, side)


@pytest.mark.parametrize("name", [name for name, a in ARCHITECTURES.items() if not a.edges])
def test_the_smallest_input(name: str) -> None:
    least = ARCHITECTURES[name].least
    assert min(min(shape[1:]) for shape in build_network(name, (1, least, least + 3), 10).shapes) == 1
    message = f"{name} pools to nothing below {least}x{least} inputs, got {least + 3}x{least - 1}"
    with pytest.raises(ValueError, match=message):
        build_network(name, (1, least + 3, least - 1), 10)


@pytest.mark.parametrize("readout", ["softmax", "mse"])
@pytest.mark.parametrize("side", [28, 32, 64])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "digits"])
def test_narrow_ones_take_a_step(name: str, side: int, readout: Any) -> None:
    """CIFAR-100 and Tiny-ImageNet sizes run: a sixteenth of the width, one EP step, finite gradients everywhere."""
    linear = readout == "mse"
    network = build_network(name, (3, side, side), 20, width=1 / 16, readout=readout, linear_output=linear)
    model, labels = Model(network), torch.arange(2)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with backend("reference"):
        ep_step(model, images, labels, RelaxConfig(free_steps=2, nudged_steps=1))
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert bool(parameter.grad.isfinite().all()), parameter_name
    weights = [p.grad for name, p in model.named_parameters() if name.startswith("connections") and p.grad is not None]
    assert all(bool(grad.any()) for grad in weights)


def test_options_of_a_network() -> None:
    network = build_network(
        "8-16p",
        (1, 8, 8),
        4,
        width=0.5,
        pool="avg",
        readout="mse",
        local_heads=(1, 2),
        local_weight=0.7,
        feedback_gain=0.3,
        slope=0.5,
        box=(-1.0, 6.0),
        linear_output=True,
        feedback="separate",
    )
    assert network.shapes == ((1, 8, 8), (4, 8, 8), (8, 4, 4), (4,))
    assert (network.box(2), network.linear_nodes, network.feedback) == ((-1.0, 6.0), (3,), "separate")
    assert [c.pool for c in network.connections] == ["none", "avg", "none"]
    assert (network.feedback_gain, network.slope, network.readout.loss) == (0.3, 0.5, "mse")
    assert [(head.node, head.outputs, head.weight) for head in network.local_heads] == [(1, 4, 0.7), (2, 4, 0.7)]
    assert build_network("3-5", (1, 8, 8), 4, width=0.01).shapes[1:] == ((1, 8, 8), (1, 8, 8))


@pytest.mark.parametrize("spec", ["vgg6", "", "32-", "-32", "32-p", "0-32", "32-32q", "32_32", "3.5-4", "-1", "32pp"])
def test_specs_that_are_none(spec: str) -> None:
    with pytest.raises(ValueError, match="build_network: argument 'model': expected one of digits, vgg5, ") as caught:
        build_network(spec, (1, 8, 8), 10)
    assert f"or widths as 32-32p-64-64p (p: pooled), got {spec!r}" in str(caught.value)


@pytest.mark.parametrize("gain", [1.0, 1.4])
def test_initial_parameters(gain: float) -> None:
    network = build_network("64-64p", (3, 8, 8), 100, local_heads=(1,))
    tensors = initial_parameters(network, weight_gain=gain, seed=3)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == Parameters.shapes(network)
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            assert not bool(tensor.any())
            continue
        want = (1.0 if name.startswith("heads") else gain) / math.sqrt(tensor[0].numel())
        assert float(tensor.std()) == pytest.approx(want, rel=5 / math.sqrt(2 * tensor.numel())), name
        assert abs(float(tensor.mean())) < 5 * want / math.sqrt(tensor.numel())


def test_a_gain_for_every_connection() -> None:
    network = build_network("64-64p-64p", (64, 8, 8), 100, feedback="separate")
    tensors = initial_parameters(network, weight_gain=(0.5, 1.0, 2.0, 4.0), seed=3)
    wanted = {"connections.0": 0.5, "connections.1": 1.0, "connections.2": 2.0, "heads.0": 4.0}
    for name, tensor in tensors.items():
        if not name.endswith("bias"):
            want = wanted[name.rsplit(".", 1)[0]] / math.sqrt(tensor[0].numel())
            assert float(tensor.std()) == pytest.approx(want, rel=5 / math.sqrt(2 * tensor.numel())), name
    forward, back = tensors["connections.1.weight"].flatten(), tensors["connections.1.feedback"].flatten()
    assert abs(float(torch.corrcoef(torch.stack([forward, back]))[0, 1])) < 5 / math.sqrt(forward.numel())
    three = initial_parameters(network, weight_gain=(0.5, 1.0, 2.0), seed=3)
    torch.testing.assert_close(three["heads.0.weight"], tensors["heads.0.weight"] / 4)
    tied = initial_parameters(build_network("64-64p-64p", (64, 8, 8), 100), seed=3)
    assert torch.equal(tied["connections.2.weight"], three["connections.2.weight"] / 2)
    message = r"argument 'weight_gain': expected 3 \(one per connection\) or 4 \(then the readout\), got 2"
    with pytest.raises(ValueError, match=message):
        initial_parameters(network, weight_gain=(1.0, 1.0))
    mse = build_network("4-4p", (1, 8, 8), 3, readout="mse")
    with pytest.raises(ValueError, match=r"argument 'weight_gain': expected 3 \(one per connection\), got 4"):
        initial_parameters(mse, weight_gain=(1.0,) * 4)


def test_every_dtype_starts_from_the_same_numbers_and_every_seed_from_others() -> None:
    network = build_network("4-4p", (1, 8, 8), 3)
    double, single = (initial_parameters(network, seed=2, dtype=d) for d in (torch.float64, torch.float32))
    assert all(torch.equal(double[name].float(), single[name]) for name in double)
    other = initial_parameters(network, seed=3)
    assert not torch.equal(other["connections.0.weight"], single["connections.0.weight"])


def model(**options: Any) -> Model:
    return Model(build_network("4-6p", (2, 8, 8), 3, local_heads=(1,)), **options)


def test_a_model_is_an_ordinary_module() -> None:
    m = model(seed=1, weight_gain=1.3)
    want = initial_parameters(m.network, seed=1, weight_gain=1.3)
    assert set(m.state_dict()) == set(dict(m.named_parameters())) == set(want)
    for name, parameter in m.named_parameters():
        assert torch.equal(parameter, want[name])
        assert parameter.requires_grad
        assert parameter.dim() != 4 or parameter.is_contiguous(memory_format=torch.channels_last)
    other = model(seed=2)
    other.load_state_dict(m.state_dict())
    tensors = other.tensors().named()
    assert all(torch.equal(tensors[name], p) and not tensors[name].requires_grad for name, p in m.named_parameters())
    first = next(other.parameters())
    with torch.no_grad():
        first += 1
    assert torch.equal(other.tensors().weights[0], first)  # a view, not a copy
    assert next(m.double().parameters()).dtype == torch.float64


def test_gradients_go_where_an_optimizer_looks() -> None:
    m = model()
    gradients = {name: torch.full_like(p, float(i)) for i, (name, p) in enumerate(m.named_parameters())}
    m.set_gradients(Parameters.from_named(m.network, gradients))
    assert all(p.grad is gradients[name] for name, p in m.named_parameters())
    torch.optim.SGD(m.parameters(), lr=0.5).step()
    want = initial_parameters(m.network)
    for i, (name, p) in enumerate(m.named_parameters()):
        torch.testing.assert_close(p.detach(), want[name] - 0.5 * i)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("fused", [True, False])
def test_gradients_of_any_layout_reach_the_right_weights(layout: torch.memory_format, fused: bool) -> None:
    """A fused optimizer does not look at strides: a gradient in another layout would move other weights."""
    m = model()
    generator = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(p.shape, generator=generator) for name, p in m.named_parameters()}
    laid_out = {n: g.contiguous(memory_format=layout) if g.dim() == 4 else g for n, g in gradients.items()}
    before = {name: p.detach().clone() for name, p in m.named_parameters()}
    m.set_gradients(Parameters.from_named(m.network, laid_out))
    torch.optim.Adam(m.parameters(), lr=1e-2, fused=fused).step()
    for name, p in m.named_parameters():
        assert p.grad is not None
        assert p.grad.stride() == p.stride()
        torch.testing.assert_close(p.detach() - before[name], -1e-2 * gradients[name].sign(), rtol=1e-3, atol=1e-6)


def test_layer_of_a_parameter() -> None:
    m = model()
    assert {name: m.layer_of(name) for name, _ in m.named_parameters()} == {
        "connections.0.weight": 1,
        "nodes.1.bias": 1,
        "connections.1.weight": 2,
        "nodes.2.bias": 2,
        "heads.1.weight": 1,  # the local head, with the layer that it reads
        "heads.1.bias": 1,
        "heads.0.weight": 3,
        "heads.0.bias": 3,
    }
    mse = Model(Network.chain((1, 4, 4), [3], ["none"], classes=2, readout="mse"))
    assert {name: mse.layer_of(name) for name, _ in mse.named_parameters()} == {
        "connections.0.weight": 1,
        "nodes.1.bias": 1,
        "connections.1.weight": 2,
        "nodes.2.bias": 2,
    }
