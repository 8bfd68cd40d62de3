"""torch.compile without graph breaks, and the ops behind it."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ep_kernels import EquilibriumNet, Head, Network, RelaxConfig, backend
from ep_kernels.nn import phases
from tests.core.nets import VARIANTS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
NETWORK = Network.chain((1, 8, 8), [4, 6], ["max", "avg"], classes=3, local_heads=[1])
CONFIG = RelaxConfig(estimator="tangent")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Mixed(nn.Module):
    def __init__(self, net: EquilibriumNet) -> None:
        super().__init__()
        self.below, self.net, self.above = nn.Conv2d(1, 1, 3, padding=1), net, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(self.below(x).sigmoid(), heads=True)
        out: Tensor = self.above(torch.cat(z, 1).tanh())
        return out


def batch(count: int) -> tuple[Tensor, Tensor]:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(count)), torch.arange(count) % 3


def found(model: nn.Module, run: Any, count: int) -> list[Tensor]:
    model.zero_grad()
    x, y = batch(count)
    loss = F.cross_entropy(run(x), y)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("config", [CONFIG, RelaxConfig(tol=1e-3, free_steps=9)], ids=["tangent", "symmetric, tol"])
def test_equal_to_eager_without_graph_breaks(config: RelaxConfig) -> None:
    """A mixed network; batches of any size run the graph of the second one; the settings may change."""
    model = Mixed(EquilibriumNet(NETWORK, config, seed=0))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for count in (3, 5, 7):
        got = found(model, compiled, count)
        residual = model.net.residual
        want = found(model, model, count)
        assert len(got) == len(want) == 1 + len(list(model.parameters()))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
        assert residual is not None
        assert model.net.residual is not None
        torch.testing.assert_close(residual, model.net.residual)
    model.net.config = replace(config, free_steps=1)
    for a, b in zip(found(model, compiled, 3), found(model, model, 3), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(batch(3)[0]), model(batch(3)[0]))


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_inductor() -> None:
    """Generated code agrees with the shapes and strides that the fake implementations promise."""
    model = Mixed(EquilibriumNet(NETWORK, CONFIG, seed=0))
    compiled = torch.compile(model, fullgraph=True)
    for a, b in zip(found(model, compiled, 3), found(model, model, 3), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def samples() -> Iterator[tuple[Any, ...]]:
    for network, config in (
        (NETWORK, CONFIG),
        (NETWORK, RelaxConfig(storage=torch.float16, tol=1e-2)),
        (replace(VARIANTS["separate, tied head"], local_heads=()), RelaxConfig(estimator="five_phase")),
    ):
        net = EquilibriumNet(network, config, seed=0)
        p = net.tensors()
        x = torch.rand(2, *network.shapes[0], generator=torch.Generator().manual_seed(0))
        feedback = [t for t in p.feedback_weights if t is not None]
        biases = [t for t in p.biases if t is not None]
        yield x, list(p.weights), feedback, biases, phases.key_of(network, config), "auto", [1, 2], True


@pytest.mark.parametrize("index", range(3))
def test_opcheck(index: int) -> None:
    """Schema, fake implementations (shapes, strides, dtypes), autograd registration, dynamic shapes."""
    x, weights, feedback, biases, *rest = list(samples())[index]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    grown = [t.clone().requires_grad_() for t in weights]
    with backend("auto"):
        torch.library.opcheck(torch.ops.ep_kernels.equilibrium, (x, grown, feedback, biases, *rest), test_utils=checks)
        outputs, saved, _ = torch.ops.ep_kernels.equilibrium(x, weights, feedback, biases, *rest)
        gradients = [torch.randn_like(t) for t in outputs]
        key, name, nodes, _ = rest
        groups = x, weights, feedback, biases, outputs, saved, gradients
        for asked in ((True, True), (True, False), (False, True)):
            arguments = (*groups, key, name, nodes, nodes, *asked)
            torch.library.opcheck(torch.ops.ep_kernels.equilibrium_backward, arguments, test_utils=checks)


def test_a_key_of_another_process() -> None:
    x, *rest = next(samples())
    want = torch.ops.ep_kernels.equilibrium(x, *rest)[0]
    phases.known.cache_clear()  # as there
    got = torch.ops.ep_kernels.equilibrium(x, *rest)[0]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for odd in ("0" * 64, "key", "", rest[3][:-8], "é"):
        rest[3] = odd
        with pytest.raises(RuntimeError, match=f"argument 'key': expected one .* made, got '{odd[:64]}"):
            torch.ops.ep_kernels.equilibrium(x, *rest)


def test_a_key_says_everything() -> None:
    for name, network in VARIANTS.items():
        for config in (CONFIG, RelaxConfig(operands=torch.float16, storage=torch.float16, estimator="five_phase")):
            dynamics = phases.known(phases.key_of(network, config))
            head = Head(network.readout.node, None, "mse", weight=0.0)
            assert dynamics.network == replace(network, readout=head, local_heads=()), name
            assert dynamics.free == config


def test_a_compiled_graph_outlives_its_settings() -> None:
    """Backward after other settings have come, and none is known any more."""
    model = Mixed(EquilibriumNet(NETWORK, CONFIG, seed=0))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want = found(model, compiled, 3)
    x, y = batch(3)
    model.zero_grad()
    loss = F.cross_entropy(compiled(x), y)
    model.net.config = replace(CONFIG, free_steps=1)
    phases.known.cache_clear()
    gc.collect()
    loss.backward()
    for a, p in zip(want[1:], model.parameters(), strict=True):
        assert p.grad is not None
        assert torch.equal(a, p.grad)


def test_the_op_refuses_what_it_cannot_do() -> None:
    x, weights, *rest = next(samples())
    with pytest.raises(RuntimeError, match=r"vmap .* cannot run a relaxation"):
        torch.func.vmap(lambda x: torch.ops.ep_kernels.equilibrium(x, weights, *rest)[0][0])(x[None])
    x.requires_grad_()
    states = torch.ops.ep_kernels.equilibrium(x, weights, *rest)[0]
    (slope,) = torch.autograd.grad(states[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a derivative of its gradients was asked for"):
        slope.sum().backward()
