"""Backpropagation through time (BPTT) of a relaxation, with and without activation checkpointing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ep_kernels import Network, Parameters, RelaxConfig
from ep_train.bptt import bptt_gradients, free_sweep, loss_at


def bptt(
    network: Network, parameters: Parameters, x: Tensor, targets: Sequence[Tensor], config: RelaxConfig, steps: int
) -> Parameters:
    """Gradients of the batch-mean loss through the last ``steps`` free sweeps; the others have no graph."""
    return bptt_gradients(network, parameters, x, targets, config, steps=steps)[0]


def checkpointed(
    network: Network, parameters: Parameters, x: Tensor, targets: Sequence[Tensor], config: RelaxConfig
) -> Parameters:
    """The same through all ``free_steps``: states are kept after every sqrt(T) sweeps, the rest is computed twice."""
    total = config.free_steps
    length = math.isqrt(total - 1) + 1
    named = {name: t.detach().requires_grad_() for name, t in parameters.named().items()}
    leaves = Parameters.from_named(network, named)
    omega = config.free_damping(network.feedback_gain)

    def segment(first: int, *states: Tensor) -> tuple[Tensor, ...]:
        now: list[Tensor] = list(states)
        kept: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
        for t in range(first, min(first + length, total)):
            damping = min(omega, 1.0) if t == 0 else omega
            now = free_sweep(network, leaves, now, config, damping, kept)
        return tuple(now)

    with torch.enable_grad():
        states: tuple[Tensor, ...] = (x, *(x.new_zeros(x.shape[0], *shape) for shape in network.shapes[1:]))
        for first in range(0, total, length):
            states = checkpoint(segment, first, *states, use_reentrant=False)
        found = torch.autograd.grad(loss_at(network, leaves, states, targets), list(named.values()))
    return Parameters.from_named(network, dict(zip(named, found, strict=True)))
