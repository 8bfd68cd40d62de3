"""A step that goes wrong: what is kept of it, what the message says, and what happens then."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ep_train import TrainConfig, Trainer, checkpoint, divergence, epoch, resume, train
from ep_train.divergence import Diverged, culprit
from ep_train.run_folder import RunFolder, read_metrics
from ep_train.trainer import new_folder
from tests.core.threads import one_thread  # noqa: F401  (autouse)

TINY = TrainConfig(
    model="4p-4",
    train_limit=60,
    test_limit=10,
    batch_size=10,
    epochs=3,
    lr=0.01,
    lr_schedule="linear",
    device="cpu",
    quiet=True,
)
TIMES = {"seconds", "images_per_second"}


def numbers(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(path)]


def report_of(path: Path, step: int) -> dict[str, Any]:
    return dict(json.loads((path / "diverged" / f"step-{step:08d}" / "report.json").read_text()))


def test_a_gradient_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(replace(TINY, out=tmp_path / "run"))
    step, seen = trainer.learner.step, []

    def broken(batch: Any) -> Any:
        result = step(batch)
        seen.append((batch.indices.tolist(), {n: p.detach().clone() for n, p in trainer.model.named_parameters()}))
        if len(seen) == 9:
            dict(trainer.model.named_parameters())["connections.1.weight"].grad[0, 0, 0, 0] = float("nan")  # type: ignore[index]
        return result

    monkeypatch.setattr(trainer.learner, "step", broken)
    folder = new_folder(trainer.config)
    kept = tmp_path / "run" / "diverged" / "step-00000008"
    message = (
        r"^the gradient's norm became nan in epoch 2 after 20 images: lower --lr or --feedback-gain, or raise "
        rf"--free-steps; layer 2 of 3 has 1 gradients that are not finite; kept in {kept}$"
    )
    with pytest.raises(Diverged, match=message):
        trainer.run(folder)
    assert len(seen) == 9
    weights = safetensors.torch.load_file(kept / "weights.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in seen[-1][1].items())  # before the step
    report = report_of(folder.path, 8)
    assert report["indices"] == seen[-1][0]
    assert {k: report[k] for k in ("step", "epoch", "batch", "steps_since")} == {
        "step": 8,
        "epoch": 2,
        "batch": 2,
        "steps_since": 0,
    }
    assert report["gradient_norm"] is None
    assert report["nonfinite"]["gradient_norm"] == "nan"
    first, second, readout = report["layers"]
    assert first["state_norm"] > 0
    assert second["residual"] < 1
    assert (first["gradient_nonfinite"], second["gradient_nonfinite"]) == (0, 1)
    assert "state_norm" not in readout
    assert readout["weight_norm"] > 0
    assert json.loads((folder.path / "summary.json").read_text())["status"] == "diverged"
    assert checkpoint.load(folder.path)["epoch"] == 1


@pytest.mark.parametrize("method", ["ep", "backprop"])
def test_a_loss_that_runs_away(method: Any, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"the loss became .*; layer \d of 3 has the largest weight, \S+; kept in "):
        train(replace(TINY, lr=1e6, optimizer="sgd", method=method, out=tmp_path / "run"))
    report = report_of(tmp_path / "run", 1)
    assert "of 3 has the largest weight, " in report["layer"]
    assert len(report["indices"]) == 10
    assert report["layers"][0]["state_norm"] >= 0


def test_a_module_that_diverges(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"; layer 1 of 1 has "):
        train(replace(TINY, model="resnet18", width=0.0625, method="backprop", lr=1e30, out=tmp_path / "run"))


def test_which_layer() -> None:
    def row(layer: int, **more: Any) -> dict[str, Any]:
        return {"layer": layer, "weight_largest": 1.0, "weight_nonfinite": 0, "gradient_nonfinite": 0, **more}

    assert culprit([row(1), row(2, weight_largest=3.5)]) == "layer 2 of 2 has the largest weight, 3.5"
    rows = [row(1, gradient_nonfinite=4), row(2, gradient_nonfinite=9)]
    assert culprit(rows) == "layer 1 of 2 has 4 gradients that are not finite"
    rows = [row(1, gradient_nonfinite=4), row(2, state_nonfinite=7)]
    assert culprit(rows) == "layer 2 of 2 has 7 states that are not finite"


def test_what_cannot_be_kept_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ep_train.durable.HashedFile.write", full)
    with pytest.raises(Diverged, match=r"the loss became .*step-00000001 cannot be written \(No space left"):
        train(replace(TINY, lr=1e6, optimizer="sgd", out=tmp_path / "run"))


def test_at_most_so_many_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "MOST", 2)
    fail_at(monkeypatch, lambda trainer: trainer.step % 6 in (1, 3))
    train(replace(TINY, on_divergence="continue", out=tmp_path / "run"))
    assert [row["skipped_batches"] for row in read_metrics(tmp_path / "run")] == [2, 2, 2]
    assert sorted(path.name[-2:] for path in (tmp_path / "run" / "diverged").iterdir()) == ["01", "03"]


# --- rollback ---------------------------------------------------------------------------------------------------------


def fail_at(monkeypatch: pytest.MonkeyPatch, when: Any) -> None:
    original = epoch.wrong

    def wrong(trainer: Trainer, loss: float, gradient: float) -> str | None:
        return "it failed" if when(trainer) else original(trainer, loss, gradient)

    monkeypatch.setattr(epoch, "wrong", wrong)


def rate(trainer: Trainer) -> float:
    return float(trainer.scheduler.base_lrs[0])


def too_fast(trainer: Trainer) -> bool:
    """At steps 10 and 14, twice and once."""
    return (trainer.step == 10 and rate(trainer) > 0.003) or (trainer.step == 14 and rate(trainer) > 0.002)


ROLLBACK = replace(TINY, on_divergence="rollback", checkpoint_every=4)


def test_a_rollback_lowers_the_learning_rate_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_at(monkeypatch, too_fast)
    summary, path = train(replace(ROLLBACK, quiet=False, out=tmp_path / "run"))
    assert summary["status"] == "finished"
    rows = read_metrics(path)
    assert [row.get("rollbacks", 0) for row in rows] == [0, 2, 3]
    assert [row["lr"] for row in rows] == pytest.approx([0.01 * 2 / 3, 0.01 / 3 / 4, 0.0])
    told = [line for line in capsys.readouterr().out.splitlines() if "rollbacks)" in line]
    assert [line.partition("back to ")[2] for line in told] == [
        "step-00000008 with 0.5 times the learning rate (1 of 3 rollbacks)",
        "step-00000008 with 0.25 times the learning rate (2 of 3 rollbacks)",
        "step-00000012 with 0.125 times the learning rate (3 of 3 rollbacks)",
    ]
    assert report_of(path, 10)["step"] == 10
    assert checkpoint.load(path)["rollbacks"] == 3
    assert [p.name for p in checkpoint.existing(path)] == ["step-00000016", "step-00000018"]


@pytest.fixture(scope="module")
def gone_back(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three rollbacks that was never stopped."""
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, too_fast)
        return train(replace(ROLLBACK, out=tmp_path_factory.mktemp("whole") / "run"))[1]


