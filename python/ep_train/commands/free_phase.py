"""The free phase of a trained network as a plain PyTorch module. This file needs torch and nothing else.

`ep-train export --to module` writes a copy of it beside the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FreePhase(nn.Module):
    """Pixels in [0, 1], [B, C, H, W], to outputs [B, classes]: normalised, then a fixed number of sweeps from zero
    states, then the readout.

    In a sweep every layer l is updated once, in its stage's order:

        a^l  = b^l + sum of drives from below + sum of gain * feedback from above
        s^l <- clip((1 - eta) s^l + eta clip(slope a^l, lo, hi), lo, hi)

    Only ordinary torch operations, and no control flow that depends on data: it can be traced, exported and compiled.
    Parameters are named as in ep_kernels.

    Args:
        spec: plain numbers, lists and strings that say what is computed (``ep_train.commands.export.spec_of``).
        weights: a state dict; None: zeros, for ``load_state_dict``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.spec = dict(spec)
        for name, shape in spec["parameters"].items():
            *path, leaf = name.split(".")
            holder: nn.Module = self
            for part in path:
                if part not in holder._modules:
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            holder.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(spec[name]).view(-1, 1, 1), persistent=False)
        if weights is not None:
            self.load_state_dict(dict(weights))

    def forward(self, pixels: Tensor) -> Tensor:
        """Outputs of the readout after all sweeps."""
        spec = self.spec
        images = (pixels - self.mean) / self.std
        states: list[Tensor | None] = [images] + [None] * (len(spec["shapes"]) - 1)  # None: zero
        kept: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}  # by connection: source, its drive, winners
        for stage in spec["stages"]:
            for t in range(stage["sweeps"]):
                eta = stage["damping"][min(t, 1)]  # of the first sweep, of the later ones
                read = list(states) if stage["schedule"] == "sync" else states
                for node in stage["order"]:
                    states[node] = self._update(node, read, eta, kept)
        return self._readout(states)

    def _update(
        self,
        node: int,
        read: Sequence[Tensor | None],
        eta: float,
        kept: dict[int, tuple[Tensor, Tensor, Tensor | None]],
    ) -> Tensor:
        """The new state of a node."""
        spec, images = self.spec, read[0]
        assert images is not None
        shape = spec["shapes"][node]
        a = self.get_parameter(f"nodes.{node}.bias").view(-1, *[1] * (len(shape) - 1))
        for c, conn in enumerate(spec["connections"]):
            if conn["dst"] == node and read[conn["src"]] is not None:
                a = a + self._drive(c, read, kept)[0]
        for c, conn in enumerate(spec["connections"]):
            above = read[conn["dst"]]
            if conn["src"] == node and above is not None:
                winners = self._drive(c, read, kept)[1] if conn["pool"] == "max" else None
                a = a + conn["feedback_gain"] * self._feedback(c, above, winners, shape)
        lo, hi = spec["boxes"][node]
        target = spec["slope"] * a
        target = target if lo is None else target.clamp(lo, hi)
        if eta != 1:
            old = read[node]
            target = eta * target if old is None else (1 - eta) * old + eta * target
            target = target.clamp(lo, hi) if eta > 1 and lo is not None else target
        new: Tensor = target.expand(images.shape[0], *shape)
        return new

    def _drive(
        self, c: int, read: Sequence[Tensor | None], kept: dict[int, tuple[Tensor, Tensor, Tensor | None]]
    ) -> tuple[Tensor, Tensor | None]:
        """What a connection sends up, and which of every four units won a max pooling; once for each source."""
        conn = self.spec["connections"][c]
        source, weight = read[conn["src"]], self.get_parameter(f"connections.{c}.weight")
        if source is None:  # zero: all drives tie, and the first unit wins
            above = read[conn["dst"]]
            assert above is not None
            return above, torch.zeros_like(above, dtype=torch.int64)
        if c in kept and kept[c][0] is source:
            return kept[c][1:]
        winners = None
        if weight.dim() == 2:
            out = F.linear(source.flatten(1), weight)
        else:
            out = F.conv2d(source, weight, stride=conn["stride"], padding=conn["padding"])
        if conn["pool"] == "avg":
            out = F.avg_pool2d(out, 2)
        elif conn["pool"] == "max":
            height, width = out.shape[-2] // 2, out.shape[-1] // 2
            split = out[..., : 2 * height, : 2 * width].unflatten(-1, (width, 2)).unflatten(-3, (height, 2))
            windows = split.transpose(-3, -2).flatten(-2)  # [B, C, height, width, 4]
            out, winners = windows.amax(-1), windows.argmax(-1)
        kept[c] = (source, out, winners)
        return out, winners

    def _feedback(self, c: int, above: Tensor, winners: Tensor | None, shape: Sequence[int]) -> Tensor:
        """What a connection sends down: the adjoint of its drive, to the winners of a max pooling."""
        conn = self.spec["connections"][c]
        own = f"connections.{c}.feedback"
        weight = self.get_parameter(own if own in self.spec["parameters"] else f"connections.{c}.weight")
        if weight.dim() == 2:
            flat: Tensor = (above @ weight).unflatten(1, tuple(shape))
            return flat
        size = [
            (n + 2 * p - k) // s + 1
            for n, k, s, p in zip(shape[1:], weight.shape[2:], conn["stride"], conn["padding"], strict=True)
        ]
        if conn["pool"] != "none":
            if winners is None:
                spread = (above / 4).unsqueeze(-1).expand(*above.shape, 4)
            else:
                first = torch.arange(4, device=above.device)
                spread = torch.where(winners.unsqueeze(-1) == first, above.unsqueeze(-1), 0.0)
            rows = spread.unflatten(-1, (2, 2)).transpose(-3, -2)  # [B, C, height, 2, width, 2]
            full = rows.flatten(-2).flatten(-3, -2)
            above = F.pad(full, (0, size[1] - full.shape[-1], 0, size[0] - full.shape[-2]))
        extra = [
            n + 2 * p - k - (m - 1) * s
            for n, m, k, s, p in zip(shape[1:], size, weight.shape[2:], conn["stride"], conn["padding"], strict=True)
        ]
        out: Tensor = F.conv_transpose2d(
            above, weight, stride=conn["stride"], padding=conn["padding"], output_padding=extra
        )
        return out

    def _readout(self, states: Sequence[Tensor | None]) -> Tensor:
        state: Tensor | None = states[int(self.spec["readout"])]
        assert state is not None
        if "heads.0.weight" not in self.spec["parameters"]:
            return state
        out: Tensor = F.linear(
            state.flatten(1), self.get_parameter("heads.0.weight"), self.get_parameter("heads.0.bias")
        )
        return out
