"""Signals become requests, so that no step is cut in half."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .trainer import Trainer

PREEMPTED = "SIGUSR1"  # what a batch system sends some time before it takes the machine away
ASKING = ("SIGINT", "SIGTERM", PREEMPTED)  # those that this system has


class Stopped(Exception):
    """A signal asked for the end, and no batch is half done."""


@contextmanager
def stop_on_signals(trainer: Trainer) -> Iterator[None]:
    """Turn SIGINT, SIGTERM or SIGUSR1 into a request: the trainer's ``stop_asked`` and ``stop_signal``.

    A SIGINT after that raises KeyboardInterrupt at once. Other signals after the first change nothing: a batch system
    sends several, and the checkpoint that the first one asked for may be on its way.
    """

    def ask(number: int, frame: object) -> None:
        if trainer.stop_asked:
            if number == signal.SIGINT and not trainer.processes.several:  # torchrun ends those that do not end
                raise KeyboardInterrupt
            return
        trainer.stop_asked, trainer.stop_signal = True, signal.Signals(number).name

    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return
    numbers = [getattr(signal, name) for name in ASKING if hasattr(signal, name)]
    previous = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
