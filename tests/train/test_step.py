"""One training step: what it stores for the optimizer and what it reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ep_kernels
from ep_kernels import RelaxConfig
from ep_train import Model, bptt_step, build_network, ep_step, predict
from ep_train.bptt import bptt_gradients
from ep_train.step import StepResult
from tests.core.threads import one_thread  # noqa: F401  (autouse)

Step = Callable[[Model, Tensor, Tensor, RelaxConfig], StepResult]
CONFIG = RelaxConfig(free_steps=4, nudged_steps=3)


def batch(count: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 1, 8, 8, generator=generator)
    return images, torch.randint(0, 4, (count,), generator=generator)


def model(**options: Any) -> Model:
    return Model(build_network("8-8p", (1, 8, 8), 4, **options), seed=1)


@pytest.mark.parametrize("readout", ["softmax", "mse"])
@pytest.mark.parametrize("step", [ep_step, bptt_step])
@pytest.mark.parametrize("estimator", ["symmetric", "tangent", "positive", "negative"])
def test_steps_lower_the_loss(step: Step, readout: Any, estimator: Any) -> None:
    m, (images, labels) = model(readout=readout, local_heads=(1,)), batch()
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    losses = []
    for _ in range(25):
        losses.append(float(step(m, images, labels, replace(CONFIG, estimator=estimator)).loss))
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert all(later < earlier for earlier, later in pairwise(losses[:7]))


def test_ep_step_stores_the_ep_gradients() -> None:
    m, (images, labels) = model(), batch()
    result = ep_step(m, images, labels, CONFIG)
    targets = ep_kernels.targets_for(m.network, labels, 4, torch.float32)
    want, equilibrium = ep_kernels.ep_gradients(m.network, m.tensors(), images, targets, CONFIG)
    for name, p in m.named_parameters():
        assert p.grad is not None
        assert torch.equal(p.grad, want.named()[name])
    assert result.residual is not None
    assert torch.equal(result.residual, equilibrium.residual.mean())
    z, residual = predict(m, images, CONFIG)
    assert torch.equal(residual, equilibrium.residual)
    assert float(result.loss) == pytest.approx(float(F.cross_entropy(z, labels)), rel=1e-6)
    assert int(result.correct) == int((z.argmax(1) == labels).sum())
    assert z.shape == (16, 4)
    assert not z.requires_grad


def test_bptt_step_unrolls_the_nudged_steps() -> None:
    m, (images, labels) = model(), batch()
    result = bptt_step(m, images, labels, CONFIG)
    targets = ep_kernels.targets_for(m.network, labels, 4, torch.float32)
    want, _, loss = bptt_gradients(m.network, m.tensors(), images, targets, CONFIG, steps=3)
    for name, p in m.named_parameters():
        assert p.grad is not None
        assert torch.equal(p.grad, want.named()[name])
    assert result.residual is None
    assert float(result.loss) == pytest.approx(float(loss))
    z, _ = predict(m, images, CONFIG)
    assert int(result.correct) == int((z.argmax(1) == labels).sum())


def test_the_reported_loss_is_the_readouts_alone() -> None:
    images, labels = batch()
    plain, local = (float(ep_step(model(local_heads=h), images, labels, CONFIG).loss) for h in ((), (1,)))
    assert plain == local
    mse = model(readout="mse")
    loss = float(ep_step(mse, images, labels, CONFIG).loss)
    z, _ = predict(mse, images, CONFIG)
    assert loss == pytest.approx(float((z - F.one_hot(labels, 4)).square().sum(1).mean() / 2), rel=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_backend_in_force_runs_the_step(backend: str) -> None:
    m, (images, labels) = model(), batch()
    ep_step(m, images, labels, CONFIG)
    want = {name: p.grad for name, p in m.named_parameters()}
    with ep_kernels.backend(backend):
        ep_step(m, images, labels, CONFIG)
    for name, p in m.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-3, atol=1e-6, msg=name)
