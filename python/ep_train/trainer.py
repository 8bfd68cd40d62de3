"""The training loop: data, model, optimizer, evaluation, run folder."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack, suppress
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
from .distributed import (
    Agreement,
    FirstFailed,
    GradientMean,
    LostContact,
    Processes,
    check_alike,
    own_device,
    shared_step,
    spread,
)
from .divergence import Diverged, check_weights, keep_unconverged
from .epoch import Partial, train_epoch
from .learners import Batch, NetworkLearner, make_learner
from .memory import peak_memory_bytes
from .optim import make_optimizer, make_scheduler
from .probe import IMAGES, probe_gradient
from .progress import Progress
from .rollback import go_back
from .run_folder import CONFIG, RunFolder, RunFolderError
from .signals import ASKING, Stopped, stop_on_signals
from .stability import advice, diagnose
from .step import StepResult
from .summary import closing, headline, summarise

PROBE = 64  # test images whose relaxation is looked at after every epoch
HISTOGRAMS = 16  # of those, whose states TensorBoard shows


class Trainer:
    """One run. Build it, then :meth:`run`."""

    def __init__(
        self, config: TrainConfig, *, dataset: Dataset | None = None, processes: Processes | None = None
    ) -> None:
        """
        Args:
            config: the run.
            dataset: already loaded; default: ``config.dataset`` is loaded.
            processes: those that share the run, joined; default: this one alone.

        Raises:
            DataError, ValueError: the data cannot be read, an argument does not fit it, or the device is not there.
            BackendError: the backend cannot run there.
            MissingExtra: tensorboard is asked for and not installed.
            ProcessError: the processes cannot work together.
        """
        self.processes = processes = processes or Processes()
        check_config(config, processes)
        if not processes.first:
            config = dataclasses.replace(config, quiet=True)
        self.config = config
        # what is not there or cannot run is refused before anything is written
        device = devices.resolve(config.device, "TrainConfig", backend=config.backend)
        self.device = own_device(processes, device, config.device)
        with devices.kernels(config.backend):
            backends.choose(self.device, storage=config.relax_config().storage)
        if config.tensorboard:
            require_tensorboard()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if dataset is None:
            with processes.local_first():
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
        spread(processes, self.model)
        self.train = Batches(
            dataset,
            "train",
            batch_size=config.batch_size,
            seed=config.seed,
            crop_padding=config.crop_padding,
            flip=config.flip,
            cutout=config.cutout,
            device=self.device,
            shard=(processes.rank, processes.count),
        )
        self.test = Batches(
            dataset,
            "test",
            batch_size=min(256 * processes.count, len(dataset.test_labels)),
            device=self.device,
            shard=(processes.rank, processes.count),
        )
        self.mean = GradientMean(processes)
        self.agreement = Agreement(processes, ("stop", *ASKING, "read"))
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
    def stopping(self) -> bool:
        """The run ends before the next batch: a signal asked for it, in several processes in any of them."""
        return self.agreement.agreed["stop"] if self.processes.several else self.stop_asked

    def ask(self, *, read: bool) -> None:
        """Begin to agree, while a batch is computed, on what all processes do after it."""
        stop = self.stop_asked  # before the name: a signal that comes between the two is for the next batch
        signals = {name: self.stop_signal == name for name in ASKING}
        self.agreement.ask(stop=stop, **signals, read=read)

    def learn(self, batch: Batch) -> tuple[StepResult, int]:
        """Gradients of a batch into ``.grad``; of all processes together its result and its number of images."""
        total = min(self.config.batch_size, len(self.train.labels) - batch.number * self.config.batch_size)
        return shared_step(self.learner, batch, total, self.mean), total

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
        """Write a checkpoint into the run's folder, unless the newest one is of this very step; of several processes
        the first one does.

        Raises:
            Diverged: a weight is not finite; nothing is written.
            CheckpointError: it cannot be written; those before it are as they were.
        """
        here = (self.folder, self.step, self.rollbacks)
        if self.folder is None or here == self._saved:
            return
        check_weights(self)
        if self.processes.first:
            checkpoint.save(self.folder.path, self.state(), keep=self.config.keep_checkpoints)
        self._saved = here

    def evaluate(self) -> float:
        """Accuracy on the test images, at the free equilibrium."""
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for images, labels in self.test.epoch(0):
            if len(labels):  # fewer images than processes leave some without
                z, _ = self.learner.predict(images)
                correct += (z.argmax(1) == labels).sum()
        return int(self.processes.sum(correct)) / len(self.dataset.test_labels)

    def look(self, progress: Progress) -> dict[str, Any]:
        """How well the free phase converges on some test images, per layer, for the row of metrics; a note when it
        does not, which says what to change (once for the same advice)."""
        learner = self.learner
        if not self.processes.first or not isinstance(learner, NetworkLearner) or self.config.method == "backprop":
            return {}
        images, labels = (t[:PROBE] for t in next(self.test.epoch(0)))
        if not len(images):  # fewer of them than processes
            return {}
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
            ConvergenceError: a free phase ended above ``tol``, with ``on_fail`` raise (likewise, and a checkpoint of
                the steps before it).
            CheckpointError, RunFolderError: a file cannot be written; the last good checkpoint is as it was.
        """
        status = "finished"
        failure: Exception | None = None
        self.folder = folder
        shown = self.config.tensorboard and self.processes.first
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with (
            devices.in_force(self.device, tf32=self.config.operands == "tf32", backend=self.config.backend),
            folder.in_use(),
            stop_on_signals(self),
            open_board(shown, folder.path, after_step=self.epoch * len(self.train)) as board,
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
                if self.epoch < self.config.epochs:
                    self._prepare()
                if self.config.on_divergence == "rollback" and not checkpoint.existing(folder.path):
                    self.save()  # a place to go back to in the first epoch, too
                while self.epoch < self.config.epochs:
                    try:
                        row = self.train_epoch(progress)
                        check_weights(self)
                    except Diverged as error:
                        progress.note(go_back(self, folder, error))
                        continue
                    check_alike(self.processes, self.model)
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
                told = [name for name in ASKING if self.agreement.agreed[name]]
                if told:  # to one process or another; PREEMPTED, the last of them, means that the run is wanted again
                    self.stop_signal = told[-1]
                try:
                    if isinstance(error, Stopped):  # between two batches: the weights are whole
                        self.save()
                except Diverged as found:
                    status, failure = "diverged", found
                where = f"{self.epoch} of {self.config.epochs} epochs and {self.partial.batches} batches"
                progress.note(f"stopped after {where}; {what_is_left(folder)}")
            except LostContact as error:
                with suppress(RunFolderError):  # this error goes first
                    folder.write_summary(summarise(self, "failed", reason=str(error)))
                raise LostContact(f"{error}; {what_is_left(folder)}") from error
            except ep_kernels.ConvergenceError as error:
                status, failure = "diverged", error
                self._save_unconverged(folder, error)
            except Diverged as error:
                status, failure = "diverged", error
            summary = summarise(self, status)
            folder.write_summary(summary)
            if self.rows and self.processes.first:
                plot_curves(self.rows, folder.path / "curves.png", title=headline(self))
            if isinstance(failure, ep_kernels.ConvergenceError):
                raise failure  # of this process's images: the others are told by its end
            self.processes.meet()  # nobody leaves while the first one still writes
            if failure is not None:
                raise failure if self.processes.first else FirstFailed(str(failure))
            progress.note(closing(summary, folder))
        return summary

    def _prepare(self) -> None:
        """What a learner does before the first batch; the first process looks for signals meanwhile.

        Raises:
            Stopped: it was asked to stop; all processes know the signal then.
        """
        try:
            self.learner.prepare(dataclasses.replace(self.processes, stopping=lambda: self.stop_asked))
        except Stopped:
            self.ask(read=False)
            self.agreement.answer()
            raise

    def _save_unconverged(self, folder: RunFolder, error: ep_kernels.ConvergenceError) -> None:
        """Write a checkpoint of the steps before the batch unless the states are not finite, then keep the batch; all
        of it is part of the error's message. Several processes keep the checkpoints that there are: one of them alone
        knows."""
        message, unsaved = str(error), ""
        if not self.processes.several:
            try:
                if error.equilibrium.residual.isfinite().all():
                    self.save()
            except (Diverged, checkpoint.CheckpointError) as problem:
                unsaved = f"; {problem}"
            try:
                message = keep_unconverged(self, folder.path, error)
            except Exception as problem:  # no memory: more is held than in a step
                message = f"{message}; its layers cannot be looked at ({type(problem).__name__}: {problem})"
            message += unsaved
        change = f"change one of these or on_fail in {folder.path / CONFIG}, then "
        how = what_is_left(folder)
        error.args = (f"{message}; {change if checkpoint.existing(folder.path) else ''}{how}",)

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
            self.learner.restore(state)  # first: other data also change shapes, and its message says so
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.epoch, self.seconds, self.rows = state["epoch"], state["seconds"], rows
            self.partial = Partial(**state["partial"])
            self.rollbacks = int(state["rollbacks"])
            self.came_from = str(state["device"])
            batches = len(self.train)
            if not (0 <= self.partial.batches < batches and self.step == state["step"]):
                raise ValueError(f"it is of step {state['step']}, here {self.step} with {batches} batches an epoch")
            self._saved = (self.folder, self.step, self.rollbacks)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise checkpoint.CheckpointError(f"the checkpoint does not fit config.json: {error}") from error


def what_is_left(folder: RunFolder) -> str:
    """Of a run that did not end: how to go on."""
    resumable = checkpoint.existing(folder.path)
    return f"continue with: ep-train resume {folder.path}" if resumable else "nothing was kept"


def check_config(config: TrainConfig, processes: Processes) -> None:
    """Raise ValueError for options that several processes cannot serve."""
    if not processes.several:
        return
    if config.warm_start:
        raise ValueError(
            f"TrainConfig: argument 'warm_start': expected none with {processes.count} processes (an image goes to "
            "another process in every epoch, its last equilibrium stays where it was)"
        )
    if config.batch_size < processes.count:
        raise ValueError(
            f"TrainConfig: argument 'batch_size': expected at least {processes.count}, an image for each process, got "
            f"{config.batch_size}"
        )


def new_folder(config: TrainConfig, held: ExitStack | None = None) -> RunFolder:
    """The folder of a run that begins, with its configuration in it.

    Args:
        config: of the run.
        held: see :meth:`RunFolder.create`.

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
        held=held,
    )
    folder.write_config(dataclasses.asdict(portable(config)))
    return folder