@pytest.mark.parametrize("calls", [7, 11, 13, 19, 23])
def test_a_rollback_is_the_same_in_a_run_that_was_stopped(
    calls: int, gone_back: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after so many batches in all: before, between and after the rollbacks."""
    fail_at(monkeypatch, too_fast)
    trainer, count = Trainer(replace(ROLLBACK, out=tmp_path / "run")), 0
    step = trainer.learner.step

    def stopping(batch: Any) -> Any:
        nonlocal count
        count += 1
        trainer.stop_asked = trainer.stop_asked or count == calls
        return step(batch)

    monkeypatch.setattr(trainer.learner, "step", stopping)
    folder = new_folder(trainer.config)
    assert trainer.run(folder)["status"] == "interrupted"
    resume(folder.path, quiet=True)
    assert numbers(folder.path) == numbers(gone_back)
    ours, theirs = checkpoint.load(folder.path), checkpoint.load(gone_back)
    assert all(torch.equal(ours["model"][name], tensor) for name, tensor in theirs["model"].items())


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Ask for the end during that batch, counted from now on."""
    original, count = Trainer.learn, 0

    def learn(self: Trainer, batch: Any) -> Any:
        nonlocal count
        count += 1
        self.stop_asked = self.stop_asked or count == batches
        return original(self, batch)

    monkeypatch.setattr(Trainer, "learn", learn)


@pytest.mark.parametrize("keep", [1, 2])
def test_stops_before_and_after_rollbacks(keep: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at step 11, where it diverges twice; then again at a lower step, whose checkpoint is the newest."""
    fail_at(monkeypatch, lambda trainer: trainer.step == 11 and rate(trainer) > 0.003)
    config = replace(ROLLBACK, keep_checkpoints=keep)
    _, whole = train(replace(config, out=tmp_path / "whole"))
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 11)
        assert train(replace(config, out=path))[0]["status"] == "interrupted"
    assert checkpoint.existing(path)[-1].name == "step-00000011"
    for step, count in ((10, 1), (9, 2)):  # 11 fails, 8, 9; then 10, 11 fails, 8
        with monkeypatch.context() as patch:
            stop_after(patch, 3)
            assert resume(path, quiet=True)[0]["status"] == "interrupted"
        state = checkpoint.load(path)
        assert (state["step"], state["rollbacks"]) == (step, count)
        assert [p.name for p in checkpoint.existing(path)][-2:] == ["step-00000008", f"step-{step:08d}"]
    assert resume(path, quiet=True)[0]["status"] == "finished"
    assert numbers(path) == numbers(whole)
    ours, theirs = checkpoint.load(path), checkpoint.load(whole)
    assert all(torch.equal(ours["model"][name], tensor) for name, tensor in theirs["model"].items())


def test_a_rollback_takes_back_what_a_stop_has_left_after_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between a rollback and the next checkpoint, a run goes on from where it went back to."""
    fail_at(monkeypatch, lambda trainer: trainer.step == 11 and rate(trainer) > 0.006)
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 11)
        train(replace(ROLLBACK, out=path))

    def killed(self: Trainer, batch: Any) -> Any:
        if self.rollbacks:
            raise MemoryError
        return original(self, batch)

    original = Trainer.learn
    monkeypatch.setattr(Trainer, "learn", killed)
    with pytest.raises(MemoryError):
        resume(path, quiet=True)
    assert [p.name for p in checkpoint.existing(path)] == ["step-00000006", "step-00000008"]


def test_a_batch_that_is_left_out_leaves_the_checkpoint_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, lambda trainer: trainer.step in (0, 3))
    config = replace(TINY, epochs=1, on_divergence="continue", checkpoint_every=1, keep_checkpoints=9)
    _, path = train(replace(config, out=tmp_path / "run"))
    found = checkpoint.existing(path)
    assert [p.name for p in found] == [f"step-{step:08d}" for step in range(1, 7)]
    before = checkpoint.load(path)["model"]
    for later in found[4:]:
        shutil.rmtree(later)
    row = numbers(path)
    assert checkpoint.load(path)["partial"]["skipped"] == 2
    resume(path, quiet=True)
    assert numbers(path) == row
    assert all(torch.equal(tensor, before[name]) for name, tensor in checkpoint.load(path)["model"].items())


