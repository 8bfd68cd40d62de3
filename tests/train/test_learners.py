"""Every method, estimator and variant as a run: it learns, and a run that was stopped goes on to the same numbers."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ep_train import TrainConfig, Trainer, build_network, cli, resume, train
from ep_train.data import Batches, load_dataset
from ep_train.data.loader import cut_out
from ep_train.divergence import Diverged
from ep_train.feedforward import backprop_gradients, feedforward_states
from ep_train.learners import Batch
from ep_train.models import Model
from ep_train.run_folder import read_metrics
from tests.core.threads import one_thread  # noqa: F401  (autouse)

TINY = TrainConfig(
    model="8p-8p", train_limit=320, test_limit=80, batch_size=20, epochs=3, lr=5e-3, device="cpu", threads=1, quiet=True
)
TIMES = {"seconds", "images_per_second"}
VARIANTS: dict[str, dict[str, Any]] = {
    "backprop": {"method": "backprop"},
    "bptt, local heads": {"method": "bptt", "local_heads": "all"},
    "five phases": {"estimator": "five_phase"},
    "contrastive": {"estimator": "contrastive", "readout": "mse"},
    "coupled": {"estimator": "coupled", "readout": "mse", "beta": 0.1},
    "separate": {"feedback": "separate"},
    "kolen-pollack": {"feedback": "kolen_pollack", "weight_decay": 1e-3, "optimizer": "sgd", "lr": 0.1},
    "dropout": {"dropout": (0.2,)},
    "dropout, backprop": {"dropout": (0.1, 0.2), "method": "backprop"},
    "warm start": {"warm_start": True, "free_steps": 2},
    "linear output": {"readout": "mse", "linear_output": True},
    "local mse": {"local_heads": "1", "local_loss": "mse", "local_weight": (0.5,), "local_pool": 4},
    "gains per layer": {"layer_gain": (1.2, 0.8)},
    "augmented": {"crop_padding": 1, "cutout": 1, "epochs": 4},
    "hot": {"optimizer": "sgd", "lr": 0.1, "nesterov": True, "momentum": 0.8, "lr_schedule": "cosine", "lr_min": 1e-3},
}


def numbers(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(path)]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_it_learns_and_resumes(changes: dict[str, Any], tmp_path: Path) -> None:
    config = replace(TINY, **changes)
    _, whole = train(replace(config, out=tmp_path / "whole"))
    rows = numbers(whole)
    assert rows[-1]["train_loss"] < 0.93 * rows[0]["train_loss"]
    assert rows[-1]["test_accuracy"] > 0.25
    trainer = Trainer(replace(config, out=tmp_path / "cut"))
    stopped = _after(trainer, config.epochs - 1, tmp_path / "cut")
    assert numbers(stopped) == rows[:-1]
    resume(stopped, quiet=True)
    assert numbers(stopped) == rows


def _after(trainer: Trainer, epochs: int, path: Path) -> Path:
    """Run some epochs of a trainer's configuration, and leave its folder as a killed run does."""
    from ep_train import checkpoint
    from ep_train.progress import Progress
    from ep_train.run_folder import RunFolder

    folder = RunFolder.create(path, dataset="digits", model="m", method="ep", seed=0)
    folder.write_config(asdict(trainer.config))
    progress = Progress(trainer.config.epochs, quiet=True)
    for _ in range(epochs):
        row = trainer.train_epoch(progress) | trainer.look(progress)
        row["test_accuracy"] = trainer.evaluate()
        folder.append_metrics(row)
        checkpoint.save(path, trainer.state())
    return path


def test_backprop_is_that_of_the_feedforward_net() -> None:
    """Against an ordinary torch module of the same shape."""
    network = build_network("6p-5", (1, 8, 8), 4)
    model, generator = Model(network, seed=3), torch.Generator().manual_seed(0)
    x = torch.rand(7, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 4, (7,), generator=generator)
    p = {name: t.detach().clone().requires_grad_() for name, t in model.named_parameters()}
    s = F.max_pool2d(F.conv2d(x, p["connections.0.weight"], padding=1), 2)
    s = (s + p["nodes.1.bias"].view(-1, 1, 1)).clamp(0, 1)
    s = (F.conv2d(s, p["connections.1.weight"], padding=1) + p["nodes.2.bias"].view(-1, 1, 1)).clamp(0, 1)
    loss = F.cross_entropy(F.linear(s.flatten(1), p["heads.0.weight"], p["heads.0.bias"]), labels)
    expected = dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))
    found, states, value = backprop_gradients(network, model.tensors(), x, [F.one_hot(labels, 4).float()])
    assert torch.allclose(value, loss.detach(), rtol=1e-6)
    assert torch.allclose(states[2], s.detach(), atol=1e-6)
    for name, gradient in found.named().items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-7), name


