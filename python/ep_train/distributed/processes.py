"""The processes of a run, as torchrun starts them: who this one is, and what it does together with the others."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
TIMEOUT = "EP_TRAIN_TIMEOUT"
NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GONE = re.compile(  # how plain errors of an exchange begin: mostly with gloo's file and line; NCCL's have its name
    r"\[(?!enforce fail)[^]\n]*\bgloo/[^]\n]*\]|Gloo connect|Application timeout caused pair closure"
    r"|Connection (closed|reset) by peer|Socket (unexpectedly )?closed|Socket Timeout|Timed out waiting|.*\bNCCL\b"
)
HOW = "start the processes with: torchrun --nproc-per-node N -m ep_train ..."


class ProcessError(RuntimeError):
    """The processes cannot work together; the message says why, and is this process's own."""


class LostContact(ProcessError):
    """Another process has died, or has not answered in time."""


class FirstFailed(ProcessError):
    """What the first process did for all has failed, there; it says why."""


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Processes:
    """Those of a run. Alone (the default) every method works, and waits for nobody.

    Attributes:
        rank: of this process, from 0. count: of all.
        local_rank, local_count: the same on this machine.
        timeout: seconds that one waits for another, before it gives up (``EP_TRAIN_TIMEOUT``).
        stopping: whether this process was asked to stop; the first one looks between two parts of long work for all.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    timeout: float = 600.0
    stopping: Callable[[], bool] = field(default=_never, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """This one speaks for all: it prints, and writes the run's folder."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """There are others."""
        return self.count > 1

    def part(self, total: int) -> slice:
        """Which of ``total`` things are this process's: parts follow each other, and differ by one at most."""
        return slice(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def share(self, total: int) -> float:
        """This process's part of ``total`` things, as a fraction."""
        mine = self.part(total)
        return (mine.stop - mine.start) / total if total else 0.0

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all processes, in place; on a GPU nothing is waited for.

        Raises:
            LostContact: another process is gone.
        """
        if self.several:
            with self.contact():
                dist.all_reduce(tensor)
        return tensor

    def first_does(self, work: Callable[[], T]) -> T:
        """What ``work`` returns in the first process, which alone does it; the others wait for it.

        What it returns has to be picklable; the others get copies, with tensors on the CPU.

        Raises:
            Exception: whatever ``work`` raises, in the first process.
            FirstFailed: in the others.
        """
        if not self.several:
            return work()
        if not self.first:
            sent: list[Any] = [None]
            self._broadcast(sent)
            fine, value = sent[0]
            if not fine:
                raise FirstFailed(f"the first process failed: {value}")
            return value  # type: ignore[no-any-return]
        try:
            found = work()
        except Exception as error:
            self._broadcast([(False, str(error))])
            raise
        self._broadcast([(True, found)])
        return found

    def same(self, what: str, value: object) -> None:
        """Make sure that ``value`` is the same in all processes.

        Raises:
            ProcessError: it differs; in every process whose value is not the first one's, and FirstFailed elsewhere.
            LostContact: another process is gone.
        """
        if not self.several:
            return
        sent: list[Any] = [value]
        self._broadcast(sent)
        odd = torch.zeros(self.count, dtype=torch.int64)
        odd[self.rank] = int(sent[0] != value)
        self.sum(odd)
        if not odd.any():
            return
        if odd[self.rank]:
            raise ProcessError(f"{what}: expected those of the first process, {_short(sent[0])}, got {_short(value)}")
        others = ", ".join(str(rank) for rank in odd.nonzero().flatten().tolist())
        raise FirstFailed(f"{what}: others in process {others} than in the first one")

    def meet(self) -> None:
        """Wait for all of them.

        Raises:
            LostContact: another process is gone.
        """
        self.sum(torch.zeros(1))

    @contextmanager
    def local_first(self) -> Iterator[None]:
        """The first process of every machine does what is within before the others do: what it downloads or writes is
        there for them.

        Raises:
            LostContact: another process is gone.
        """
        if self.local_rank:
            self.meet()
        yield
        if not self.local_rank:
            self.meet()

    @contextmanager
    def contact(self) -> Iterator[None]:
        """Errors of the exchange within, as one that says what has happened; others (no memory, a broken GPU) pass.

        Raises:
            LostContact: another process is gone.
        """
        try:
            yield
        except RuntimeError as error:
            if not _of_exchange(error):
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise LostContact(f"no contact with the other processes: one has ended or hangs ({reason})") from error

    def _broadcast(self, sent: list[Any]) -> None:
        with self.contact():
            dist.broadcast_object_list(sent, 0, device=torch.device("cpu"))


def _of_exchange(error: RuntimeError) -> bool:
    """It is torch's for an exchange that failed, or what gloo and NCCL say as a plain RuntimeError."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and GONE.match(str(error)) is not None


def _short(value: object, length: int = 300) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def from_environment(environment: Mapping[str, str] = os.environ) -> Processes:
    """The processes that torchrun has started, or one alone.

    Raises:
        ProcessError: variables of torchrun that are missing or make no sense.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return Processes()
    missing = [name for name in NEEDED if name not in environment]
    if missing:
        there = ", ".join(name for name in NEEDED if name in environment)
        raise ProcessError(
            f"expected the environment variables of torchrun, got {there} without {', '.join(missing)}: {HOW}"
        )
    numbers = {}
    for name in NEEDED[:4]:
        if not environment[name].isdecimal():
            raise ProcessError(f"environment variable {name}: expected an integer >= 0, got {environment[name]!r}")
        numbers[name] = int(environment[name])
    for name, limit in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("LOCAL_WORLD_SIZE", "WORLD_SIZE")):
        most = numbers[limit] - (name != "LOCAL_WORLD_SIZE")
        if numbers[name] > most:
            raise ProcessError(
                f"environment variable {name}: expected at most {most} ({limit} {numbers[limit]}), got {numbers[name]}"
            )
    seconds = environment.get(TIMEOUT, str(Processes.timeout))
    try:
        timeout = float(seconds)
    except ValueError:
        timeout = math.nan
    if not (timeout > 0 and math.isfinite(timeout)):
        raise ProcessError(f"environment variable {TIMEOUT}: expected seconds > 0, got {seconds!r}")
    rank, count, local_rank, local_count = (numbers[name] for name in NEEDED[:4])
    return Processes(rank, count, local_rank, local_count, timeout)


def voice() -> tuple[str, bool]:
    """How this process names itself in a message, and whether it is the one that speaks for all."""
    try:
        processes = from_environment()
    except ProcessError:
        return "ep-train", True
    name = f"ep-train (process {processes.rank} of {processes.count})" if processes.several else "ep-train"
    return name, processes.first


def own_device(processes: Processes, device: torch.device, name: str) -> torch.device:
    """The device of this process: the CPU, or the GPU with its local rank for a number.

    Args:
        device: of a run of one process. name: as it was asked for.

    Raises:
        ValueError: a single GPU for several processes, or more processes on this machine than GPUs.
    """
    if not processes.several or device.type != "cuda":
        return device
    if name.startswith("cuda:"):
        raise ValueError(
            f"TrainConfig: argument 'device': expected auto, cpu or cuda with {processes.count} processes (each takes "
            f"a GPU of its own), got {name!r}"
        )
    gpus = torch.cuda.device_count()
    if processes.local_count > gpus:
        raise ValueError(
            f"TrainConfig: argument 'device': expected at most {gpus} processes on this machine (a GPU each), got "
            f"{processes.local_count}: lower --nproc-per-node, or use --device cpu"
        )
    return torch.device("cuda", processes.local_rank)


@contextmanager
def joined(processes: Processes) -> Iterator[None]:
    """Connect the processes: by NCCL for what is on GPUs, by gloo for what is on the host. A process group that is
    there already is used as it is.

    Raises:
        LostContact: not all processes have come.
    """
    if not processes.several or dist.is_initialized():
        yield
        return
    with processes.contact():
        timeout = timedelta(seconds=processes.timeout)
        store, rank, count = next(dist.rendezvous("env://", processes.rank, processes.count, timeout=timeout))  # type: ignore[attr-defined]
        if os.environ.get("LOCAL_WORLD_SIZE") == str(count):
            # torchrun keeps one store over restarts: without this, the addresses of killed processes are found in it.
            # (On several machines the counts may differ, and each attempt has a store of its own.)
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"attempt-{attempt}", store)  # type: ignore[attr-defined]
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
    log = logging.getLogger("ep_kernels")
    level = log.level
    if not processes.first:
        log.setLevel(logging.ERROR)  # the first one says the same
    try:
        yield
    except LostContact:
        raise  # to take leave of who is gone may hang
    except BaseException:
        dist.destroy_process_group()
        raise
    finally:
        log.setLevel(level)
    dist.destroy_process_group()
