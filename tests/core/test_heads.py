"""Heads: losses, outputs and nudges of every kind against autograd, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ep_kernels import Connection, Head, Network, Parameters, RelaxConfig, ep_gradients, reference
from tests.core.nets import problem

MAP, VECTOR = (5, 7, 6), (11,)
HEADS: dict[str, tuple[Head, tuple[int, ...]]] = {
    "linear on a vector": (Head(1, 4), VECTOR),
    "linear on a map": (Head(1, 4, weight=0.3), MAP),
    "pooled": (Head(1, 4, pool=2), MAP),
    "pooled, uneven windows": (Head(1, 4, pool=4), MAP),
    "pooled to one": (Head(1, 4, pool=1, weight=-0.7), MAP),
    "temperature": (Head(1, 4, pool=2, temperature=4.0), MAP),
    "mse": (Head(1, 4, loss="mse", weight=2.0), VECTOR),
    "pointwise mse": (Head(1, 4, loss="mse", pointwise=True), MAP),
    "pointwise pooled mse": (Head(1, 4, loss="mse", pool=3, pointwise=True, weight=0.5), MAP),
    "pointwise cross-entropy": (Head(1, 4, pool=2, pointwise=True, temperature=0.5), MAP),
    "identity mse": (Head(1, None, loss="mse"), VECTOR),
    "identity mse on a map": (Head(1, None, loss="mse", weight=0.2), MAP),
    "identity pooled": (Head(1, None, loss="mse", pool=2), MAP),
    "cosine": (Head(1, 4, loss="cosine", weight=2.0), VECTOR),
    "pooled cosine": (Head(1, 4, loss="cosine", pool=2), MAP),
    "pointwise cosine": (Head(1, 4, loss="cosine", pointwise=True, weight=0.5), MAP),
    "identity cosine on a map": (Head(1, None, loss="cosine", weight=0.2), MAP),
    "identity cross-entropy": (Head(1, None, temperature=3.0), VECTOR),
}


def sample(name: str) -> tuple[Head, Tensor, Tensor | None, Tensor | None, Tensor]:
    head, shape = HEADS[name]
    generator = torch.Generator().manual_seed(3)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    weight_shape = head.weight_shape(shape)
    weight = None if weight_shape is None else normal(*weight_shape)
    target = normal(3, *head.output_shape(shape))
    if head.loss == "cross_entropy":
        target = target.softmax(1)
    return head, normal(3, *shape), weight, None if weight is None else normal(len(weight)), target


@pytest.mark.parametrize("name", HEADS)
def test_nudge_is_the_gradient_of_the_loss(name: str) -> None:
    head, state, weight, bias, target = sample(name)
    leaf = state.clone().requires_grad_()
    z = reference.head_output(head, leaf, weight, bias)
    assert tuple(z.shape[1:]) == head.output_shape(tuple(state.shape[1:]))
    loss = reference.head_loss(head, z, target)
    assert loss.shape == (3,)
    wrt_z, wrt_s = torch.autograd.grad(loss.sum(), (z, leaf))
    torch.testing.assert_close(reference.head_error(head, z, target), wrt_z, rtol=1e-12, atol=1e-13)
    got = reference.head_gradient(head, state, weight, bias, target)
    assert float(wrt_s.abs().max()) > 1e-3
    torch.testing.assert_close(got, wrt_s, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", HEADS)
def test_losses_are_the_ones_of_the_contract(name: str) -> None:
    head, state, weight, bias, target = sample(name)
    z = reference.head_output(head, state, weight, bias)
    got = reference.head_loss(head, z, target)
    if head.loss == "mse":
        want = head.weight / 2 * ((z - target) ** 2).flatten(1).sum(1)
    elif head.loss == "cosine":
        want = head.weight * (1 - F.cosine_similarity(z, target, dim=1)).reshape(len(z), -1).sum(1)
    else:
        want = head.weight * head.temperature**2 * F.cross_entropy(z / head.temperature, target, reduction="none")
        want = want.reshape(len(z), -1).sum(1)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_output_of_a_pooled_head_is_that_of_torch() -> None:
    head, state, weight, bias, _ = sample("pooled")
    assert weight is not None
    z = reference.head_output(head, state, weight, bias)
    torch.testing.assert_close(z, F.linear(F.adaptive_avg_pool2d(state, 2).flatten(1), weight, bias))
    head, state, weight, bias, _ = sample("pointwise pooled mse")
    assert weight is not None
    z = reference.head_output(head, state, weight, bias)
    torch.testing.assert_close(z, F.conv2d(F.adaptive_avg_pool2d(state, 3), weight, bias))


def test_soft_targets_have_the_gradient_of_the_scaled_kl() -> None:
    """tau^2 KL(teacher || student) and tau^2 cross-entropy differ by a constant: the teacher's entropy."""
    head, state, weight, bias, target = sample("temperature")
    leaf = state.clone().requires_grad_()
    log_p = F.log_softmax(reference.head_output(head, leaf, weight, bias) / head.temperature, 1)
    kl = head.temperature**2 * F.kl_div(log_p, target, reduction="sum")
    (want,) = torch.autograd.grad(kl, leaf)
    torch.testing.assert_close(reference.head_gradient(head, state, weight, bias, target), want)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", HEADS)
