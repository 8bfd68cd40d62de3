"""What a trainer trains: a model with the step and the prediction of a method. One class for each kind."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

import ep_kernels
from ep_kernels import Network

from .config import STORAGES, TrainConfig
from .data import Dataset
from .distill import Distillation
from .distributed import GradientMean, Processes
from .dropout import Dropout
from .feedforward import feedforward_states
from .losses import AugmentedLoss, LocalErrors
from .models import Model, build_network
from .step import (
    StepResult,
    backprop_step,
    bptt_step,
    ep_step,
    module_step,
    predict,
    predict_feedforward,
)
from .teachers import TEACHERS, Normalisation, build_teacher, load_teacher
from .warm import WarmStates

OPTIONS = {
    ("LocalErrors", "layers"): "local_heads",
    ("LocalErrors", "weight"): "local_weight",
    ("LocalErrors", "pool"): "local_pool",
    ("LocalErrors", "loss"): "local_loss",
    ("Distillation", "logits"): "distill_logits",
    ("Distillation", "temperature"): "distill_temperature",
    ("Distillation", "local_logits"): "distill_local_logits",
    ("Distillation", "features"): "distill_features",
    ("Distillation", "feature_weight"): "distill_feature_weight",
    ("Distillation", "feature_loss"): "distill_feature_loss",
    ("Distillation", "map"): "distill_map",
    ("Distillation", "cache"): "teacher_cache",
    ("Dropout", "rates"): "dropout",
}
FOR_NETWORKS = (
    "teacher",
    "local_heads",
    "distill_logits",
    "distill_local_logits",
    "distill_features",
    "dropout",
    "readout",
    "box",
    "layer_gain",
    "layer_lr",
    "weight_gain",
    "slope",
)
STREAM = 1_000_003  # a prime: seeds of different batches differ


@dataclass(frozen=True)
class Batch:
    """Images [B, C, H, W], labels [B] and the images' indices in the dataset [B]; the epoch and its batch, from 0.

    Of several processes each has its part of the images, and ``mean`` is over all parts.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    epoch: int
    number: int
    mean: GradientMean | None = None


class Learner(Protocol):
    """A model, how it learns from a batch, and how it predicts."""

    @property
    def model(self) -> nn.Module:
        """What the optimizer and checkpoints hold."""

    def prepare(self, processes: Processes) -> None:
        """Before the first batch: what takes a while, and one process does for all."""

    def step(self, batch: Batch) -> StepResult:
        """Gradients of a batch into ``.grad``."""

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Outputs [B, classes], and residuals [B] of a relaxation."""

    def layer_of(self, name: str) -> int:
        """Layer of a parameter, from 1, for per-layer learning rates."""

    @property
    def layers(self) -> int:
        """Number of layers, with the readout."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the model."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""


