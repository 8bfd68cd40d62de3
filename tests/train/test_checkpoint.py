"""Checkpoints: written whole or not at all, checked before use, and refused with a reason, the one before it used."""

from __future__ import annotations

import hashlib
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ep_train import TrainConfig, Trainer, checkpoint, durable, resume, train
from ep_train.checkpoint import CheckpointError
from ep_train.run_folder import RunFolder, RunFolderError, read_metrics
from ep_train.teachers import load_teacher
from tests.core.threads import one_thread  # noqa: F401  (autouse)

TINY = TrainConfig(model="4p-4", train_limit=40, test_limit=10, batch_size=10, epochs=1, device="cpu", quiet=True)
FILES = {"weights.safetensors", "state.pt", "manifest.json"}


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    return Trainer(TINY).state()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def rehash(path: Path) -> None:
    """Make a manifest that fits what the files are now."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    for name in manifest["files"]:
        data = (path / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest}))


# --- written ----------------------------------------------------------------------------------------------------------


def test_a_round_trip(tmp_path: Path, state: dict[str, Any]) -> None:
    path = checkpoint.save(tmp_path, {**state, "step": 12})
    assert path == tmp_path / "checkpoints" / "step-00000012"
    assert {f.name for f in path.iterdir()} == FILES
    found = checkpoint.load(tmp_path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found["model"][name], t) for name, t in state["model"].items())
    weights = safetensors.torch.load_file(path / "weights.safetensors")
    assert all(torch.equal(weights[name], t) for name, t in state["model"].items())
    assert "model" not in torch.load(path / "state.pt", weights_only=True)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["step"], manifest["epoch"]) == (12, 0)
    assert all((path / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items())


def test_the_newest_are_kept(tmp_path: Path, state: dict[str, Any]) -> None:
    for step in (5, 10, 15, 123456789):
        checkpoint.save(tmp_path, {**state, "step": step}, keep=3)
    assert names(tmp_path) == ["step-00000010", "step-00000015", "step-123456789"]
    assert checkpoint.load(tmp_path)["step"] == 123456789
    checkpoint.save(tmp_path, {**state, "step": 123456789, "seconds": 3.0}, keep=1)
    assert names(tmp_path) == ["step-123456789-2"]  # never in the place of another
    assert checkpoint.load(tmp_path)["seconds"] == 3.0
    (tmp_path / "checkpoints" / "step-123456789-2" / "state.pt").write_bytes(b"short")
    checkpoint.save(tmp_path, {**state, "step": 123456790}, keep=1)
    assert names(tmp_path) == ["step-123456790"]
    (tmp_path / "checkpoints" / "step-123456790" / "state.pt").unlink()
    checkpoint.save(tmp_path, {**state, "step": 123456795}, keep=2)
    assert names(tmp_path) == ["step-123456790", "step-123456795"]


def test_one_that_a_signal_asked_for_counts_until_there_is_a_newer_one(tmp_path: Path, state: dict[str, Any]) -> None:
    for step, scheduled in ((2, True), (4, True), (5, False), (7, False)):
        checkpoint.save(tmp_path, {**state, "step": step, "scheduled": scheduled})
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000007"]
    assert checkpoint.load(tmp_path)["step"] == 7
    assert checkpoint.newest_good(tmp_path, scheduled=True).path.name == "step-00000004"
    checkpoint.save(tmp_path, {**state, "step": 8, "scheduled": True})
    assert names(tmp_path) == ["step-00000004", "step-00000008"]


def test_the_one_just_written_is_kept_whatever_its_step(tmp_path: Path, state: dict[str, Any]) -> None:
    for step, scheduled in ((4, True), (8, True), (11, False)):
        checkpoint.save(tmp_path, {**state, "step": step, "scheduled": scheduled}, keep=1)
    path = checkpoint.save(tmp_path, {**state, "step": 9, "scheduled": False}, keep=1)  # of a run that went back
    assert path.is_dir()
    assert names(tmp_path) == ["step-00000008", "step-00000009"]
    checkpoint.save(tmp_path, {**state, "step": 12, "scheduled": True}, keep=1)
    assert checkpoint.save(tmp_path, {**state, "step": 10, "scheduled": True}, keep=1).is_dir()


def test_newer_ones_are_removed(tmp_path: Path, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *_ = (checkpoint.save(tmp_path, {**state, "step": step}, keep=9) for step in (4, 4, 9, 11))
    checkpoint.remove_newer(tmp_path, second)
    assert names(tmp_path) == ["step-00000004", "step-00000004-2"]

    def full(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(durable, "remove_folder", full)
    with pytest.raises(CheckpointError, match="step-00000004-2: cannot be removed: Read-only file system"):
        checkpoint.remove_newer(tmp_path, first)
    checkpoint.remove_newer(tmp_path, second)  # there is none


def test_what_a_killed_process_left_is_removed_and_never_read(tmp_path: Path, state: dict[str, Any]) -> None:
    part = tmp_path / "checkpoints" / ".step-00000003-abcd.part"
    part.mkdir(parents=True)
    (part / "weights.safetensors").write_bytes(b"half")
    assert checkpoint.never_written(tmp_path)
    checkpoint.save(tmp_path, {**state, "step": 7})
    assert names(tmp_path) == ["step-00000007"]


# --- no space ---------------------------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a full disk: the system refuses to make any file larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1000, 3000, 5000])
def test_a_full_disk_leaves_the_last_good_one(size: int, tmp_path: Path, state: dict[str, Any]) -> None:
    """Full at the weights (3.8 kB), or in the middle of the state, which is made longer than they are."""
    checkpoint.save(tmp_path, {**state, "step": 1})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    message = r"step-00000002: cannot write the checkpoint \(File too large\); the last one is step-00000001"
    with pytest.raises(CheckpointError, match=message), files_of_at_most(size):
        checkpoint.save(tmp_path, {**state, "step": 2, "warm": torch.rand(20_000)})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before
    assert names(tmp_path) == ["step-00000001"]
    assert checkpoint.load(tmp_path)["step"] == 1


def test_a_run_on_a_full_disk_ends_with_a_message_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TINY, epochs=4)
    _, whole = train(replace(config, out=tmp_path / "whole"))
    write, files = durable.HashedFile.write, []

    def full(self: durable.HashedFile, data: bytes) -> int:
        files.append(self)
        if len(set(files)) > 3 + 3 + 1:  # in the third checkpoint
            raise OSError(28, os.strerror(28))
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(durable.HashedFile, "write", full)
        with pytest.raises(CheckpointError, match=r"\(No space left on device\); the last one is step-00000008"):
            train(replace(config, out=tmp_path / "run"))
    assert len(read_metrics(tmp_path / "run")) == 3
    assert names(tmp_path / "run") == ["step-00000004", "step-00000008"]
    resume(tmp_path / "run", quiet=True)
    assert [r["train_loss"] for r in read_metrics(tmp_path / "run")] == [r["train_loss"] for r in read_metrics(whole)]


def test_metrics_on_a_full_disk(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_metrics({"epoch": 1})
    with (
        files_of_at_most(20),
        pytest.raises(RunFolderError, match=r"metrics\.jsonl: cannot be written: File too large"),
    ):
        folder.append_metrics({"epoch": 2, "train_loss": 1.25})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1}\n'
    with files_of_at_most(20), pytest.raises(RunFolderError, match=r"summary\.json: cannot be written: File too large"):
        folder.write_summary({"status": "finished and more"})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# --- damaged ----------------------------------------------------------------------------------------------------------


class Boom:
    """What a malicious pickle would hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code from a checkpoint ran",)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def other_state(change: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        torch.save(change(torch.load(path / "state.pt", weights_only=True)), path / "state.pt")
        rehash(path)

    return write