def test_the_feedforward_net_is_the_limit_of_small_gain() -> None:
    import ep_kernels

    network = build_network("6-6p-5", (1, 8, 8), 4, feedback_gain=1e-6)
    tensors = Model(network, seed=1).tensors()
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    relaxed = ep_kernels.free_phase(network, tensors, x, ep_kernels.RelaxConfig(free_steps=3))
    for ours, theirs in zip(feedforward_states(network, tensors, x), relaxed.states, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_evaluations_can_be_rare(tmp_path: Path) -> None:
    summary, path = train(replace(TINY, evaluate_every=2, out=tmp_path / "run"))
    assert ["test_accuracy" in row for row in read_metrics(path)] == [False, True, True]
    assert summary["test_accuracy"] == read_metrics(path)[-1]["test_accuracy"]


def test_the_log_tells_how_the_free_phase_converges(tmp_path: Path) -> None:
    _, path = train(replace(TINY, epochs=1, out=tmp_path / "run"))
    (row,) = read_metrics(path)
    assert len(row["layer_residual"]) == len(row["at_lo"]) == len(row["at_hi"]) == 2
    assert 0 <= row["spectral_radius"] < 1
    assert all(0 <= share <= 1 for share in (*row["at_lo"], *row["at_hi"]))


def test_a_free_phase_that_does_not_converge_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wild = replace(TINY, feedback_gain=1.0, weight_gain=4.0, schedule="sync", epochs=1, quiet=False)
    train(replace(wild, out=tmp_path / "run", lr=1e-5))
    assert "feedback" in capsys.readouterr().out


def test_results_hold_no_states() -> None:
    """They wait to be read, on a GPU many of them, and states are large."""
    for options in ({}, {"warm_start": True}):
        trainer = Trainer(replace(TINY, **options))
        images, labels, indices = next(trainer.train.indexed(1))
        assert trainer.learner.step(Batch(images, labels, indices, 1, 0)).states is None


def test_warm_starts_are_evaluated_to_their_equilibrium() -> None:
    config = replace(TINY, warm_start=True, free_steps=2)
    assert config.evaluation_config().free_steps == 20
    assert replace(config, evaluate_steps=7).evaluation_config().free_steps == 7
    same = replace(TINY, free_steps=3, on_fail="ignore")
    assert same.evaluation_config() == same.relax_config()


def test_another_teacher_is_not_resumed_with(tmp_path: Path) -> None:
    options = replace(TINY, method="backprop", model="vgg11_bn", width=0.0625, epochs=1)
    _, teacher = train(replace(options, out=tmp_path / "teacher"))
    student = replace(TINY, teacher=str(teacher), distill_logits=0.5, epochs=1, out=tmp_path / "student")
    _, path = train(student)
    assert json.loads((path / "config.json").read_text())["teacher"] == str(teacher.resolve())
    train(replace(options, seed=1, out=teacher, overwrite=True))
    with pytest.raises(ValueError, match="is not the one that this run was started with"):
        resume(path, epochs=2, quiet=True)


def test_a_module_keeps_its_buffers_when_a_batch_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TINY, method="backprop", model="resnet18", width=0.0625, on_divergence="continue", epochs=1)
    trainer = Trainer(replace(config, out=tmp_path / "run"))
    step, count = trainer.learner.step, 0

    def broken(batch: Any) -> Any:
        nonlocal count
        count += 1
        return step(replace(batch, images=batch.images * float("inf")) if count == 2 else batch)

    monkeypatch.setattr(trainer.learner, "step", broken)
    (row,) = read_metrics(_after(trainer, 1, tmp_path / "run"))
    assert row["skipped_batches"] == 1
    assert all(bool(b.isfinite().all()) for b in trainer.model.buffers())


