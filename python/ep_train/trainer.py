"""The training loop: data, model, optimizer, evaluation, run folder."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ep_kernels
from ep_kernels import backends

from . import checkpoint
from . import device as devices
from .config import TrainConfig
from .curves import plot_curves
from .data import Batches, Dataset, load_dataset
from .learners import Batch, Learner, NetworkLearner, make_learner
from .memory import peak_memory_bytes
from .progress import Progress
from .run_folder import RunFolder
from .stability import advice, diagnose
from .step import StepResult, read

# States stay in their box, so a loss that runs away stays finite: it is given up at this multiple of a guess's.
RUNAWAY = 1e4
READ_EVERY = 0.3  # seconds between two readings of the losses from a GPU; on the CPU every batch's is read at once
PROBE = 64  # test images whose relaxation is looked at after every epoch


class Diverged(RuntimeError):
    """The loss is not finite or has run away; the run ends with what its last checkpoint holds."""


class Stopped(Exception):
    """A signal asked for the end, and a batch has just been finished."""


@dataclass
class Partial:
    """Sums over the batches of an epoch that is not finished."""

    batches: int = 0
    seen: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    residual_sum: float = 0.0
    seconds: float = 0.0
    skipped: int = 0


class Trainer:
    """One run. Build it, then :meth:`run`."""

    def __init__(self, config: TrainConfig, *, dataset: Dataset | None = None) -> None:
        """
        Args:
            config: the run.
            dataset: already loaded; default: ``config.dataset`` is loaded.

        Raises:
            DataError, ValueError: the data cannot be read, an argument does not fit it, or the device is not there.
            BackendError: the backend cannot run there.
        """
        self.config = config
        # what is not there or cannot run is refused before anything is written
        self.device = devices.resolve(config.device, "TrainConfig", backend=config.backend)
        with _backend(config.backend):
            backends.choose(self.device, storage=config.relax_config().storage)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if dataset is None:
            dataset = load_dataset(
                config.dataset,
                root=config.data_root,
                train_limit=config.train_limit,
                test_limit=config.test_limit,
                seed=config.seed,
            )
        self.dataset = dataset
        self.learner = make_learner(config, dataset, self.device)
        self.model = self.learner.model
        self.train = Batches(
            dataset,
            "train",
            batch_size=config.batch_size,
            seed=config.seed,
            crop_padding=config.crop_padding,
            flip=config.flip,
            cutout=config.cutout,
            device=self.device,
        )
        self.test = Batches(dataset, "test", batch_size=min(256, len(dataset.test_labels)), device=self.device)
        self.advised: str | None = None
        self.optimizer = make_optimizer(self.learner, config)
        self.scheduler = make_scheduler(self.optimizer, config, config.epochs * len(self.train))
        self.epoch = 0  # finished ones
        self.partial = Partial()  # of the epoch after those
        self.stop_asked = False
        self.seconds = 0.0  # of training itself, without evaluation
        self.rows: list[dict[str, Any]] = []
        self.came_from = devices.kind(self.device)  # where a resumed run was before

    # ---- one epoch ----

    def train_epoch(self, progress: Progress) -> dict[str, Any]:
        """Train on every batch once; returns the epoch's row of metrics (without the test accuracy)."""
        config = self.config
        epoch = self.epoch + 1
        done = self.partial
        lenient = config.on_divergence == "continue"
        progress.start_epoch(epoch, len(self.train), completed=done.batches)
        began = time.perf_counter()
        unread: list[tuple[StepResult, int]] = []  # with the number of images

        def show(batches: int, residual: float | None) -> None:
            nonlocal began
            now = time.perf_counter()
            done.seconds += now - began
            began = now
            progress.update(
                loss=done.loss_sum / done.seen,
                accuracy=done.correct / done.seen,
                residual=residual,
                images_per_second=done.seen / done.seconds,
                batches=batches,
            )

        for images, labels, indices in self.train.indexed(epoch, start=done.batches):
            if self.stop_asked:
                if unread:
                    show(len(unread), self._add_up(unread))
                raise Stopped
            buffers = [b.clone() for b in self.model.buffers()] if lenient else []
            result = self.learner.step(Batch(images, labels, indices, epoch, done.batches + len(unread)))
            unread.append((result, len(labels)))
            count = len(unread)
            due = lenient or self.device.type == "cpu" or time.perf_counter() - began >= READ_EVERY
            if lenient and self._broken(result):
                for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                    buffer.copy_(before)
                unread.clear()
                done.batches += 1
                done.skipped += 1
                if done.skipped > len(self.train) // 2:
                    raise Diverged(f"more than half of epoch {epoch} was left out: lower --lr or --feedback-gain")
                self.scheduler.step()
                continue
            residual = self._add_up(unread) if due else None
            self.optimizer.step()
            self.scheduler.step()
            if due:
                show(count, residual)
        if unread:
            show(len(unread), self._add_up(unread))
        if done.skipped:
            progress.note(
                f"epoch {epoch}: {done.skipped} of {len(self.train)} batches left out: the loss had run away, or it or "
                "a gradient was not finite"
            )
        self.seconds += done.seconds
        self.epoch, self.partial = epoch, Partial()
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": epoch * len(self.train),
            "train_loss": done.loss_sum / done.seen,
            "train_accuracy": done.correct / done.seen,
            "images_per_second": done.seen / done.seconds,
            "seconds": done.seconds,
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        if config.method == "ep":
            row["residual"] = done.residual_sum / done.seen
        if done.skipped:
            row["skipped_batches"] = done.skipped
        return row

    def _broken(self, result: StepResult) -> bool:
        """The batch's loss has run away, or it or a gradient is not finite."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        finite = torch.stack([g.isfinite().all() for g in gradients]).all()
        return not (bool(finite) and float(result.loss) < self._runaway)

    @property
    def _runaway(self) -> float:
        return RUNAWAY * math.log(max(self.dataset.classes, 3))

    def _add_up(self, unread: list[tuple[StepResult, int]]) -> float | None:
        """Add batches to the epoch's sums and empty the list; returns the last one's residual.

        Raises:
            Diverged: at the first batch whose loss is not finite or has run away.
        """
        done = self.partial
        residual: float | None = None
        for (loss, correct, residual), (_, count) in zip(read([result for result, _ in unread]), unread, strict=True):
            if not loss < self._runaway:
                raise Diverged(
                    f"the loss became {loss:.3g} in epoch {self.epoch + 1} after {done.seen} images: lower --lr or "
                    "--feedback-gain, or raise --free-steps"
                )
            done.batches += 1
            done.seen += count
            done.loss_sum += loss * count
            done.correct += correct
            done.residual_sum += (residual or 0.0) * count
        unread.clear()
        return residual

    def check_weights(self) -> None:
        """Raise before a checkpoint of broken weights replaces a good one."""
        floating = [(name, t) for name, t in self.model.state_dict().items() if t.is_floating_point()]
        names, parameters = zip(*floating, strict=True)
        finite = torch.stack([parameter.isfinite().all() for parameter in parameters]).tolist()
        if not all(finite):
            name = names[finite.index(False)]
            raise Diverged(f"'{name}' is no longer finite after epoch {self.epoch}: lower --lr or --feedback-gain")

    def evaluate(self) -> float:
        """Accuracy on the test images, at the free equilibrium."""
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for images, labels in self.test.epoch(0):
            z, _ = self.learner.predict(images)
            correct += (z.argmax(1) == labels).sum()
        return int(correct) / len(self.dataset.test_labels)

    def look(self, progress: Progress) -> dict[str, Any]:
        """How well the free phase converges on some test images, per layer, for the row of metrics; a note when it
        does not, which says what to change (once for the same advice)."""
        learner = self.learner
        if not isinstance(learner, NetworkLearner) or self.config.method == "backprop":
            return {}
        images = next(self.test.epoch(0))[0][:PROBE]
        relax = self.config.evaluation_config()
        stability = diagnose(learner.network, learner.model.tensors(), images, relax)
        found = advice(stability, relax, learner.network)
        if found is not None and found != self.advised:
            self.advised = found
            progress.note(found)
        return stability.row()

    # ---- the run ----

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Train to the last epoch, or until SIGINT or SIGTERM; returns the summary, which is also in the folder.

        A signal ends the run after the batch that it fell into, with a checkpoint; a second one ends it at once.

        Raises:
            Diverged: the loss is not finite or has run away (the summary is written first).
        """
        status, failure = "finished", None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with (
            _backend(self.config.backend),
            devices.in_force(self.device, tf32=self.config.operands == "tf32"),
            self._signals(),
            Progress(self.config.epochs, quiet=self.config.quiet) as progress,
        ):
            progress.note(self.headline())
            if self.came_from != devices.kind(self.device):
                progress.note(
                    f"this run comes from another device ({self.came_from}): its numbers will be close to those of "
                    "a run that stayed there, not the same bit for bit"
                )
            if self.epoch >= self.config.epochs:
                progress.note(f"already finished after {self.epoch} epochs; resume with --epochs N to go on")
            try:
                while self.epoch < self.config.epochs:
                    row = self.train_epoch(progress)
                    self.check_weights()
                    row |= self.look(progress)
                    last = self.epoch == self.config.epochs
                    if last or self.epoch % self.config.evaluate_every == 0:
                        row["test_accuracy"] = self.evaluate()
                    progress.end_epoch(row)
                    self.rows.append(row)
                    folder.append_metrics(row)
                    checkpoint.save(folder.path, self.state())
            except (Stopped, KeyboardInterrupt) as error:
                status = "interrupted"
                if isinstance(error, Stopped):  # between two batches: the weights are whole
                    checkpoint.save(folder.path, self.state())
                where = f"{self.epoch} of {self.config.epochs} epochs and {self.partial.batches} batches"
                resumable = (folder.path / checkpoint.NAME).exists()
                then = f"continue with: ep-train resume {folder.path}" if resumable else "nothing was kept"
                progress.note(f"stopped after {where}; {then}")
            except Diverged as error:
                status, failure = "diverged", error
            summary = self.summary(status)
            folder.write_summary(summary)
            if self.rows:
                plot_curves(self.rows, folder.path / "curves.png", title=self.headline())
            if failure is not None:
                raise failure
            progress.note(self.closing(summary, folder))
        return summary

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn the first SIGINT or SIGTERM into a request, so that no step is cut in half."""

        def ask(number: int, frame: object) -> None:
            if self.stop_asked:
                raise KeyboardInterrupt
            self.stop_asked = True

        if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
            yield
            return
        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def headline(self) -> str:
        """One line that says what is trained, by which method, on which backend and, if a GPU, on which device."""
        config = self.config
        count = sum(p.numel() for p in self.model.parameters())
        storage = config.relax_config().storage
        backend = backends.choose(self.device, storage=storage) if config.method == "ep" else "autograd"
        where = f" on {devices.describe(self.device)}" if self.device.type == "cuda" else ""
        how = f"k {config.feedback_gain:g}, {config.schedule}, {config.free_steps} + {config.nudged_steps} sweeps"
        how = "" if config.method == "backprop" else f" {how},"
        return (
            f"{self.dataset.source}: {config.model_name} ({count / 1e6:.2f} M parameters) by {config.method},{how} "
            f"backend {backend}{where}"
        )

    def closing(self, summary: dict[str, Any], folder: RunFolder) -> str:
        """The last line: result, time and place."""
        accuracy = summary["test_accuracy"]
        result = "no epoch finished" if accuracy is None else f"test accuracy {accuracy:.2%}"
        return f"{result} after {summary['seconds']:.1f} s of training; {folder.path}"

    def summary(self, status: str) -> dict[str, Any]:
        """What summary.json holds; accuracies are fractions, rates per second of training."""
        last = self.rows[-1] if self.rows else {}
        images = self.epoch * self.train.images_per_epoch
        return {
            "status": status,
            "test_accuracy": last.get("test_accuracy"),
            "best_test_accuracy": max(
                (row["test_accuracy"] for row in self.rows if row.get("test_accuracy") is not None), default=None
            ),
            "train_loss": last.get("train_loss"),
            "train_accuracy": last.get("train_accuracy"),
            "residual": last.get("residual"),
            "epochs": self.epoch,
            "seconds": self.seconds + self.partial.seconds,
            "images_per_second": images / self.seconds if self.seconds else None,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "device": devices.describe(self.device),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "data": self.dataset.source,
            "versions": {"ep_kernels": ep_kernels.__version__, "torch": torch.__version__},
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "seconds": self.seconds,
            "partial": dataclasses.asdict(self.partial),
            "device": devices.kind(self.device),
            **self.learner.state(),
        }

    def restore(self, state: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Continue from a checkpoint of any device; ``rows`` are the metrics up to it.

        Raises:
            CheckpointError: it is of another network or optimizer.
        """
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.epoch, self.seconds, self.rows = state["epoch"], state["seconds"], rows
            self.partial = Partial(**state["partial"])
            self.came_from = str(state["device"])
            self.learner.restore(state)
        except (RuntimeError, TypeError, ValueError, KeyError) as error:  # torch's own, one for each kind of misfit
            raise checkpoint.CheckpointError(f"the checkpoint does not fit config.json: {error}") from error


