"""The command ``ep-train``: options, help, exit codes and messages."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ep_train import TrainConfig, cli
from ep_train.check import CheckConfig
from ep_train.cli import ResumeConfig
from ep_train.config import Estimator
from ep_train.config_file import FREE, config_from_json
from ep_train.run_folder import RunFolder, read_metrics
from tests.core.threads import one_thread  # noqa: F401  (autouse)

TINY = ["--model", "4p", "--train-limit", "40", "--test-limit", "10", "--batch-size", "10", "--epochs", "1"]
TINY += ["--device", "cpu"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ep_train", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def help_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("command", "config"), [([], TrainConfig), (["train"], TrainConfig), (["check"], CheckConfig)])
def test_help_mentions_every_option(command: list[str], config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(command, capsys)
    words = set(text.replace(",", " ").split())
    for field in dataclasses.fields(config):
        assert f"--{field.name.replace('_', '-')}" in words, field.name
    if config is TrainConfig:
        flat = " ".join(text.replace("│", " ").split())
        assert "Train a convolutional network by Equilibrium Propagation" in flat
        assert "ep-train check" in flat
        assert "ep-train resume" in flat
        assert all(name in flat for name in Estimator.__args__)
        assert "Quiet" not in flat


def test_help_of_resume(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(["resume"], capsys)
    assert {field.name for field in dataclasses.fields(ResumeConfig)} == {"folder", "epochs", *FREE}
    assert "FOLDER" in text.upper()
    assert "--epochs" in text


def test_every_option_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Docstrings of the dataclass become the help: one that is missing leaves only the default."""
    flat = " ".join(help_of([], capsys).replace("│", " ").split())
    for phrase in ("Which kernels run.", "T: sweeps of the free phase.", "Learning rate.", "Print nothing."):
        assert phrase in flat


