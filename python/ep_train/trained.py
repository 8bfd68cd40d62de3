"""A trained network from the folder of its run: what ``eval``, ``predict`` and ``export`` work with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ep_kernels
from ep_kernels import Network, RelaxConfig

from . import checkpoint
from . import device as devices
from .config import TrainConfig
from .config_file import config_from_json
from .data import DataError, Dataset
from .learners import network_of
from .models import Model
from .step import predict, predict_feedforward
from .teachers import TEACHERS, Normalisation, build_teacher

Backend = Literal["auto", "reference", "cpu", "triton", "cuda"]


@dataclass(frozen=True)
class Trained:
    """A network (or a teacher) with the weights of its run's last checkpoint.

    Attributes:
        path: the run's folder. config: its configuration.
        module: a :class:`Model`, or the teacher, on ``device``.
        relax: of the free phase; None: one pass without feedback (a teacher, or a run by backprop).
        image_shape: (C, H, W). normalisation: what the run's images were brought to.
        dataset: whose images those were (``Dataset.name``).
        class_names: by label.
        device, backend: where it computes, and by which kernels.
    """

    path: Path
    config: TrainConfig
    module: nn.Module
    relax: RelaxConfig | None
    image_shape: tuple[int, int, int]
    normalisation: Normalisation
    dataset: str
    class_names: tuple[str, ...]
    device: torch.device
    backend: Backend

    @property
    def network(self) -> Network | None:
        """The network, without the heads that its training had beside the readout; None for a teacher."""
        return self.module.network if isinstance(self.module, Model) else None

    @property
    def probabilities(self) -> bool:
        """The outputs are logits, whose softmax are probabilities; else they are values of output units."""
        return self.network is None or self.network.readout.loss != "mse"

    @torch.no_grad()
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Outputs [B, classes] for images as :meth:`normalised` gives them, and residuals [B] of a free phase."""
        if not isinstance(self.module, Model):
            return self.module(images), None
        if self.relax is None:
            return predict_feedforward(self.module, images), None
        return predict(self.module, images, self.relax)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The readout's loss per image, [B]."""
        if self.network is None:
            return cross_entropy(outputs, labels, reduction="none")
        target = nn.functional.one_hot(labels, len(self.class_names)).to(outputs.dtype)
        return ep_kernels.reference.head_loss(self.network.readout, outputs, target)

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 [B, C, H, W] to float32 on the device, as the run's own images were."""
        mean, std = (
            torch.tensor(v, dtype=torch.float32, device=self.device).view(-1, 1, 1)
            for v in (self.normalisation.mean, self.normalisation.std)
        )
        values = pixels.to(self.device).float().div_(255).sub_(mean).div_(std)
        return values.contiguous(memory_format=torch.channels_last)

    def check(self, dataset: Dataset) -> None:
        """Raise DataError unless images and classes of a dataset are of the kind that the run had."""
        for what, got, expected in (
            ("images (C, H, W)", dataset.image_shape, self.image_shape),
            ("classes", dataset.class_names, self.class_names),
        ):
            if got != expected:
                raise DataError(
                    f"{dataset.source}: expected {what} as in {self.path}, {_short(expected)}, got {_short(got)}"
                )

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Compute on this device with this backend."""
        with devices.in_force(self.device, tf32=self.config.operands == "tf32", backend=self.backend):
            yield


def load_trained(
    path: str | Path, *, device: str = "auto", backend: Backend = "auto", free_steps: int | None = None
) -> Trained:
    """The network of a run, ready to predict.

    Args:
        path: the run's folder.
        device: auto, cpu, cuda, or cuda:N.
        backend: auto, reference, cpu, triton or cuda.
        free_steps: sweeps of the free phase instead of the run's own number for test images.

    Raises:
        CheckpointError: there is no run with a checkpoint, or it cannot be read or is of an older version.
        ValueError: the device is not there; ``free_steps`` below 1, or given for what has no free phase.
    """
    path = Path(path)
    if not path.is_dir():
        raise checkpoint.CheckpointError(f"{path}: expected the folder of a run, and there is none")
    config = config_from_json(path / "config.json")
    state = checkpoint.model_of(path)  # the one place where these commands read weights
    where = devices.resolve(device, "load_trained", backend=backend)
    try:
        kept, shape = state["normalisation"], tuple(state["image_shape"])
        normalisation = Normalisation(tuple(kept["mean"]), tuple(kept["std"]))
        names, dataset = tuple(state["class_names"]), str(state["dataset"])
    except KeyError as error:
        raise checkpoint.CheckpointError(f"{path}: a checkpoint of an older version: it has no {error}") from error
    relax = None
    try:
        if config.model_name in TEACHERS:
            module = build_teacher(config.model_name, shape, len(names), width=config.width)
            module.load_state_dict(state["model"])
        else:
            module, relax = restored(config, state["model"], shape, len(names))
    except (RuntimeError, ValueError) as error:
        raise checkpoint.CheckpointError(f"{path}: the checkpoint does not fit config.json: {error}") from error
    if free_steps is not None:
        if relax is None:
            raise ValueError(f"argument 'free_steps': expected none with {path}, which has no free phase")
        if free_steps < 1:
            raise ValueError(f"argument 'free_steps': expected an integer >= 1, got {free_steps}")
        relax = replace(relax, free_steps=free_steps)
    module = module.to(where).eval().requires_grad_(False)
    return Trained(path, config, module, relax, shape, normalisation, dataset, names, where, backend)


def restored(
    config: TrainConfig, weights: Mapping[str, Tensor], image_shape: tuple[int, int, int], classes: int
) -> tuple[Model, RelaxConfig | None]:
    """The network of a run, without the heads that its training had beside the readout.

    Args:
        config: of the run.
        weights: its checkpoint's.
        image_shape: (C, H, W). classes: outputs of the readout.

    Returns:
        The network with its weights, on the CPU, and how its free phase runs; None of a run by backprop, which has
        none.

    Raises:
        ValueError, RuntimeError: the weights do not fit the configuration, or that does not fit the images.
    """
    model = Model(network_of(config, image_shape, classes))
    wanted = model.state_dict().keys()
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name in wanted})
    return model, None if config.method == "backprop" else config.evaluation_config()


def _short(value: tuple[Any, ...]) -> str:
    text = ", ".join(map(str, value[:6]))
    return f"({text}{', ...' if len(value) > 6 else ''})" + (f" ({len(value)})" if len(value) > 6 else "")
