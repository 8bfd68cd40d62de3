"""A loss that runs away, and what is not finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .step import StepResult

if TYPE_CHECKING:
    from .trainer import Trainer

# States stay in their box, so a loss that runs away stays finite: it is given up at this multiple of a guess's.
RUNAWAY = 1e4


class Diverged(RuntimeError):
    """The loss is not finite or has run away; the run ends with what its last checkpoint holds."""


def broken(trainer: Trainer, result: StepResult) -> bool:
    """The batch's loss has run away, or it or a gradient is not finite."""
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    finite = torch.stack([g.isfinite().all() for g in gradients]).all()
    return not (bool(finite) and float(result.loss) < runaway(trainer))


def runaway(trainer: Trainer) -> float:
    return RUNAWAY * math.log(max(trainer.dataset.classes, 3))


def check_weights(trainer: Trainer) -> None:
    """Raise before a checkpoint of broken weights replaces a good one."""
    floating = [(name, t) for name, t in trainer.model.state_dict().items() if t.is_floating_point()]
    names, parameters = zip(*floating, strict=True)
    finite = torch.stack([parameter.isfinite().all() for parameter in parameters]).tolist()
    if not all(finite):
        name = names[finite.index(False)]
        raise Diverged(f"'{name}' is no longer finite after epoch {trainer.epoch}: lower --lr or --feedback-gain")