def train(config: TrainConfig) -> tuple[dict[str, Any], Path]:
    """Start a run; returns its summary and folder."""
    trainer = Trainer(config)
    folder = new_folder(config)
    return trainer.run(folder), folder.path


def new_folder(config: TrainConfig) -> RunFolder:
    """The folder of a run that begins, with its configuration in it.

    Raises:
        RunFolderError: see :meth:`RunFolder.create`.
    """
    folder = RunFolder.create(
        config.out,
        dataset=config.dataset,
        model=config.model_name,
        method=config.method,
        seed=config.seed,
        overwrite=config.overwrite,
    )
    folder.write_config(dataclasses.asdict(portable(config)))
    return folder


def portable(config: TrainConfig) -> TrainConfig:
    """The same run from any working directory: paths of the teacher and its cache are absolute."""
    name, colon, path = (config.teacher or "").rpartition(":")
    teacher = f"{name}{colon}{Path(path).resolve()}" if path and Path(path).exists() else config.teacher
    cache = config.teacher_cache.resolve() if config.teacher_cache is not None else None
    return dataclasses.replace(config, teacher=teacher, teacher_cache=cache)


def resume(
    path: Path, *, epochs: int | None = None, device: str | None = None, quiet: bool = False
) -> tuple[dict[str, Any], Path]:
    """Continue the run in ``path`` from its last checkpoint: the same numbers as if it had never stopped.

    The same bit for bit is promised on the same kind of device only; a run may go on on another one, and says so. On a
    GPU the kernels of backend ``triton`` add without atomics, in one order; cuDNN, which computes for ``reference`` and
    BPTT there, promises none.

    Args:
        epochs: train to this many instead; a falling learning rate then falls over the new total.
        device: go on there instead of on the run's own.

    Raises:
        CheckpointError, RunFolderError: there is nothing to resume there.
        ValueError, BackendError: the device is not there, or the backend cannot run on it; nothing has been written.
    """
    state = checkpoint.load(path)
    config = config_from_json(path / "config.json", quiet=quiet)
    if epochs is not None:
        config = dataclasses.replace(config, epochs=epochs)
    if device is not None:
        config = dataclasses.replace(config, device=device)
    trainer = Trainer(config)
    folder = RunFolder.resume(path, before_epoch=state["epoch"] + 1)
    if epochs is not None or device is not None:
        folder.write_config(dataclasses.asdict(config))
    trainer.restore(state, folder.read_metrics())
    return trainer.run(folder), folder.path


