"""TensorBoard's events, read back with TensorBoard's own reader; probes of the gradient."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ep_train import TrainConfig, cli, resume, train
from ep_train.board import Board, scalars
from ep_train.run_folder import read_metrics
from tests.core.threads import one_thread  # noqa: F401  (autouse)

pytest.importorskip("tensorboard")
OPTIONS: dict[str, Any] = {
    "model": "4p-8",
    "train_limit": 100,
    "test_limit": 30,
    "batch_size": 20,
    "device": "cpu",
    "quiet": True,
}


def events(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    return read.Reload()


def shown(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every scalar, by tag."""
    read = events(run)
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def expected(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The same from metrics.jsonl, in float32 as TensorBoard keeps it."""
    out: dict[str, list[tuple[int, float]]] = {}
    for row in read_metrics(run):
        for tag, value in scalars(row):
            out.setdefault(tag, []).append((row["step"], float(torch.tensor(value, dtype=torch.float32))))
    return out


def test_every_metric_is_there(tmp_path: Path) -> None:
    train(TrainConfig(**OPTIONS, epochs=2, tensorboard=True, probe_gradient=2, out=tmp_path / "run"))
    found = shown(tmp_path / "run")
    assert found == expected(tmp_path / "run")
    assert [step for step, _ in found["loss/train"]] == [5, 10]
    assert [step for step, _ in found["gradient_cosine/connections.0.weight"]] == [10]
    layers = [
        f"{kind}/layer_{layer}" for kind in ("layer_residual", "saturation_lo", "saturation_hi") for layer in (1, 2)
    ]
    assert set(found) >= {
        "accuracy/train", "accuracy/test", "residual/train", "residual/spectral_radius", "run/images_per_second",
        "run/seconds_per_epoch", "run/peak_memory_bytes", "run/learning_rate", "gradient/smallest_cosine", *layers,
    }  # fmt: skip
    read = events(tmp_path / "run")
    for node, units in ((1, 4 * 4 * 4), (2, 8 * 4 * 4)):
        histograms = read.Histograms(f"states/layer_{node}")
        assert [h.step for h in histograms] == [5, 10]
        assert histograms[0].histogram_value.num == 16 * units
        assert histograms[0].histogram_value.min >= 0
        assert histograms[0].histogram_value.max <= 1


def test_a_resumed_run_goes_on_without_a_step_twice(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(TrainConfig(**OPTIONS, epochs=1, tensorboard=True, out=run))
    kept = tmp_path / "kept"
    shutil.copytree(run, kept, ignore=shutil.ignore_patterns("tensorboard"))
    resume(run, epochs=3, quiet=True)
    first = shown(run)
    assert [step for step, _ in first["loss/train"]] == [5, 10, 15]
    # as if it had been killed after its third epoch, before any checkpoint of the second was written
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(kept, run, dirs_exist_ok=True)
    resume(run, epochs=3, quiet=True)
    again = shown(run)
    assert again == expected(run)
    assert again["loss/train"] == first["loss/train"]
    assert {tag: [step for step, _ in values] for tag, values in again.items()} == {
        tag: [step for step, _ in values] for tag, values in first.items()
    }


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(TrainConfig(**OPTIONS, epochs=1, tensorboard=True, out=run))
    shutil.rmtree(run / "checkpoints")
    resume(run, quiet=True)
    assert shown(run) == expected(run)


def test_a_run_that_goes_back_drops_what_came_later(tmp_path: Path) -> None:
    board = Board(tmp_path / "tensorboard")
    for step, loss in ((5, 1.0), (10, 2.0), (15, 3.0), (10, 4.0), (15, 5.0)):
        board.write({"step": step, "train_loss": loss}, {})
    board.close()
    assert shown(tmp_path)["loss/train"] == [(5, 1.0), (10, 4.0), (15, 5.0)]


def test_a_run_by_backprop_and_overwriting(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for seed in (0, 1):
        config = TrainConfig(
            **OPTIONS, epochs=1, method="backprop", tensorboard=True, seed=seed, out=run, overwrite=True
        )
        train(config)
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert shown(run) == expected(run)
    assert events(run).Tags()["histograms"] == ["states/layer_1", "states/layer_2"]


def test_states_that_are_not_finite_leave_no_histogram(tmp_path: Path) -> None:
    board = Board(tmp_path / "run" / "tensorboard")
    board.write(
        {"step": 3, "train_loss": 1.0}, {1: torch.tensor([0.0, float("nan"), 1.0]), 2: torch.full((2,), torch.inf)}
    )
    board.close()
    read = events(tmp_path / "run")
    assert read.Tags()["histograms"] == ["states/layer_1"]
    assert read.Histograms("states/layer_1")[0].histogram_value.num == 2


def test_without_tensorboard_nothing_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    arguments = ["--tensorboard", "--model", "4p", "--train-limit", "20", "--batch-size", "10"]
    assert cli.main([*arguments, "--out", str(tmp_path / "run")]) == 1
    assert "--tensorboard needs its extra: pip install 'ep-kernels[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_probes_leave_the_run_alone_and_tell_good_from_bad(tmp_path: Path) -> None:
    paths = {}
    for every in (0, 1):
        config = TrainConfig(**OPTIONS, epochs=2, probe_gradient=every, out=tmp_path / str(every))
        _, paths[every] = train(config)
    plain, probed = (read_metrics(path) for path in paths.values())
    for before, after in zip(plain, probed, strict=True):
        assert not any(key.startswith("gradient") for key in before)
        added = {key for key in after if key.startswith("gradient")}
        assert added == {"gradient_cosine", "gradient_cosine_smallest", "gradient_residual"}
        assert after["train_loss"] == before["train_loss"]
        names = {"connections.0.weight", "connections.1.weight", "nodes.1.bias", "nodes.2.bias"}
        assert set(after["gradient_cosine"]) == names | {"heads.0.weight", "heads.0.bias"}
        assert 0.99 < after["gradient_cosine_smallest"] <= 1 + 1e-9
        assert after["gradient_residual"] < 1e-6
    few: dict[str, Any] = {"feedback_gain": 1.0, "schedule": "sync", "free_steps": 2, "nudged_steps": 2}
    _, path = train(TrainConfig(**OPTIONS, **few, epochs=1, probe_gradient=1, out=tmp_path / "few"))
    assert read_metrics(path)[0]["gradient_cosine_smallest"] < 0.9


def test_probes_are_of_ep(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="argument 'probe_gradient': expected --method ep with it, got bptt"):
        TrainConfig(method="bptt", probe_gradient=1)
