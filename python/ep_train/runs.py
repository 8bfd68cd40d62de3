"""Start a run, or go on with one that stopped."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from . import checkpoint
from .config import TrainConfig
from .config_file import FREE, START, config_from_json, going_on, portable, with_free
from .distributed import Processes, from_environment, joined
from .run_folder import CONFIG, NoFolder, RunFolder, RunFolderError
from .trainer import Trainer, new_folder

# Seconds that --resume-or-start waits for another process in the folder: over NFS the lock of a machine that is lost
# lasts until its lease ends, of 90 s where nobody has chosen another.
PATIENCE = 120.0


def train(config: TrainConfig) -> tuple[dict[str, Any], Path]:
    """Start a run, or take part in one: under torchrun every process calls this.

    With ``resume_or_start`` it goes on instead, where ``out`` has a run of the same configuration. Options that say
    where and not what (``FREE`` of ep_train.config_file), and are not the defaults in ``config``, are as there from
    then on. Where another process is in ``out`` (or a machine was that is lost) it waits up to two minutes for its end.

    Args:
        config: the run: data, network, method and where it is written.

    Returns:
        Its summary, as in summary.json, and its folder.

    Raises:
        DataError, ValueError: the data cannot be read, options that do not fit together or the data; a device that is
            not there; a teacher or a cache of its logits that cannot be used.
        BackendError, MissingExtra: the backend cannot run there; what an option needs is not installed.
        RunFolderError, CheckpointError: ``out`` cannot be used, or holds a run of another configuration; a checkpoint
            cannot be written.
        Diverged: a loss, a gradient or a weight is not finite, or the loss has run away (``on_divergence``).
        ConvergenceError: a free phase of a training batch ended above ``tol``, with ``on_fail`` raise.
        ProcessError: several processes cannot work together, or another one is gone.
    """
    processes = from_environment()
    with joined(processes), ExitStack() as held:
        processes.same("options", dataclasses.asdict(dataclasses.replace(config, data_root=None, quiet=False)))
        out = config.out
        if config.resume_or_start and out is not None and processes.first_does(lambda: _is_there(config, out)):
            wait = min(PATIENCE, processes.timeout / 2)  # the others wait for this one
            found = processes.first_does(lambda: _where_it_stopped(out, held, wait=wait))
            theirs = processes.first_does(lambda: config_from_json(out / CONFIG) if _is_there(config, out) else config)
            return _go_on(out, going_on(config, theirs), processes, found)
        trainer = Trainer(config, processes=processes)
        path = processes.first_does(lambda: new_folder(config, held).path)
        return trainer.run(_folder(path, processes)), path


def _is_there(config: TrainConfig, path: Path) -> bool:
    """Whether ``path`` holds this run already.

    Raises:
        CheckpointError: its configuration cannot be read.
        RunFolderError: it is another one.
    """
    if not (path / CONFIG).is_file():
        return False
    theirs = dataclasses.asdict(portable(config_from_json(path / CONFIG)))
    ours = dataclasses.asdict(portable(config))
    odd = [name for name in ours if name not in FREE + START and ours[name] != theirs[name]]
    if odd:
        found = ", ".join(f"{name} {theirs[name]!r} and not {ours[name]!r}" for name in odd)
        raise RunFolderError(
            f"{path} holds a run of another configuration ({found}): choose another folder, or go on with it as it is: "
            f"ep-train resume {path}"
        )
    return True


def _folder(path: Path, processes: Processes) -> RunFolder:
    return (RunFolder if processes.first else NoFolder)(path)


def resume(path: Path, *, epochs: int | None = None, quiet: bool = False, **free: Any) -> tuple[dict[str, Any], Path]:
    """Continue the run in ``path`` from its newest good checkpoint: the same numbers as if it had never stopped.

    A run that was killed before its first checkpoint starts from its beginning. Checkpoints that are damaged are named
    in the log and renamed.

    The same bit for bit is promised on the same kind of device only; a run may go on on another one, and says so. On a
    GPU the kernels of backend ``triton`` add without atomics, in one order; cuDNN, which computes for ``reference`` and
    BPTT there, promises none.

    Under torchrun every process calls this; there may be another number of them than before. The numbers are then the
    same to rounding.

    Args:
        path: the run's folder.
        epochs: train to this many instead; a falling learning rate then falls over the new total.
        quiet: print nothing.
        free: other options that say where and not what (``FREE`` of ep_train.config_file), as ``device="cuda"``; None:
            the run's own. They and ``epochs`` are in its config.json from then on.

    Returns:
        The summary of the whole run, as in summary.json, and its folder.

    Raises:
        CheckpointError, RunFolderError: there is nothing to resume there, or what is there is of another network,
            optimizer or teacher, or of other images; nothing has been written.
        ValueError, BackendError: the device is not there, or the backend cannot run on it; nothing has been written.
        TypeError: an option that may not change.
        DataError, MissingExtra, Diverged, ConvergenceError, ProcessError: see :func:`train`.
    """
    processes = from_environment()
    with joined(processes), ExitStack() as held:
        found = processes.first_does(lambda: _where_it_stopped(path, held))
        config = processes.first_does(lambda: config_from_json(path / CONFIG, quiet=quiet))
        if epochs is not None:
            config = dataclasses.replace(config, epochs=epochs)
        return _go_on(path, with_free(config, **free), processes, found)


def _go_on(
    path: Path, config: TrainConfig, processes: Processes, found: checkpoint.Found | None
) -> tuple[dict[str, Any], Path]:
    trainer = Trainer(config, processes=processes)
    trainer.folder = _folder(path, processes)
    if found is not None:
        trainer.restore(found.state, [])
    processes.meet()  # what one of them refuses leaves the folder as it is

    def rows() -> list[dict[str, Any]]:
        folder = RunFolder.resume(path, before_epoch=1 if found is None else found.state["epoch"] + 1)
        if found is not None:
            checkpoint.set_aside(found.refused)
        now = portable(config)
        if now != config_from_json(path / CONFIG, quiet=config.quiet):
            folder.write_config(dataclasses.asdict(now))
        return folder.read_metrics()

    trainer.rows = processes.first_does(rows)
    return trainer.run(trainer.folder), path


def _where_it_stopped(path: Path, held: ExitStack, *, wait: float = 0.0) -> checkpoint.Found | None:
    """The checkpoint to go on from; None where none has been written yet.

    Args:
        held: keeps other processes out of the folder until it is closed.
        wait: so many seconds for another process's end.

    Raises:
        CheckpointError: there is no run, none of its checkpoints is good, or they are gone.
        RunFolderError: another process runs there.
    """
    if (path / CONFIG).exists() or (path / checkpoint.FOLDER).exists():  # else a lock would be all that is there
        held.enter_context(RunFolder(path).in_use(wait=wait))
    # the first row may be there already: it is written just before the first checkpoint
    if (path / CONFIG).is_file() and checkpoint.never_written(path) and len(RunFolder(path).read_metrics()) <= 1:
        return None
    return checkpoint.newest_good(path)