def config_from_json(path: Path, *, quiet: bool = False, complete: bool = True) -> TrainConfig:
    """The configuration that a run folder holds.

    Args:
        complete: every option must be there; else those that are not have their defaults.

    Raises:
        CheckpointError: it is missing, damaged or of another version.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise checkpoint.CheckpointError(f"{path}: not a readable configuration: {error}") from error
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if not isinstance(values, dict):
        raise checkpoint.CheckpointError(f"{path}: expected a JSON object of options, got {type(values).__name__}")
    odd = {"unknown": sorted(set(values) - known), "missing": sorted(known - set(values)) if complete else []}
    if any(odd.values()):
        found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in odd.items() if names)
        raise checkpoint.CheckpointError(f"{path}: not the configuration of this version of ep-train ({found})")
    try:
        for name in ("data_root", "out", "teacher_cache"):
            values[name] = Path(values[name]) if values.get(name) is not None else None
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return TrainConfig(**{**values, "quiet": quiet})
    except (TypeError, ValueError) as error:
        raise checkpoint.CheckpointError(f"{path}: not a configuration of ep-train: {error}") from error


def make_optimizer(learner: Learner, config: TrainConfig) -> torch.optim.Optimizer:
    """torch's optimizer, one parameter group per tensor, with the layer's factor of the learning rate."""
    layers = learner.layers  # nodes, then the readout
    factors = config.layer_lr or (1.0,) * layers
    if len(factors) != layers:
        raise ValueError(
            f"TrainConfig: argument 'layer_lr': expected {layers} factors (bottom to top, then a readout that has "
            f"weights), got {len(factors)}"
        )
    groups = [
        {"params": [p], "lr": config.lr * factors[learner.layer_of(name) - 1]}
        for name, p in learner.model.named_parameters()
        if p.requires_grad
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Factor of the learning rate at each of ``steps`` steps, from 1 to ``lr_min / lr``."""
    end = config.lr_min / config.lr
    falls = {
        "constant": lambda t: 1.0,
        "linear": lambda t: 1.0 - (1.0 - end) * t / steps,
        "cosine": lambda t: end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * t / steps)),
    }
    return torch.optim.lr_scheduler.LambdaLR(optimizer, falls[config.lr_schedule])


@contextmanager
def _backend(name: str) -> Iterator[None]:
    if name == "auto":  # leaves the environment variable in force
        yield
    else:
        with ep_kernels.backend(name):
            yield
