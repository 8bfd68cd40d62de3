"""The feed-forward network of the same shape, and backprop through it: what EP is compared with.

Without feedback a layer is ``s^l = clip(gamma (b^l + sum of drives), lo, hi)``, one pass from below. It is the limit of
the network as the feedback gain goes to zero (Xie & Seung 2003).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ep_kernels import Network, Parameters, reference
from ep_kernels.plan import update_order

from .bptt import loss_at


def feedforward_states(network: Network, parameters: Parameters, x: Tensor) -> list[Tensor]:
    """States of one pass from below, per node, [B, ...]; differentiable."""
    states = [x] * len(network.shapes)
    for node in update_order(network, "sweep", "free"):
        bias = parameters.biases[node]
        assert bias is not None
        a = bias.view(-1, *[1] * (len(network.shapes[node]) - 1))
        for c in network.into[node]:
            conn = network.connections[c]
            a = a + reference.connection_drive(conn, states[conn.src], parameters.weights[c])
        states[node] = (network.slope * a).clamp(*network.box(node))
    return states


def backprop_gradients(
    network: Network, parameters: Parameters, x: Tensor, targets: Sequence[Tensor]
) -> tuple[Parameters, list[Tensor], Tensor]:
    """Gradients of the batch-mean loss by backprop, the states, and the loss.

    Parameters that the loss does not reach get zeros.
    """
    named = {name: t.detach().requires_grad_() for name, t in parameters.named().items()}
    leaves = Parameters.from_named(network, named)
    with torch.enable_grad():
        states = feedforward_states(network, leaves, x)
        loss = loss_at(network, leaves, states, targets)
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(named.items(), found, strict=True)
    }
    return Parameters.from_named(network, gradients), [s.detach() for s in states], loss.detach()