def test_head_gradients_of_an_ep_step(name: str, backend: str) -> None:
    """One node, every kind of head on it: at its equilibrium the readout gradient is the ordinary one."""
    head, shape = HEADS[name]
    connection = Connection(0, 1) if len(shape) == 3 else Connection(0, 1, None)
    source = (2, 7, 6) if len(shape) == 3 else (6,)
    net = Network((source, shape), (connection,), head)
    p = problem(net, seed=4, bias=0.3)
    config = RelaxConfig(free_steps=1, nudged_steps=1, estimator="tangent")
    got, equilibrium = ep_gradients(net, p.parameters, p.x, p.targets, config, backend=backend)
    state = equilibrium.states[1]
    named = {n: t.clone().requires_grad_() for n, t in p.parameters.named().items()}
    leaves = Parameters.from_named(net, named)
    flow = reference.connection_drive(connection, p.x, leaves.weights[0])
    assert leaves.biases[1] is not None
    s = (flow + leaves.biases[1].view(-1, *[1] * (len(shape) - 1))).clamp(0, 1)
    torch.testing.assert_close(s.detach(), state, rtol=0, atol=1e-14)
    z = reference.head_output(head, s, leaves.head_weights[0], leaves.head_biases[0])
    want = torch.autograd.grad(reference.head_loss(head, z, p.targets[0]).mean(), list(named.values()))
    for (key, ours), theirs in zip(got.named().items(), want, strict=True):
        assert float(theirs.abs().max()) > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13, msg=key)


@pytest.mark.parametrize("what", ["state", "target"])
def test_a_zero_vector_has_no_direction(what: str) -> None:
    """Its loss is the weight, its gradient zero (of autograd too); a NaN is no zero."""
    head, state, _, _, target = sample("identity cosine on a map")
    zeroed = state if what == "state" else target
    zeroed[1, :, 2, 3] = 0
    zeroed[2] *= 1e-7
    leaf = state.requires_grad_()
    loss = reference.head_loss(head, leaf, target)
    torch.testing.assert_close(loss[2], torch.tensor(head.weight * 42, dtype=loss.dtype))
    (wrt_s,) = torch.autograd.grad(loss.sum(), leaf)
    got = reference.head_gradient(head, leaf.detach(), None, None, target)
    torch.testing.assert_close(got, wrt_s, rtol=1e-12, atol=1e-13)
    assert not got[1, :, 2, 3].any()
    assert not got[2].any()
    assert got[0].abs().amax(0).min() > 0
    zeroed.detach()[2, 0, 0, 0] = float("nan")
    got = reference.head_gradient(head, leaf.detach(), None, None, target)
    assert got.isnan().any(1).sum() == 1
    assert got[2, :, 0, 0].isnan().all()


def test_weight_of_a_head_scales_its_nudge() -> None:
    head, state, weight, bias, target = sample("pooled")
    once = reference.head_gradient(head, state, weight, bias, target)
    thrice = reference.head_gradient(replace(head, weight=3.0), state, weight, bias, target)
    torch.testing.assert_close(thrice, 3 * once)
