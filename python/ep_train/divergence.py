"""A loss that runs away, and what is not finite: how it is noticed, what is kept of it, and how a run goes back.

Every step's loss and the norm of its gradient are looked at before the optimizer moves the weights (on a GPU: when they
are read). What was wrong is kept in ``diverged/step-00000123`` of the run's folder: the images, numbers of every layer,
and the weights.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ep_kernels import ConvergenceError, free_phase

from . import durable
from .feedforward import feedforward_states
from .learners import NetworkLearner
from .run_folder import to_json
from .stability import diagnose

if TYPE_CHECKING:
    from .trainer import Trainer

# States stay in their box, so a loss that runs away stays finite: it is given up at this multiple of a guess's.
RUNAWAY = 1e4
FOLDER = "diverged"
REPORT, WEIGHTS = "report.json", "weights.safetensors"
MOST = 10  # steps that a run keeps


@dataclass(frozen=True)
class Step:
    """One that went wrong.

    Attributes:
        number: steps of the run before it. epoch: from 1. batch: of the epoch, from 0.
        indices: of its images in the training split.
        loss, gradient: the batch's mean loss, and the norm of the whole gradient; None: it did not come to them.
        later: steps that the weights have moved since; 0: they are those that it started from.
    """

    number: int
    epoch: int
    batch: int
    indices: list[int]
    loss: float | None
    gradient: float | None
    later: int


class Diverged(RuntimeError):
    """The loss is not finite or has run away, or a gradient or a weight is not finite.

    Attributes:
        step: which one, if it is known.
        layer: where, as far as :func:`keep` could tell.
    """

    def __init__(self, message: str, step: Step | None = None) -> None:
        super().__init__(message)
        self.step = step
        self.layer: str | None = None
        self.kept: Path | None = None

    def __str__(self) -> str:
        where = "" if self.layer is None else f"; {self.layer}"
        kept = "" if self.kept is None else f"; kept in {self.kept}"
        return f"{self.args[0]}{where}{kept}"


def gradient_norm(model: nn.Module) -> Tensor:
    """Of all gradients together: not finite if any of them is not, or if it exceeds 1.8e19 (in float32)."""
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def runaway(trainer: Trainer) -> float:
    """The loss from which on a run is given up."""
    return RUNAWAY * math.log(max(trainer.dataset.classes, 3))


def wrong(trainer: Trainer, loss: float, gradient: float) -> str | None:
    """What is wrong with the next step, of this loss and norm of the gradient, and what to do; None: nothing."""
    epoch, seen = trainer.epoch + 1, trainer.partial.seen
    if not loss < runaway(trainer):
        return (
            f"the loss became {loss:.3g} in epoch {epoch} after {seen} images: lower --lr or --feedback-gain, or raise "
            "--free-steps"
        )
    if not math.isfinite(gradient):
        return (
            f"the gradient's norm became {gradient:.3g} in epoch {epoch} after {seen} images: lower --lr or "
            "--feedback-gain, or raise --free-steps"
        )
    return None


def check_weights(trainer: Trainer) -> None:
    """Raise before a checkpoint of broken weights replaces a good one.

    Raises:
        Diverged: a weight is not finite.
    """
    floating = [(name, t) for name, t in trainer.model.state_dict().items() if t.is_floating_point()]
    names, norms = zip(*((name, torch.linalg.vector_norm(t)) for name, t in floating), strict=True)
    finite = torch.stack(norms).isfinite().tolist()
    if not all(finite):
        name = names[finite.index(False)]
        raise Diverged(f"'{name}' is no longer finite after step {trainer.step}: lower --lr or --feedback-gain")


def keep(trainer: Trainer, folder: Path, error: Diverged) -> None:
    """Look for the layer, and keep the step in ``folder/diverged`` (the first ``MOST`` of a run); both are then part of
    the error's message. What cannot be written is said there too: the error itself goes first. Of several processes the
    first one does, with its part of the images."""
    if not trainer.processes.first:
        return
    step = error.step
    kept = len(list((folder / FOLDER).glob("step-*")))
    if kept >= MOST and trainer.config.on_divergence == "continue":
        return
    number = trainer.step if step is None else step.number
    with torch.no_grad():
        layers = layer_numbers(trainer, step)
    error.layer = culprit(layers, unconverged=step is not None and step.loss is None)
    path = folder / FOLDER / f"step-{number:08d}"
    if path.exists() or kept >= MOST:
        error.kept = path if path.exists() else None
        return
    report = {
        "reason": str(error.args[0]),
        "layer": error.layer,
        "step": number,
        "epoch": trainer.epoch if step is None else step.epoch,
        "batch": None if step is None else step.batch,
        "indices": None if step is None else step.indices,
        "loss": None if step is None else step.loss,
        "gradient_norm": None if step is None else step.gradient,
        "steps_since": None if step is None else step.later,
        "learning_rate": [group["lr"] for group in trainer.optimizer.param_groups],
        "layers": layers,
    }
    weights = {name: t.detach().to("cpu").contiguous() for name, t in trainer.model.state_dict().items()}
    try:
        with durable.whole_folder(path) as inside:
            for name, data in (
                (REPORT, (json.dumps(to_json(report), indent=2) + "\n").encode()),
                (WEIGHTS, safetensors.torch.save(weights)),
            ):
                with durable.HashedFile(inside / name) as file:
                    file.write(data)
        error.kept = path
    except OSError as problem:
        error.layer = f"{error.layer}; {path} cannot be written ({problem.strerror or problem})"


def keep_unconverged(trainer: Trainer, folder: Path, error: ConvergenceError) -> str:
    """Keep the batch whose free phase did not converge as :func:`keep` does; returns the message with all of that."""
    epoch, batch = trainer.epoch + 1, trainer.partial.batches
    indices = next(trainer.train.indexed(epoch, start=batch))[2]
    trainer.optimizer.zero_grad()  # they are those of the batch before
    found = Diverged(str(error), Step(trainer.step, epoch, batch, indices.tolist(), None, None, later=0))
    keep(trainer, folder, found)
    return str(found)


def layer_numbers(trainer: Trainer, step: Step | None) -> list[dict[str, Any]]:
    """Per layer, from 1, the readout last: norms of its weights and gradients, and how many are not finite; of a
    network of this library with a known step, also its states on that batch: mean norm per image, those not finite, and
    by a relaxation the residual after its free phase (from zero states)."""
    learner = trainer.learner
    layers: list[dict[str, Any]] = [{"layer": number} for number in range(1, learner.layers + 1)]
    for key, tensors in (
        ("weight", [(name, p.detach()) for name, p in trainer.model.named_parameters()]),
        ("gradient", [(name, p.grad) for name, p in trainer.model.named_parameters() if p.grad is not None]),
    ):
        for row in layers:
            own = [t for name, t in tensors if learner.layer_of(name) == row["layer"]]
            row[f"{key}_norm"] = float(nn.utils.get_total_norm(own)) if own else 0.0
            row[f"{key}_largest"] = max((float(t.abs().max()) for t in own), default=0.0)
            row[f"{key}_nonfinite"] = sum(int((~t.isfinite()).sum()) for t in own)
    if step is None or not isinstance(learner, NetworkLearner):
        return layers
    images = next(trainer.train.indexed(step.epoch, start=step.batch))[0]
    network, tensors_ = learner.network, learner.model.tensors()
    if trainer.config.method == "backprop":
        states = feedforward_states(network, tensors_, images)
    else:
        relax = replace(trainer.config.relax_config(), on_fail="ignore")
        states = free_phase(network, tensors_, images, relax, keep=True).states
        residuals = diagnose(network, tensors_, images, relax, iterations=2).layer_residual
        for row, residual in zip(layers, residuals, strict=False):
            row["residual"] = residual
    for row, state in zip(layers, states[1:], strict=False):  # the readout has no states
        flat = state.detach().flatten(1).double()
        row["state_norm"] = float(flat.norm(dim=1).mean())
        row["state_nonfinite"] = int((~flat.isfinite()).sum())
    return layers


def culprit(layers: list[dict[str, Any]], *, unconverged: bool = False) -> str:
    """The lowest layer with something that is not finite, else the one with the largest weight, or residual."""
    for key, word in (("weight", "weights"), ("state", "states"), ("gradient", "gradients")):
        for row in layers:
            count = row.get(f"{key}_nonfinite", 0)
            if count:
                return f"layer {row['layer']} of {len(layers)} has {count} {word} that are not finite"
    key, word = ("residual", "residual") if unconverged else ("weight_largest", "weight")
    worst = max(layers, key=lambda row: row.get(key, 0.0))  # the readout has no residual
    return f"layer {worst['layer']} of {len(layers)} has the largest {word}, {worst[key]:.3g}"
