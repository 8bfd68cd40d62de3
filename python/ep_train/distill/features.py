"""Terms that compare a student's states with a teacher's features through a linear map (Romero et al. 2015)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ep_kernels import Head, Network, reference

from ..teachers import Teacher
from .config import AUTO, Distillation


class FeatureTerm(nn.Module):
    """One pair of a student's node and a teacher's module: its head, its target, and the map of the teacher's side.

    Maps are compared at the smaller of the two sizes: a teacher's larger map is averaged to the student's (adaptive
    average pooling); where the student's is larger, both are averaged to the largest square that fits in both. If
    either side is a vector, the other side's map is averaged to one pixel. A sequence [B, tokens, F] is averaged over
    its tokens.

    Attributes:
        name: the teacher's module.
        head: of the network: with a map of its own (``map="student"``), or the identity.
        map: 1x1 convolution or linear map of the features, with a bias (``map="teacher"``), else None.
    """

    def __init__(
        self,
        network: Network,
        node: int,
        name: str,
        shape: Sequence[int],
        *,
        weight: float = 1.0,
        loss: Literal["mse", "cosine"] = "mse",
        side: Literal["student", "teacher"] = "student",
        generator: torch.Generator | None = None,
    ) -> None:
        """
        Args:
            node: the student's.
            shape: of the teacher's features for one image, (C, H, W), (tokens, F) or (F,).
            weight: of the term; the mean over its elements is part of the head's weight.
            generator: of the map's initial weights, normal with standard deviation 1 / sqrt(fan-in).
        """
        super().__init__()
        ours = network.shapes[node]
        self.name = name
        self.student_shape = ours
        self.as_map = len(ours) == 3 and len(shape) == 3
        self.size: tuple[int, int] | None = None  # that the teacher's maps are averaged to
        pool: int | None = None
        if self.as_map:
            (height, width), (theirs_high, theirs_wide) = ours[1:], shape[1:]
            self.size = (height, width)
            if height > theirs_high or width > theirs_wide:
                pool = min(height, width, theirs_high, theirs_wide)
                self.size = (pool, pool)
        elif len(ours) == 3:
            pool = 1
        channels = shape[0] if len(shape) == 3 else shape[-1]
        outputs = channels if side == "student" else None
        head = Head(node, outputs, loss=loss, pool=pool, pointwise=side == "student" and self.as_map)
        self.out_shape = head.output_shape(ours)
        counted = self.out_shape[1:] if loss == "cosine" else self.out_shape
        self.head = Head(node, outputs, loss, pool, head.pointwise, weight / math.prod(counted))
        self.map: nn.Conv2d | nn.Linear | None = None
        if side == "teacher":
            self.map = nn.Conv2d(channels, ours[0], 1) if self.as_map else nn.Linear(channels, ours[0])
            with torch.no_grad():
                draw = torch.randn(self.map.weight.shape, generator=generator, dtype=torch.float64)
                self.map.weight.copy_(draw / math.sqrt(channels))
                self.map.bias.zero_()  # type: ignore[union-attr]

    def compared(self, features: Tensor) -> Tensor:
        """The teacher's features [B, ...] at the size that they are compared at: [B, C, h, w] or [B, C]."""
        if features.dim() == 3:
            return features.mean(1)
        if features.dim() == 4 and not self.as_map:
            return features.mean((2, 3))
        if self.size is not None and tuple(features.shape[2:]) != self.size:
            return F.adaptive_avg_pool2d(features, self.size)
        return features

    def target(self, compared: Tensor) -> Tensor:
        """What the head is compared with, [B, *head.output_shape]; differentiable by the map, if there is one."""
        if self.map is not None:
            compared = self.map(compared.to(self.map.weight.dtype))
        return compared.reshape(-1, *self.out_shape)

    def loss(self, state: Tensor, compared: Tensor) -> Tensor:
        """Loss per sample, [n], of the identity head at states [n, ...], in a graph of the map alone."""
        assert self.map is not None
        z = reference.head_feature(self.head, state.detach().to(self.map.weight.dtype))
        return reference.head_loss(self.head, z, self.target(compared))


def pair_features(network: Network, teacher: Teacher, distillation: Distillation) -> list[tuple[int, str]]:
    """Pairs of a student's node and a teacher's module.

    ``auto`` takes the last node of every map size. Of the teacher's modules whose maps have that size (if there are
    any, else of all), it takes the one at the same fraction of the depth, counted in convolutions: the last such one to
    be computed, that is after normalisation and nonlinearity: no convolution or normalisation, no block of these alone
    (a shortcut), nothing that passes on what it is given.

    Raises:
        ValueError: a layer that the student does not have; nothing to pair.
    """
    top = len(network.shapes) - 1
    if distillation.features != (AUTO,):
        pairs = []
        for pair in distillation.features:
            layer, _, name = pair.partition("=")
            if int(layer) > top:
                raise ValueError(f"Distillation: argument 'features': expected layers from 1 to {top}, got {pair!r}")
            pairs.append((int(layer), name))
        return pairs
    layers = [
        (name, shape, convs)
        for name, shape, convs in teacher.layers()
        if len(shape) == 3 and not _linear(teacher.module.get_submodule(name))
    ]
    last = {network.shapes[i][1:]: i for i in range(1, top + 1) if len(network.shapes[i]) == 3}
    if not layers or not last:
        raise ValueError("Distillation: argument 'features': expected a student and a teacher with maps for 'auto'")
    total = max(convs for _, _, convs in layers)
    if total:
        depths = {name: convs / total for name, _, convs in layers}
    else:
        depths = {name: (i + 1) / len(layers) for i, (name, _, _) in enumerate(layers)}
    deepest = max(network.levels[i] for i in last.values())
    pairs = []
    for size, node in last.items():
        same = [name for name, shape, _ in layers if shape[1:] == size] or list(depths)
        fraction = network.levels[node] / deepest
        gaps = {name: abs(depths[name] - fraction) for name in same}
        least = min(gaps.values())
        pairs.append((node, [name for name in same if gaps[name] <= least + 1e-9][-1]))
    return pairs


def _linear(module: nn.Module) -> bool:
    """It consists of convolutions and normalisations alone."""
    kinds = (nn.Conv2d, nn.modules.batchnorm._BatchNorm, nn.Identity)
    return all(isinstance(part, kinds) for part in module.modules() if not list(part.children()))
