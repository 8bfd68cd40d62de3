"""Runs that are killed at random moments, started twice or signalled twice, and long ones: nothing is lost or leaks."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ep_train import TrainConfig, Trainer, checkpoint, epoch, locks, resume, train
from ep_train.distributed import Agreement, Processes
from ep_train.run_folder import RunFolder, RunFolderError, read_metrics
from ep_train.signals import ASKING, stop_on_signals
from tests.core.threads import one_thread  # noqa: F401  (autouse)
from tests.train.segment import go_on

OPTIONS: dict[str, Any] = {
    "model": "4p",
    "train_limit": 200,
    "test_limit": 20,
    "batch_size": 5,
    "epochs": 3,
    "estimator": "random_sign",
    "lr_schedule": "cosine",
    "crop_padding": 1,
    "checkpoint_every": 3,
    "device": "cpu",
}
TINY = TrainConfig(model="4p", train_limit=100, test_limit=10, batch_size=10, epochs=2, device="cpu", quiet=True)
KILLS = 20


def numbers(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in {"seconds", "images_per_second"}} for row in read_metrics(path)]


def assert_same(path: Path, whole: Path) -> None:
    """Metrics and weights, bit for bit; every line once."""
    assert numbers(path) == numbers(whole)
    assert (path / "metrics.jsonl").read_bytes().count(b"\n") == len(numbers(whole))
    ours, theirs = checkpoint.load(path), checkpoint.load(whole)
    assert all(torch.equal(ours["model"][name], tensor) for name, tensor in theirs["model"].items())


def test_killed_twenty_times_it_ends_as_if_it_never_was(tmp_path: Path) -> None:
    """By SIGKILL: mostly while it trains or writes a checkpoint (every third step), sometimes while it starts."""
    context = multiprocessing.get_context("forkserver")  # a new process in milliseconds: torch is imported once
    context.set_forkserver_preload(["ep_train.cli", "sklearn.datasets", "matplotlib.figure"])
    seconds = 0.0

    def begin(path: Path) -> tuple[Any, Any]:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=go_on, args=(path, OPTIONS, theirs))
        process.start()
        theirs.close()
        return process, ours

    process, pipe = begin(tmp_path / "whole")
    assert pipe.recv() == "training"
    seconds = pipe.recv()
    process.join()
    assert process.exitcode == 0
    path, moments, killed, steps = tmp_path / "run", random.Random(0), 0, []
    while killed < KILLS:
        process, pipe = begin(path)
        if killed % 5 != 4:
            assert pipe.recv() == "training"
        process.join(moments.uniform(0, seconds / 12))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
        found = checkpoint.existing(path)
        steps.append(int(found[-1].name[5:13]) if found else 0)
    else:
        process, _ = begin(path)
        process.join()
    assert process.exitcode == 0
    assert killed == KILLS, f"it had ended after {killed} kills"
    assert steps == sorted(steps)
    assert steps[-1] > 3  # it got somewhere between the kills
    assert_same(path, tmp_path / "whole")
    assert [place.name for place in (path / "checkpoints").iterdir() if not place.name.startswith("step-")] == []


def test_steps_between_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    original = checkpoint.save

    def save(folder: Path, state: dict[str, Any], **options: Any) -> Path:
        saved.append(state["step"])
        return original(folder, state, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    _, path = train(replace(TINY, checkpoint_every=4, keep_checkpoints=3, out=tmp_path / "run"))
    assert saved == [4, 8, 10, 12, 16, 20]  # and at the end of every epoch
    assert [place.name for place in checkpoint.existing(path)] == ["step-00000012", "step-00000016", "step-00000020"]
    _, plain = train(replace(TINY, out=tmp_path / "plain"))
    assert saved[6:] == [10, 20]
    assert_same(path, plain)


def test_a_run_without_a_checkpoint_starts_again(tmp_path: Path) -> None:
    _, whole = train(replace(TINY, out=tmp_path / "whole"))
    for rows in ("", '{"epoch": 1, "train_loss": 2.0}\n', '{"epo'):
        path = tmp_path / f"run{len(rows)}"
        path.mkdir()
        (path / "metrics.jsonl").write_text(rows)
        config = (whole / "config.json").read_text().replace(str(whole), str(path))
        (path / "config.json").write_text(config)
        resume(path, quiet=True)
        assert_same(path, whole)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    _, path = train(replace(TINY, epochs=1, out=tmp_path / "run"))
    before = {file: file.read_bytes() for file in path.rglob("*.*") if file.is_file()}
    other = locks.take(path)  # by another descriptor: as another process
    for start in (
        lambda: resume(path, epochs=2, quiet=True),
        lambda: train(replace(TINY, out=path, overwrite=True)),
    ):
        with pytest.raises(RunFolderError, match="another process is running in this folder: wait for"):
            start()
    assert {file: file.read_bytes() for file in path.rglob("*.*") if file.is_file()} == before
    os.close(other)
    resume(path, epochs=2, quiet=True)
    assert len(read_metrics(path)) == 2


def test_a_job_that_is_started_again_waits_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A lost machine's lasts for a while over NFS."""
    job = replace(TINY, epochs=1, out=tmp_path / "run", resume_or_start=True)
    _, path = train(job)
    other = locks.take(path)
    monkeypatch.setattr("ep_train.runs.PATIENCE", 0.3)
    with pytest.raises(RunFolderError, match="another process is running in this folder: wait for"):
        train(job)
    assert caplog.text.count("waiting for its end, 0 s at most") == 1
    with pytest.raises(RunFolderError, match="another process is running in this folder: wait for"):
        resume(path, quiet=True)
    assert caplog.text.count("waiting for its end") == 1
    monkeypatch.setattr("ep_train.runs.PATIENCE", 30.0)
    given_up = threading.Timer(0.5, os.close, (other,))
    given_up.start()
    assert train(job)[0]["status"] == "finished"
    given_up.join()
    assert caplog.text.count("waiting for its end, 30 s at most") == 1


