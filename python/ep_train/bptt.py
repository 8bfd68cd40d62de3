"""Backpropagation through the relaxation: the baseline, and the true gradient that EP is checked against.

The dynamics are those of the free phase (same schedule, live winners whose choice is not differentiated). The first
steps run without a graph; the last ``steps`` are unrolled and differentiated, as in the literature (Ernoult et al.
2019; Laborieux et al. 2021). From a converged state with enough steps this is the gradient of the loss at equilibrium.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ep_kernels import Network, Parameters, RelaxConfig, free_phase, reference
from ep_kernels.plan import update_order


def free_sweep(
    network: Network, parameters: Parameters, states: list[Tensor], config: RelaxConfig, input_drives: dict[int, Tensor]
) -> list[Tensor]:
    """One differentiable sweep of the free phase; returns the new states."""
    new, damping = list(states), config.free_damping
    for node in update_order(network, config.schedule, "free"):
        read = states if config.schedule == "sync" else new
        bias = parameters.biases[node]
        assert bias is not None
        a = bias.view(-1, *[1] * (read[node].dim() - 2))
        for c in network.into[node]:
            conn = network.connections[c]
            if conn.src == 0:
                a = a + input_drives[c]
            else:
                a = a + reference.connection_drive(conn, read[conn.src], parameters.weights[c])
        for c in network.out_of[node]:
            conn = network.connections[c]
            winners = None
            if conn.pool == "max":
                with torch.no_grad():
                    weight = parameters.weights[c]
                    _, winners = reference.drive(read[node], weight, conn.stride, conn.padding, conn.pool)
            back = reference.feedback(
                read[conn.dst],
                parameters.weights[c],
                network.shapes[node],
                conn.stride,
                conn.padding,
                conn.pool,
                winners,
            )
            a = a + network.feedback_coefficient(c) * back
        new[node] = reference.update(read[node], a, damping, network.slope, network.lo, network.hi)
    return new


def loss_at(network: Network, parameters: Parameters, states: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Batch mean of the augmented loss at given states."""
    total = states[0].new_zeros(())
    for h, head in enumerate(network.heads):
        z = reference.head_output(head, states[head.node], parameters.head_weights[h], parameters.head_biases[h])
        total = total + reference.head_loss(head, z, targets[h]).mean()
    return total


def bptt_gradients(
    network: Network,
    parameters: Parameters,
    x: Tensor,
    targets: Sequence[Tensor],
    config: RelaxConfig,
    *,
    steps: int,
    free_steps: int | None = None,
    states: Sequence[Tensor] | None = None,
) -> tuple[Parameters, list[Tensor], Tensor]:
    """Gradients of the batch-mean loss by BPTT through the last ``steps`` of the free phase.

    Args:
        steps: sweeps that are unrolled and differentiated.
        free_steps: sweeps run without a graph before them; default ``config.free_steps - steps`` (at least 0).
        states: where the relaxation starts; default zero.

    Returns:
        Gradients (parameters that the loss does not reach get zeros), the final states and the loss.
    """
    before = max(config.free_steps - steps, 0) if free_steps is None else free_steps
    start = [x, *(x.new_zeros(x.shape[0], *shape) for shape in network.shapes[1:])] if states is None else list(states)
    if before:
        with torch.no_grad():
            run = replace(config, free_steps=before)
            start = free_phase(network, parameters, x, run, states=None if states is None else start).states
    named = {name: t.detach().requires_grad_() for name, t in parameters.named().items()}
    leaves = Parameters.from_named(network, named)
    with torch.enable_grad():
        drives = {
            c: reference.connection_drive(network.connections[c], x, leaves.weights[c]) for c in network.out_of[0]
        }
        now = list(start)
        for _ in range(steps):
            now = free_sweep(network, leaves, now, config, drives)
        loss = loss_at(network, leaves, now, targets)
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(named.items(), found, strict=True)
    }
    return Parameters.from_named(network, gradients), [s.detach() for s in now], loss.detach()
