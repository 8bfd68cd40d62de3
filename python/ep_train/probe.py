"""How good EP's gradient is during a run: its cosine to the true gradient, tensor by tensor, on a few test images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import ep_kernels
from ep_kernels import Parameters

from .check import compare, smallest_cosine, true_gradients
from .config import TrainConfig
from .models import Model
from .step import targets_of

IMAGES = 8  # of the test set, from its first on
SETTLE = 40  # sweeps to the true state, and again as many through which BPTT goes


@torch.no_grad()
def probe_gradient(
    model: Model, images: Tensor, labels: Tensor, config: TrainConfig, *, steps: int = SETTLE
) -> dict[str, Any]:
    """Cosine of EP's gradient to BPTT-to-convergence, for the row of metrics.

    EP computes as in training (estimator, precision, backend in force); the true gradient, of the same augmented loss
    at the equilibrium that EP's free phase approaches, in float64 and plain PyTorch (:func:`ep_train.check
    .true_gradients`). That costs ``steps`` sweeps forward, and ``steps`` more forward and backward, of these images;
    its memory holds the latter's states.

    Args:
        images: [B, C, H, W]. labels: int64 [B].
        config: of a run by EP.

    Returns:
        ``gradient_cosine``: by tensor (``connections.0.weight``, ...); ``gradient_cosine_smallest``: over the weights
        of connections; ``gradient_residual``: of the state that the true gradient is taken at, which is none while
        that is large.
    """
    network, tensors = model.network, model.tensors()
    targets = targets_of(model, images, labels)
    relax = replace(config.relax_config(), on_fail="ignore")  # the row tells
    gradients, equilibrium = ep_kernels.ep_gradients(network, tensors, images, targets, relax)
    exact = Parameters.from_named(network, {name: t.double() for name, t in tensors.named().items()})
    states = [images.double(), *(s.double() for s in equilibrium.states[1:])]
    true, residual = true_gradients(
        network, exact, states, [t.double() for t in targets], steps=steps, schedule=config.schedule
    )
    rows = compare(gradients, true)
    return {
        "gradient_cosine": {row.name: row.cosine for row in rows},
        "gradient_cosine_smallest": smallest_cosine(rows),
        "gradient_residual": residual,
    }