def garbage(name: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (path / name).write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
        rehash(path)

    return write


def other_step(path: Path) -> None:
    path.rename(path.with_name("step-00000003"))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut": (
        lambda p: cut(p / "weights.safetensors"),
        r"weights\.safetensors: truncated or changed: expected \d+",
    ),
    "weights changed": (
        lambda p: flip(p / "weights.safetensors", -1),
        r"weights\.safetensors: damaged or changed: expec",
    ),
    "weights gone": (lambda p: (p / "weights.safetensors").unlink(), r"weights\.safetensors: cannot be read: No such"),
    "state cut": (lambda p: cut(p / "state.pt"), r"state\.pt: truncated or changed: expected \d+ bytes, got \d+"),
    "state changed": (
        lambda p: flip(p / "state.pt", 100),
        r"state\.pt: damaged or changed: expected SHA-256 \w{12}\.\.\.",
    ),
    "manifest gone": (lambda p: (p / "manifest.json").unlink(), r"manifest\.json: cannot be read: No such file"),
    "manifest empty": (lambda p: (p / "manifest.json").write_text(""), r"manifest\.json: damaged or changed: Expec"),
    "manifest deep": (lambda p: (p / "manifest.json").write_text("[" * 100_000), r"manifest\.json: damaged or"),
    "manifest list": (lambda p: (p / "manifest.json").write_text("[]"), r"manifest\.json: damaged or changed: "),
    "manifest changed": (
        lambda p: flip(p / "manifest.json", (p / "manifest.json").read_bytes().index(b'"epoch": ') + 9),
        r"manifest\.json: damaged or changed: it does not fit its own SHA-256",
    ),
    "renamed": (other_step, r"step-00000003/manifest\.json: damaged or changed: it is of step 2"),
    "code": (other_state(lambda s: {**s, "device": Boom()}), r"state\.pt: not a readable state: "),
    "another list": (other_state(lambda s: [1, 2]), r"state\.pt: not a state of ep-train \(what does not fit: "),
    "no partial": (other_state(lambda s: {k: v for k, v in s.items() if k != "partial"}), "what does not fit: partial"),
    "odd epoch": (other_state(lambda s: {**s, "epoch": "one"}), r"state\.pt: not a state of ep-train \(what.*: epoch"),
    "odd step": (other_state(lambda s: {**s, "step": 1}), r"state\.pt: not a state of ep-train \(what.*: step"),
    "state garbage": (garbage("state.pt"), r"state\.pt: not a readable state: "),
    "weights garbage": (garbage("weights.safetensors"), r"weights\.safetensors: not a readable file of weights: "),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_one_is_refused_and_the_one_before_it_used(
    what: str,
    tmp_path: Path,
    state: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage, message = DAMAGE[what]
    checkpoint.save(tmp_path, {**state, "step": 1})
    newest = checkpoint.save(tmp_path, {**state, "step": 2, "epoch": 1})
    damage(newest)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(next(iter(checkpoint.existing(tmp_path)[1:])))
    assert not caplog.records
    found = checkpoint.newest_good(tmp_path)
    used = found.path
    assert (used.name, found.state["step"]) == ("step-00000001", 1)
    assert "using step-00000001, which is older" in caplog.text
    checkpoint.set_aside(found.refused)
    assert [name[:15] for name in names(tmp_path)] == ["refused-step-00", "step-00000001"]
    damage(used) if what not in ("renamed", "odd step") else cut(used / "state.pt")
    with pytest.raises(CheckpointError, match=r"checkpoints: no good checkpoint: \S+step-00000001"):
        checkpoint.load(tmp_path)
    assert not checkpoint.never_written(tmp_path)
    assert "code from a checkpoint ran" not in capsys.readouterr().out


def test_a_resumed_run_goes_on_from_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = replace(TINY, epochs=3, keep_checkpoints=3)
    _, whole = train(replace(config, out=tmp_path / "whole"))
    _, path = train(replace(config, out=tmp_path / "run"))
    for damaged in ("step-00000012", "step-00000008"):
        flip(path / "checkpoints" / damaged / "weights.safetensors", -1)
    resume(path, quiet=True)
    assert caplog.text.count("which is older") == 2
    assert [r["train_loss"] for r in read_metrics(path)] == [r["train_loss"] for r in read_metrics(whole)]
    ours, theirs = checkpoint.load(path), checkpoint.load(whole)
    assert all(torch.equal(ours["model"][name], tensor) for name, tensor in theirs["model"].items())
    assert names(path) == [
        "refused-step-00000008",
        "refused-step-00000012",
        *("step-00000004", "step-00000008", "step-00000012"),
    ]
    damaged = path / "checkpoints" / "step-00000012" / "state.pt"
    cut(damaged)
    teacher = load_teacher(str(path), image_shape=(1, 8, 8), classes=10)  # the weights of step 8 serve
    assert "using step-00000008, which is older" in caplog.text
    assert teacher.classes == 10


# --- of another run, of another version -------------------------------------------------------------------------------


def test_a_checkpoint_of_another_run_is_refused(state: dict[str, Any]) -> None:
    for other in (replace(TINY, model="4p-5"), replace(TINY, model="4p"), replace(TINY, local_heads="1")):
        with pytest.raises(CheckpointError, match=r"the checkpoint does not fit config\.json: "):
            Trainer(other).restore(state, [])
    for change in ({"partial": {"weeks": 3}}, {"partial": {"batches": 9}}, {"epoch": 1}, {"optimizer": {"state": 3}}):
        with pytest.raises(CheckpointError, match=r"the checkpoint does not fit config\.json: "):
            Trainer(TINY).restore({**state, **change}, [])
    Trainer(TINY).restore(state, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalisation": {"mean": [0.5], "std": [1.0]}}, r"normalisation.mean[0]: 0.5 and not 0.0"),
        ({"normalisation": "unit"}, "normalisation: 'unit' and not {'mean': [0.0], 'std': [1.0]}"),
        ({"pixels": {"mean": [0.5]}}, "pixels.mean[0]: 0.5 and not 0.3"),
        ({"image_shape": [1, 8, 9], "dataset": "cifar10"}, "image_shape[2]: 9 and not 8"),
        ({"image_shape": [1, 8, 9], "dataset": "cifar10"}, "dataset: 'cifar10' and not 'digits'"),
        ({"class_names": list("abcdefghij")}, "class_names[0]: 'a' and not '0'"),
        ({"class_names": ["0"]}, "class_names: 1 values and not 10 values"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"method": "backprop", "model": "resnet18", "width": 0.05}])