class NetworkLearner:
    """A network of this library by EP, BPTT or backprop of its feed-forward counterpart.

    Args:
        config: the run. dataset: its data. device: where the model is.

    Raises:
        ValueError, DataError: options that do not fit together or the dataset; a teacher that cannot be loaded.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset, device: torch.device) -> None:
        self.config = config
        self._relax = {sign: config.relax_config(positive_sign=sign) for sign in (False, True)}
        teacher = None
        if config.teacher is not None:
            teacher = load_teacher(
                config.teacher,
                image_shape=dataset.image_shape,
                classes=dataset.classes,
                images=Normalisation.of(dataset),
                dataset=dataset.name,
            )
        elif config.distill_logits or config.distill_local_logits or config.distill_features:
            raise ValueError("TrainConfig: argument 'teacher': expected one to distil from, got none")
        with _named_as_options():
            self.loss = AugmentedLoss(
                network_of(config, dataset.image_shape, dataset.classes),
                dataset.classes,
                local=LocalErrors(config.local_heads, config.local_weight, config.local_pool, config.local_loss),
                distillation=_distillation(config),
                teacher=teacher,
                seed=config.seed,
                dataset=dataset,
                augmented=bool(config.crop_padding or config.flip or config.cutout),
            )
        self.network = self.loss.network
        gains = tuple(config.weight_gain * gain for gain in config.layer_gain) or config.weight_gain
        self._model = Model(self.network, weight_gain=gains, seed=config.seed, loss=self.loss).to(device)
        self._trained_on = _trained_on(dataset)
        with _named_as_options():
            self.dropout = Dropout(self.network, config.dropout) if config.dropout else None
        self.warm = None
        if config.warm_start:
            stored = STORAGES[config.warm_storage] or torch.float32
            self.warm = WarmStates(self.network, len(dataset.train_labels), dtype=stored)

    @property
    def model(self) -> Model:
        """The network's parameters, and those of the loss."""
        return self._model

    @property
    def layers(self) -> int:
        """Nodes, then the readout if it has weights."""
        return len(self.network.shapes) - 1 + int(self.network.readout.outputs is not None)

    def layer_of(self, name: str) -> int:
        """Layer of a parameter: see :meth:`Model.layer_of`."""
        return self.model.layer_of(name)

    def prepare(self, processes: Processes) -> None:
        """The teacher's logits into their cache.

        Raises:
            CacheError, OSError, ProcessError: see :meth:`LogitCache.fill`.
        """
        self.loss.fill_cache(processes)

    def step(self, batch: Batch) -> StepResult:
        """Gradients of a batch into ``.grad``."""
        masks = None
        if self.dropout is not None:
            masks = self.dropout.draw(self._draws(batch, "dropout"), batch.images.device)
        images, labels, indices = batch.images, batch.labels, batch.indices
        if self.config.method == "backprop":
            return backprop_step(self.model, images, labels, indices=indices, masks=masks, mean=batch.mean)
        relax = self._relax[self._sign(batch)]
        if self.config.method == "bptt":
            return bptt_step(self.model, images, labels, relax, indices=indices, masks=masks, mean=batch.mean)
        states = self.warm.get(indices, images) if self.warm is not None else None
        same_update = self.config.feedback == "kolen_pollack"
        result = ep_step(
            self.model,
            images,
            labels,
            relax,
            indices=indices,
            states=states,
            masks=masks,
            same_update=same_update,
            mean=batch.mean,
        )
        if self.warm is not None:
            assert result.states is not None
            self.warm.put(indices, result.states)
        return replace(result, states=None)  # results wait to be read, and states are large

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Outputs of the readout, and the residuals of the free phase (none of a feed-forward network)."""
        if self.config.method == "backprop":
            return predict_feedforward(self.model, images), None
        return predict(self.model, images, self.config.evaluation_config())

    @torch.no_grad()
    def states(self, images: Tensor) -> list[Tensor]:
        """Of every node, where :meth:`predict` ends; the images come first."""
        network, tensors = self.network, self.model.tensors()
        if self.config.method == "backprop":
            return feedforward_states(network, tensors, images)
        return ep_kernels.free_phase(network, tensors, images, self.config.evaluation_config()).states

    def state(self) -> dict[str, Any]:
        """What it was trained on, which teacher it has, and the kept equilibria of a warm start."""
        teacher = self.loss.teacher
        return {
            **self._trained_on,
            **({} if teacher is None else {"teacher": teacher.digest()}),
            **({} if self.warm is None else {"warm": self.warm.state_dict()}),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on.

        Raises:
            ValueError: the images or the teacher are other ones by now.
        """
        _check_images(self._trained_on, state)
        teacher = self.loss.teacher
        if teacher is not None and state["teacher"] != teacher.digest():
            raise ValueError(f"the teacher {self.config.teacher} is not the one that this run was started with")
        if self.warm is not None:
            self.warm.load_state_dict(state["warm"])

    def _sign(self, batch: Batch) -> bool:
        """This batch's draw of ``random_sign``: the same whichever batches came before."""
        if self.config.estimator != "random_sign":
            return True
        return bool(torch.randint(2, (1,), generator=self._draws(batch, "sign")))

    def _draws(self, batch: Batch, what: Literal["dropout", "sign"]) -> torch.Generator:
        """Random numbers of a batch, the same after a resume."""
        seed = 0
        for part in (self.config.seed, batch.epoch, batch.number, what == "sign"):
            seed = (seed * STREAM + int(part)) % (1 << 63)
        return torch.Generator().manual_seed(seed)


class ModuleLearner:
    """An ordinary torch module by backprop: a teacher.

    Args:
        module: called with images; returns logits.
        dataset: its data.
    """

    def __init__(self, module: nn.Module, dataset: Dataset, device: torch.device) -> None:
        self._trained_on = _trained_on(dataset)
        self._module: nn.Module = module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def model(self) -> nn.Module:
        """The module."""
        return self._module

    @property
    def layers(self) -> int:
        """One: it has no per-layer learning rates."""
        return 1

    def layer_of(self, name: str) -> int:
        """Always the one layer."""
        return 1

    def state(self) -> dict[str, Any]:
        """What it was trained on: a student's images are brought to that."""
        return dict(self._trained_on)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on.

        Raises:
            ValueError: the images are other ones by now.
        """
        _check_images(self._trained_on, state)

    def prepare(self, processes: Processes) -> None:
        """Nothing."""

    def step(self, batch: Batch) -> StepResult:
        """Gradients of a batch into ``.grad``."""
        return module_step(self._module, batch.images, batch.labels, mean=batch.mean)

    @torch.no_grad()
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits in evaluation mode."""
        self._module.eval()
        return self._module(images), None


