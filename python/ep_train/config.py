"""Everything that a training run is: one typed dataclass, which is also the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch

from ep_kernels import RelaxConfig
from ep_kernels.precision import Operands

from .device import check_name

Method = Literal["ep", "bptt"]
Estimator = Literal["symmetric", "positive", "negative", "random_sign", "tangent"]
OPERANDS: dict[str, Operands] = {
    "float32": None,
    "tf32": "tf32",
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
STORAGES: dict[str, torch.dtype | None] = {"float32": None, "float16": torch.float16}
T = TypeVar("T")


@dataclass(frozen=True)
class TrainConfig:
    """Train a convolutional network by Equilibrium Propagation (or BPTT through the same relaxation)."""

    dataset: str = "digits"
    """digits, fashion-mnist, cifar10, cifar100, or folder:PATH (train/<class>/*.jpg|png and test/...)."""
    data_root: Path | None = None
    """Folder that holds the dataset's files (default: its usual place, else a download)."""
    train_limit: int | None = None
    """Use only this many training images, balanced over classes."""
    test_limit: int | None = None
    """Use only this many test images, balanced over classes."""
    crop_padding: int = 0
    """Random crops after padding by this many pixels (0: none)."""
    flip: bool = False
    """Mirror training images at random."""

    model: str | None = None
    """digits, vgg5, vgg7, vgg8, vgg11, or widths as 32-32p-64-64p (p: pooled). Default: digits for the digits, else
    vgg5."""
    width: float = 1.0
    """Factor of every width."""
    pool: Literal["max", "avg"] = "max"
    """Kind of the 2x2 pooling."""
    readout: Literal["softmax", "mse"] = "softmax"
    """softmax: linear readout outside the dynamics, cross-entropy; mse: output units inside, squared error."""
    local_heads: tuple[int, ...] = ()
    """Layers (1 is the first) that get a local cross-entropy head."""
    local_weight: float = 0.2
    """Weight of each local head's loss."""
    feedback_gain: float = 0.1
    """k in (0, 1]: factor of the feedback per level; 1 is classical EP."""
    slope: float = 1.0
    """gamma of clip(gamma a, 0, 1); 1/2 is the variant of Laborieux et al. 2021."""
    weight_gain: float = 1.0
    """Initial weights have standard deviation weight_gain / sqrt(fan-in)."""

    method: Method = "ep"
    """ep, or bptt: backpropagation through the last nudged_steps sweeps of the same free phase."""
    schedule: Literal["sweep", "even_odd", "sync"] = "sweep"
    """Order of the updates: sweep (bottom-up, nudged top-down), even_odd, or sync (all at once)."""
    free_steps: int = 4
    """T: sweeps of the free phase."""
    nudged_steps: int = 3
    """K: sweeps of the nudged phases."""
    beta: float = RelaxConfig.beta
    """Nudging strength."""
    estimator: Estimator = "symmetric"
    """Which phases are contrasted: symmetric (+beta and -beta), positive, negative, random_sign (one of the two per
    batch), or tangent (the limit of small beta, one linear phase)."""
    form: Literal["delta", "states"] = "delta"
    """What the nudged phases relax: the deltas from the free equilibrium, or the states."""
    winners: Literal["frozen", "live"] = "frozen"
    """Max-pooling winners of the nudged phases."""
    linear_nudge: bool = False
    """Evaluate the nudge once per phase instead of at every update."""
    damping: float = 1.0
    """eta in (0, 1]: 1 moves a state all the way."""
    over_relaxation: float | None = None
    """omega in [1, 2): free sweeps after the first move every state this many times as far (not with sync).
    Default: by the feedback gain, 1.17 at 0.1."""
    tol: float = 0.0
    """Stop a relaxation early when every residual is at most this (0: never; else a GPU is waited for every batch)."""

    epochs: int = 6
    """Passes over the training images."""
    batch_size: int = 32
    """Images a step."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """torch.optim's Adam, AdamW, or SGD with momentum 0.9."""
    lr: float = 1e-3
    """Learning rate."""
    layer_lr: tuple[float, ...] = ()
    """Factors of the learning rate per layer, bottom to top, then the readout (default: 1 for all)."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate falls to zero over the run, if at all."""
    weight_decay: float = 0.0
    """Of the optimizer."""

    seed: int = 0
    """Of the initial weights, the held-out images, the order of the batches and random signs."""
    device: str = "auto"
    """auto (a GPU where torch sees one, else the CPU), cpu, cuda, or cuda:N."""
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    """Which kernels run."""
    operands: Literal["float32", "tf32", "float16", "bfloat16"] = "float32"
    """Precision of the operands of convolutions and matrix products (tf32: on GPUs; elsewhere it is float32)."""
    storage: Literal["float32", "float16"] = "float32"
    """Precision of the states in memory."""
    threads: int | None = None
    """CPU threads (default: torch's)."""
    out: Path | None = None
    """Run folder (default: runs/<dataset>-<model>-<method>-<time>-<seed>)."""
    overwrite: bool = False
    """Replace an earlier run in --out."""
    quiet: bool = False
    """Print nothing."""

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "lr", "width", "weight_gain")
        for name in positive:
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"TrainConfig: argument '{name}': expected a finite number > 0, got {value!r}")
        for name in ("weight_decay", "seed", "crop_padding"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"TrainConfig: argument '{name}': expected a finite number >= 0, got {value!r}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"TrainConfig: argument 'threads': expected an integer >= 1, got {self.threads}")
        check_name(self.device, "TrainConfig")
        self.relax_config()  # raises on any of its arguments

    @property
    def model_name(self) -> str:
        """The model, with the dataset's default filled in."""
        return self.model or ("digits" if self.dataset == "digits" else "vgg5")

    def relax_config(self, *, positive_sign: bool = True) -> RelaxConfig:
        """The relaxation's settings; ``positive_sign`` is this batch's draw of ``random_sign``."""
        estimator = self.estimator
        if estimator == "random_sign":
            estimator = "positive" if positive_sign else "negative"
        return RelaxConfig(
            schedule=self.schedule,
            free_steps=self.free_steps,
            nudged_steps=self.nudged_steps,
            beta=self.beta,
            estimator=estimator,
            form=self.form,
            winners=self.winners,
            linear_nudge=self.linear_nudge,
            damping=self.damping,
            over_relaxation=self.over_relaxation,
            tol=self.tol,
            operands=_named("operands", OPERANDS, self.operands),
            storage=_named("storage", STORAGES, self.storage),
        )


def _named(argument: str, values: dict[str, T], name: str) -> T:
    if name not in values:
        raise ValueError(f"TrainConfig: argument '{argument}': expected one of {', '.join(values)}, got {name!r}")
    return values[name]