def test_a_checkpoint_of_other_images_is_refused(change: dict[str, Any], message: str, options: dict[str, Any]) -> None:
    trainer = Trainer(replace(TINY, **options))
    state = trainer.state()
    with pytest.raises(CheckpointError) as caught:
        trainer.restore({**state, **change}, [])
    assert "the images are not those that this run was started with (" in str(caught.value)
    assert message in str(caught.value)


def test_a_checkpoint_that_says_less_about_its_images(state: dict[str, Any]) -> None:
    """One of an earlier version; or other last digits, and another place."""
    trainer = Trainer(TINY)
    known = ("normalisation", "pixels", "dataset", "image_shape", "class_names")
    for name in known:
        trainer.restore({key: value for key, value in state.items() if key != name}, [])
    trainer.restore({key: value for key, value in state.items() if key not in known}, [])
    mean = [value + 1e-9 for value in state["pixels"]["mean"]]
    trainer.restore({**state, "pixels": {**state["pixels"], "mean": mean}}, [])


def test_weights_of_version_0_1_0_still_teach(tmp_path: Path, state: dict[str, Any]) -> None:
    RunFolder(tmp_path).write_config({**vars(TINY), "model": "4p-4"})
    torch.save({"model": state["model"]}, tmp_path / "checkpoint.pt")
    assert load_teacher(str(tmp_path), image_shape=(1, 8, 8), classes=10).classes == 10
    with pytest.raises(CheckpointError, match=r"whose runs this version does not continue: finish it with"):
        resume(tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: not a readable checkpoint"):
        load_teacher(str(tmp_path), image_shape=(1, 8, 8), classes=10)
    torch.save([1], tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: not a checkpoint of ep-train"):
        load_teacher(str(tmp_path), image_shape=(1, 8, 8), classes=10)
