"""What we compare with, written as its users write it: plain PyTorch, default memory format, no tricks of ours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ep_kernels import Network, Parameters


class AutogradLoop:
    """EP as published codes run it: autograd of the energy's primitive at every step, all layers at once.

    Phi(s) = sum_l <s^l, drive_l(s^(l-1))>; s <- clip(dPhi/ds, 0, 1) (Ernoult et al. 2019; Laborieux et al. 2021; the
    same loop in their public code). Chains of 3x3 convolutions with 2x2 max pooling and a softmax readout; gain 1.
    """

    def __init__(self, network: Network, parameters: Parameters) -> None:
        self.network = network
        self.weights = [w.detach().clone().contiguous().requires_grad_() for w in parameters.weights]
        self.biases = [b.detach().clone().requires_grad_() for b in parameters.biases[1:] if b is not None]
        readout, bias = parameters.head_weights[0], parameters.head_biases[0]
        assert readout is not None
        assert bias is not None
        self.readout, self.readout_bias = readout.detach().clone(), bias.detach().clone()

    def phi(self, x: Tensor, states: Sequence[Tensor]) -> Tensor:
        """Primitive function per sample, [B]."""
        below, total = x, x.new_zeros(x.shape[0])
        for conn, weight, bias, state in zip(self.network.connections, self.weights, self.biases, states, strict=True):
            drive = F.conv2d(below, weight, bias, stride=conn.stride, padding=conn.padding)
            if conn.pool == "max":
                drive = F.max_pool2d(drive, 2)
            total = total + (drive * state).flatten(1).sum(1)
            below = state
        return total

    def step(self, x: Tensor, states: list[Tensor], target: Tensor | None = None, beta: float = 0.0) -> list[Tensor]:
        """One relaxation step of every layer from the same states."""
        states = [s.detach().requires_grad_() for s in states]
        phi = self.phi(x, states).sum()
        if target is not None:
            logits = F.linear(states[-1].flatten(1), self.readout, self.readout_bias)
            phi = phi - beta * F.cross_entropy(logits, target, reduction="sum")
        gradients = torch.autograd.grad(phi, states)
        return [g.clamp(0, 1) for g in gradients]

    def relax(self, x: Tensor, steps: int) -> list[Tensor]:
        """Free phase from zero."""
        states = [x.new_zeros(x.shape[0], *shape) for shape in self.network.shapes[1:]]
        for _ in range(steps):
            states = self.step(x, states)
        return states

    def batch(self, x: Tensor, labels: Tensor, free_steps: int, nudged_steps: int, beta: float) -> list[Tensor]:
        """One training batch: free phase, two nudged phases, gradient of the contrast by autograd."""
        free = self.relax(x, free_steps)
        gradients = []
        for sign in (1.0, -1.0):
            states = free
            for _ in range(nudged_steps):
                states = self.step(x, states, labels, sign * beta)
            phi = self.phi(x, states).mean()
            gradients.append(torch.autograd.grad(phi, [*self.weights, *self.biases]))
        return [(m - p) / (2 * beta) for p, m in zip(*gradients, strict=True)]


class FeedForward(nn.Module):
    """The feed-forward net of the same shape: convolution, pooling, clip to [0, 1], linear readout."""

    def __init__(self, network: Network, parameters: Parameters) -> None:
        super().__init__()
        self.pools = [conn.pool for conn in network.connections]
        self.convs = nn.ModuleList()
        for conn, weight, bias in zip(network.connections, parameters.weights, parameters.biases[1:], strict=True):
            conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], conn.stride[0], conn.padding[0])
            assert bias is not None
            conv.load_state_dict({"weight": weight, "bias": bias})
            self.convs.append(conv)
        readout, bias = parameters.head_weights[0], parameters.head_biases[0]
        assert readout is not None
        assert bias is not None
        self.readout = nn.Linear(readout.shape[1], readout.shape[0])
        self.readout.load_state_dict({"weight": readout, "bias": bias})

    def forward(self, x: Tensor) -> Tensor:
        """Logits, [B, classes]."""
        for conv, pool in zip(self.convs, self.pools, strict=True):
            x = conv(x)
            x = (F.max_pool2d(x, 2) if pool == "max" else x).clamp(0, 1)
        out: Tensor = self.readout(x.flatten(1))
        return out


def backprop(model: FeedForward, x: Tensor, labels: Tensor) -> None:
    """One ordinary training batch, without the optimizer's step."""
    model.zero_grad()
    F.cross_entropy(model(x), labels).backward()


class Convolutions:
    """The convolutions of one full free sweep and nothing else: every drive but the clamped input's, every feedback."""

    def __init__(self, network: Network, parameters: Parameters, batch: int) -> None:
        layout = torch.channels_last
        self.jobs = []
        for conn, weight in zip(network.connections, parameters.weights, strict=True):
            if conn.src == 0:
                continue
            source = torch.rand(batch, *network.shapes[conn.src]).contiguous(memory_format=layout)
            size = conn.map_size(*network.shapes[conn.src][1:])
            above = torch.rand(batch, weight.shape[0], *size).contiguous(memory_format=layout)
            self.jobs.append((source, above, weight.contiguous(memory_format=layout), conn.stride, conn.padding))

    @torch.no_grad()
    def run(self) -> None:
        """Once."""
        for source, above, weight, stride, padding in self.jobs:
            F.conv2d(source, weight, stride=stride, padding=padding)
            F.conv_transpose2d(above, weight, stride=stride, padding=padding)