def test_a_rollback_in_the_first_epoch_goes_to_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, lambda trainer: trainer.step == 2 and rate(trainer) > 0.006)
    _, path = train(replace(ROLLBACK, epochs=1, checkpoint_every=0, out=tmp_path / "run"))
    _, slower = train(replace(ROLLBACK, epochs=1, lr=0.005, out=tmp_path / "slower"))
    (row,), (other,) = numbers(path), numbers(slower)
    assert row == {**other, "rollbacks": 1}


def test_a_run_goes_back_only_so_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, lambda trainer: trainer.step == 7)
    with pytest.raises(Diverged, match=r"^it failed \(given up after 2 rollbacks\); layer \d of 3 has the largest"):
        train(replace(ROLLBACK, max_rollbacks=2, out=tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "diverged"
    assert checkpoint.load(tmp_path / "run")["step"] == 6


def test_a_rollback_past_a_damaged_checkpoint_takes_back_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(trainer: Trainer) -> bool:
        if trainer.step != 14 or rate(trainer) < 0.006:
            return False
        assert trainer.folder is not None
        (trainer.folder.path / "checkpoints" / "step-00000012" / "state.pt").write_bytes(b"")
        return True

    fail_at(monkeypatch, damaged)
    _, path = train(replace(ROLLBACK, checkpoint_every=0, out=tmp_path / "run"))
    assert [row["epoch"] for row in RunFolder(path).read_metrics()] == [1, 2, 3]
    assert [row.get("rollbacks", 0) for row in read_metrics(path)] == [0, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollback_factor": 1.0}, r"argument 'rollback_factor': expected a number in \(0, 1\), got 1.0"),
        ({"max_rollbacks": -1}, "argument 'max_rollbacks': expected a finite number >= 0, got -1"),
        ({"checkpoint_every": -1}, "argument 'checkpoint_every': expected a finite number >= 0, got -1"),
        ({"keep_checkpoints": 0}, "argument 'keep_checkpoints': expected a finite number > 0, got 0"),
        ({"on_divergence": "panic"}, "argument 'on_divergence'"),
    ],
)
def test_options_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)