def test_a_run_that_leaves_out_most_batches_ends(tmp_path: Path) -> None:
    wild = replace(TINY, optimizer="sgd", lr=1e30, on_divergence="continue", out=tmp_path / "run")
    with pytest.raises(Diverged, match="more than half of epoch 1 was left out"):
        train(wild)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_broken_batches_are_left_out_on_request(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(replace(TINY, epochs=1, on_divergence="continue", out=tmp_path / "run"))
    step, count = trainer.learner.step, 0

    def broken(batch: Any) -> Any:
        nonlocal count
        count += 1
        result = step(batch)
        if count not in (3, 9):
            return result
        if what == "loss":
            next(trainer.model.parameters()).grad.fill_(1e3)  # type: ignore[union-attr]
            return replace(result, loss=torch.tensor(float("nan")))
        next(trainer.model.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
        return result

    monkeypatch.setattr(trainer.learner, "step", broken)
    path = _after(trainer, 1, tmp_path / "run")
    (row,) = read_metrics(path)
    assert row["skipped_batches"] == 2
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    assert max(float(p.detach().abs().max()) for p in trainer.model.parameters()) < 5


def test_a_teacher_is_trained_and_taught_from(tmp_path: Path) -> None:
    """``ep-train teacher``, then distillation from its folder, by its logits (kept on disk) and its features."""
    small = ["--dataset", "digits", "--train-limit", "320", "--test-limit", "80", "--threads", "1", "--quiet"]
    teacher = tmp_path / "teacher"
    options = ["--model", "resnet18", "--width", "0.0625", "--crop-padding", "0", "--no-flip", "--batch-size", "20"]
    assert cli.main(["teacher", *small, *options, "--epochs", "2", "--out", str(teacher)]) == 0
    assert read_metrics(teacher)[-1]["train_loss"] < read_metrics(teacher)[0]["train_loss"]
    taught = ["--teacher", str(teacher), "--model", "8p-8p", "--epochs", "1", "--distill-logits", "1"]
    cache = tmp_path / "kept"
    runs = []
    for name, more in (
        ("logits", []),
        ("cached", ["--teacher-cache", str(cache)]),
        ("features", ["--distill-features", "auto", "--distill-map", "teacher"]),
    ):
        assert cli.main([*small, *taught, *more, "--out", str(tmp_path / name)]) == 0
        runs.append(numbers(tmp_path / name))
    assert runs[0][-1]["train_loss"] == pytest.approx(runs[1][-1]["train_loss"], rel=1e-5)
    assert runs[2][-1]["train_loss"] != runs[0][-1]["train_loss"]
    assert cache.exists()
    config = json.loads((tmp_path / "features" / "config.json").read_text())
    assert config["distill_features"] == ["auto"]
    epochs = resume(tmp_path / "features", epochs=2, quiet=True)[0]["epochs"]
    assert epochs == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_heads": "7"}, "argument 'local_heads': expected layers from 1 to 2, got '7'"),
        ({"local_heads": "some"}, "argument 'local_heads'"),
        ({"local_heads": "all", "local_weight": (1.0, 2.0, 3.0)}, "argument 'local_weight'"),
        ({"distill_logits": 1.0}, "argument 'teacher': expected one to distil from"),
        ({"teacher": "nobody"}, "load_teacher"),
        ({"dropout": (0.1, 0.1, 0.1)}, "argument 'dropout'"),
        ({"model": "vgg11_bn"}, "argument 'model': expected --method backprop with vgg11_bn, got ep"),
        ({"layer_gain": (1.0,) * 5}, "gain"),
        ({"model": "resnet18", "method": "backprop", "dropout": (0.1,)}, "arguments dropout: resnet18 is an ordinary"),
    ],
)
def test_what_does_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Trainer(replace(TINY, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warm_start": True, "flip": True}, "argument 'warm_start': expected no augmentation"),
        ({"linear_output": True}, "argument 'linear_output': expected --readout mse"),
        ({"method": "bptt", "feedback": "separate"}, "argument 'feedback': expected --method ep with it, got bptt"),
        ({"estimator": "contrastive"}, "argument 'estimator': contrastive needs --readout mse"),
        ({"lr_min": 1.0}, "argument 'lr_min': expected at most --lr"),
        ({"nesterov": True}, "argument 'nesterov'"),
        ({"teacher_cache": Path("x")}, "argument 'teacher_cache'"),
        ({"momentum": 1.0}, "argument 'momentum'"),
        ({"estimator": "coupled", "readout": "mse", "beta": 2.0}, "argument 'beta'"),
    ],
)
def test_settings_that_exclude_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **options)


def test_cutout() -> None:
    pixels = torch.full((3, 5, 6, 2), 9, dtype=torch.uint8)
    cut = cut_out(pixels, 3, torch.tensor([[2, 2], [0, 5], [4, 0]]))
    black = (cut == 0).all(-1)
    assert black.sum((1, 2)).tolist() == [9, 4, 4]
    assert black[0, 1:4, 1:4].all()
    assert black[1, :2, 4:].all()
    assert black[2, 3:, :2].all()
    data = load_dataset("digits", train_limit=40, test_limit=10, seed=0)
    batches = Batches(data, batch_size=40, cutout=3, shuffle=False, normalise="unit")
    whole = Batches(data, batch_size=40, shuffle=False, normalise="unit")
    (one, _), (other, _) = next(batches.epoch(1)), next(whole.epoch(1))
    assert not torch.equal(one, other)
    assert torch.equal(torch.where(one == 0, other, one), other)  # what is not black is as it was
    assert not torch.equal(one, next(batches.epoch(2))[0])


def test_indices_are_the_images_places() -> None:
    data = load_dataset("digits", train_limit=40, test_limit=10, seed=0)
    batches = Batches(data, batch_size=8, normalise="unit")
    for images, labels, indices in batches.indexed(3):
        assert torch.equal(labels, data.train_labels[indices])
        assert torch.allclose(images[:, 0], data.train_images[indices, 0].float() / 255)
