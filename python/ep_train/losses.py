"""The augmented loss of a run: local errors and distillation beside the readout's loss.

``L_aug = L(readout, y) + sum_l lambda_l L_l`` (docs/distillation.md; local errors: Nøkland & Eidnes 2019; both in EP:
arXiv 2508.15989). Every term is a head of the network, so each backend nudges with all of them; here are the heads, and
their targets for every batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import ep_kernels
from ep_kernels import Equilibrium, Head, Network, Nudged

from .data import Dataset
from .distill import Distillation, FeatureTerm, LogitCache, cache_key, pair_features
from .distill.cache import ALONE
from .distributed import Processes
from .teachers import Teacher


@dataclass(frozen=True)
class LocalErrors:
    """Readouts on hidden layers, each trained on the labels.

    Args:
        layers: ``none``, ``all`` (every layer below the readout's), or numbers as ``2,4,6`` (1 is the first).
        weight: lambda: one for all heads, or one for each.
        pool: maps are averaged to this size (at most their own) before the linear layer.
        loss: ``cross_entropy``, or ``mse``: ``1/2 |z - y|^2`` against one-hot labels, summed over classes.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    layers: str = "all"
    weight: tuple[float, ...] = (0.2,)
    pool: int = 2
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"

    def __post_init__(self) -> None:
        parts = [part.strip() for part in self.layers.split(",")]
        ok = self.layers in ("none", "all")
        if not ok and all(part.isdecimal() for part in parts):
            numbers = {int(part) for part in parts}
            ok = len(numbers) == len(parts) and 0 not in numbers
        _require(ok, "LocalErrors", "layers", "none, all, or different layers as 2,4,6", self.layers)
        ok = bool(self.weight) and all(math.isfinite(w) and w >= 0 for w in self.weight)
        _require(ok, "LocalErrors", "weight", "finite numbers >= 0", self.weight)
        _require(self.pool >= 1, "LocalErrors", "pool", "an integer >= 1", self.pool)
        _require(self.loss in ("cross_entropy", "mse"), "LocalErrors", "loss", "cross_entropy or mse", self.loss)

    def heads(self, network: Network, classes: int) -> list[Head]:
        """The heads for a network, in the order in which ``layers`` names them."""
        top = len(network.shapes) - 1
        if self.layers == "none":
            nodes = []
        elif self.layers == "all":
            nodes = [i for i in range(1, top + 1) if i != network.readout.node]
        else:
            nodes = [int(part) for part in self.layers.split(",")]
            _require(max(nodes) <= top, "LocalErrors", "layers", f"layers from 1 to {top}", self.layers)
        count = len(self.weight)
        weights = self.weight * len(nodes) if count == 1 else self.weight
        ok = len(weights) == len(nodes)
        _require(ok, "LocalErrors", "weight", f"one number or {len(nodes)} of them (one for each head)", count)
        heads = []
        for node, weight in zip(nodes, weights, strict=True):
            shape = network.shapes[node]
            pool = min(self.pool, *shape[1:]) if len(shape) == 3 else None
            heads.append(Head(node, classes, self.loss, pool, weight=weight))
        return heads


class AugmentedLoss(nn.Module):
    """The heads of a run and their targets.

    Its own parameters are the maps on the teacher's side, if there are any: the optimizer takes them beside the
    model's, and ``state_dict`` holds them. The teacher moves with it, and is no part of its ``state_dict``.

    Attributes:
        network: the given network with the heads in ``local_heads``: local errors, then the softened logits on the
            readout and on every local head (tied to it), then the features.
    """

    def __init__(
        self,
        network: Network,
        classes: int,
        *,
        local: LocalErrors | None = None,
        distillation: Distillation | None = None,
        teacher: Teacher | None = None,
        seed: int = 0,
        dataset: Dataset | None = None,
        augmented: bool = False,
    ) -> None:
        """
        Args:
            network: without local heads.
            classes: of the labels.
            local: local errors, or none.
            distillation: terms of a teacher, or none.
            teacher: whose outputs those are; moved with the module, and never trained.
            seed: of the run: the initial maps are drawn from :func:`maps_seed` of it.
            dataset, augmented: whose training images the batches are, and whether those are cropped or mirrored; for
                ``distillation.cache`` only.

        Raises:
            ValueError: terms that the network or the teacher cannot serve, a cache of augmented images.
            CacheError: the cache holds something else.
        """
        super().__init__()
        where = "AugmentedLoss"
        _require(not network.local_heads, where, "network", "one without local heads", network.local_heads)
        ok = (distillation is None) == (teacher is None)
        _require(ok, where, "teacher", "a teacher if there is a distillation, else None", teacher and type(teacher))
        self.classes = classes
        self.distillation = distillation
        self._unregistered: tuple[Teacher, ...] = () if teacher is None else (teacher,)  # not in the state dict
        labelled = local.heads(network, classes) if local is not None else []
        heads, terms = list(labelled), []
        if distillation is not None and teacher is not None:
            heads += self._softened(network, labelled, distillation, teacher)
            terms = _feature_terms(network, distillation, teacher, seed)
        self._labelled = 1 + len(labelled)
        self._softened_count = len(heads) - len(labelled)
        self.terms = nn.ModuleList(terms)
        self.network = replace(network, local_heads=(*heads, *(term.head for term in terms)))
        self._compared: list[Tensor] = []  # of the last batch: the features of the terms with maps on their side
        self._dataset = dataset
        self._cache: LogitCache | None = None
        if distillation is not None and distillation.cache is not None and teacher is not None:
            expected = "fixed images (no crops, no mirroring): the teacher sees others in every epoch"
            _require(not augmented, "Distillation", "cache", expected, "augmented ones")
            _require(dataset is not None, where, "dataset", "the dataset whose logits the cache keeps", dataset)
            assert dataset is not None
            key = cache_key(teacher, dataset)
            self._cache = LogitCache(distillation.cache, len(dataset.train_labels), teacher.classes, key)

    @property
    def teacher(self) -> Teacher | None:
        """The teacher, on the device of this module."""
        return self._unregistered[0] if self._unregistered else None

    @torch.no_grad()
    def targets(self, images: Tensor, labels: Tensor, indices: Tensor | None = None) -> list[Tensor]:
        """One target per head of :attr:`network`, after one pass of the teacher.

        Args:
            images: [B, C, H, W], the batch as the student sees it.
            labels: int64 [B].
            indices: int64 [B], the images' places in the training set: of a cache only. Without them (of test images)
                the teacher runs.

        Returns:
            Per head [B, ...] in the dtype of ``images``: probabilities or values.

        Raises:
            ValueError: labels out of range.
        """
        one_hot = ep_kernels.targets_for(self.network, labels, self.classes, images.dtype)[0]
        out = [one_hot] * self._labelled
        if self.distillation is None:
            return out
        logits, features = self._taught(images, indices)
        if self._softened_count:
            out += [(logits / self.distillation.temperature).softmax(1)] * self._softened_count
        self._compared = []
        for term in self._feature_terms():
            compared = term.compared(features[term.name])
            out.append(term.target(compared).to(images.dtype).contiguous())
            if term.map is not None:
                self._compared.append(compared)
        return out

    def fill_cache(self, processes: Processes = ALONE) -> None:
        """Have the logits of all training images in the cache, if there is one, before the first batch asks for them.

        Args:
            processes: all of a run call this; the first one's teacher looks at the images.

        Raises:
            Exception: see :meth:`LogitCache.fill`, which a signal may end.
        """
        if self._cache is not None:
            (teacher,) = self._unregistered
            assert self._dataset is not None
            self._cache.fill(teacher, self._dataset, next(teacher.buffers()).device, processes)

    def set_gradients(self, equilibrium: Equilibrium, nudged: Nudged) -> None:
        """Gradients of the maps on the teacher's side into ``.grad``: the mean of their ordinary loss gradients at the
        two contrasted states, of the batch that :meth:`targets` saw last."""
        self._set_gradients(lambda node: ep_kernels.contrasted_states(equilibrium, nudged, node))

    def set_gradients_at(self, states: Sequence[Tensor]) -> None:
        """The same at given states, one tensor [B, ...] per node: of BPTT or of backprop."""
        self._set_gradients(lambda node: states[node])

    def _set_gradients(self, state_of: Callable[[int], Tensor]) -> None:
        mapped = [term for term in self._feature_terms() if term.map is not None]
        if mapped and len(self._compared) != len(mapped):
            raise RuntimeError("AugmentedLoss.set_gradients: expected a call of targets before, got none")
        for term, compared in zip(mapped, self._compared, strict=True):
            assert term.map is not None
            state = state_of(term.head.node)
            tiled = compared.repeat(len(state) // max(len(compared), 1), *[1] * (compared.dim() - 1))
            with torch.enable_grad():
                loss = term.loss(state, tiled).sum() / max(len(state), 1)
                found = torch.autograd.grad(loss, list(term.map.parameters()))
            for parameter, gradient in zip(term.map.parameters(), found, strict=True):
                if gradient.stride() != parameter.stride():  # fused optimizers pair numbers as they lie in memory
                    gradient = torch.empty_like(parameter, requires_grad=False).copy_(gradient)
                parameter.grad = gradient

    def _feature_terms(self) -> list[FeatureTerm]:
        return [term for term in self.terms if isinstance(term, FeatureTerm)]

    def _softened(
        self, network: Network, labelled: Sequence[Head], distillation: Distillation, teacher: Teacher
    ) -> list[Head]:
        """Heads of the teacher's softened logits, each tied to the one whose map it reads with."""
        if distillation.wants_logits and teacher.classes != self.classes:
            raise ValueError(
                f"AugmentedLoss: argument 'distillation': expected a teacher of {self.classes} classes for its logits, "
                f"got one of {teacher.classes}: take features from it instead"
            )
        ok = bool(labelled) or not distillation.local_logits
        _require(ok, "Distillation", "local_logits", "local heads (--local-heads) for a weight > 0", "none of them")
        heads = []
        for index, head in enumerate((network.readout, *labelled)):
            weight = distillation.local_logits if index else distillation.logits
            if weight > 0:
                tied = index if head.outputs is not None else None
                heads.append(
                    Head(head.node, head.outputs, "cross_entropy", head.pool, head.pointwise, weight,
                         distillation.temperature, tied)
                )  # fmt: skip
        return heads

    def _taught(self, images: Tensor, indices: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's logits and features, from the cache or from one pass."""
        (teacher,) = self._unregistered
        if self._cache is None or indices is None:
            return teacher.outputs(images)
        if not self._cache.complete:
            self.fill_cache()
        kept = self._cache.get(indices)
        assert kept is not None
        return kept.to(images.dtype), {}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> AugmentedLoss:
        """What ``to``, ``double``, ... are made of: the teacher moves too."""
        for teacher in self._unregistered:
            teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def maps_seed(seed: int) -> int:
    """Where the initial maps on the teacher's side are drawn from: not the numbers that the same run's weights have.

    The first eight bytes of sha256("ep_train maps SEED"), so that it is the same everywhere.
    """
    return int.from_bytes(hashlib.sha256(f"ep_train maps {seed}".encode()).digest()[:8], "big")


def _feature_terms(network: Network, distillation: Distillation, teacher: Teacher, seed: int) -> list[FeatureTerm]:
    if not distillation.features:
        return []
    pairs = pair_features(network, teacher, distillation)
    weights = distillation.feature_weight
    ok = len(weights) in (1, len(pairs))
    _require(ok, "Distillation", "feature_weight", f"one number or {len(pairs)} of them ({pairs})", len(weights))
    weights = weights * len(pairs) if len(weights) == 1 else weights
    teacher.watch([name for _, name in pairs])
    shapes = teacher.shapes()
    generator = torch.Generator().manual_seed(maps_seed(seed))
    return [
        FeatureTerm(
            network,
            node,
            name,
            shapes[name],
            weight=weight,
            loss=distillation.feature_loss,
            side=distillation.map,
            generator=generator,
        )
        for (node, name), weight in zip(pairs, weights, strict=True)
    ]


def _require(condition: bool, where: str, argument: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{where}: argument '{argument}': expected {expected}, got {got!r}")
