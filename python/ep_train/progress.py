"""What a training run shows: bars for the epoch and the run, and one line when an epoch is over."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Progress:
    """Context manager around a run's epochs.

    On a terminal, a bar for the running epoch, one for the run, and one line for each finished epoch; elsewhere (pipe,
    file, CI) only the lines; with `quiet`, nothing. Bars say how long is left, of the epoch and of the run, and lines
    that of the run (ETA): by the pace since this process began its first epoch, evaluations included.

    >>> with Progress(epochs=1, quiet=True) as progress:
    ...     progress.start_epoch(1, total_batches=10)
    ...     progress.update(loss=2.3, accuracy=0.1)
    ...     progress.end_epoch({"epoch": 1, "train_loss": 2.3})
    """

    def __init__(
        self,
        epochs: int | None = None,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        bar: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            epochs: how many there will be, for "3/20" and the ETA; None: only "3".
            quiet: show nothing.
            stream: where to write; default: the standard output at the time of each line.
            bar: show the bar; default: when `stream` is a terminal and rich can be imported.
            clock: the time, in seconds.
        """
        self._epochs = epochs
        self._quiet = quiet
        self._stream = stream
        self._want_bar = bar
        self._rich: RichProgress | None = None
        self._task: TaskID | None = None
        self._run: TaskID | None = None
        self._clock = clock
        self._began: tuple[float, int] | None = None  # when, and with how many batches of the run behind it
        self._done = self._per_epoch = 0  # batches: of the run so far, and of an epoch

    def __enter__(self) -> Progress:
        stream = self._output()
        wanted = stream.isatty() if self._want_bar is None else self._want_bar
        if wanted and not self._quiet:
            self._rich = _make_bar(stream, force=self._want_bar is True)
            if self._rich is not None:
                self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._remove_task()
            if self._run is not None:
                self._rich.remove_task(self._run)
                self._run = None
            self._rich.stop()
            self._rich = None

    def start_epoch(self, epoch: int, total_batches: int, *, completed: int = 0) -> None:
        """Begin an epoch.

        Args:
            epoch: its number, as shown.
            total_batches: how many `update` calls make it complete.
            completed: how many of them a resumed run has behind it.
        """
        self._done, self._per_epoch = (epoch - 1) * total_batches + completed, total_batches
        if self._began is None:
            self._began = self._clock(), self._done
        if self._rich is not None:
            self._remove_task()
            title = f"epoch {_epoch(epoch, self._epochs)}"
            self._task = self._rich.add_task(title, total=total_batches, completed=completed, values="", left="")
            if self._epochs is not None and self._run is None:
                total = self._epochs * total_batches
                self._run = self._rich.add_task("run", total=total, completed=self._done, values="", left="")
            self._show_left()

    def update(
        self,
        *,
        loss: float | None = None,
        accuracy: float | None = None,
        residual: float | None = None,
        images_per_second: float | None = None,
        batches: int = 1,
    ) -> None:
        """Count `batches` finished batches and show the latest values.

        Args:
            loss, residual, images_per_second: None: not shown.
            accuracy: a fraction, 0..1.
            batches: how many batches this call stands for.
        """
        self._done += batches
        if self._rich is None or self._task is None:
            return
        values = {"loss": loss, "accuracy": accuracy, "residual": residual, "images_per_second": images_per_second}
        self._rich.update(self._task, advance=batches, values="  ".join(_parts(values)))
        self._show_left()

    def eta(self) -> float | None:
        """Seconds to the end of the last epoch; None before anything has been timed, or without a number of epochs."""
        return None if self._epochs is None else self._time_for(self._epochs * self._per_epoch - self._done)

    def _time_for(self, batches: int) -> float | None:
        """Seconds that so many more batches take, with their share of the evaluations."""
        when, behind = self._began or (0.0, self._done)
        timed = self._done - behind
        return max(batches, 0) * (self._clock() - when) / timed if timed > 0 else None

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """Take the bar away and print the epoch's line.

        Args:
            row: the row of metrics; accuracies are fractions, `seconds` the time of the epoch. Missing
                keys are left out of the line.
        """
        self._remove_task()
        self._show_left()
        parts = [f"epoch {_epoch(row['epoch'], self._epochs)}"] if "epoch" in row else []
        eta = self.eta()
        self.note("  ".join([*parts, *_parts(row), *([f"ETA {_duration(eta)}"] if eta else [])]))

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        if self._quiet:
            return
        if self._rich is not None:
            self._rich.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._output(), flush=True)

    def _output(self) -> TextIO:
        return sys.stdout if self._stream is None else self._stream

    def _show_left(self) -> None:
        if self._rich is None:
            return
        of_epoch = -self._done % self._per_epoch if self._per_epoch else 0
        for task, left in ((self._task, self._time_for(of_epoch)), (self._run, self.eta())):
            if task is not None:
                self._rich.update(task, left="" if left is None else f"{_duration(left)} left")
        if self._run is not None:
            self._rich.update(self._run, completed=self._done)

    def _remove_task(self) -> None:
        if self._rich is not None and self._task is not None:
            self._rich.remove_task(self._task)
            self._rich.refresh()
        self._task = None


def _make_bar(stream: TextIO, *, force: bool) -> RichProgress | None:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress
    except ImportError:
        return None
    return RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}", markup=False),
        TextColumn("{task.fields[values]}", markup=False),
        console=Console(file=stream, force_terminal=True if force else None),
        transient=True,
        refresh_per_second=5,
    )


def _epoch(epoch: int, epochs: int | None) -> str:
    return f"{epoch}" if epochs is None else f"{epoch:>{len(str(epochs))}}/{epochs}"


def _parts(values: Mapping[str, Any]) -> list[str]:
    """The known values of a row as text, in a fixed order and of fixed width, so that lines align."""
    forms: tuple[tuple[tuple[str, ...], Callable[[float], str]], ...] = (
        (("train_loss", "loss"), lambda value: f"loss {_loss(value):>6}"),
        (("train_accuracy", "accuracy"), lambda value: f"train {100 * value:5.1f} %"),
        (("test_accuracy",), lambda value: f"test {100 * value:5.1f} %"),
        (("residual",), lambda value: f"residual {value:7.1e}"),
        (("images_per_second",), lambda value: f"{value:7,.0f} img/s"),
        (("seconds",), lambda value: f"{_duration(value):>7}"),
        (("lr",), lambda value: f"lr {value:.3g}"),
    )
    parts = []
    for keys, form in forms:
        value = next((values[key] for key in keys if values.get(key) is not None), None)
        if value is not None:
            parts.append(form(float(value)))
    return parts


def _loss(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
