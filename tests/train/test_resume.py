"""Runs that are killed, stopped or damaged: what is left, and that a resumed run ends with the same numbers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ep_train import TrainConfig, Trainer, checkpoint, cli, resume, train
from ep_train.run_folder import read_metrics
from tests.core.threads import one_thread  # noqa: F401  (autouse)

OPTIONS: dict[str, Any] = {
    "model": "16p-16",
    "train_limit": 400,
    "test_limit": 50,
    "batch_size": 5,
    "epochs": 4,
    "estimator": "random_sign",
    "lr_schedule": "cosine",
    "crop_padding": 1,
    "threads": 1,
    "device": "cpu",
}
TIMES = {"seconds", "images_per_second"}


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    """The same run in a process of its own."""
    options = [part for name, value in OPTIONS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "ep_train", *options, "--out", str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not checkpoint.existing(folder):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            out, err = process.communicate()
            pytest.fail(f"no checkpoint in {folder} (exit code {process.returncode}):\n{out}{err}")
        time.sleep(0.005)


def numbers(path: Path) -> list[dict[str, Any]]:
    """The metrics without times."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(path)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never interrupted."""
    summary, path = train(TrainConfig(**OPTIONS, out=tmp_path_factory.mktemp("whole") / "run", quiet=True))
    assert summary["status"] == "finished"
    return path


def assert_same_end(path: Path, whole: Path) -> None:
    """Bit for bit: JSON holds every digit of a float."""
    assert numbers(path) == numbers(whole)
    ours, theirs = (checkpoint.load(p) for p in (path, whole))
    assert all(torch.equal(ours["model"][name], tensor) for name, tensor in theirs["model"].items())
    assert json.loads((path / "summary.json").read_text())["status"] == "finished"


