"""Options of the solver on their way from the command line to the relaxation, and what a run does with them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ep_kernels import ConvergenceError, Network, RelaxConfig, free_phase
from ep_train import Trainer, checkpoint, learners, train
from ep_train.bptt import bptt_gradients, loss_at
from ep_train.cli import main
from ep_train.config import TrainConfig
from ep_train.distributed import Processes
from ep_train.feedforward import feedforward_states
from ep_train.learners import Batch
from ep_train.run_folder import RunFolder, read_metrics
from ep_train.stability import diagnose
from tests.core.nets import problem
from tests.core.threads import one_thread  # noqa: F401  (autouse)

OPTIONS = ["--start", "feedforward", "--early-operands", "tf32", "--early-steps", "2", "--tol", "1e-6"]
SMALL = ["--model", "2p-3", "--train-limit", "40", "--test-limit", "20", "--epochs", "1", "--quiet"]


def test_they_reach_training_and_evaluation() -> None:
    config = TrainConfig(
        schedule="even_odd", tol=1e-3, on_fail="ignore", start="feedforward", early_operands="tf32", early_steps=2,
        evaluate_steps=9,
    )  # fmt: skip
    for relax, steps in ((config.relax_config(), 4), (config.evaluation_config(), 9)):
        assert (relax.on_fail, relax.start, relax.early_operands, relax.early_steps) == (
            "ignore", "feedforward", "tf32", 2
        )  # fmt: skip
        assert (relax.tol, relax.free_steps) == (1e-3, steps)
    assert TrainConfig().relax_config() == RelaxConfig()


def test_odd_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for change, message in (
        ({"on_fail": "raise"}, "argument 'on_fail': expected a tol > 0"),
        ({"early_steps": 2}, "argument 'early_steps': expected early_operands and early_steps > 0 together"),
        ({"start": "warm"}, "argument 'start': expected one of zero, feedforward, got 'warm'"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**change)  # type: ignore[arg-type]
    with pytest.raises(SystemExit):
        main(["--schedule", "random"])
    said = capsys.readouterr().err
    assert all(name in said for name in ("sweep", "even_odd", "sync")), said


def test_a_run_with_all_of_them(tmp_path: Path) -> None:
    out = tmp_path / "run"
    common = [*SMALL, "--schedule", "even_odd", "--free-steps", "60", "--on-fail", "raise", "--out", str(out)]
    assert main([*common, *OPTIONS]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["residual"] <= 1e-6


def test_a_run_ends_where_a_free_phase_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = [*SMALL, "--tol", "1e-9", "--free-steps", "2", "--on-fail", "raise", "--out", str(out)]
    assert main(arguments) == 1
    assert "the free phase has not converged: residual" in capsys.readouterr().err
    assert json.loads((out / "summary.json").read_text())["status"] == "diverged"


def failing_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A free phase of that training batch ends above a tolerance that none can meet."""
    original, calls = learners.ep_step, 0

    def step(model: Any, images: Any, labels: Any, relax: RelaxConfig, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(model, images, labels, replace(relax, tol=1e-12) if calls == number else relax, **options)

    monkeypatch.setattr(learners, "ep_step", step)


@pytest.mark.parametrize("number", [1, 3, 5, 7])
def test_a_run_that_a_free_phase_has_ended_goes_on_where_it_was(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the first batch, within an epoch, at the first batch of another one, and within that."""
    out = tmp_path / "run"
    options = [*SMALL[:-3], "--batch-size", "10", "--epochs", "2", "--tol", "0.5", "--on-fail", "raise", "--quiet"]
    with monkeypatch.context() as patch:
        failing_at(number, patch)
        assert main([*options, "--out", str(out)]) == 1
    kept = out / "diverged" / f"step-{number - 1:08d}"
    said = capsys.readouterr().err
    assert said.startswith("ep-train: the free phase has not converged: residual ")
    assert said.endswith(
        f"; kept in {kept}; change one of these or on_fail in {out / 'config.json'}, then continue with: ep-train "
        f"resume {out}\n"
    )
    assert re.search(r"; layer \d of 3 has the largest residual, \S+; kept in ", said)
    report = json.loads((kept / "report.json").read_text())
    assert (report["step"], report["epoch"], report["batch"]) == (number - 1, 1 + number // 5, (number - 1) % 4)
    assert (report["loss"], report["gradient_norm"], len(report["indices"])) == (None, None, 10)
    assert all(row["gradient_norm"] == 0 for row in report["layers"])  # those there were are of the batch before
    assert json.loads((out / "summary.json").read_text())["status"] == "diverged"
    assert checkpoint.load(out)["step"] == number - 1
    text = (out / "config.json").read_text()
    (out / "config.json").write_text(text.replace('"on_fail": "raise"', '"on_fail": "warn"'))
    assert main(["resume", str(out), "--quiet"]) == 0
    assert main([*options, "--out", str(tmp_path / "whole")]) == 0
    ours, theirs = (checkpoint.load(path)["model"] for path in (out, tmp_path / "whole"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    ours, theirs = ([row["train_loss"] for row in read_metrics(path)] for path in (out, tmp_path / "whole"))
    assert ours == theirs


def test_a_batch_that_cannot_be_looked_at_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The layers' numbers take more memory than a step."""
    out = tmp_path / "run"

    def none_left(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("ep_train.divergence.layer_numbers", none_left)
    failing_at(3, monkeypatch)
    options = [*SMALL[:-3], "--batch-size", "10", "--epochs", "2", "--tol", "0.5", "--on-fail", "raise", "--quiet"]
    assert main([*options, "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("ep-train: the free phase has not converged: residual ")
    assert "; its layers cannot be looked at (OutOfMemoryError: CUDA out of memory); change one of these" in said
    assert json.loads((out / "summary.json").read_text())["status"] == "diverged"
    assert checkpoint.load(out)["step"] == 2
    assert not (out / "diverged").exists()


def test_states_that_are_not_finite_leave_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = learners.ep_step, 0

    def step(model: Any, images: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(model, images * float("nan") if calls == 7 else images, *arguments, **options)

    monkeypatch.setattr(learners, "ep_step", step)
    config = TrainConfig(
        model="2p-3", train_limit=40, test_limit=20, batch_size=10, epochs=2, quiet=True, tol=0.5, on_fail="raise",
        out=tmp_path / "run",
    )  # fmt: skip
    with pytest.raises(ConvergenceError, match=r"states that are not finite.*; change one of these or on_fail in .*"):
        train(config)
    assert checkpoint.load(tmp_path / "run")["step"] == 4


def test_one_of_several_processes_keeps_nothing_on_its_own(tmp_path: Path) -> None:
    config = TrainConfig(model="2p-3", train_limit=40, test_limit=20, batch_size=10, tol=1e-9, on_fail="raise")
    trainer, folder = Trainer(config), RunFolder(tmp_path)
    with pytest.raises(ConvergenceError) as caught:
        trainer.learn(Batch(*next(trainer.train.indexed(1)), 1, 0))
    trainer.processes, trainer.folder = Processes(0, 2), folder
    before = str(caught.value)
    trainer._save_unconverged(folder, caught.value)
    assert str(caught.value) == f"{before}; nothing was kept"
    assert list(tmp_path.iterdir()) == []


def test_images_that_are_only_looked_at_raise_nothing(tmp_path: Path) -> None:
    """A run that no training batch has ended: test images after its epochs, and as the teacher of another run."""
    config = TrainConfig(
        model="2p-3", train_limit=40, test_limit=20, epochs=1, quiet=True, tol=1e-9, on_fail="raise", free_steps=2
    )
    trainer = Trainer(config)
    (images, labels), *_ = trainer.train.epoch(1)
    with pytest.raises(ConvergenceError) as caught:
        trainer.learner.step(learners.Batch(images, labels, torch.arange(len(labels)), 1, 0))
    assert caught.value.equilibrium.steps == 2
    assert 0 <= trainer.evaluate() <= 1
    _, residual = trainer.learner.predict(images)
    assert residual is not None
    assert residual.min() > 1e-9
    assert len(trainer.some_states()) == 2


def test_diagnosis_looks_at_what_has_not_converged() -> None:
    p = problem(Network.chain((1, 6, 6), [3, 3], ["none"] * 2, classes=2, feedback_gain=0.5))
    config = RelaxConfig(free_steps=3, tol=1e-9, on_fail="raise", early_operands="tf32", early_steps=1)
    assert diagnose(p.network, p.parameters, p.x, config).residual > 1e-9


def test_bptt_starts_where_ep_does() -> None:
    p = problem(Network.chain((1, 6, 6), [3, 3, 3], ["none"] * 3, classes=2, feedback_gain=0.5))
    config = RelaxConfig("sync", 2, start="feedforward")
    _, states, loss = bptt_gradients(p.network, p.parameters, p.x, p.targets, config, steps=2)
    found = free_phase(p.network, p.parameters, p.x, config)
    for a, b in zip(states, found.states, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(loss, loss_at(p.network, p.parameters, found.states, p.targets))
    zero = RelaxConfig(schedule="sync", free_steps=2)
    below = feedforward_states(p.network, p.parameters, p.x)
    warm = free_phase(p.network, p.parameters, p.x, zero, states=below)
    torch.testing.assert_close(warm.states[-1], found.states[-1])
