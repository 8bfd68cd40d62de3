"""Options of the solver on their way from the command line to the relaxation, and what a run does with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ep_kernels import ConvergenceError, Network, RelaxConfig, free_phase
from ep_train import Trainer, learners
from ep_train.bptt import bptt_gradients, loss_at
from ep_train.cli import main
from ep_train.config import TrainConfig
from ep_train.feedforward import feedforward_states
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
