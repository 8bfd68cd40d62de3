"""The progress display: plain lines without a terminal, a bar with one, nothing when quiet."""

from __future__ import annotations

import io
import math
import sys

import pytest

from ep_train.progress import Progress

ROW = {
    "epoch": 3,
    "step": 1170,
    "train_loss": 0.41234,
    "train_accuracy": 0.853,
    "test_accuracy": 0.8124,
    "residual": 2e-6,
    "images_per_second": 4512.3,
    "seconds": 63.2,
    "lr": 0.001,
}
LINE = "epoch  3/20  loss 0.4123  train  85.3 %  test  81.2 %  residual 2.0e-06    4,512 img/s    1m03s  lr 0.001\n"


def still() -> float:
    """A clock on which nothing takes time: no ETA."""
    return 0.0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(progress: Progress, row: dict[str, object] | None = None) -> None:
    with progress:
        progress.start_epoch(3, total_batches=4, completed=1)
        for loss in (0.5, 0.45, 0.41):
            progress.update(loss=loss, accuracy=0.8, residual=1e-6, images_per_second=4500.0)
        progress.end_epoch(ROW if row is None else row)


def test_without_a_terminal_there_is_one_plain_line() -> None:
    stream = io.StringIO()
    run(Progress(epochs=20, stream=stream, clock=still))
    assert stream.getvalue() == LINE
    assert stream.getvalue().isascii()


def test_standard_output_is_looked_up_late(capsys: pytest.CaptureFixture[str]) -> None:
    run(Progress(epochs=20, clock=still))
    assert capsys.readouterr().out == LINE


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_quiet(stream: io.StringIO) -> None:
    progress = Progress(quiet=True, stream=stream)
    run(progress)
    progress.note("nothing")
    assert stream.getvalue() == ""


def test_terminal_shows_a_bar_and_keeps_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    stream = Terminal()
    run(Progress(epochs=20, stream=stream, clock=still))
    text = stream.getvalue()
    assert LINE.rstrip() in text
    assert "\x1b[" in text  # the bar was drawn, and taken away
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is back


def test_the_bar_counts_and_shows_the_latest_values(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    with Progress(epochs=20, stream=stream, bar=True) as progress:
        progress.start_epoch(3, total_batches=8, completed=2)
        progress.update(loss=0.5)
        progress.update(loss=0.25, accuracy=0.8, batches=3)
        assert progress._rich is not None
        progress._rich.refresh()
        text = stream.getvalue()
    assert "epoch  3/20" in text
    assert "6/8" in text
    assert "loss 0.2500  train  80.0 %" in text


def test_terminal_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()

    def interrupted() -> None:
        with Progress(stream=stream) as progress:
            progress.start_epoch(1, total_batches=3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert stream.getvalue().count("\x1b[?25h") == 1


def test_without_rich_a_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rich", "rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    stream = Terminal()
    run(Progress(epochs=20, stream=stream, clock=still))
    assert stream.getvalue() == LINE


def test_missing_and_unusual_values() -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    run(progress, {"epoch": 1, "train_loss": math.nan, "test_accuracy": None, "seconds": 4000, "unknown": "x"})
    run(progress, {"epoch": 2, "train_loss": 12345.678, "residual": 0.0, "seconds": 3.21})
    assert stream.getvalue().splitlines() == [
        "epoch 1  loss    nan    1h06m",
        "epoch 2  loss 1.23e+04  residual 0.0e+00     3.2s",
    ]


def test_lines_align() -> None:
    stream = io.StringIO()
    progress = Progress(epochs=100, stream=stream, clock=still)
    for epoch, accuracy in ((9, 0.0712), (10, 0.95), (100, 1.0)):
        run(progress, {**ROW, "epoch": epoch, "test_accuracy": accuracy, "train_accuracy": accuracy})
    assert len({len(line) for line in stream.getvalue().splitlines()}) == 1


def test_markup_in_a_note_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress(stream=stream, bar=True) as progress:
        progress.note("saved [bold]runs/x[/bold]")
    assert "[bold]runs/x[/bold]" in stream.getvalue()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_line_says_when_the_run_will_end() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(epochs=5, stream=stream, clock=clock) as progress:
        for epoch in (3, 4, 5):  # a resumed run, in the middle of its third epoch
            progress.start_epoch(epoch, total_batches=10, completed=5 if epoch == 3 else 0)
            assert progress.eta() == (None if epoch == 3 else pytest.approx((6 - epoch) * 20.0))
            clock.now += 10.0 if epoch == 3 else 20.0  # 2 s a batch, evaluations included
            progress.update(batches=5 if epoch == 3 else 10)
            progress.end_epoch({"epoch": epoch, "train_loss": 0.5})
    assert stream.getvalue().splitlines() == [
        "epoch 3/5  loss 0.5000  ETA 40.0s",
        "epoch 4/5  loss 0.5000  ETA 20.0s",
        "epoch 5/5  loss 0.5000",
    ]


def test_the_bars_say_how_long_epoch_and_run_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "120")
    stream, clock = Terminal(), Clock()
    with Progress(epochs=30, stream=stream, bar=True, clock=clock) as progress:
        progress.start_epoch(1, total_batches=100)
        clock.now += 10
        progress.update(batches=50)
        assert progress._rich is not None
        progress._rich.refresh()
        text = stream.getvalue()
    last = text[text.rindex("epoch  1/30") :]
    assert "50/100" in last
    assert "10.0s left" in last  # of the epoch
    assert "50/3000" in last
    assert "9m50s left" in last  # of the run
