"""``ep-train eval``: its numbers are those of the run, and of the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ep_train import TrainConfig, checkpoint, cli, train
from ep_train.checkpoint import CheckpointError
from ep_train.trained import load_trained
from tests.core.threads import one_thread  # noqa: F401  (autouse)


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["eval", *arguments, "--json", "-", "--device", "cpu"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_numbers_are_those_of_the_run_and_the_network(
    run: Path, test_set: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(capsys, str(run))
    summary = json.loads((run / "summary.json").read_text())
    assert found["accuracy"] == summary["test_accuracy"]
    with pytest.raises(CheckpointError, match=r"nothing: expected the folder of a run, and there is none"):
        load_trained(run / "nothing", device="cpu")
    trained = load_trained(str(run), device="cpu")
    images, labels = test_set
    outputs, residual = trained.predict(trained.normalised(images))
    assert residual is not None
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(outputs, labels)), rel=1e-5)
    assert found["residual"] == pytest.approx(float(residual.mean()), rel=1e-5)
    assert found["largest_residual"] == pytest.approx(float(residual.max()), rel=1e-5)
    guessed = outputs.argmax(1)
    for true, row in enumerate(found["confusion"]):
        assert row == [int(((labels == true) & (guessed == other)).sum()) for other in range(10)]
        entry = found["classes"][true]
        assert entry == {"name": str(true), "images": sum(row), "accuracy": row[true] / sum(row)}
    assert (found["images"], found["split"], found["free_steps"]) == (100, "test", 3)


def test_other_sweeps_and_training_images(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(capsys, str(run), "--split", "train", "--free-steps", "8", "--batch-size", "64")
    assert (found["images"], found["free_steps"]) == (400, 8)  # whole: no batch is left out
    few = evaluate(capsys, str(run), "--split", "train", "--free-steps", "1")
    assert found["residual"] < few["residual"]


def test_the_table(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "result.json"
    assert cli.main(["eval", str(run), "--json", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("100 test images, 3 sweeps")
    assert lines[1].startswith("accuracy ")
    assert len(lines) == 12
    written = json.loads(path.read_text())
    assert f"accuracy {100 * written['accuracy']:.2f} %" in lines[1]
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_images_from_a_folder(
    run: Path, test_set: tuple[Tensor, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i, (image, label) in enumerate(zip(*test_set, strict=True)):
        for split in ("train", "test"):
            folder = tmp_path / "pictures" / split / str(int(label))
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(folder / f"{i:03d}.png")
    found = evaluate(capsys, str(run), "--dataset", "folder:pictures", "--data-root", str(tmp_path))
    assert found["images"] == 100
    # normalised as the run's images were, not by statistics of these
    assert found["accuracy"] == evaluate(capsys, str(run))["accuracy"]
    for split in ("train", "test"):
        (tmp_path / "pictures" / split / "9").rename(tmp_path / "pictures" / split / "nine")
    assert cli.main(["eval", str(run), "--dataset", "folder:pictures", "--data-root", str(tmp_path)]) == 1
    assert "expected classes as in" in capsys.readouterr().err


def test_a_run_by_backprop_and_a_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"epochs": 1, "train_limit": 100, "test_limit": 40, "batch_size": 20, "device": "cpu"}
    for name, model, more in (("mse", "4p", {"readout": "mse"}), ("teacher", "resnet18", {"width": 0.05})):
        path = tmp_path / name
        config = TrainConfig(model=model, method="backprop", out=path, quiet=True, **options, **more)
        summary, _ = train(config)
        found = evaluate(capsys, str(path))
        assert found["accuracy"] == summary["test_accuracy"]
        assert (found["residual"], found["free_steps"]) == (None, None)
        assert cli.main(["eval", str(path), "--free-steps", "3"]) == 1
        assert "has no free phase" in capsys.readouterr().err


def test_what_cannot_be_evaluated(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(tmp_path)], "config.json: not a readable configuration"),
        ([str(run), "--free-steps", "0"], "argument 'free_steps': expected an integer >= 1, got 0"),
        ([str(run), "--dataset", "nothing"], "unknown dataset 'nothing'"),
        ([str(run), "--backend", "triton", "--device", "cpu"], "backend 'triton' cannot run"),
    ):
        assert cli.main(["eval", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_a_checkpoint_that_does_not_say_what_it_was_trained_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = checkpoint.model_of(run)
    del state["class_names"]
    monkeypatch.setattr(checkpoint, "model_of", lambda path: state)
    with pytest.raises(CheckpointError, match="older version: it has no 'class_names'"):
        load_trained(run, device="cpu")
