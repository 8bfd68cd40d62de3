"""What a student takes from its teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

AUTO = "auto"


@dataclass(frozen=True)
class Distillation:
    """Weights and kinds of the distillation terms.

    Args:
        logits: weight of ``tau^2 KL(softmax(teacher / tau) || softmax(readout / tau))`` (Hinton et al. 2015).
        temperature: tau.
        local_logits: weight of the same term on every local head, with that head's own map.
        features: pairs ``LAYER=MODULE`` of a student's layer (1 is the first) and a teacher's module, as
            ``3=features.7`` (Romero et al. 2015), or ``auto``: one pair for the last layer of every map size.
        feature_weight: one for all pairs, or one for each.
        feature_loss: ``mse``: ``1/2 mean (M s - t)^2`` over channels and pixels; ``cosine``: ``1 - cos(M s, t)`` over
            channels, averaged over pixels.
        map: which side the linear map M is on: ``student`` (``M s`` against ``t``) or ``teacher`` (``s`` against
            ``M t``).
        cache: file that keeps the teacher's logits of the training images (fixed images and logit terms only).

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    logits: float = 0.0
    temperature: float = 4.0
    local_logits: float = 0.0
    features: tuple[str, ...] = ()
    feature_weight: tuple[float, ...] = (1.0,)
    feature_loss: Literal["mse", "cosine"] = "mse"
    map: Literal["student", "teacher"] = "student"
    cache: Path | None = None

    def __post_init__(self) -> None:
        for name in ("logits", "local_logits"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, name, "a finite number >= 0", value)
        ok = math.isfinite(self.temperature) and self.temperature > 0
        _require(ok, "temperature", "a finite number > 0", self.temperature)
        ok = bool(self.feature_weight) and all(math.isfinite(w) and w >= 0 for w in self.feature_weight)
        _require(ok, "feature_weight", "finite numbers >= 0", self.feature_weight)
        _require(self.feature_loss in ("mse", "cosine"), "feature_loss", "mse or cosine", self.feature_loss)
        _require(self.map in ("student", "teacher"), "map", "student or teacher", self.map)
        if self.features != (AUTO,):
            _require(AUTO not in self.features, "features", "auto alone, or pairs without it", " ".join(self.features))
            for pair in self.features:
                layer, _, module = pair.partition("=")
                ok = layer.isdecimal() and int(layer) > 0 and bool(module)
                _require(ok, "features", "pairs as 3=features.7, or auto", pair)
            count = len(self.feature_weight)
            ok = not self.features or count in (1, len(self.features))
            _require(ok, "feature_weight", f"one number or {len(self.features)} of them (features)", count)
        some = self.logits > 0 or self.local_logits > 0 or bool(self.features)
        _require(some, "logits, local_logits, features", "at least one term", "none")
        ok = self.cache is None or not self.features
        _require(ok, "cache", "no features: they need a pass of the teacher for every batch anyway", self.features)

    @property
    def wants_logits(self) -> bool:
        """A term reads the teacher's logits."""
        return self.logits > 0 or self.local_logits > 0


def _require(condition: bool, argument: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"Distillation: argument '{argument}': expected {expected}, got {got!r}")
