"""Published recipes, and this project's, as named sets of configuration values (``--preset laborieux2021-ce``).

Of the published ones, numbers are those of the authors' code or README, seen there; ``differs`` lists what a run does
otherwise than that code. Initial gains are converted: those codes draw weights uniformly in ``±g / sqrt(fan-in)``, of
standard deviation ``g / sqrt(3 fan-in)``; ours are normal, of that standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preset:
    """Values for fields of ``TrainConfig``; the others keep their defaults, and the command line overrides both.

    Attributes:
        source: where the values were read.
        what: one line.
        values: by field.
        differs: what a run does otherwise than the source.
    """

    source: str
    what: str
    values: Mapping[str, object]
    differs: Sequence[str] = field(default=())


def _uniform(gains: Sequence[float]) -> tuple[float, ...]:
    """Gains of normal weights with the standard deviation of uniform ones in ±g / sqrt(fan-in)."""
    return tuple(round(g / math.sqrt(3), 4) for g in gains)


# gain 1, live winners, states, no over-relaxation: EP as published
_CLASSICAL: dict[str, object] = {
    "feedback_gain": 1.0,
    "form": "states",
    "winners": "live",
    "damping": 1.0,
    "over_relaxation": 1.0,
    "tol": 0.0,
    "method": "ep",
    "estimator": "symmetric",
    "optimizer": "sgd",
    "momentum": 0.9,
    "lr_schedule": "cosine",
    "batch_size": 128,
    "crop_padding": 4,
    "flip": True,
}
_BIASES = "biases start at zero instead of uniform ones"
_WEIGHTS = "initial weights are normal, of the standard deviation of the uniform ones"
_EDGES = "crops are padded black instead of with the image's edge"
_THIRD = "images are normalised to standard deviation 1; there to 1/3 (std=3*0.2023, ...)"
_STEPS = "the learning rate falls at every batch instead of every epoch"

# ---- Laborieux et al. 2021 ----

_LABORIEUX_CODE = "arXiv 2006.03824; README and main.py of github.com/Laborieux-Axel/Equilibrium-Propagation"
_LABORIEUX_DIFFERS = (
    _WEIGHTS,
    _BIASES,
    _EDGES,
    _THIRD,
    _STEPS,
    "the learning rate falls over all 120 epochs; there CosineAnnealingLR(T_max=100), so it rises again from epoch 101",
)
_LABORIEUX: dict[str, object] = {
    **_CLASSICAL,
    "dataset": "cifar10",
    "model": "laborieux",
    "slope": 0.5,
    "layer_gain": _uniform([1.0] * 5),
    "schedule": "sync",
    "free_steps": 250,
    "lr": 0.25,
    "layer_lr": (1.0, 0.6, 0.4, 0.32, 0.2),  # 0.25 0.15 0.1 0.08 0.05
    "lr_min": 1e-5,
    "weight_decay": 3e-4,
    "epochs": 120,
}
_LABORIEUX_MSE = {**_LABORIEUX, "readout": "mse", "nudged_steps": 30, "beta": 0.5}
_LABORIEUX_CE = {**_LABORIEUX, "readout": "softmax", "nudged_steps": 25, "beta": 1.0}
_LABORIEUX_VF = {**_LABORIEUX_CE, "nudged_steps": 30, "winners": "frozen"}
_VF_DIFFERS = (
    *_LABORIEUX_DIFFERS,
    "winners are frozen in the nudged phases: ours has no contrast of live ones with feedback weights of their own",
)

# ---- Scellier et al. 2023 ----

_DCHN_CODE = (
    "arXiv 2312.15103; papers/ebl-algorithms/sota-dchn.py, model/ and training/ of "
    "github.com/rain-neuromorphics/energy-based-learning"
)
_PARITY = "even layers are updated before odd ones; there odd ones come first"
_CARRIED = "the free phase starts from zero; there from the states of the batch before"
_DCHN_DIFFERS = (_WEIGHTS, _BIASES, _EDGES, _STEPS, _PARITY, _CARRIED)
_DCHN: dict[str, object] = {
    **_CLASSICAL,
    "model": "dchn",
    "readout": "mse",
    "linear_output": True,
    "schedule": "even_odd",
    "free_steps": 60,
    "lr_min": 2e-6,
    "epochs": 100,
}

# ---- arXiv 2509.26003 ----

_RESNET_CODE = (
    "arXiv 2509.26003; README and EquiProp/ of "
    "github.com/BrainSeek-Lab/Scaling-Equilibrium-Propagation-to-Deeper-Neural-Network-Architectures"
)
_RESNET_DIFFERS = (
    *_DCHN_DIFFERS,
    "nodes of one parity are updated in turn; there at once (they are joined by the skips)",
)
_RESNET: dict[str, object] = {
    **_DCHN,
    "model": "hopfield_resnet13",
    "box": (0.0, 6.0),  # relu6
    "layer_gain": _uniform([0.6, 0.6, 0.7, *(0.6, 0.7, 0.6) * 3, 0.8]),
    "free_steps": 120,
    "nudged_steps": 50,
    "lr": 3e-2,
    "nesterov": True,
    "epochs": 300,
}

# ---- this project's: what docs/decisions.md and docs/results.md measured ----

_OURS: dict[str, object] = {
    "method": "ep",
    "readout": "softmax",
    "schedule": "sweep",
    "form": "delta",
    "winners": "frozen",
    "optimizer": "adam",
    "lr_schedule": "cosine",
    "flip": True,
}
_SHALLOW = {
    **_OURS,
    "model": "vgg5",
    "feedback_gain": 0.05,
    "estimator": "tangent",
    "free_steps": 2,
    "nudged_steps": 1,
    "over_relaxation": 1.15,
    "batch_size": 50,
    "epochs": 8,
    "lr": 2e-4,
}
_DEEP = {
    **_OURS,
    "feedback_gain": 0.02,
    "estimator": "tangent",
    "free_steps": 2,
    "nudged_steps": 1,
    "lr": 2e-4,
}
_MEASURED = "docs/results.md, CIFAR-10 (JPEG), 10,000 images"
_COSINES = "sweeps and gain: docs/decisions.md (cosine >= 0.99 on 8 layers at k 0.02, 2 + 1); learning rate: of vgg5"

PRESETS: dict[str, Preset] = {
    "laborieux2021-mse": Preset(
        f"{_LABORIEUX_CODE}: 'EP with symmetric gradient estimate', --loss mse",
        "128-256-512-512, squared error, T 250, K 30, beta 0.5",
        _LABORIEUX_MSE,
        _LABORIEUX_DIFFERS,
    ),
    "laborieux2021-mse-onesided": Preset(
        f"{_LABORIEUX_CODE}: 'EP with one-sided gradient estimate'",
        "the same with +beta only",
        {**_LABORIEUX_MSE, "estimator": "positive"},
        _LABORIEUX_DIFFERS,
    ),
    "laborieux2021-mse-randomsign": Preset(
        f"{_LABORIEUX_CODE}: 'EP with random sign gradient estimate'",
        "the same with +beta or -beta, drawn for every batch",
        {**_LABORIEUX_MSE, "estimator": "random_sign"},
        _LABORIEUX_DIFFERS,
    ),
    "laborieux2021-ce": Preset(
        f"{_LABORIEUX_CODE}: 'EP with symmetric gradient estimate', --loss cel --softmax",
        "128-256-512-512, softmax readout, T 250, K 25, beta 1",
        _LABORIEUX_CE,
        _LABORIEUX_DIFFERS,
    ),
    "laborieux2021-ce-dropout": Preset(
        f"{_LABORIEUX_CODE}: --dropouts 1.0 1.0 1.0 0.9 1.0 (main_dropout.py itself is not in the repository)",
        "the same with 10 % dropout on the last convolution",
        {**_LABORIEUX_CE, "dropout": (0.0, 0.0, 0.0, 0.1)},
        (*_LABORIEUX_DIFFERS, "the published dropout code could not be seen: ours drops channels of the fourth layer"),
    ),
    "laborieux2021-vf": Preset(
        f"{_LABORIEUX_CODE}: --model VFCNN",
        "feedback weights of their own, K 30",
        {**_LABORIEUX_VF, "feedback": "separate"},
        _VF_DIFFERS,
    ),
    "laborieux2021-vf-same-update": Preset(
        f"{_LABORIEUX_CODE}: --model VFCNN --same-update",
        "the same; forward and feedback weights get the mean of their updates",
        {**_LABORIEUX_VF, "feedback": "kolen_pollack"},
        _VF_DIFFERS,
    ),
    "scellier2023-cifar10": Preset(
        _DCHN_CODE,
        "deep convolutional Hopfield network, linear outputs, 60 + 20 iterations, beta 0.1",
        {
            **_DCHN,
            "dataset": "cifar10",
            "layer_gain": _uniform([0.4, 0.7, 0.6, 0.3, 0.4]),
            "nudged_steps": 20,
            "beta": 0.1,
            "lr": 0.03,
            "weight_decay": 2.5e-4,
        },
        (*_DCHN_DIFFERS, _THIRD),
    ),
    "scellier2023-cifar100": Preset(
        _DCHN_CODE,
        "the same for 100 classes, 60 + 15 iterations, beta 0.25",
        {
            **_DCHN,
            "dataset": "cifar100",
            "layer_gain": _uniform([0.5, 0.4, 0.5, 0.8, 0.5]),
            "nudged_steps": 15,
            "beta": 0.25,
            "lr": 0.04,
            "layer_lr": (0.75, 1.0, 1.0, 1.0, 0.625),  # 0.03 0.04 0.04 0.04 0.025
            "weight_decay": 3.5e-4,
        },
        _DCHN_DIFFERS,
    ),
    "hopfield-resnet13-cifar10": Preset(
        _RESNET_CODE,
        "13 connections, states in [0, 6], 120 + 50 iterations, beta 0.1",
        {**_RESNET, "dataset": "cifar10", "beta": 0.1, "weight_decay": 2.5e-4},
        (*_RESNET_DIFFERS, _THIRD, "no RandAugment(num_ops=3, magnitude=9)"),
    ),
    "hopfield-resnet13-cifar100": Preset(
        _RESNET_CODE,
        "the same for 100 classes, beta 0.15 (300 epochs are the README's for CIFAR-10)",
        {**_RESNET, "dataset": "cifar100", "beta": 0.15, "weight_decay": 3.5e-4},
        (*_RESNET_DIFFERS, "no RandAugment(num_ops=4, magnitude=9)"),
    ),
    "vgg5-cifar10": Preset(_MEASURED, "this project's: k 0.05, 2 + 1 sweeps", {**_SHALLOW, "dataset": "cifar10"}),
    "vgg8-cifar10": Preset(
        _COSINES,
        "this project's: k 0.02, 2 + 1 sweeps; not trained to the end yet",
        {**_DEEP, "dataset": "cifar10", "model": "vgg8"},
    ),
    "vgg11-cifar10": Preset(
        _COSINES,
        "this project's: k 0.02, 2 + 1 sweeps; not trained to the end yet",
        {**_DEEP, "dataset": "cifar10", "model": "vgg11"},
    ),
}


def preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ValueError: there is none; with the names.
    """
    if name not in PRESETS:
        raise ValueError(f"argument 'preset': expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