def test_help_is_quick_in_a_process_of_its_own() -> None:
    began = time.monotonic()
    done = run("--help")
    assert done.returncode == 0
    assert "--feedback-gain" in done.stdout
    assert done.stderr == ""
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no-such-option", "1"],
        ["--epochs", "many"],
        ["--schedule", "random"],
        ["--method", "bp"],
        ["check", "--seed", "1"],
        ["resume"],
        ["resume", "a", "b"],
        ["retrain"],
        ["--beta", "0"],
        ["--threads", "0"],
        ["--device", "tpu"],
        ["check", "--device", "cuda:first"],
        ["resume", "a", "--device", "gpu"],
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert any(word in out.err for word in arguments) or "required" in out.err.lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "folder:/no/such/folder"], "/no/such/folder"),
        (["--dataset", "mnist2"], "unknown dataset 'mnist2'; the datasets are:"),
        (["--dataset", "cifar10", "--data-root", "/no/such/folder"], "/no/such/folder"),
        ([*TINY, "--model", "huge"], "argument 'model': expected one of digits, vgg5"),
        ([*TINY, "--model", "vgg5"], "vgg5 pools to nothing below 16x16 inputs, got 8x8"),
        ([*TINY, "--layer-lr", "1", "0.5", "0.2"], "argument 'layer_lr': expected 2 factors"),
        ([*TINY, "--local-heads", "4"], "argument 'local_heads': expected layers from 1 to 1, got '4'"),
        ([*TINY, "--backend", "cuda"], "backend 'cuda' cannot run: "),
        ([*TINY, "--lr", "1e6"], "the loss became "),
        (["check", "--model", "9q"], "or widths as 32-32p-64-64p"),
        (["check", "--over-relaxation", "2.5"], "argument 'over_relaxation': expected a number in [1, 2), got 2.5"),
        ([*TINY, "--device", "cuda:99"], "TrainConfig: argument 'device': expected auto"),
        (["check", "--device", "cuda:99"], "CheckConfig: argument 'device': expected auto"),
        (["resume", "/no/such/run"], "/no/such/run/checkpoints: expected a checkpoint, got none (the first is"),
    ],
)
def test_failures_exit_with_1_and_a_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "run")] if arguments[0] not in ("check", "resume") else []
    assert cli.main([*arguments, *out]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ep-train: ")
    assert message in error
    assert "Traceback" not in error


def test_a_run_from_the_command_line(tmp_path: Path) -> None:
    done = run(*TINY, "--local-heads", "1", "--layer-lr", "1", "0.5", "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert "4p (0.00 M parameters) by ep, k 0.1, sweep, 4 + 3 sweeps, backend cpu" in lines[0]
    assert lines[1].startswith("epoch 1/1")
    assert lines[2].startswith("test accuracy ")
    assert lines[2].endswith(str(tmp_path / "run"))
    assert done.stderr == ""
    assert len(read_metrics(tmp_path / "run")) == 1
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["local_heads"], config["layer_lr"]) == ("1", [1.0, 0.5])


def test_a_used_folder_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--quiet", "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == ""
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert cli.main(arguments) == 1
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert cli.main([*arguments, "--overwrite"]) == 0


def test_the_default_folder_names_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*TINY, "--quiet", "--seed", "3", "--method", "bptt"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("digits-4p-bptt-")
    assert folder.name.endswith("-3")


def test_check_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["check", "--model", "4p", "--size", "8", "--batch-size", "2", "--seeds", "1", "--no-classical"]
    assert cli.main([*arguments, "--json", "--converge-steps", "5"]) == 0
    assert list(json.loads(capsys.readouterr().out)["results"]) == ["k 0.1, sweep 4 + 3"]


def test_ctrl_c_outside_the_loop(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(config: TrainConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train", interrupt)
    assert cli.main(TINY) == 130
    assert capsys.readouterr().err == "ep-train: stopped by Ctrl-C\n"


# --- presets, configurations, recipes ---------------------------------------------------------------------------------


def test_presets_are_listed_and_taken_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--epochs", "1", "--preset", "list"]) == 0
    shown = capsys.readouterr().out
    assert "laborieux2021-ce: " in shown
    assert "arXiv 2006.03824" in shown
    small = ["--train-limit", "40", "--test-limit", "20", "--epochs", "1", "--free-steps", "3", "--nudged-steps", "2"]
    some = ["--width", "0.02", "--batch-size", "20", "--crop-padding", "0", "--no-flip", "--threads", "1", "--quiet"]
    options = [*small, "--preset=vgg5-cifar10", *some, "--dataset", "digits", "--model", "8p-8"]
    assert cli.main([*options, "--out", str(tmp_path / "run")]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["estimator"], config["feedback_gain"], config["epochs"]) == ("tangent", 0.05, 1)
    again = ["--config", str(tmp_path / "run"), "--out", str(tmp_path / "again"), "--lr", "0.01"]
    assert cli.main(again) == 0
    other = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {k for k in config if config[k] != other[k]} == {"lr", "out", "quiet"}


@pytest.mark.parametrize("mark", ["metrics.jsonl", "checkpoints", ".lock"])
@pytest.mark.parametrize("option", ["overwrite", "resume_or_start"])
def test_the_configuration_of_a_run_is_taken_without_its_folder(
    mark: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = dataclasses.replace(TrainConfig(out=tmp_path / "run", epochs=3), **{option: True})  # type: ignore[arg-type]
    RunFolder(tmp_path).write_config(dataclasses.asdict(theirs))
    (tmp_path / "job.json").write_text((tmp_path / "config.json").read_text())

    def started(path: Path, *more: str) -> tuple[TrainConfig, str]:
        found = cli.started_from(["--config", str(path), *more], TrainConfig())
        return found, capsys.readouterr().err

    for path in (tmp_path, tmp_path / "config.json"):
        assert started(path) == (theirs, "")  # of nobody's run, whatever its name is
    (tmp_path / mark).touch()
    name = f"--{option.replace('_', '-')}"
    for path in (tmp_path, tmp_path / "config.json"):
        note = f"ep-train: the options of {tmp_path} are taken without its --out, {name}\n"
        assert started(path) == (TrainConfig(epochs=3), note)
        assert started(path, "--out=new", name) == (TrainConfig(epochs=3), "")
    assert started(tmp_path / "job.json") == (theirs, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "nope"], "argument 'preset': expected one of laborieux2021-mse"),
        (["--preset"], "argument '--preset': expected a value"),
        (["--config", "nowhere.json"], "nowhere.json: not a readable configuration"),
    ],
)
def test_presets_and_configurations_that_are_none(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"epochs": 1, "colour": 3}', "(unknown: colour)"),
        ('{"lr_schedule": "cos"}', "argument 'lr_schedule': expected one of constant, cosine, linear, got 'cos'"),
        ("[1]", "expected a JSON object of options, got list"),
    ],
)
def test_a_configuration_that_was_edited_wrongly(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.json").write_text(text)
    assert cli.main(["--config", str(tmp_path / "c.json")]) == 1
    assert message in capsys.readouterr().err


def test_a_recipe_is_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "recipe.json"
    assert cli.main(["recipe", "vgg11-cifar100", "--out", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "ASSUM" in shown
    assert f"ep-train --config {path}" in shown
    config = config_from_json(path)
    assert (config.dataset, config.model, config.operands) == ("cifar100", "vgg11", "float16")
    assert cli.main(["recipe", "vgg11-cifar100", "--out", str(path)]) == 1
    assert "is there already" in capsys.readouterr().err