def make_learner(config: TrainConfig, dataset: Dataset, device: torch.device) -> Learner:
    """What a configuration trains.

    Raises:
        ValueError, DataError: see :class:`NetworkLearner`.
    """
    name = config.model_name
    if name not in TEACHERS:
        return NetworkLearner(config, dataset, device)
    if config.method != "backprop":
        raise ValueError(f"TrainConfig: argument 'model': expected --method backprop with {name}, got {config.method}")
    plain = TrainConfig()
    void = [option for option in FOR_NETWORKS if getattr(config, option) != getattr(plain, option)]
    if void:
        raise ValueError(f"TrainConfig: arguments {', '.join(void)}: {name} is an ordinary module, without them")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        module = build_teacher(name, dataset.image_shape, dataset.classes, width=config.width)
    return ModuleLearner(module, dataset, device)


def _trained_on(dataset: Dataset) -> dict[str, Any]:
    images = Normalisation.of(dataset)
    return {
        "normalisation": {"mean": list(images.mean), "std": list(images.std)},
        "pixels": {"mean": list(dataset.mean), "std": list(dataset.std)},  # which images, however they are normalised
        "dataset": dataset.name,
        "image_shape": list(dataset.image_shape),
        "class_names": list(dataset.class_names),
    }


def _check_images(ours: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise ValueError for images that are not those of a checkpoint, as far as it says which they were. The name of a
    folder is where they are, and may change."""
    moved = all(str(values.get("dataset")).startswith("folder:") for values in (ours, state))
    names = [name for name in ours if name in state and not (moved and name == "dataset")]
    odd = [text for name in names if (text := _difference(name, ours[name], state[name])) is not None]
    if odd:
        raise ValueError(f"the images are not those that this run was started with ({', '.join(odd)})")


def _difference(name: str, ours: Any, theirs: Any) -> str | None:
    """Where two values differ first; floats are the same to the last digits, which another machine may round."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        inner = (_difference(f"{name}.{key}", value, theirs.get(key)) for key, value in ours.items())
        return next(filter(None, inner), None)
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return next(filter(None, (_difference(f"{name}[{i}]", *pair) for i, pair in pairs)), None)
    if isinstance(ours, float) and isinstance(theirs, int | float):
        same = math.isclose(ours, theirs, rel_tol=0, abs_tol=1e-6)
    else:
        same = bool(ours == theirs)
    found, here = (f"{len(v)} values" if isinstance(v, list) else f"{v!r:.80}" for v in (theirs, ours))
    return None if same else f"{name}: {found} and not {here}"


def network_of(config: TrainConfig, image_shape: tuple[int, int, int], classes: int) -> Network:
    """The network of a run, without its local heads."""
    return build_network(
        config.model_name,
        image_shape,
        classes,
        width=config.width,
        pool=config.pool,
        readout=config.readout,
        linear_output=config.linear_output,
        box=config.box,
        feedback="tied" if config.feedback == "tied" else "separate",
        feedback_gain=config.feedback_gain,
        slope=config.slope,
    )


@contextmanager
def _named_as_options() -> Iterator[None]:
    """Errors of the classes that options are handed to, by the names of the options."""
    try:
        yield
    except ValueError as error:
        found = re.match(r"(LocalErrors|Distillation|Dropout): argument '(\w+)'", str(error))
        option = OPTIONS.get((found[1], found[2])) if found else None
        if found is None or option is None:
            raise
        raise ValueError(f"TrainConfig: argument '{option}'{str(error)[found.end() :]}") from error


def _distillation(config: TrainConfig) -> Distillation | None:
    if config.teacher is None:
        return None
    return Distillation(
        logits=config.distill_logits,
        temperature=config.distill_temperature,
        local_logits=config.distill_local_logits,
        features=config.distill_features,
        feature_weight=config.distill_feature_weight,
        feature_loss=config.distill_feature_loss,
        map=config.distill_map,
        cache=config.teacher_cache,
    )
