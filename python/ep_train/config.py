"""Everything that a training run is: one typed dataclass, which is also the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch

from ep_kernels import RelaxConfig
from ep_kernels.precision import Operands

from .device import check_name
from .typed import check_types

Method = Literal["ep", "bptt", "backprop"]
Estimator = Literal[
    "symmetric", "positive", "negative", "random_sign", "tangent", "five_phase", "contrastive", "coupled"
]
Feedback = Literal["tied", "separate", "kolen_pollack"]
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
    """Train a convolutional network by Equilibrium Propagation (or BPTT through the same relaxation, or backprop of the
    feed-forward network of the same shape)."""

    dataset: str = "digits"
    """digits, fashion-mnist, cifar10, cifar100, or folder:PATH (train/<class>/*.jpg|png and test/...)."""
    data_root: Path | None = None
    """Folder that holds the dataset's files (default: its usual place, else a download), or that a folder:PATH is in (a
    relative one; default: the working directory)."""
    train_limit: int | None = None
    """Use only this many training images, balanced over classes."""
    test_limit: int | None = None
    """Use only this many test images, balanced over classes."""
    data_cache: Literal["memory", "mmap"] = "memory"
    """Where the images of a folder:PATH are: read into memory, or in a memory-mapped file of decoded images."""
    normalise: Literal["unit", "standard"] | None = None
    """unit: pixels in 0..1; standard: less the training images' mean, divided by their standard deviation, per channel.
    Default: unit for the digits, else standard."""
    crop_padding: int = 0
    """Random crops after padding by this many pixels (0: none)."""
    flip: bool = False
    """Mirror training images at random."""
    cutout: int = 0
    """Side of a black square that is put at random into every training image (0: none)."""

    model: str | None = None
    """A network of docs/networks.md (digits, vgg5 to vgg16, laborieux, dchn, hopfield_resnet13), or widths as
    32-32p-64-64p (p: pooled); with --method backprop also a teacher (vgg16_bn, resnet18). Default: digits for the
    digits, else vgg5."""
    width: float = 1.0
    """Factor of every width."""
    pool: Literal["max", "avg"] = "max"
    """Kind of the 2x2 pooling."""
    readout: Literal["softmax", "mse"] = "softmax"
    """softmax: linear readout outside the dynamics, cross-entropy; mse: output units inside, squared error."""
    linear_output: bool = False
    """mse: the output units are not clipped."""
    local_heads: str = "none"
    """Layers that get a local error: none, all, or numbers as 2,4,6 (1 is the first)."""
    local_weight: tuple[float, ...] = (0.2,)
    """Weight of the local errors: one for all, or one for each."""
    local_pool: int = 2
    """A local head reads its layer's map averaged to this many pixels squared."""
    local_loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    """Loss of the local heads."""

    teacher: str | None = None
    """Distil from NAME:PATH (vgg11_bn, vgg13_bn, vgg16_bn, resnet18 and their weights), a torchvision or timm name, or
    the folder of a run of ep-train."""
    distill_logits: float = 0.0
    """Weight of the KL divergence between the teacher's and the readout's softened outputs."""
    distill_local_logits: float = 0.0
    """The same on every local head."""
    distill_temperature: float = 4.0
    """tau of both."""
    distill_features: tuple[str, ...] = ()
    """Pairs layer=module of a student's layer and a teacher's module whose output it learns, or auto."""
    distill_feature_weight: tuple[float, ...] = (1.0,)
    """Weight of the feature losses: one for all, or one for each pair."""
    distill_feature_loss: Literal["mse", "cosine"] = "mse"
    """Their loss."""
    distill_map: Literal["student", "teacher"] = "student"
    """Whose features a trained linear map takes to the other's width."""
    teacher_cache: Path | None = None
    """File that keeps the teacher's logits (of data that is not augmented)."""

    feedback_gain: float = 0.1
    """k in (0, 1]: factor of the feedback per level; 1 is classical EP."""
    slope: float = 1.0
    """gamma of clip(gamma a, 0, 1); 1/2 is the variant of Laborieux et al. 2021."""
    box: tuple[float, float] = (0.0, 1.0)
    """lo and hi, the bounds of the states."""
    weight_gain: float = 1.0
    """Initial weights have standard deviation weight_gain / sqrt(fan-in)."""
    layer_gain: tuple[float, ...] = ()
    """Factors of weight_gain per connection, bottom to top, then the readout if given (default: 1 for all)."""
    feedback: Feedback = "tied"
    """tied: feedback through the transposed weights; separate: through weights of its own (vector-field EP);
    kolen_pollack: its own, with the same updates."""
    dropout: tuple[float, ...] = ()
    """Probability that a channel is left out of a training batch, one for all hidden layers or one for each."""

    method: Method = "ep"
    """ep; bptt: backpropagation through the last nudged_steps sweeps of the same free phase; backprop: of the
    feed-forward network of the same shape (no feedback)."""
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
    batch), tangent (the limit of small beta, one linear phase), five_phase (+-beta and +-2 beta, extrapolated); for an
    mse readout also contrastive and coupled (clamped output units)."""
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
    warm_start: bool = False
    """Start every image's free phase from its last equilibrium (kept in memory and in the checkpoint; not with
    augmentation)."""
    warm_storage: Literal["float32", "float16"] = "float32"
    """Precision of the equilibria that a warm start keeps."""
    tol: float = 0.0
    """Stop a relaxation early when every residual is at most this (0: never)."""
    on_fail: Literal["raise", "warn", "ignore"] = "warn"
    """When a free phase of a training batch ends above --tol: end the run, say so once, or nothing (what only looks at
    images, as an evaluation, goes on). With a --tol, all but ignore wait for a GPU at every batch."""
    start: Literal["zero", "feedforward"] = "zero"
    """Where free phases start without a warm start: zero states, or a bottom-up pass without feedback (for even_odd and
    sync; the first sweep of sweep is that already)."""
    early_operands: Literal["none", "tf32", "float16", "bfloat16"] = "none"
    """Precision of the operands of the first --early-steps sweeps of a free phase, before those of --operands."""
    early_steps: int = 0
    """How many sweeps those are; the last one is never among them."""

    epochs: int = 6
    """Passes over the training images."""
    batch_size: int = 32
    """Images a step."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """torch.optim's Adam, AdamW or SGD."""
    lr: float = 1e-3
    """Learning rate."""
    lr_min: float = 0.0
    """What a falling learning rate ends at."""
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = False
    """SGD's momentum after Nesterov."""
    layer_lr: tuple[float, ...] = ()
    """Factors of the learning rate per layer, bottom to top, then the readout (default: 1 for all)."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate falls over the run, if at all."""
    weight_decay: float = 0.0
    """Of the optimizer."""
    evaluate_every: int = 1
    """Epochs between two evaluations on the test images (the last epoch always has one)."""
    evaluate_steps: int | None = None
    """Sweeps of the free phase on test images (default: free_steps; 10 times as many with warm starts, which have gone
    on from earlier sweeps)."""
    on_divergence: Literal["stop", "continue", "rollback"] = "stop"
    """When a batch's loss or gradient is not finite or the loss runs away: stop, leave that batch out and go on, or go
    back to the last good checkpoint with a lower learning rate."""
    rollback_factor: float = 0.5
    """What every rollback multiplies the learning rate by."""
    max_rollbacks: int = 3
    """So many at most; the run stops at the next divergence."""
    checkpoint_every: int = 0
    """Steps between two checkpoints within an epoch (0: only at its end, and when the run is stopped)."""
    keep_checkpoints: int = 2
    """So many of the newest checkpoints are kept."""

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
    tensorboard: bool = False
    """Write TensorBoard events into tensorboard/ in the run folder: every metric, and histograms of the states."""
    probe_gradient: int = 0
    """Every so many epochs, the cosine of EP's gradient to the true one on 8 test images, per tensor (0: never). It
    takes as long as about 20 training batches of 32 images (docs/tools.md)."""
    out: Path | None = None
    """Run folder (default: runs/<dataset>-<model>-<method>-<time>-<seed>)."""
    overwrite: bool = False
    """Replace an earlier run in --out."""
    resume_or_start: bool = False
    """Go on from the checkpoint in --out where there is one of the same configuration, else start: for jobs that are
    started again until they are done (docs/distributed.md)."""
    quiet: bool = False
    """Print nothing."""

    def __post_init__(self) -> None:
        check_types(self)
        positive = ("epochs", "batch_size", "lr", "width", "weight_gain", "evaluate_every", "local_pool")
        for name in (*positive, "keep_checkpoints"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"TrainConfig: argument '{name}': expected a finite number > 0, got {value!r}")
        counts = ("crop_padding", "cutout", "checkpoint_every", "max_rollbacks", "probe_gradient")
        for name in ("weight_decay", "seed", "lr_min", *counts):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"TrainConfig: argument '{name}': expected a finite number >= 0, got {value!r}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"TrainConfig: argument 'threads': expected an integer >= 1, got {self.threads}")
        if not 0 < self.rollback_factor < 1:
            raise ValueError(
                f"TrainConfig: argument 'rollback_factor': expected a number in (0, 1), got {self.rollback_factor!r}"
            )
        if self.lr_min > self.lr:
            raise ValueError(f"TrainConfig: argument 'lr_min': expected at most --lr {self.lr}, got {self.lr_min}")
        if self.evaluate_steps is not None and self.evaluate_steps < 1:
            raise ValueError(f"TrainConfig: argument 'evaluate_steps': expected >= 1, got {self.evaluate_steps}")
        if self.resume_or_start and (self.out is None or self.overwrite):
            got = "none" if self.out is None else "--overwrite too"
            raise ValueError(f"TrainConfig: argument 'resume_or_start': expected --out with it, got {got}")
        if self.teacher_cache is not None and self.teacher is None:
            raise ValueError("TrainConfig: argument 'teacher_cache': expected a --teacher, got none")
        if self.nesterov and not (self.optimizer == "sgd" and self.momentum > 0):
            raise ValueError("TrainConfig: argument 'nesterov': expected --optimizer sgd with a momentum > 0")
        if self.estimator in ("contrastive", "coupled") and self.readout != "mse":
            raise ValueError(f"TrainConfig: argument 'estimator': {self.estimator} needs --readout mse, got softmax")
        if self.feedback != "tied" and self.winners == "live":
            raise ValueError(f"TrainConfig: argument 'winners': expected frozen with feedback {self.feedback}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"TrainConfig: argument 'momentum': expected a number in [0, 1), got {self.momentum!r}")
        if self.linear_output and self.readout != "mse":
            raise ValueError("TrainConfig: argument 'linear_output': expected --readout mse, whose units it is of")
        if self.warm_start and (self.crop_padding or self.flip or self.cutout):
            raise ValueError(
                "TrainConfig: argument 'warm_start': expected no augmentation (an image's last equilibrium is that of "
                "another picture)"
            )
        of_ep = {
            "feedback": self.feedback != "tied",
            "warm_start": self.warm_start,
            "probe_gradient": self.probe_gradient,
        }
        for name, given in of_ep.items():
            if self.method != "ep" and given:
                raise ValueError(f"TrainConfig: argument '{name}': expected --method ep with it, got {self.method}")
        check_name(self.device, "TrainConfig")
        self.relax_config()  # raises on any of its arguments

    @property
    def model_name(self) -> str:
        """The model, with the dataset's default filled in."""
        return self.model or ("digits" if self.dataset == "digits" else "vgg5")

    def evaluation_config(self) -> RelaxConfig:
        """The relaxation's settings for images that are only looked at: of the test set, of a teacher, of predictions.
        ``on_fail`` is for training batches."""
        steps = self.evaluate_steps or self.free_steps * (10 if self.warm_start else 1)
        return replace(self.relax_config(), free_steps=steps, on_fail="ignore")

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
            on_fail=self.on_fail,
            start=self.start,
            early_operands=None
            if self.early_operands == "none"
            else _named("early_operands", OPERANDS, self.early_operands),
            early_steps=self.early_steps,
        )


def _named(argument: str, values: dict[str, T], name: str) -> T:
    if name not in values:
        raise ValueError(f"TrainConfig: argument '{argument}': expected one of {', '.join(values)}, got {name!r}")
    return values[name]
