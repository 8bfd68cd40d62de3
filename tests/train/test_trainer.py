"""A run from end to end on a few digits: its folder, its summary, its optimizer; signs, schedules and divergence."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ep_train
from ep_kernels import BackendError, backends
from ep_train import TrainConfig, Trainer, divergence, epoch, learners, optim, train
from ep_train.run_folder import RunFolder, read_metrics
from tests.core.threads import one_thread  # noqa: F401  (autouse)

TINY = TrainConfig(model="8p-8", train_limit=160, test_limit=40, batch_size=20, epochs=2, device="cpu", quiet=True)
METRICS = {
    "epoch",
    "step",
    "train_loss",
    "train_accuracy",
    "test_accuracy",
    "residual",
    "layer_residual",
    "at_lo",
    "at_hi",
    "spectral_radius",
    "images_per_second",
    "seconds",
    "lr",
}


def run(tmp_path: Path, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    summary, path = train(replace(TINY, out=tmp_path / "run", **changes))
    return summary, read_metrics(path)


def test_a_run_folder_holds_everything(tmp_path: Path) -> None:
    summary, path = train(replace(TINY, out=tmp_path / "run"))
    assert path == tmp_path / "run"
    assert {f.name for f in path.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "curves.png",
        "checkpoints",
        ".lock",
    }
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [METRICS] * 2
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 8), (2, 16)]
    assert all(row["images_per_second"] == pytest.approx(160 / row["seconds"]) for row in rows)
    assert json.loads((path / "summary.json").read_text()) == summary
    assert {"test_accuracy", "train_loss", "seconds", "images_per_second", "peak_memory_bytes"} <= summary.keys()
    assert summary["status"] == "finished"
    assert summary["test_accuracy"] == rows[-1]["test_accuracy"]
    assert summary["best_test_accuracy"] == max(row["test_accuracy"] for row in rows)
    assert summary["train_loss"] == rows[-1]["train_loss"]
    assert summary["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert summary["images_per_second"] == pytest.approx(320 / summary["seconds"])
    assert summary["peak_memory_bytes"] > 2**26
    assert summary["device"] == "cpu"
    assert summary["parameters"] == (9 * 8 + 8) + (9 * 64 + 8) + (10 * 128 + 10)
    config = json.loads((path / "config.json").read_text())
    assert config["model"] == "8p-8"
    assert set(config) == set(asdict(TINY))
    assert (path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("method", ["ep", "bptt"])
def test_it_learns(method: Any, tmp_path: Path) -> None:
    changes = {"model": "16-16p", "train_limit": 500, "test_limit": 100, "epochs": 4, "lr": 3e-3, "feedback_gain": 0.05}
    summary, rows = run(tmp_path, method=method, **changes)
    assert summary["test_accuracy"] > 0.7
    losses = [row["train_loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert ("residual" in rows[0]) == (method == "ep")


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    def numbers(where: str, **changes: Any) -> list[float]:
        return [row["train_loss"] for row in run(tmp_path / where, estimator="random_sign", **changes)[1]]

    first = numbers("a")
    assert numbers("b") == first
    assert numbers("c", seed=1) != first


def test_reference_and_cpu_give_the_same_first_epoch(tmp_path: Path) -> None:
    losses = [run(tmp_path / name, backend=name, epochs=1)[0]["train_loss"] for name in ("reference", "cpu")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert backends.requested() == "auto"


def test_a_backend_that_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="backend 'triton' cannot run"):
        run(tmp_path, backend="triton")


def test_options_reach_the_relaxation() -> None:
    config = TrainConfig(
        schedule="even_odd",
        free_steps=7,
        nudged_steps=5,
        beta=0.3,
        estimator="negative",
        form="states",
        winners="live",
        linear_nudge=True,
        damping=0.5,
        over_relaxation=1.2,
        tol=1e-3,
        operands="bfloat16",
        storage="float16",
        on_fail="ignore",
        start="feedforward",
        early_operands="float16",
        early_steps=3,
    )
    relax = config.relax_config()
    dtypes = {"operands": torch.bfloat16, "storage": torch.float16, "early_operands": torch.float16}
    for name, value in asdict(relax).items():
        assert value == dtypes.get(name, getattr(config, name)), name


def test_names_of_precisions() -> None:
    operands = {"float32": None, "tf32": "tf32", "float16": torch.float16, "bfloat16": torch.bfloat16}
    for name, value in operands.items():
        assert replace(TINY, operands=name).relax_config().operands == value
    assert [replace(TINY, storage=s).relax_config().storage for s in ("float32", "float16")] == [None, torch.float16]
    with pytest.raises(
        ValueError, match="argument 'operands': expected one of float32, tf32, float16, bfloat16, got 'f'"
    ):
        replace(TINY, operands="f")
    with pytest.raises(ValueError, match="argument 'storage': expected one of float32, float16, got 'bfloat16'"):
        replace(TINY, storage="bfloat16")


def test_low_precision_operands_train(tmp_path: Path) -> None:
    full, *low = (run(tmp_path / o, operands=o)[1][-1]["train_loss"] for o in ("float32", "bfloat16", "float16"))
    assert full not in low
    assert low == pytest.approx([full] * 2, rel=0.05)


@pytest.mark.parametrize("method", ["ep", "bptt"])
def test_states_stored_in_float16_train(method: Any, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"method": method, "backend": "reference", "free_steps": 5}
    full, half = (run(tmp_path / s, storage=s, **changes)[1][-1]["train_loss"] for s in ("float32", "float16"))
    assert half != full
    assert half == pytest.approx(full, rel=0.05)


def test_a_backend_that_cannot_store_so(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="backend 'cpu' cannot run: it stores states in the parameters' dtype"):
        run(tmp_path, backend="cpu", storage="float16")
    assert not (tmp_path / "run").exists()


def test_images_are_augmented(tmp_path: Path) -> None:
    plain, cropped, flipped = (
        run(tmp_path / name, **changes)[1][0]["train_loss"]
        for name, changes in (("plain", {}), ("crop", {"crop_padding": 2}), ("flip", {"flip": True}))
    )
    assert len({plain, cropped, flipped}) == 3


# --- random signs -----------------------------------------------------------------------------------------------------


def signs_of(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, **trainer_state: Any) -> list[str]:
    """The estimator of every batch of an epoch."""
    seen: list[str] = []
    original = learners.ep_step

    def record(model: Any, images: Any, labels: Any, relax: Any, **options: Any) -> Any:
        seen.append(relax.estimator)
        return original(model, images, labels, relax, **options)

    monkeypatch.setattr(learners, "ep_step", record)
    made = Trainer(config)
    for name, value in trainer_state.items():
        setattr(made, name, value)
    with ep_train.progress.Progress(1, quiet=True) as progress:
        made.train_epoch(progress)
    monkeypatch.setattr(learners, "ep_step", original)
    return seen


def test_random_sign_draws_both_and_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TINY, estimator="random_sign", batch_size=4)
    first = signs_of(config, monkeypatch)
    assert len(first) == 40
    assert 10 <= first.count("positive") <= 30
    assert set(first) == {"positive", "negative"}
    assert signs_of(config, monkeypatch) == first
    assert signs_of(config, monkeypatch, epoch=1) != first  # another epoch draws anew
    assert signs_of(replace(config, seed=1), monkeypatch) != first
    partial = epoch.Partial(batches=15)
    assert signs_of(config, monkeypatch, partial=partial) == first[15:]  # in the middle of an epoch, too


# --- optimizer and learning rate --------------------------------------------------------------------------------------


def small_learner(**changes: Any) -> learners.Learner:
    config = replace(TINY, **{"model": "3-4p", "local_heads": "1", **changes})
    return learners.NetworkLearner(config, Trainer(TINY).dataset, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_optimizers(name: Any, kind: type) -> None:
    config = TrainConfig(optimizer=name, lr=0.2, layer_lr=(1.0, 0.5, 0.1), weight_decay=0.03)
    learner = small_learner()
    optimizer = optim.make_optimizer(learner, config)
    assert type(optimizer) is kind
    rates = {id(g["params"][0]): g["lr"] for g in optimizer.param_groups}
    assert all(g["weight_decay"] == 0.03 for g in optimizer.param_groups)
    assert {n: rates[id(p)] for n, p in learner.model.named_parameters()} == {
        "connections.0.weight": 0.2,
        "nodes.1.bias": 0.2,
        "heads.1.weight": 0.2,
        "heads.1.bias": 0.2,
        "connections.1.weight": 0.1,
        "nodes.2.bias": 0.1,
        "heads.0.weight": pytest.approx(0.02),
        "heads.0.bias": pytest.approx(0.02),
    }
    plain = optim.make_optimizer(learner, replace(config, layer_lr=()))
    assert {g["lr"] for g in plain.param_groups} == {0.2}
    if name == "sgd":
        assert {g["momentum"] for g in optimizer.param_groups} == {0.9}
        other = optim.make_optimizer(learner, TrainConfig(optimizer="sgd", nesterov=True, momentum=0.5))
        assert {(g["nesterov"], g["momentum"]) for g in other.param_groups} == {(True, 0.5)}


@pytest.mark.parametrize("factors", [(1.0,), (1.0, 1.0), (1.0,) * 4])
def test_layer_lr_of_the_wrong_length(factors: tuple[float, ...]) -> None:
    message = rf"argument 'layer_lr': expected 3 factors \(bottom to top, .*\), got {len(factors)}"
    with pytest.raises(ValueError, match=message):
        optim.make_optimizer(small_learner(), TrainConfig(layer_lr=factors))


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("constant", lambda t: 1.0),
        ("linear", lambda t: 1 - t / 10),
        ("cosine", lambda t: 0.5 + 0.5 * math.cos(math.pi * t / 10)),
    ],
)
def test_learning_rate_schedules(schedule: Any, factor: Any) -> None:
    config = TrainConfig(lr=0.4, lr_schedule=schedule, layer_lr=(1.0, 1.0, 0.5))
    optimizer = optim.make_optimizer(small_learner(), config)
    scheduler = optim.make_scheduler(optimizer, config, 10)
    for t in range(11):
        rates = [g["lr"] for g in optimizer.param_groups]
        assert max(rates) == pytest.approx(0.4 * factor(t))
        assert min(rates) == pytest.approx(0.2 * factor(t))
        optimizer.step()
        scheduler.step()


def test_an_mse_readout_has_no_rate_of_its_own() -> None:
    """Its output units are a layer: one factor for each layer, and none beside them."""
    learner = small_learner(readout="mse", local_heads="none")
    assert learner.layers == 3
    rates = optim.make_optimizer(learner, TrainConfig(lr=1.0, layer_lr=(0.1, 0.2, 0.3))).param_groups
    assert sorted({group["lr"] for group in rates}) == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_ends_at_lr_min(schedule: Any) -> None:
    optimizer = optim.make_optimizer(small_learner(), TrainConfig(lr=0.4))
    scheduler = optim.make_scheduler(optimizer, TrainConfig(lr=0.4, lr_min=0.1, lr_schedule=schedule), 10)
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert (rates[0], rates[5], rates[10]) == pytest.approx((0.4, 0.25, 0.1))


def test_the_learning_rate_falls_to_zero_over_a_run(tmp_path: Path) -> None:
    _, rows = run(tmp_path, lr_schedule="linear", lr=0.01)
    assert [row["lr"] for row in rows] == pytest.approx([0.005, 0.0])


# --- divergence -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lr", "optimizer"), [(1e6, "adam"), (1e6, "sgd"), (1e30, "sgd")])
def test_a_run_that_diverges_ends(lr: float, optimizer: Any, tmp_path: Path) -> None:
    with pytest.raises(divergence.Diverged, match=r"the loss became .* in epoch 1 after \d+ images: lower --lr"):
        run(tmp_path, lr=lr, optimizer=optimizer)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "diverged"
    assert summary["epochs"] == 0
    assert summary["test_accuracy"] is None


def test_a_high_loss_is_no_divergence_yet(tmp_path: Path) -> None:
    summary, rows = run(tmp_path, lr=3.0)
    assert summary["status"] == "finished"
    assert max(row["train_loss"] for row in rows) > 10


def test_a_dataset_can_be_given(tmp_path: Path) -> None:
    data = Trainer(TINY).dataset
    made = Trainer(replace(TINY, dataset="cifar10", model="4p"), dataset=data)
    summary = made.run(RunFolder.create(tmp_path / "x", dataset="d", model="m", method="ep", seed=0))
    assert summary["data"] == data.source
    assert summary["status"] == "finished"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "argument 'epochs': expected a finite number > 0, got 0"),
        ({"lr": float("nan")}, "argument 'lr': expected a finite number > 0, got nan"),
        ({"weight_decay": -0.1}, "argument 'weight_decay': expected a finite number >= 0, got -0.1"),
        ({"seed": -1}, "argument 'seed': expected a finite number >= 0, got -1"),
        ({"threads": 0}, "argument 'threads': expected an integer >= 1, got 0"),
        ({"beta": 0.0}, "RelaxConfig: argument 'beta': expected a finite number > 0, got 0.0"),
        ({"winners": "live"}, "argument 'winners': expected 'frozen' with form='delta'"),
    ],
)
def test_configurations_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="argument '") as caught:
        replace(TINY, **change)
    assert message in str(caught.value)
