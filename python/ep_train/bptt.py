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

Kept = dict[int, tuple[Tensor, Tensor, Tensor | None]]  # by connection: source, its drive, winners


def free_sweep(
    network: Network, parameters: Parameters, states: list[Tensor], config: RelaxConfig, damping: float, kept: Kept
) -> list[Tensor]:
    """One differentiable sweep of the free phase; returns the new states.

    ``kept`` holds drives between sweeps: one is computed again only when its source has changed.
    """
    new = list(states)
    read = states if config.schedule == "sync" else new

    def drive(c: int) -> tuple[Tensor, Tensor | None]:
        conn = network.connections[c]
        source = read[conn.src]
        if c not in kept or kept[c][0] is not source:
            pooled, winners = reference.drive(source, parameters.weights[c], conn.stride, conn.padding, conn.pool)
            kept[c] = (source, pooled, winners)
        return kept[c][1:]

    for node in update_order(network, config.schedule, "free"):
        bias = parameters.biases[node]
        assert bias is not None
        a = bias.view(-1, *[1] * (read[node].dim() - 2))
        for c in network.into[node]:
            a = a + drive(c)[0]
        for c in network.out_of[node]:
            conn = network.connections[c]
            winners = drive(c)[1] if conn.pool == "max" else None
            own = parameters.feedback_weights[c] if parameters.feedback_weights else None
            back = reference.feedback(
                read[conn.dst],
                parameters.weights[c] if own is None else own,
                network.shapes[node],
                conn.stride,
                conn.padding,
                conn.pool,
                winners,
            )
            a = a + network.feedback_coefficient(c) * back
        new[node] = reference.update(read[node], a, damping, network.slope, *network.box(node))
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
        network: what is relaxed.
        parameters: its tensors.
        x: the clamped input, [B, ...].
        targets: per head, [B, ...].
        config: schedule, damping and ``free_steps`` are read.
        steps: sweeps that are unrolled and differentiated.
        free_steps: sweeps run without a graph before them; by default as many as make ``config.free_steps`` in all.
        states: where the relaxation starts; default: where ``config`` says.

    Returns:
        Gradients (parameters that the loss does not reach get zeros), the final states and the loss.
    """
    if free_steps is None:
        steps = min(steps, config.free_steps)
    before = config.free_steps - steps if free_steps is None else free_steps
    start = [x, *(x.new_zeros(x.shape[0], *shape) for shape in network.shapes[1:])] if states is None else list(states)
    if before:
        with torch.no_grad():
            run = replace(config, free_steps=before, on_fail="ignore")  # it goes on below
            start = free_phase(network, parameters, x, run, states=None if states is None else start).states
    elif states is None and config.start == "feedforward" and config.schedule != "sweep":
        start = free_phase(network, parameters, x, RelaxConfig(free_steps=1)).states  # bottom-up, without feedback yet
    start = [s.to(x.dtype) for s in start]
    named = {name: t.detach().requires_grad_() for name, t in parameters.named().items()}
    leaves = Parameters.from_named(network, named)
    with torch.enable_grad():
        kept: Kept = {}
        omega = config.free_damping(network.feedback_gain)
        now = list(start)
        for t in range(steps):
            first = t == 0 and not before  # a relaxation's first sweep is never over-relaxed
            damping = min(omega, 1.0) if first else omega
            now = free_sweep(network, leaves, now, config, damping, kept)
        loss = loss_at(network, leaves, now, targets)
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(named.items(), found, strict=True)
    }
    return Parameters.from_named(network, gradients), [s.detach() for s in now], loss.detach()