@pytest.mark.parametrize("out", [None, "run"])
def test_a_new_run_has_its_folder_from_the_start(
    out: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From before its config.json is there: nobody gets in between."""
    monkeypatch.chdir(tmp_path)
    taken: list[Path] = []

    def run(self: Trainer, folder: RunFolder) -> dict[str, Any]:
        with pytest.raises(BlockingIOError):
            locks.take(folder.path)
        taken.append(folder.path)
        return {}

    write = RunFolder.write_config

    def written(self: RunFolder, config: Any) -> Path:
        with pytest.raises(BlockingIOError):
            locks.take(self.path)
        return write(self, config)

    monkeypatch.setattr(Trainer, "run", run)
    monkeypatch.setattr(RunFolder, "write_config", written)
    _, path = train(replace(TINY, out=None if out is None else Path(out)))
    assert taken == [path]
    os.close(locks.take(path))  # given up


def test_signals_after_the_first() -> None:
    trainer: Any = SimpleNamespace(stop_asked=False, stop_signal=None, processes=Processes())
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with stop_on_signals(trainer):
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):  # as a batch system sends them
            signal.raise_signal(number)
        assert (trainer.stop_asked, trainer.stop_signal) == (True, "SIGUSR1")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert {number: signal.getsignal(number) for number in before} == before


class Late:
    """A trainer that a signal reaches just before one of its attributes is read for the n-th time."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.processes, self.agreement = Processes(), Agreement(Processes(), ("stop", *ASKING, "read"))
        self.asked = False
        self.name: str | None = None

    def _read(self) -> None:
        self.left -= 1
        if not self.left:
            signal.raise_signal(signal.SIGUSR1)

    @property
    def stop_asked(self) -> bool:
        self._read()
        return self.asked

    @stop_asked.setter
    def stop_asked(self, asked: bool) -> None:
        self.asked = asked

    @property
    def stop_signal(self) -> str | None:
        self._read()
        return self.name

    @stop_signal.setter
    def stop_signal(self, name: str | None) -> None:
        self.name = name


@pytest.mark.parametrize("number", range(1, 6))
def test_no_stop_is_agreed_on_without_its_signal(number: int) -> None:
    trainer: Any = Late(number)
    with stop_on_signals(trainer):
        Trainer.ask(trainer, read=False)
        agreed = trainer.agreement.answer()
        assert not agreed["stop"] or agreed["SIGUSR1"]
        Trainer.ask(trainer, read=False)
        agreed = trainer.agreement.answer()
        assert (agreed["stop"], [name for name in ASKING if agreed[name]]) == (True, ["SIGUSR1"])


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())  # isinstance asks some things more


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_of_a_thousand_steps_is_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten epochs of 100 steps, with evaluations and checkpoints. Between the third and the last: no tensor more, and
    less than 2 MB (a leak of 3 kB a step)."""
    found: list[tuple[int, int]] = []
    original = epoch.train_epoch

    def measured(trainer: Trainer, progress: Any) -> dict[str, Any]:
        found.append((resident(), tensors_alive()))
        return original(trainer, progress)

    monkeypatch.setattr("ep_train.trainer.train_epoch", measured)
    options = {**OPTIONS, "batch_size": 2, "epochs": 11, "checkpoint_every": 50}
    summary, _ = train(TrainConfig(**options, out=tmp_path / "run", quiet=True))
    assert summary["epochs"] == len(found) == 11
    assert {count for _, count in found[2:]} == {found[2][1]}
    assert found[-1][0] - found[2][0] < 2e6


def test_the_folder_of_a_run_that_was_killed_while_it_began(tmp_path: Path) -> None:
    (tmp_path / ".config.json-x1y2.tmp").write_text("{")
    folder = RunFolder.create(tmp_path, dataset="d", model="m", method="ep", seed=0)
    assert [path.name for path in folder.path.iterdir()] == [".lock"]