def test_a_killed_run_resumes_to_the_same_numbers(tmp_path: Path, whole: Path) -> None:
    process = start(tmp_path / "run")
    wait_for_checkpoint(tmp_path / "run", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = len(read_metrics(tmp_path / "run"))
    assert 1 <= done < 4
    assert not (tmp_path / "run" / "summary.json").exists()
    summary, path = resume(tmp_path / "run", quiet=True)
    assert summary["status"] == "finished"
    assert summary["epochs"] == 4
    assert_same_end(path, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_stopped_run_keeps_what_was_learnt(number: signal.Signals, tmp_path: Path, whole: Path) -> None:
    process = start(tmp_path / "run")
    wait_for_checkpoint(tmp_path / "run", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == (75 if number == signal.SIGUSR1 else 130), err
    assert "Traceback" not in err
    assert f"continue with: ep-train resume {tmp_path / 'run'}" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["signal"]) == ("interrupted", number.name)
    assert 1 <= summary["epochs"] < 4
    assert summary["test_accuracy"] is not None
    state = checkpoint.load(tmp_path / "run")
    assert state["epoch"] == summary["epochs"] == len(read_metrics(tmp_path / "run"))
    assert (tmp_path / "run" / "curves.png").exists()
    assert cli.main(["resume", str(tmp_path / "run"), "--quiet"]) == 0
    assert_same_end(tmp_path / "run", whole)


def test_a_run_stopped_in_its_first_epoch_resumes_in_the_middle_of_it(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ep_train import learners

    original, calls, before = learners.ep_step, [], signal.getsignal(signal.SIGINT)

    def step(*args: Any, **options: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 30:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **options)

    monkeypatch.setattr(learners, "ep_step", step)
    summary, path = train(TrainConfig(**OPTIONS, out=tmp_path / "run", quiet=True))
    assert (summary["status"], summary["epochs"]) == ("interrupted", 0)
    assert len(calls) == 30
    assert checkpoint.load(path)["partial"]["batches"] == 30
    assert signal.getsignal(signal.SIGINT) is before
    resume(path, quiet=True)
    assert len(calls) == 4 * 80  # no batch twice
    assert_same_end(path, whole)


def test_more_epochs(tmp_path: Path, whole: Path) -> None:
    small = {**OPTIONS, "epochs": 1, "lr_schedule": "constant", "train_limit": 50}
    _, path = train(TrainConfig(**small, out=tmp_path / "one", quiet=True))
    summary, _ = resume(path, epochs=3, quiet=True)
    assert summary["epochs"] == 3
    assert json.loads((path / "config.json").read_text())["epochs"] == 3
    _, straight = train(TrainConfig(**{**small, "epochs": 3}, out=tmp_path / "three", quiet=True))
    assert_same_end(path, straight)


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())
    return found


def test_options_that_say_where_and_not_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever changes them, by `resume` or --resume-or-start: the next one sees them."""
    monkeypatch.chdir(tmp_path)
    seen: list[TrainConfig] = []
    original = Trainer.run

    def run(self: Trainer, folder: Any) -> dict[str, Any]:
        seen.append(self.config)
        return original(self, folder)

    monkeypatch.setattr(Trainer, "run", run)
    config = TrainConfig(model="4p", train_limit=20, test_limit=10, batch_size=10, epochs=1, device="cpu", quiet=True)
    _, path = train(replace(config, out=tmp_path / "run"))
    places = ["--threads", "1", "--data-root", "data", "--checkpoint-every", "7", "--keep-checkpoints", "5"]
    assert cli.main(["resume", str(path), "--quiet", *places]) == 0
    changed = {"threads": 1, "data_root": str(tmp_path / "data"), "checkpoint_every": 7, "keep_checkpoints": 5}
    assert changed.items() <= config_of(path).items()
    resume(path, quiet=True)
    assert (seen[-1].threads, seen[-1].checkpoint_every, seen[-1].keep_checkpoints) == (1, 7, 5)
    assert seen[-1].data_root == tmp_path / "data"

    again = replace(config, out=path, resume_or_start=True, keep_checkpoints=3, data_root=Path("other"))
    train(again)  # what is not given stays
    changed = {"threads": 1, "data_root": str(tmp_path / "other"), "checkpoint_every": 7, "keep_checkpoints": 3}
    assert changed.items() <= config_of(path).items()
    resume(path, quiet=True)
    assert (seen[-1].keep_checkpoints, seen[-1].data_root) == (3, tmp_path / "other")
    resume(path, quiet=True, checkpoint_every=0)
    assert config_of(path)["checkpoint_every"] == 0

    for name in ("lr", "out"):
        with pytest.raises(TypeError, match=f"expected some of device, .*got {name}"):
            resume(path, quiet=True, **{name: 1.0})
    resume(path, quiet=True, threads=1)
    asked: list[Any] = []
    monkeypatch.setattr("ep_train.commands.evaluate.load_dataset", lambda _, **options: asked.append(options))
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    others = ["--data-root", "elsewhere", "--data-cache", "mmap", "--threads", "2"]
    for more, expected in (([], (1, tmp_path / "other", "memory")), (others, (2, Path("elsewhere"), "mmap"))):
        with pytest.raises(AttributeError):  # no images
            cli.main(["eval", str(path), *more])
        threads, options = asked[-2:]
        assert (threads, options["root"], options["data_cache"]) == expected


def write_images(folder: Path, *, seed: int = 0, names: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Grey 8x8 ones."""
    generator = np.random.default_rng(seed)
    for split, count in (("train", 6), ("test", 2)):
        for name in names:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder.parent


PICTURES = TrainConfig(
    dataset="folder:pictures", model="4p", batch_size=6, epochs=1, device="cpu", threads=1, quiet=True
)


def test_a_folder_of_images_may_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A relative one is found in another --data-root; an absolute one is where it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    here, scratch = write_images(tmp_path / "here" / "pictures"), tmp_path / "scratch"
    monkeypatch.chdir(here)
    _, path = train(replace(PICTURES, out=tmp_path / "run"))
    assert (config_of(path)["dataset"], config_of(path)["data_root"]) == ("folder:pictures", str(here))
    monkeypatch.chdir("/")
    job = replace(PICTURES, out=path, resume_or_start=True)
    train(job)  # where they were
    assert config_of(path)["data_root"] == str(here)
    here.rename(scratch)
    for command in ("eval", "resume"):
        assert cli.main([command, str(path)]) == 1
        assert "here/pictures: no such folder" in capsys.readouterr().err
    train(replace(job, data_root=scratch))
    assert config_of(path)["data_root"] == str(scratch)
    scratch.rename(here)
    assert cli.main(["eval", str(path), "--data-root", str(here)]) == 0
    assert cli.main(["resume", str(path), "--data-root", str(here)]) == 0
    assert config_of(path)["data_root"] == str(here)

    absolute = replace(PICTURES, dataset=f"folder:{here / 'pictures'}", out=tmp_path / "absolute")
    _, path = train(absolute)
    capsys.readouterr()
    for command in ("eval", "resume"):
        assert cli.main([command, str(path), "--data-root", str(scratch)]) == 1
        assert "argument 'data_root': expected none, as the images are in folder:/" in capsys.readouterr().err
    train(replace(absolute, resume_or_start=True, data_root=scratch))  # as the job was started
    other = ["--dataset", "folder:pictures", "--data-root", str(here)]
    assert cli.main(["eval", str(path), *other]) == 0


@pytest.mark.parametrize("normalise", ["standard", "unit"])
def test_other_images_are_refused_before_anything_is_written(
    normalise: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = write_images(tmp_path / "a" / "pictures")
    _, path = train(replace(PICTURES, normalise=normalise, data_root=root, out=tmp_path / "run"))
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "train_loss": 1.0}\n')  # of after the checkpoint
    kept = ("config.json", "metrics.jsonl", "summary.json")
    before = {name: (path / name).read_bytes() for name in kept}
    others = {
        "b": ({"seed": 1}, "normalisation.mean[0]: " if normalise == "standard" else "pixels.mean[0]: "),
        "c": ({"names": ("cat", "horse")}, "class_names[1]: 'dog' and not 'horse'"),
    }
    for name, (options, message) in others.items():
        other = write_images(tmp_path / name / "pictures", **options)  # type: ignore[arg-type]
        places = ["--data-root", str(other), "--keep-checkpoints", "7"]
        assert cli.main(["resume", str(path), "--quiet", *places]) == 1
        error = capsys.readouterr().err
        assert "the images are not those that this run was started with (" in error
        assert message in error
        assert {name: (path / name).read_bytes() for name in kept} == before
    (tmp_path / "moved").mkdir()
    shutil.move(root / "pictures", tmp_path / "moved" / "pictures")
    assert cli.main(["resume", str(path), "--quiet", "--data-root", str(tmp_path / "moved")]) == 0
    assert len(read_metrics(path)) == 1


def test_a_checkpoint_that_does_not_fit_leaves_the_folder_as_it_is(tmp_path: Path) -> None:
    small = TrainConfig(model="4p", train_limit=20, test_limit=10, batch_size=10, epochs=1, device="cpu", quiet=True)
    _, path = train(replace(small, out=tmp_path / "run"))
    damage_config(path, model="4p-4")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "train_loss": 1.0}\n')
    before = {name: (path / name).read_bytes() for name in ("config.json", "metrics.jsonl")}
    with pytest.raises(checkpoint.CheckpointError, match="does not fit"):
        resume(path, epochs=3, quiet=True)
    assert {name: (path / name).read_bytes() for name in before} == before


def test_a_run_that_goes_on_as_it_was_keeps_its_configuration(whole: Path) -> None:
    before = (whole / "config.json").stat()
    resume(whole, quiet=True)
    assert (whole / "config.json").stat().st_ino == before.st_ino


def test_a_folder_without_a_run_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError):
        resume(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_has_nothing_left_to_do(whole: Path) -> None:
    before = numbers(whole)
    summary, _ = resume(whole, quiet=True)
    assert summary["status"] == "finished"
    assert numbers(whole) == before


def damage_config(path: Path, **changes: Any) -> None:
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no folder", "checkpoints: expected a checkpoint, got none"),
        ("checkpoints", "checkpoints: no good checkpoint: "),
        ("old", "checkpoint.pt: a checkpoint of an earlier version, whose runs this version does not continue"),
        ("gone", "checkpoints: expected a checkpoint, got none"),
        ("no config", "config.json: not a readable configuration: "),
        ("config", "config.json: not a readable configuration: "),
        ("unknown option", "config.json: not the configuration of this version of ep-train"),
        ("missing option", "config.json: not the configuration of this version of ep-train"),
        ("wrong type", "config.json: not a configuration of ep-train: "),
        ("wrong value", "argument 'beta': expected a finite number > 0, got -1"),
        ("wrong device", "argument 'device': expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("no device", "argument 'device': expected str, got 7"),
        ("other model", "the checkpoint does not fit config.json: "),
        ("metrics", "metrics.jsonl, line 1: not JSON"),
    ],
)
def test_what_is_damaged_is_named(what: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = TrainConfig(model="4p", train_limit=20, test_limit=10, batch_size=10, epochs=2, device="cpu", quiet=True)
    _, path = train(replace(small, out=tmp_path / "run"))
    config = path / "config.json"
    if what == "no folder":
        path = tmp_path / "elsewhere"
    elif what == "checkpoints":
        for kept in checkpoint.existing(path):
            (kept / "state.pt").write_bytes(b"PK\x03\x04 torn")
    elif what in ("old", "gone"):
        shutil.rmtree(path / "checkpoints")
        if what == "old":
            (path / "checkpoint.pt").touch()
    elif what == "no config":
        config.unlink()
    elif what == "config":
        config.write_text(config.read_text()[:40])
    elif what == "missing option":
        config.write_text("{}")
    elif what == "metrics":
        (path / "metrics.jsonl").write_text("torn\n{}\n")
    else:
        changes: dict[str, dict[str, Any]] = {
            "unknown option": {"colour": 1},
            "wrong type": {"lr": "fast"},
            "wrong value": {"beta": -1},
            "wrong device": {"device": "tpu"},
            "no device": {"device": 7},
        }
        damage_config(path, **changes.get(what, {"model": "4p-4"}))
    assert cli.main(["resume", str(path), "--quiet"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ep-train: ")
    assert message in error
    assert "Traceback" not in error
