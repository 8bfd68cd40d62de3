"""What backward() leaves in .grad: against ep_gradients, and against BPTT to convergence of whole programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ep_kernels import EquilibriumNet, Head, Network, Parameters, RelaxConfig, backend, ep_gradients, targets_for
from ep_train.bptt import free_sweep
from tests.core.nets import BACKENDS, NETWORKS, VARIANTS, cosine, problem

DOUBLE = torch.float64
SETTLED = RelaxConfig(free_steps=60, nudged_steps=40, beta=1e-4)
CHAIN = Network.chain((2, 8, 8), [4, 6], ["max", "avg"], classes=3, feedback_gain=0.5)


def net_of(network: Network, config: RelaxConfig, seed: int = 0) -> tuple[EquilibriumNet, Tensor]:
    p = problem(network, seed)
    net = EquilibriumNet(network, config, dtype=DOUBLE)
    net.load_state_dict(p.parameters.named())
    return net, p.x


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


class Unrolled(nn.Module):
    """The same network as an ordinary module: autograd goes through every sweep of its relaxation."""

    def __init__(self, net: EquilibriumNet, sweeps: int = 60) -> None:
        super().__init__()
        self.net, self.sweeps = net, sweeps

    def forward(self, x: Tensor) -> Tensor:
        network = self.net.network
        tensors = Parameters.from_named(network, dict(self.net.named_parameters()))
        states = [x, *(x.new_zeros(len(x), *shape) for shape in network.shapes[1:])]
        kept: Any = {}
        for _ in range(self.sweeps):
            states = free_sweep(network, tensors, states, RelaxConfig(), 1.0, kept)
        out = states[network.readout.node]
        map_ = tensors.head_weights[0]
        return out if map_ is None else F.linear(out.flatten(1), map_, tensors.head_biases[0])


def compare(ours: dict[str, Tensor], true: dict[str, Tensor], least: float = 0.9999) -> None:
    assert ours.keys() == true.keys()
    for name, theirs in true.items():
        assert cosine(ours[name], theirs) > least, name
        assert float(ours[name].norm() / theirs.norm()) == pytest.approx(1, abs=0.01), name


@pytest.mark.parametrize("name", ["max", "average, odd maps", "slope 1/2, local heads", "skips, max"])
@pytest.mark.parametrize("estimator", ["symmetric", "positive", "negative", "five_phase", "tangent"])
@pytest.mark.parametrize("backend_name", BACKENDS)
def test_the_networks_own_loss_gives_ep_gradients(name: str, estimator: Any, backend_name: str) -> None:
    """The same free phase and nudge as ep_gradients; only the strength of the nudge is another, and cancels."""
    network = replace(NETWORKS[name], local_heads=())
    config = RelaxConfig(estimator=estimator, linear_nudge=True, beta=1e-8)
    net, x = net_of(network, config)
    target = problem(network, 0).targets[0]
    with backend(backend_name):
        z = net(x)
        loss = F.cross_entropy(z, target) if network.readout.outputs else 0.5 * (z - target).square().sum(1).mean()
        loss.backward()
        want, free = ep_gradients(network, net.tensors(), x, [target], config)
    for key, theirs in want.named().items():
        torch.testing.assert_close(gradients(net)[key], theirs, rtol=2e-5, atol=1e-9, msg=key)
    assert net.residual is not None
    assert torch.equal(net.residual, free.residual)


@pytest.mark.parametrize("form", ["delta", "states"])
@pytest.mark.parametrize("winners", ["frozen", "live"])
@pytest.mark.parametrize("estimator", ["symmetric", "positive", "negative", "five_phase", "tangent"])
def test_parameters_and_input_against_bptt(form: Any, winners: Any, estimator: Any) -> None:
    if winners == "live" and (form == "delta" or estimator == "tangent"):
        pytest.skip("deltas are relative to the free winners")
    beta = 1e-4 if form == "delta" else 1e-3
    net, x = net_of(CHAIN, replace(SETTLED, form=form, winners=winners, estimator=estimator, beta=beta))
    labels = torch.arange(len(x)) % 3
    found = []
    for module in (net, Unrolled(net)):
        net.zero_grad()
        x = x.detach().clone().requires_grad_()
        F.cross_entropy(module(x), labels).backward()
        assert x.grad is not None
        found.append({"x": x.grad, **gradients(net)})
    compare(*found)


@pytest.mark.parametrize("name", ["skips, max", "skips, average", "no pooling, mse", "5x5, no padding"])
def test_other_networks_against_bptt(name: str) -> None:
    """Skip connections from the clamped input, strides, output units inside the dynamics."""
    net, x = net_of(replace(NETWORKS[name], local_heads=(), feedback_gain=0.3), SETTLED)
    found = []
    for module in (net, Unrolled(net, 80)):
        net.zero_grad()
        x = x.detach().clone().requires_grad_()
        module(x).square().sum().backward()
        assert x.grad is not None
        found.append({"x": x.grad, **gradients(net)})
    compare(*found)


class Mixed(nn.Module):
    """Backprop, then EP, then backprop."""

    def __init__(self, middle: nn.Module, seed: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.below = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh())
        self.middle = middle
        self.above = nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.GELU(), nn.Flatten(), nn.Linear(16, 3))
        self.to(DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.above(self.middle(self.below(x)))
        return out


@pytest.mark.parametrize("estimator", ["symmetric", "tangent"])
def test_mixed_networks_against_bptt(estimator: Any) -> None:
    """Gradients of the modules below, of the EP layers and of the modules above, all from one backward()."""
    network = replace(CHAIN, readout=Head(2, None, "mse"))  # its outputs are the states of its last map
    net, _ = net_of(network, replace(SETTLED, estimator=estimator))
    generator = torch.Generator().manual_seed(4)
    x, labels = torch.rand(5, 1, 8, 8, dtype=DOUBLE, generator=generator), torch.arange(5) % 3
    found = []
    for middle in (net, Unrolled(net)):
        mixed = Mixed(middle)
        mixed.zero_grad()
        F.cross_entropy(mixed(x), labels, label_smoothing=0.1).backward()
        found.append({name.replace("middle.net.", "middle."): g for name, g in gradients(mixed).items()})
    assert {name.split(".")[0] for name in found[0]} == {"below", "middle", "above"}
    compare(*found)


def test_two_nets_in_a_row_against_bptt() -> None:
    first, x = net_of(replace(CHAIN, readout=Head(2, None, "mse")), SETTLED)
    second, _ = net_of(Network.chain((6, 2, 2), [5], ["none"], classes=3, hidden=[7], feedback_gain=0.5), SETTLED, 1)
    found = []
    for chain in (nn.Sequential(first, second), nn.Sequential(Unrolled(first), Unrolled(second))):
        chain.zero_grad()
        F.nll_loss(F.log_softmax(2 * chain(x), 1), torch.arange(len(x)) % 3).backward()
        found.append({name.replace(".net.", "."): g for name, g in gradients(chain).items()})
    compare(*found)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda z: z.sum(),
    "focal": lambda z: ((1 - z.softmax(1)) ** 2 * -z.log_softmax(1)).sum(1).mean(),
    "of one sample": lambda z: z[0].square().sum(),
    "across samples": lambda z: -F.log_softmax(z @ z.t(), 1).diagonal().mean(),  # contrastive: no sum over samples
}


@pytest.mark.parametrize("name", LOSSES)
def test_any_loss_on_the_logits(name: str) -> None:
    net, x = net_of(CHAIN, replace(SETTLED, estimator="tangent"))
    found = []
    for module in (net, Unrolled(net)):
        net.zero_grad()
        LOSSES[name](module(x)).backward()
        found.append(gradients(net))
    compare(*found)


@pytest.mark.parametrize("estimator", ["symmetric", "tangent"])
@pytest.mark.parametrize("exponent", [-80, -16, 16, 80])
def test_a_scaled_loss_scales_the_gradients(estimator: Any, exponent: int) -> None:
    """Exactly, for powers of two: what GradScaler multiplies by. In float32, far from where beta was chosen."""
    net = EquilibriumNet(CHAIN, RelaxConfig(estimator=estimator), seed=1)
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.rand(4, 2, 8, 8, generator=generator).requires_grad_(), torch.arange(4) % 3
    found = []
    for scale in (1.0, 2.0**exponent):
        net.zero_grad()
        loss = F.cross_entropy(net(x), labels) * scale
        found.append([g / scale for g in torch.autograd.grad(loss, [x, *net.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(bool(g.any()) for g in found[0])


def test_tangent_is_linear_in_the_loss() -> None:
    net, x = net_of(CHAIN, RelaxConfig(estimator="tangent"))
    labels = torch.arange(len(x)) % 3
    losses = [lambda: F.cross_entropy(net(x), labels), lambda: 30 * net(x).square().mean()]
    parts = [torch.autograd.grad(loss(), list(net.parameters())) for loss in losses]
    whole = torch.autograd.grad(losses[0]() - losses[1](), list(net.parameters()))
    for a, b, both in zip(*parts, whole, strict=True):
        torch.testing.assert_close(a - b, both, rtol=1e-9, atol=1e-12)


def test_every_node_may_have_a_loss() -> None:
    """Losses on hidden states nudge their nodes directly; the ones on local heads too."""
    network = NETWORKS["slope 1/2, local heads"]
    net, x = net_of(network, RelaxConfig(estimator="tangent", free_steps=60, nudged_steps=40))
    targets = problem(network).targets
    outputs = net(x, heads=True)
    assert len(outputs) == len(network.heads) == 3
    weights = [head.weight for head in network.heads]
    loss = sum(w * F.cross_entropy(z, t) for w, z, t in zip(weights, outputs, targets, strict=True))
    assert isinstance(loss, Tensor)
    loss.backward()
    want, _ = ep_gradients(network, net.tensors(), x, targets, net.config)
    for name, theirs in want.named().items():
        torch.testing.assert_close(gradients(net)[name], theirs, rtol=1e-7, atol=1e-10)
    states = net.states(x)
    assert states[0] is x
    assert [tuple(s.shape[1:]) for s in states] == list(network.shapes)
    assert torch.equal(F.linear(states[-1], *net.heads.get_submodule("0").parameters()), net(x))
    (only,) = torch.autograd.grad(states[1].sum(), net.get_parameter("connections.0.weight"))
    assert bool(only.any())


def test_feedback_weights_of_their_own() -> None:
    network = replace(VARIANTS["separate, tied head"], local_heads=())
    config = RelaxConfig(estimator="tangent")
    net, x = net_of(network, config)
    labels = torch.arange(len(x)) % 3
    F.cross_entropy(net(x), labels).backward()
    want, _ = ep_gradients(network, net.tensors(), x, targets_for(network, labels, 3, DOUBLE), config)
    assert any("feedback" in name for name in want.named())
    for name, theirs in want.named().items():
        torch.testing.assert_close(gradients(net)[name], theirs, rtol=1e-9, atol=1e-12)


def test_stored_in_float16() -> None:
    """States may be stored narrow: gradients of a mean loss, too small for float16, come through."""
    config = RelaxConfig(estimator="tangent")
    found = []
    for storage in (None, torch.float16):
        net = EquilibriumNet(CHAIN, replace(config, storage=storage), seed=0)
        x = torch.rand(8, 2, 8, 8, generator=torch.Generator().manual_seed(0))
        with backend("reference"):
            (1e-6 * F.cross_entropy(net(x), torch.arange(8) % 3)).backward()
        found.append(gradients(net))
    for name, theirs in found[0].items():
        assert cosine(found[1][name], theirs) > 0.999, name


def test_frozen_parameters_get_nothing_and_cost_nothing_more() -> None:
    net, x = net_of(CHAIN, RelaxConfig())
    net.requires_grad_(False)
    assert not net(x).requires_grad
    net.get_parameter("connections.1.weight").requires_grad_(True)
    net(x).sum().backward()
    assert list(gradients(net)) == ["connections.1.weight"]
    net.zero_grad()
    net.requires_grad_(False)
    x.requires_grad_()
    net(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.any())
    assert gradients(net) == {}
