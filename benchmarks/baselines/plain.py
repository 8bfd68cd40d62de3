"""The same algorithm in plain PyTorch: convolution, transposed convolution, pooling and elementwise calls.

Chains of 3x3 convolutions with 2x2 max pooling and a softmax readout, in channels_last memory. It computes what
``ep_kernels`` computes, every drive that is still valid reused; eager, in a CUDA graph, or under torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ep_kernels import Network, Parameters, RelaxConfig
from ep_kernels.solver import delta_scales

Pooling = Literal["indices", "windows"]
Pool = Callable[[Tensor], tuple[Tensor, Tensor]]


def pool_indices(z: Tensor) -> tuple[Tensor, Tensor]:
    """2x2 max pooling and the winners' positions in the map."""
    return F.max_pool2d(z, 2, return_indices=True)  # type: ignore[return-value]


def flat_indices(winners: Tensor, width: int) -> Tensor:
    """Winners 0..3 as positions in a map of ``width`` columns, as ``max_pool2d`` returns them."""
    rows = torch.arange(winners.shape[2], device=winners.device).view(-1, 1)
    columns = torch.arange(winners.shape[3], device=winners.device)
    q = winners.long()
    return (2 * rows + q // 2) * width + 2 * columns + q % 2


def gather_indices(z: Tensor, index: Tensor) -> Tensor:
    """``z`` at given winners; ``z`` may hold several times their samples."""
    index = index.repeat(z.shape[0] // index.shape[0], 1, 1, 1)
    return z.flatten(2).gather(2, index.flatten(2)).view(index.shape)


def unpool_indices(s: Tensor, index: Tensor, size: Sequence[int]) -> Tensor:
    """``s`` at its winners, zero elsewhere."""
    index = index.repeat(s.shape[0] // index.shape[0], 1, 1, 1)
    out = F.max_unpool2d(s, index, 2, output_size=list(size))
    return out.contiguous(memory_format=torch.channels_last)


def _corners(z: Tensor) -> list[Tensor]:
    h, w = z.shape[2] // 2 * 2, z.shape[3] // 2 * 2
    return [z[:, :, y:h:2, x:w:2] for y in (0, 1) for x in (0, 1)]


def pool_windows(z: Tensor) -> tuple[Tensor, Tensor]:
    """2x2 max pooling and the winner 0..3 of each window, by comparisons (what a compiler fuses)."""
    a, b, c, d = _corners(z)
    north, south = torch.maximum(a, b), torch.maximum(c, d)
    one = torch.ones((), dtype=torch.uint8, device=z.device)
    winner = torch.where(south > north, (d > c) * one + 2, (b > a) * one)
    return torch.maximum(north, south), winner


def gather_windows(z: Tensor, winner: Tensor) -> Tensor:
    """As :func:`gather_indices`."""
    winner = winner.repeat(z.shape[0] // winner.shape[0], 1, 1, 1)
    a, b, c, d = _corners(z)
    return torch.where(winner < 2, torch.where(winner == 0, a, b), torch.where(winner == 2, c, d))


def unpool_windows(s: Tensor, winner: Tensor, size: Sequence[int]) -> Tensor:
    """As :func:`unpool_indices`."""
    winner = winner.repeat(s.shape[0] // winner.shape[0], 1, 1, 1)
    north, south = (
        torch.stack([torch.where(winner == q, s, 0.0) for q in (row, row + 1)], -1).flatten(-2) for row in (0, 2)
    )
    out = torch.stack([north, south], 3).flatten(2, 3)
    if list(out.shape[2:]) != list(size):
        out = F.pad(out, (0, size[1] - out.shape[3], 0, size[0] - out.shape[2]))
    return out.contiguous(memory_format=torch.channels_last)


POOLINGS = {
    "indices": (pool_indices, gather_indices, unpool_indices),
    "windows": (pool_windows, gather_windows, unpool_windows),
}


class PlainEP:
    """Free sweeps and whole EP batches of a chain, schedule ``sweep``, delta or tangent form, frozen winners.

    Args:
        dtype: of operands, states and elementwise arithmetic (as under ``module.to(dtype)``); parameters are cast in
            every call, as autocast would.
    """

    def __init__(self, network: Network, dtype: torch.dtype, pooling: Pooling = "indices") -> None:
        self.network, self.dtype = network, dtype
        self.pool, self.gather, self.unpool = POOLINGS[pooling]
        self.pooled = [conn.pool == "max" for conn in network.connections]
        self.maps = [conn.map_size(*network.shapes[conn.src][1:]) for conn in network.connections]
        self.padding = [conn.padding for conn in network.connections]
        self.top = len(network.connections)
        self.k = network.feedback_gain
        assert network.slope == 1
        assert (network.lo, network.hi) == (0, 1)

    def scales(self, config: RelaxConfig) -> list[float]:
        """Of the deltas by node."""
        return delta_scales(self.network, 1.0 if config.estimator == "tangent" else config.beta)

    def cast(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        return [t.to(self.dtype) for t in tensors if t is not None]

    def drive(self, c: int, source: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        z = F.conv2d(source, weights[c], padding=self.padding[c])
        return self.pool(z) if self.pooled[c] else (z, None)

    def frozen_drive(self, c: int, source: Tensor, weights: list[Tensor], winners: list[Tensor | None]) -> Tensor:
        z, won = F.conv2d(source, weights[c], padding=self.padding[c]), winners[c]
        return z if won is None else self.gather(z, won)

    def up(self, c: int, state: Tensor, winners: list[Tensor | None]) -> Tensor:
        won = winners[c]
        return state if won is None else self.unpool(state, won, self.maps[c])

    def feedback(self, c: int, state: Tensor, weights: list[Tensor], winners: list[Tensor | None]) -> Tensor:
        return F.conv_transpose2d(self.up(c, state, winners), weights[c], padding=self.padding[c])

    def sweep(
        self,
        states: list[Tensor],
        first: tuple[Tensor, Tensor | None],
        winners: list[Tensor | None],
        weights: list[Tensor],
        biases: list[Tensor],
        damping: float,
        *,
        feedback: bool = True,
    ) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
        """One free sweep, bottom-up. ``states[i]`` is of node i; ``first`` is the clamped input's drive.

        Returns the new states, the winners and the pre-activations.
        """
        states, winners, kept = list(states), list(winners), []
        for c in range(self.top):
            drive, won = first if c == 0 else self.drive(c, states[c], weights)
            winners[c] = won
            a = drive + biases[c].view(-1, 1, 1)
            if feedback and c + 1 < self.top:
                a = a + self.k * self.feedback(c + 1, states[c + 2], weights, winners)
            new = a.clamp(0, 1)
            if damping != 1:
                new = ((1 - damping) * states[c + 1] + damping * new).clamp(0, 1)
            states[c + 1] = new
            kept.append(a)
        return states, winners, kept

    def free(
        self, parameters: Parameters, x: Tensor, config: RelaxConfig
    ) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
        """The free phase from zero."""
        weights, biases = self.cast(parameters.weights), self.cast(parameters.biases)
        x = x.to(self.dtype)
        first = self.drive(0, x, weights)
        states: list[Tensor] = [x] * (self.top + 1)
        winners: list[Tensor | None] = [None] * self.top
        kept: list[Tensor] = []
        omega = config.free_damping(self.k)
        for t in range(config.free_steps):
            damping = omega if t else 1.0
            states, winners, kept = self.sweep(states, first, winners, weights, biases, damping, feedback=t > 0)
        return states, winners, kept

    @torch.no_grad()
    def gradients(
        self, parameters: Parameters, x: Tensor, target: Tensor, config: RelaxConfig, scales: list[float]
    ) -> Parameters:
        """What ``ep_gradients`` returns, for ``estimator`` ``tangent`` or ``symmetric``; ``scales``: :meth:`scales`."""
        states, winners, kept = self.free(parameters, x, config)
        tangent = config.estimator == "tangent"
        phases, beta = (1, 1.0) if tangent else (2, config.beta)
        weights = self.cast(parameters.weights)
        head, head_bias = self.cast(parameters.head_weights)[0], self.cast(parameters.head_biases)[0]
        deltas = self.nudged(states, winners, kept, weights, head, head_bias, target, config, phases, beta, scales)
        batch = x.shape[0]
        found, biases = [], []
        centre = 0.0 if tangent else 0.5
        for c in range(self.top):
            span = beta * phases * self.k ** (self.top - c - 1) * batch
            diff, mean = self.difference(states[c + 1], deltas[c + 1], centre / scales[c + 1])
            up_diff, up_mean = self.up(c, diff, winners), self.up(c, mean, winners)
            pad = self.padding[c]
            if c == 0:
                weight = conv2d_weight(states[0], weights[c].shape, up_diff, padding=pad).float()
                weight = weight / (scales[c + 1] * span)
            else:
                diff_s, mean_s = self.difference(states[c], deltas[c], centre / scales[c])
                weight = conv2d_weight(mean_s, weights[c].shape, up_diff, padding=pad).float() / (scales[c + 1] * span)
                weight += conv2d_weight(diff_s, weights[c].shape, up_mean, padding=pad).float() / (scales[c] * span)
            found.append(-weight)
            biases.append(-diff.sum((0, 2, 3), dtype=torch.float32) / (scales[c + 1] * span))
        top = states[-1] if tangent else states[-1].repeat(2, 1, 1, 1) + deltas[-1] / scales[-1]
        error = self.head_error(top, head, head_bias, target)
        share = 1 / (batch * phases)
        head_gradient = (error.t() @ top.flatten(1)).float() * share
        head_bias_gradient = error.sum(0, dtype=torch.float32) * share
        return Parameters(found, [None, *biases], [head_gradient], [head_bias_gradient])

    def nudged(
        self,
        states: list[Tensor],
        winners: list[Tensor | None],
        kept: list[Tensor],
        weights: list[Tensor],
        head: Tensor,
        head_bias: Tensor,
        target: Tensor,
        config: RelaxConfig,
        phases: int,
        beta: float,
        scales: list[float],
    ) -> list[Tensor]:
        """Scaled deltas by node, [phases B, ...] (index 0 is not read)."""
        tangent = phases == 1
        batch = states[-1].shape[0]
        pre = [a.repeat(phases, 1, 1, 1) for a in kept]
        deltas: list[Tensor | None] = [None] * (self.top + 1)
        sign = torch.ones(batch, 1, 1, 1, dtype=self.dtype, device=states[0].device)
        if not tangent:
            sign = torch.cat([sign, -sign])
        for t in range(config.nudged_steps):
            for node in range(self.top, 0, -1):
                c, a = node - 1, None
                if t and node > 1:
                    source = deltas[node - 1]
                    assert source is not None
                    a = (scales[node] / scales[node - 1]) * self.frozen_drive(c, source, weights, winners)
                if node < self.top:
                    ratio = scales[node + 1] / scales[node]
                    above = deltas[node + 1]
                    assert above is not None
                    back = (self.k / ratio) * self.feedback(node, above, weights, winners)
                    a = back if a is None else a + back
                else:
                    now, delta = states[-1].repeat(phases, 1, 1, 1), deltas[node]
                    if not tangent and delta is not None:
                        now = now + delta / scales[node]
                    error = self.head_error(now, head, head_bias, target)
                    push = (-beta * scales[node]) * sign * (error @ head).view(now.shape)
                    a = push if a is None else a + push
                deltas[node] = tangent_clip(pre[c], a) if tangent else delta_clip(pre[c], a, scales[node])
        return [t if t is not None else states[0] for t in deltas]

    @staticmethod
    def difference(free: Tensor, delta: Tensor, centre: float) -> tuple[Tensor, Tensor]:
        """The difference of the two phases and their mean (one phase: the delta and the free state)."""
        if delta.shape[0] == free.shape[0]:
            return delta, free
        plus, minus = delta.chunk(2)
        return plus - minus, free + centre * (plus + minus)

    @staticmethod
    def head_error(state: Tensor, head: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        """dL/dz of cross-entropy."""
        z = F.linear(state.flatten(1), head, bias)
        return z.softmax(1) - target.to(z.dtype).repeat(z.shape[0] // target.shape[0], 1)


def tangent_clip(pre: Tensor, a: Tensor) -> Tensor:
    """As ``ep_kernels.reference.tangent_clip`` for the box 0..1."""
    return a * ((pre > 0) & (pre < 1))


def delta_clip(pre: Tensor, a: Tensor, scale: float) -> Tensor:
    """As ``ep_kernels.reference.delta_clip`` for the box 0..1."""
    below, above = -pre * scale, (1 - pre) * scale
    inside = torch.minimum(torch.maximum(a, below), above)
    under = (a - below).clamp(0, scale)
    over = (a - above).clamp(-scale, 0)
    return torch.where(pre < 0, under, torch.where(pre > 1, over, inside))
