"""The training loop: data, model, optimizer, evaluation, run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import ep_kernels
from ep_kernels import backends

from . import checkpoint
from . import device as devices
from .board import open_board, require_tensorboard
from .config import TrainConfig
from .config_file import portable
from .curves import plot_curves
from .data import Batches, Dataset, load_dataset
from .divergence import Diverged, check_weights
from .epoch import Partial, Stopped, train_epoch
from .learners import NetworkLearner, make_learner
from .memory import peak_memory_bytes
from .optim import make_optimizer, make_scheduler
from .probe import IMAGES, probe_gradient
from .progress import Progress
from .rollback import go_back
from .run_folder import RunFolder
from .signals import stop_on_signals
from .stability import advice, diagnose
from .summary import closing, headline, summarise

PROBE = 64  # test images whose relaxation is looked at after every epoch
HISTOGRAMS = 16  # of those, whose states TensorBoard shows


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
            MissingExtra: tensorboard is asked for and not installed.
        """
        self.config = config
        # what is not there or cannot run is refused before anything is written
        self.device = devices.resolve(config.device, "TrainConfig", backend=config.backend)
        with _backend(config.backend):
            backends.choose(self.device, storage=config.relax_config().storage)
        if config.tensorboard:
            require_tensorboard()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if dataset is None:
            dataset = load_dataset(
                config.dataset,
                root=config.data_root,
                train_limit=config.train_limit,
                test_limit=config.test_limit,
                seed=config.seed,
                data_cache=config.data_cache,
                normalise=config.normalise,
            )
        elif config.normalise is not None:
            dataset = dataclasses.replace(dataset, normalise=config.normalise)
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
        self.stop_signal: str | None = None
        self.rollbacks = 0  # of the run so far
        self.folder: RunFolder | None = None  # while it runs
        self._saved: tuple[RunFolder | None, int, int] | None = None
        self.seconds = 0.0  # of training itself, without evaluation
        self.rows: list[dict[str, Any]] = []
        self.came_from = devices.kind(self.device)  # where a resumed run was before

    # ---- one epoch ----

    def train_epoch(self, progress: Progress) -> dict[str, Any]:
        """Train on every batch once; returns the epoch's row of metrics (without the test accuracy)."""
        return train_epoch(self, progress)

    @property
    def step(self) -> int:
        """Finished steps of the run, over all epochs, with those that were left out."""
        return self.epoch * len(self.train) + self.partial.batches

    def checkpoint_due(self, batches: int) -> bool:
        """Whether ``--checkpoint-every`` asks for one after so many batches of the epoch (its end always has one)."""
        every = self.config.checkpoint_every
        step = self.epoch * len(self.train) + batches
        return every > 0 and step % every == 0 and batches < len(self.train)

    def save(self) -> None:
        """Write a checkpoint into the run's folder, unless the newest one is of this very step.

        Raises:
            Diverged: a weight is not finite; nothing is written.
            CheckpointError: it cannot be written; those before it are as they were.
        """
        here = (self.folder, self.step, self.rollbacks)
        if self.folder is None or here == self._saved:
            return
        check_weights(self)
        checkpoint.save(self.folder.path, self.state(), keep=self.config.keep_checkpoints)
        self._saved = here

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
        images, labels = (t[:PROBE] for t in next(self.test.epoch(0)))
        relax = self.config.evaluation_config()
        stability = diagnose(learner.network, learner.model.tensors(), images, relax)
        found = advice(stability, relax, learner.network)
        if found is not None and found != self.advised:
            self.advised = found
            progress.note(found)
        row = stability.row()
        if self.config.probe_gradient and self.epoch % self.config.probe_gradient == 0:
            row |= probe_gradient(learner.model, images[:IMAGES], labels[:IMAGES], self.config)
        return row

    def some_states(self) -> dict[int, Tensor]:
        """Of some test images, by node: the free equilibrium, for histograms. A teacher has none."""
        learner = self.learner
        if not isinstance(learner, NetworkLearner):
            return {}
        states = learner.states(next(self.test.epoch(0))[0][:HISTOGRAMS])
        return dict(enumerate(states[1:], 1))

    # ---- the run ----

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Train to the last epoch, or until SIGINT, SIGTERM or SIGUSR1; returns the summary, also in the folder.

        A signal ends the run after the batch that it fell into, with a checkpoint; a further SIGINT ends it at once.

        Raises:
            Diverged: the loss, a gradient or a weight is not finite, or the loss has run away (the summary is written
                first).
            ConvergenceError: a free phase ended above ``tol``, with ``on_fail`` raise (likewise).
            CheckpointError, RunFolderError: a file cannot be written; the last good checkpoint is as it was.
        """
        status, failure = "finished", None
        self.folder = folder
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with (
            _backend(self.config.backend),
            devices.in_force(self.device, tf32=self.config.operands == "tf32"),
            folder.in_use(),
            stop_on_signals(self),
            open_board(self.config.tensorboard, folder.path, after_step=self.epoch * len(self.train)) as board,
            Progress(self.config.epochs, quiet=self.config.quiet) as progress,
        ):
            progress.note(headline(self))
            if self.came_from != devices.kind(self.device):
                progress.note(
                    f"this run comes from another device ({self.came_from}): its numbers will be close to those of "
                    "a run that stayed there, not the same bit for bit"
                )
            if self.epoch >= self.config.epochs:
                progress.note(f"already finished after {self.epoch} epochs; resume with --epochs N to go on")
            try:
                if self.config.on_divergence == "rollback" and not checkpoint.existing(folder.path):
                    self.save()  # a place to go back to in the first epoch, too
                while self.epoch < self.config.epochs:
                    try:
                        row = self.train_epoch(progress)
                        check_weights(self)
                    except Diverged as error:
                        progress.note(go_back(self, folder, error))
                        continue
                    row |= self.look(progress)
                    last = self.epoch == self.config.epochs
                    if last or self.epoch % self.config.evaluate_every == 0:
                        row["test_accuracy"] = self.evaluate()
                    progress.end_epoch(row)
                    if board is not None:
                        row["peak_memory_bytes"] = peak_memory_bytes(self.device)
                        board.write(row, self.some_states())
                    self.rows.append(row)
                    folder.append_metrics(row)
                    self.save()
            except (Stopped, KeyboardInterrupt) as error:
                status = "interrupted"
                try:
                    if isinstance(error, Stopped):  # between two batches: the weights are whole
                        self.save()
                except Diverged as found:
                    status, failure = "diverged", found
                where = f"{self.epoch} of {self.config.epochs} epochs and {self.partial.batches} batches"
                resumable = checkpoint.existing(folder.path)
                then = f"continue with: ep-train resume {folder.path}" if resumable else "nothing was kept"
                progress.note(f"stopped after {where}; {then}")
            except (Diverged, ep_kernels.ConvergenceError) as error:
                status, failure = "diverged", error
            summary = summarise(self, status)
            folder.write_summary(summary)
            if self.rows:
                plot_curves(self.rows, folder.path / "curves.png", title=headline(self))
            if failure is not None:
                raise failure
            progress.note(closing(summary, folder))
        return summary

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "step": self.step,
            "scheduled": self.partial.batches == 0 or self.checkpoint_due(self.partial.batches),
            "epoch": self.epoch,
            "seconds": self.seconds,
            "rollbacks": self.rollbacks,
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
            self.rollbacks = int(state["rollbacks"])
            self.came_from = str(state["device"])
            self.learner.restore(state)
            batches = len(self.train)
            if not (0 <= self.partial.batches < batches and self.step == state["step"]):
                raise ValueError(f"it is of step {state['step']}, here {self.step} with {batches} batches an epoch")
            self._saved = (self.folder, self.step, self.rollbacks)
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise checkpoint.CheckpointError(f"the checkpoint does not fit config.json: {error}") from error


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


@contextmanager
def _backend(name: str) -> Iterator[None]:
    if name == "auto":  # leaves the environment variable in force
        yield
    else:
        with ep_kernels.backend(name):
            yield
