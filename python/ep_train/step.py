"""One training step: gradients of a batch by EP, BPTT or backprop, stored for an ordinary optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ep_kernels
from ep_kernels import Network, Parameters, RelaxConfig

from .bptt import bptt_gradients
from .feedforward import backprop_gradients, feedforward_states
from .models import Model

if TYPE_CHECKING:
    from .distributed import GradientMean
    from .dropout import Masks


@dataclass(frozen=True)
class StepResult:
    """Of one batch. Tensors, so that a GPU need not be waited for.

    Attributes:
        loss: mean loss of the readout at the free equilibrium, a scalar.
        correct: number of correct predictions there, a scalar.
        residual: mean over samples of the residual of the last free sweep, a scalar; None for BPTT and backprop.
        states: of EP, the free equilibrium, per node: a warm start of the same images.
    """

    loss: Tensor
    correct: Tensor
    residual: Tensor | None
    states: list[Tensor] | None = None


def ep_step(
    model: Model,
    images: Tensor,
    labels: Tensor,
    config: RelaxConfig,
    *,
    indices: Tensor | None = None,
    states: Sequence[Tensor | None] | None = None,
    masks: Masks | None = None,
    same_update: bool = False,
    mean: GradientMean | None = None,
) -> StepResult:
    """EP gradients of a batch into ``.grad``: free phase, nudged phases, contrast.

    Args:
        model: its parameters get the gradients of the batch-mean loss; those of the batch before are replaced.
        images: [B, C, H, W], in the parameters' dtype and on their device.
        labels: int64 [B].
        config: of both phases.
        indices: of the images in their dataset, for a teacher whose logits are kept.
        states: where the free phase starts, per node; default zero.
        masks: of dropout.
        same_update: weights and separate feedback weights both get the mean of their gradients.
        mean: over processes, each of which has a part of the batch: what each contrast finds is sent while the next
            one is computed.

    Returns:
        Loss, correct predictions, residual and free equilibrium.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or labels out of range.
        BackendError: a backend asked for by name cannot run, with the reason.
        LostContact: another process is gone.
    """
    network, own = model.network, model.tensors()
    tensors = own if masks is None else masks.apply(own)
    targets = targets_of(model, images, labels, indices)
    equilibrium = ep_kernels.free_phase(network, tensors, images, config, states=states, keep=True)
    ready = None if mean is None else mean.add
    gradients, nudged = ep_kernels.nudged_gradients(network, tensors, equilibrium, targets, config, ready=ready)
    if model.loss is not None:
        model.loss.set_gradients(equilibrium, nudged)
    if mean is not None:
        _add_own(mean, model.loss)
        mean.finish()
    if same_update:
        gradients = ep_kernels.kolen_pollack(gradients)
    model.set_gradients(gradients if masks is None else masks.gradients(gradients))
    z = ep_kernels.readout(network, tensors, equilibrium)
    loss, correct = _score(network, z, targets[0], labels)
    return StepResult(loss, correct, equilibrium.residual.mean(), equilibrium.states)


def bptt_step(
    model: Model,
    images: Tensor,
    labels: Tensor,
    config: RelaxConfig,
    *,
    indices: Tensor | None = None,
    masks: Masks | None = None,
    mean: GradientMean | None = None,
) -> StepResult:
    """BPTT gradients of a batch into ``.grad``: the last ``nudged_steps`` of ``free_steps`` sweeps are unrolled.

    Args:
        model: its parameters get the gradients of the batch-mean loss; those of the batch before are replaced.
        images: [B, C, H, W], in the parameters' dtype and on their device.
        labels: int64 [B].
        config: of the free phase.
        indices: of the images in their dataset, for a teacher whose logits are kept.
        masks: of dropout.
        mean: of the gradients over processes, each of which has a part of the batch.

    Returns:
        Loss and correct predictions.

    Raises:
        ValueError: labels out of range.
    """

    def gradients(tensors: Parameters, targets: list[Tensor]) -> tuple[Parameters, list[Tensor]]:
        return bptt_gradients(model.network, tensors, images, targets, config, steps=config.nudged_steps)[:2]

    tensors = model.tensors()
    targets = targets_of(model, images, labels, indices)
    found, states = gradients(tensors if masks is None else masks.apply(tensors), targets)
    return _from_states(model, found, states, targets, labels, masks, mean)


def backprop_step(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    indices: Tensor | None = None,
    masks: Masks | None = None,
    mean: GradientMean | None = None,
) -> StepResult:
    """Backprop gradients of a batch into ``.grad``, of the feed-forward network of the same shape."""
    tensors = model.tensors()
    targets = targets_of(model, images, labels, indices)
    masked = tensors if masks is None else masks.apply(tensors)
    found, states, _ = backprop_gradients(model.network, masked, images, targets)
    return _from_states(model, found, states, targets, labels, masks, mean)


def _add_own(mean: GradientMean, module: nn.Module | None) -> None:
    """The gradients in ``.grad`` of a module's own parameters."""
    for name, parameter in module.named_parameters() if module is not None else ():
        if parameter.grad is not None:
            mean.add(name, parameter.grad)


