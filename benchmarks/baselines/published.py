"""What we compare with, written as its users write it: plain PyTorch, default memory format, no tricks of ours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ep_kernels import Network, Parameters


class AutogradLoop:
    """EP as published codes run it: autograd of the energy's primitive at every step.

    Phi(s) = sum_l k^l <s^l, drive_l(s^(l-1))>; s^l <- clip(dPhi/ds^l / k^l, 0, 1) (Ernoult et al. 2019; Laborieux et
    al. 2021; the same loop in their public code, where k is 1). Chains of 3x3 convolutions with 2x2 max pooling and a
    softmax readout.

    Args:
        gain: k; the published one by default.
        in_turn: a step updates the layers in turn, bottom-up in the free phase and top-down in the nudged ones (a
            sweep), each by autograd of the whole energy; else all at once from the same states.
        local: in turn, of the two terms of the energy only that hold the layer (nothing published does that).
    """

    def __init__(
        self, network: Network, parameters: Parameters, *, gain: float = 1.0, in_turn: bool = False, local: bool = False
    ) -> None:
        self.network, self.gain, self.in_turn, self.local = network, gain, in_turn, local
        self.weights = [w.detach().clone().contiguous().requires_grad_() for w in parameters.weights]
        self.biases = [b.detach().clone().requires_grad_() for b in parameters.biases[1:] if b is not None]
        readout, bias = parameters.head_weights[0], parameters.head_biases[0]
        assert readout is not None
        assert bias is not None
        self.readout, self.readout_bias = readout.detach().clone(), bias.detach().clone()

    def phi(self, x: Tensor, states: Sequence[Tensor], terms: Sequence[int] | None = None) -> Tensor:
        """Primitive function per sample, [B]; ``terms``: of these connections only."""
        total = x.new_zeros(x.shape[0])
        for c in range(len(states)) if terms is None else terms:
            conn = self.network.connections[c]
            below = states[c - 1] if c else x
            drive = F.conv2d(below, self.weights[c], self.biases[c], stride=conn.stride, padding=conn.padding)
            if conn.pool == "max":
                drive = F.max_pool2d(drive, 2)
            total = total + self.gain ** (c + 1) * (drive * states[c]).flatten(1).sum(1)
        return total

    def loss(self, state: Tensor, target: Tensor) -> Tensor:
        """Summed cross-entropy of the readout."""
        return F.cross_entropy(F.linear(state.flatten(1), self.readout, self.readout_bias), target, reduction="sum")

    def step(self, x: Tensor, states: list[Tensor], target: Tensor | None = None, beta: float = 0.0) -> list[Tensor]:
        """One relaxation step of every layer."""
        if self.in_turn:
            return self.sweep(x, states, target, beta)
        states = [s.detach().requires_grad_() for s in states]
        phi = self.phi(x, states).sum()
        if target is not None:
            phi = phi - self.gain ** len(states) * beta * self.loss(states[-1], target)
        gradients = torch.autograd.grad(phi, states)
        return [(g / self.gain ** (i + 1)).clamp(0, 1) for i, g in enumerate(gradients)]

    def sweep(self, x: Tensor, states: list[Tensor], target: Tensor | None, beta: float) -> list[Tensor]:
        """Every layer in turn, from the newest states of the others."""
        now, top = [s.detach() for s in states], len(states) - 1
        for i in range(top + 1) if target is None else range(top, -1, -1):
            now[i].requires_grad_()
            terms = [c for c in (i, i + 1) if c <= top] if self.local else None
            phi = self.phi(x, now, terms).sum()
            if target is not None and i == top:
                phi = phi - self.gain ** (top + 1) * beta * self.loss(now[top], target)
            (gradient,) = torch.autograd.grad(phi, [now[i]])
            now[i] = (gradient / self.gain ** (i + 1)).clamp(0, 1)
        return now

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
            phi = self.phi(x, [s.detach() for s in states]).mean()
            gradients.append(torch.autograd.grad(phi, [*self.weights, *self.biases]))
        scale = 2 * beta * self.gain ** len(free)
        return [(m - p) / scale for p, m in zip(*gradients, strict=True)]


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

    def __init__(
        self,
        network: Network,
        parameters: Parameters,
        batch: int,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        def rand(*shape: int) -> Tensor:
            return torch.rand(shape).to(device, dtype).contiguous(memory_format=torch.channels_last)

        self.jobs = []
        for conn, weight in zip(network.connections, parameters.weights, strict=True):
            if conn.src == 0:
                continue
            source = rand(batch, *network.shapes[conn.src])
            above = rand(batch, weight.shape[0], *conn.map_size(*network.shapes[conn.src][1:]))
            packed = weight.detach().to(device, dtype).contiguous(memory_format=torch.channels_last)
            self.jobs.append((source, above, packed, conn.stride, conn.padding))

    @torch.no_grad()
    def run(self) -> list[Tensor]:
        """Once; the last drive and feedback are returned."""
        last: list[Tensor] = []
        for source, above, weight, stride, padding in self.jobs:
            last = []  # what nobody reads is freed before the next one
            last.append(F.conv2d(source, weight, stride=stride, padding=padding))
            last.append(F.conv_transpose2d(above, weight, stride=stride, padding=padding))
        return last

    def flops(self) -> int:
        """Of a run: two a multiply-add."""
        return sum(4 * weight.numel() * above.shape[0] * above[0, 0].numel() for _, above, weight, _, _ in self.jobs)
