"""Presets: known fields, networks that build, and the numbers of their sources."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch

from ep_kernels import Network, RelaxConfig
from ep_train import Trainer
from ep_train.config import TrainConfig
from ep_train.data import Dataset
from ep_train.learners import Batch
from ep_train.models import build_network, initial_parameters
from ep_train.presets import PRESETS, preset

FIELDS = {field.name for field in fields(TrainConfig)}
NETWORK = ("width", "pool", "readout", "linear_output", "box", "slope", "feedback_gain")
RELAX = (
    "schedule", "free_steps", "nudged_steps", "beta", "estimator", "form", "winners", "linear_nudge", "damping",
    "over_relaxation", "tol",
)  # fmt: skip
CLASSES = {"cifar10": 10, "cifar100": 100}


def built(name: str, **changes: Any) -> Network:
    values = dict(PRESETS[name].values)
    chosen = {key: values[key] for key in NETWORK if key in values} | changes
    feedback: Any = "tied" if values.get("feedback", "tied") == "tied" else "separate"
    classes = CLASSES[str(values["dataset"])]
    return build_network(str(values["model"]), (3, 32, 32), classes, feedback=feedback, **chosen)


@pytest.mark.parametrize("name", PRESETS)
def test_values_are_those_of_known_fields(name: str) -> None:
    chosen = PRESETS[name]
    assert set(chosen.values) <= FIELDS
    TrainConfig(**chosen.values)  # type: ignore[arg-type]
    assert chosen.source
    assert chosen.what


@pytest.mark.parametrize("name", PRESETS)
def test_networks_build_and_take_the_tuples(name: str) -> None:
    values: dict[str, Any] = dict(PRESETS[name].values)
    network = built(name)
    initial_parameters(built(name, width=1 / 64), weight_gain=values.get("layer_gain", 1.0))
    softmax = network.readout.outputs is not None
    assert len(values.get("layer_lr", ())) in (0, len(network.shapes) - 1 + softmax)
    hidden = len(network.shapes) - 1 - (not softmax)
    assert len(values.get("dropout", ())) in (0, 1, hidden)
    relax = {key: values[key] for key in RELAX if key in values}
    if relax.get("estimator") == "random_sign":
        relax["estimator"] = "positive"
    RelaxConfig(**relax)
    assert network.feedback == "tied" or values["winners"] == "frozen"  # what nudged_phase takes


@pytest.mark.parametrize("name", [name for name in PRESETS if "20" in name or "hopfield" in name])
def test_published_ones_are_classical(name: str) -> None:
    chosen = PRESETS[name]
    values = chosen.values
    assert "arXiv" in chosen.source
    assert chosen.differs
    assert (values["feedback_gain"], values["form"], values["over_relaxation"]) == (1.0, "states", 1.0)
    assert (values["optimizer"], values["momentum"], values["batch_size"]) == ("sgd", 0.9, 128)


def test_numbers_of_the_sources() -> None:
    ce = PRESETS["laborieux2021-ce"].values
    assert (ce["free_steps"], ce["nudged_steps"], ce["beta"], ce["epochs"]) == (250, 25, 1.0, 120)
    rates = [float(ce["lr"]) * factor for factor in ce["layer_lr"]]  # type: ignore[arg-type, attr-defined]
    assert rates == pytest.approx([0.25, 0.15, 0.1, 0.08, 0.05])
    assert ce["layer_gain"] == pytest.approx([1 / math.sqrt(3)] * 5, abs=1e-4)  # torch.nn.Conv2d's own
    hundred = PRESETS["scellier2023-cifar100"].values
    rates = [float(hundred["lr"]) * factor for factor in hundred["layer_lr"]]  # type: ignore[arg-type, attr-defined]
    assert rates == pytest.approx([0.03, 0.04, 0.04, 0.04, 0.025])
    ten = PRESETS["scellier2023-cifar10"].values
    gains = [math.sqrt(3) * gain for gain in ten["layer_gain"]]  # type: ignore[attr-defined]
    assert gains == pytest.approx([0.4, 0.7, 0.6, 0.3, 0.4], abs=1e-3)
    resnet = PRESETS["hopfield-resnet13-cifar10"].values
    gains = [math.sqrt(3) * gain for gain in resnet["layer_gain"]]  # type: ignore[attr-defined]
    assert gains == pytest.approx([0.6, 0.6, 0.7, 0.6, 0.7, 0.6, 0.6, 0.7, 0.6, 0.6, 0.7, 0.6, 0.8], abs=1e-3)
    assert (resnet["box"], resnet["nesterov"], resnet["epochs"]) == ((0.0, 6.0), True, 300)


def test_an_unknown_name() -> None:
    assert preset("laborieux2021-ce") is PRESETS["laborieux2021-ce"]
    with pytest.raises(ValueError, match=r"argument 'preset': expected one of laborieux2021-mse, .*, got 'lin2025'"):
        preset("lin2025")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_starts_a_run(name: str) -> None:
    """As ``ep-train --preset`` does: a configuration, a trainer, and a step of it at a small width."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(12) % 4
    names = tuple("abcd")
    data = Dataset("random", images, labels, images[:4], labels[:4], names, (0.5,) * 3, (0.3,) * 3, "random")
    values = {**PRESETS[name].values, "width": 1 / 64, "batch_size": 4, "threads": 1, "device": "cpu"}
    short = {"free_steps": 4, "nudged_steps": 3, "epochs": 1, "operands": "float32", "storage": "float32"}
    trainer = Trainer(TrainConfig(**{**values, **short}), dataset=data)
    batch = next(trainer.train.indexed(1))
    result = trainer.learner.step(Batch(*batch, 1, 0))
    assert bool(result.loss.isfinite())
    assert len(trainer.learner.model.state_dict()) > 5