def module_step(module: nn.Module, images: Tensor, labels: Tensor, *, mean: GradientMean | None = None) -> StepResult:
    """Gradients of the mean cross-entropy of an ordinary torch module into ``.grad``.

    Args:
        mean: over processes; of the running statistics of batch normalisation too. The statistics that a batch is
            normalised with are those of each process's part.
    """
    module.train()
    module.zero_grad(set_to_none=True)
    with torch.enable_grad():
        z = module(images)
        loss = cross_entropy(z, labels)
        loss.backward()
    if mean is not None:
        _add_own(mean, module)
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                mean.add(name, buffer)
        mean.finish()
    return StepResult(loss.detach(), (z.detach().argmax(1) == labels).sum(), None)


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
    """Outputs of the readout at the free equilibrium.

    Args:
        model: the network and its parameters.
        images: [B, C, H, W], in the parameters' dtype and on their device.
        config: of the free phase.

    Returns:
        Logits, or values for ``mse``, [B, classes]; and the residuals, [B].

    Raises:
        ValueError: images of the wrong shape, dtype or device.
        BackendError: a backend asked for by name cannot run, with the reason.
    """
    tensors = model.tensors()
    equilibrium = ep_kernels.free_phase(model.network, tensors, images, config)
    return ep_kernels.readout(model.network, tensors, equilibrium), equilibrium.residual


@torch.no_grad()
def predict_feedforward(model: Model, images: Tensor) -> Tensor:
    """Outputs of the readout, [B, classes], of the feed-forward network."""
    tensors = model.tensors()
    return _readout(model.network, tensors, feedforward_states(model.network, tensors, images))


def _from_states(
    model: Model,
    gradients: Parameters,
    states: list[Tensor],
    targets: list[Tensor],
    labels: Tensor,
    masks: Masks | None,
    mean: GradientMean | None,
) -> StepResult:
    tensors = model.tensors()
    if model.loss is not None:
        model.loss.set_gradients_at(states)
    if mean is not None:
        for name, gradient in gradients.named().items():
            mean.add(name, gradient)
        _add_own(mean, model.loss)
        mean.finish()
    model.set_gradients(gradients if masks is None else masks.gradients(gradients))
    z = _readout(model.network, tensors if masks is None else masks.apply(tensors), states)
    loss, correct = _score(model.network, z, targets[0], labels)
    return StepResult(loss, correct, None)


def targets_of(model: Model, images: Tensor, labels: Tensor, indices: Tensor | None = None) -> list[Tensor]:
    """One target per head of the model's network, [B, ...]; ``indices`` of training images only."""
    if model.loss is not None:
        return model.loss.targets(images, labels, indices)
    network = model.network
    classes = network.readout.output_shape(network.shapes[network.readout.node])[0]
    return ep_kernels.targets_for(network, labels, classes, images.dtype)


def _readout(network: Network, tensors: Parameters, states: Sequence[Tensor]) -> Tensor:
    head = network.readout
    return ep_kernels.reference.head_output(head, states[head.node], tensors.head_weights[0], tensors.head_biases[0])


def _score(network: Network, z: Tensor, target: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    loss = ep_kernels.reference.head_loss(network.readout, z, target).mean()
    return loss, (z.argmax(1) == labels).sum()
