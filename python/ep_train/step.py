"""One training step: gradients of a batch by EP or BPTT, stored for an ordinary optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import ep_kernels
from ep_kernels import RelaxConfig

from .bptt import bptt_gradients
from .models import Model


@dataclass(frozen=True)
class StepResult:
    """Of one batch: the readout's mean loss and number of correct predictions at the free equilibrium, and the mean
    residual of the last free sweep over samples (None for BPTT). Tensors, so that a GPU need not be waited for."""

    loss: Tensor
    correct: Tensor
    residual: Tensor | None


def ep_step(model: Model, images: Tensor, labels: Tensor, config: RelaxConfig) -> StepResult:
    """EP gradients of a batch into ``.grad``: free phase, nudged phases, contrast."""
    network, tensors = model.network, model.tensors()
    targets = ep_kernels.targets_for(network, labels, _classes(model), images.dtype)
    gradients, equilibrium = ep_kernels.ep_gradients(network, tensors, images, targets, config)
    model.set_gradients(gradients)
    z = ep_kernels.readout(network, tensors, equilibrium)
    loss, correct = _score(model, z, targets[0], labels)
    return StepResult(loss, correct, equilibrium.residual.mean())


def bptt_step(model: Model, images: Tensor, labels: Tensor, config: RelaxConfig) -> StepResult:
    """BPTT gradients of a batch into ``.grad``: the last ``nudged_steps`` of ``free_steps`` sweeps are unrolled."""
    network, tensors = model.network, model.tensors()
    targets = ep_kernels.targets_for(network, labels, _classes(model), images.dtype)
    gradients, states, _ = bptt_gradients(network, tensors, images, targets, config, steps=config.nudged_steps)
    model.set_gradients(gradients)
    head = network.readout
    z = ep_kernels.reference.head_output(head, states[head.node], tensors.head_weights[0], tensors.head_biases[0])
    loss, correct = _score(model, z, targets[0], labels)
    return StepResult(loss, correct, None)


def read(results: Sequence[StepResult]) -> list[tuple[float, int, float | None]]:
    """Loss, correct predictions and residual of each batch. Waits for a GPU once, however many they are."""
    if not results:
        return []
    losses = torch.stack([result.loss for result in results]).tolist()
    correct = torch.stack([result.correct for result in results]).tolist()
    measured = [result.residual for result in results if result.residual is not None]
    residuals = torch.stack(measured).tolist() if measured else [None] * len(results)
    return list(zip(losses, correct, residuals, strict=True))


@torch.no_grad()
def predict(model: Model, images: Tensor, config: RelaxConfig) -> tuple[Tensor, Tensor]:
    """Outputs of the readout, [B, classes], and residuals, [B], of the free phase."""
    tensors = model.tensors()
    equilibrium = ep_kernels.free_phase(model.network, tensors, images, config)
    return ep_kernels.readout(model.network, tensors, equilibrium), equilibrium.residual


def _score(model: Model, z: Tensor, target: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    loss = ep_kernels.reference.head_loss(model.network.readout, z, target).mean()
    return loss, (z.argmax(1) == labels).sum()


def _classes(model: Model) -> int:
    network = model.network
    return network.readout.output_shape(network.shapes[network.readout.node])[0]
