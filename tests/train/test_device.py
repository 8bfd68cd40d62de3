"""Where a run computes: names and errors, what moves between devices, readings that wait once, Triton's kernels."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ep_kernels import BackendError, Network, RelaxConfig, targets_for
from ep_train import TrainConfig, Trainer, checkpoint, device, divergence, epoch, learners, resume, step, train
from ep_train.check import CheckConfig, check_network, run_check
from ep_train.cli import ResumeConfig
from ep_train.data import Batches
from ep_train.progress import Progress
from ep_train.run_folder import RunFolder, read_metrics
from ep_train.step import StepResult
from tests.core.threads import one_thread  # noqa: F401  (autouse)

TINY = TrainConfig(
    model="8p-8", train_limit=160, test_limit=40, batch_size=20, epochs=2, crop_padding=1, device="cpu", quiet=True
)
TIMES = {"seconds", "images_per_second"}
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch that says it has two, of which the second is current."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "NVIDIA Test 9000")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def numbers(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(path)]


# --- names and errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tpu", "", "CPU", "cuda:", "cuda:-1", "cuda:x", "cuda:1 ", "cpu:0", None, 0])
@pytest.mark.parametrize("make", [TrainConfig, CheckConfig, ResumeConfig])
def test_names_that_are_none(make: Any, name: Any) -> None:
    options: dict[str, Any] = {"folder": Path()} if make is ResumeConfig else {}
    if make is ResumeConfig and name is None:
        return
    with pytest.raises(ValueError, match="argument 'device'") as caught:
        make(device=name, **options)
    if make is TrainConfig and not isinstance(name, str):
        assert str(caught.value) == f"TrainConfig: argument 'device': expected str, got {name!r}"
        return
    assert str(caught.value) == (
        f"{make.__name__}: argument 'device': expected auto, cpu, cuda or cuda:N, got {name!r}"
    )


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("name", "found"),
    [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")],
)
def test_names_with_two_gpus(name: str, found: str) -> None:
    assert device.resolve(name, "X") == torch.device(found)


@pytest.mark.usefixtures("two_gpus")
def test_auto_follows_a_backend_that_runs_on_the_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.resolve("auto", "X", backend="cpu").type == "cpu"
    assert device.resolve("auto", "X", backend="reference").type == "cuda"
    monkeypatch.setenv("EP_KERNELS_BACKEND", "cpu")
    assert device.resolve("auto", "X").type == "cpu"
    assert device.resolve("auto", "X", backend="reference").type == "cuda"
    assert device.resolve("cuda", "X").type == "cuda"


@pytest.mark.usefixtures("two_gpus")
def test_descriptions() -> None:
    assert device.describe(torch.device("cuda", 1)) == "cuda:1 (NVIDIA Test 9000)"
    assert device.describe(torch.device("cpu")) == device.kind(torch.device("cpu")) == "cpu"
    assert device.kind(torch.device("cuda", 1)) == "NVIDIA Test 9000"


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
@pytest.mark.parametrize(
    ("built", "why"), [(None, "torch .* is built without CUDA"), ("13.0", "torch sees no CUDA device")]
)
def test_without_a_gpu(name: str, built: str | None, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.version, "hip", None)
    out = tmp_path / "run"
    message = rf"argument 'device': expected auto or cpu \({why}\), got '{name}'"
    with pytest.raises(ValueError, match=f"^TrainConfig: {message}"):
        train(replace(TINY, device=name, out=out))
    assert not out.exists()
    with pytest.raises(ValueError, match=f"^CheckConfig: {message}"):
        run_check(CheckConfig(device=name))
    assert device.resolve("auto", "X") == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="expected auto, cpu, cuda or cuda:0 to cuda:1, got 'cuda:2'"):
        train(replace(TINY, device="cuda:2", out=out))
    with pytest.raises(BackendError, match="backend 'cpu' cannot run: it runs on cpu tensors, these are on cuda:1"):
        train(replace(TINY, device="cuda", backend="cpu", out=out))
    assert not out.exists()


def test_a_backend_of_the_environment_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EP_KERNELS_BACKEND", "cpu")
    with pytest.raises(BackendError, match="it stores states in the parameters' dtype"):
        train(replace(TINY, device="auto", storage="float16", out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_gpu")
def test_resuming_on_a_gpu_that_is_not_there_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    _, path = train(replace(TINY, epochs=1, out=tmp_path / "run"))
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "torn')
    before = {file: file.read_bytes() for file in path.rglob("*.*") if file.is_file()}
    with pytest.raises(ValueError, match="argument 'device': expected auto or cpu"):
        resume(path, epochs=3, device="cuda", quiet=True)
    assert {file: file.read_bytes() for file in path.rglob("*.*") if file.is_file()} == before


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("method", ["ep", "bptt"])
def test_auto_is_the_cpu_here(method: Any, tmp_path: Path) -> None:
    runs = [train(replace(TINY, method=method, device=name, out=tmp_path / name)) for name in ("auto", "cpu")]
    assert numbers(runs[0][1]) == numbers(runs[1][1])
    assert [summary["device"] for summary, _ in runs] == ["cpu", "cpu"]
    states = [checkpoint.load(path)["model"] for _, path in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("method", ["ep", "bptt"])
def test_late_readings_change_no_number(method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the losses of several batches are read together."""
    config = replace(TINY, method=method, estimator="random_sign")
    _, path = train(replace(config, out=tmp_path / "at once"))
    read_late(monkeypatch, seconds=0.01)
    _, late = train(replace(config, out=tmp_path / "late"))
    assert numbers(late) == numbers(path)
    monkeypatch.setattr(epoch, "READ_EVERY", math.inf)
    _, once = train(replace(config, out=tmp_path / "once"))
    assert numbers(once) == numbers(path)


class Elsewhere:
    """A device of another type: the CPU, treated as one that works on its own."""

    type = "elsewhere"


def read_late(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    original = Trainer.train_epoch

    def train_epoch(self: Trainer, progress: Progress) -> dict[str, Any]:
        there, self.device = self.device, Elsewhere()  # type: ignore[assignment]
        try:
            return original(self, progress)
        finally:
            self.device = there

    monkeypatch.setattr(Trainer, "train_epoch", train_epoch)
    monkeypatch.setattr(epoch, "READ_EVERY", seconds)


def test_late_readings_still_find_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later: list[int] = []

    def message(out: str) -> str:
        with pytest.raises(divergence.Diverged) as caught:
            train(replace(TINY, lr=1e6, optimizer="sgd", out=tmp_path / out))
        assert checkpoint.never_written(tmp_path / out)
        report = json.loads((tmp_path / out / "diverged" / "step-00000001" / "report.json").read_text())
        later.append(report["steps_since"])
        return caught.value.args[0]

    at_once = message("at once")
    read_late(monkeypatch, math.inf)
    assert message("late") == at_once
    assert later == [0, 7]


def test_a_stop_reads_what_was_not_yet_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = train(replace(TINY, out=tmp_path / "whole"))
    read_late(monkeypatch, math.inf)
    original, calls = learners.ep_step, []

    def stop_after_five(*args: Any, **options: Any) -> StepResult:
        calls.append(args)
        if len(calls) == 5:
            made.stop_asked = True
        return original(*args, **options)

    monkeypatch.setattr(learners, "ep_step", stop_after_five)
    made = Trainer(replace(TINY, out=tmp_path / "run"))
    folder = RunFolder.create(tmp_path / "run", dataset="d", model="m", method="ep", seed=0)
    folder.write_config(vars(made.config))
    assert made.run(folder)["status"] == "interrupted"
    assert made.partial.batches == 5
    assert made.partial.seen == 100
    resume(folder.path, quiet=True)
    assert numbers(folder.path) == numbers(whole)


def test_progress_counts_every_batch_of_a_late_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(Progress, "update", lambda self, **values: shown.append(values))
    read_late(monkeypatch, math.inf)
    with Progress(1, quiet=True) as progress:
        row = Trainer(TINY).train_epoch(progress)
    assert [values["batches"] for values in shown] == [8]
    assert shown[0]["loss"] == row["train_loss"]
    assert shown[0]["residual"] > 0


def test_read_in_the_order_of_the_batches() -> None:
    results = [
        StepResult(torch.tensor(float(i)), torch.tensor(i), None if i % 2 else torch.tensor(i / 8)) for i in range(4)
    ]
    assert step.read(results[::2]) == [(0.0, 0, 0.0), (2.0, 2, 0.25)]
    assert step.read(results[1::2]) == [(1.0, 1, None), (3.0, 3, None)]
    assert step.read([]) == []


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_split_on_the_host_gives_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Trainer(TINY).dataset
    options: dict[str, Any] = {"batch_size": 20, "crop_padding": 2, "flip": True}
    here = list(Batches(dataset, **options).epoch(1))
    pinned: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    away = Batches(dataset, device="meta", resident=False, **options)
    assert away.images.device.type == away.labels.device.type == "cpu"
    sent = list(away.epoch(1))
    assert len(sent) == len(here) == 8
    assert all(images.device.type == labels.device.type == "meta" for images, labels in sent)
    assert [images.shape for images, _ in sent] == [images.shape for images, _ in here]
    assert [t.dtype for t in pinned[:5]] == [torch.uint8, torch.int64, torch.bool, torch.int64, torch.int64]
    assert torch.equal(torch.cat(pinned[3::5]), torch.cat([labels for _, labels in here]))
    assert sorted(torch.cat(pinned[4::5]).tolist()) == list(range(160))  # their places
    assert Batches(dataset, device="meta", **options).images.device.type == "meta"


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("free", "resident"), [(4, True), (3.9, False)])
def test_a_split_stays_on_the_host_when_a_gpu_has_little_room(
    free: float, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Trainer(TINY).dataset
    size = dataset.train_images.numel()
    moved: list[str] = []

    def to(tensor: Tensor, where: torch.device) -> Tensor:
        moved.append(where.type)
        return tensor

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (int(free * size), 10 * size))
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(torch, "tensor", lambda values, **options: torch.as_tensor(values))
    Batches(dataset, batch_size=20, device="cuda:1")
    assert moved == ["cuda" if resident else "cpu"] * 2


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_are_checked_on_the_cpu(label: int) -> None:
    network = Network.chain((1, 4, 4), [2], ["max"], classes=3)
    with pytest.raises(ValueError, match=rf"'labels': expected 0 to 2 \(classes\), got {min(label, 0)} to"):
        targets_for(network, torch.tensor([0, label]), 3, torch.float32)
    assert targets_for(network, torch.tensor([], dtype=torch.int64), 3, torch.float32)[0].shape == (0, 3)


def test_labels_on_a_gpu_are_checked_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake tensor stands for one that is not known yet: reading it would raise."""
    asked: list[tuple[Tensor, str]] = []
    monkeypatch.setattr(torch, "_assert_async", lambda condition, message: asked.append((condition, message)))
    network = Network.chain((1, 4, 4), [2], ["max"], classes=3)
    with FakeTensorMode():
        (target,) = targets_for(network, torch.zeros(5, dtype=torch.int64, device="cuda"), 3, torch.float32)
    assert target.shape == (5, 3)
    ((condition, message),) = asked
    assert (condition.device.type, condition.shape, condition.dtype) == ("cuda", (), torch.bool)
    assert message == "targets_for: argument 'labels': expected 0 to 2 (classes)"


# --- checkpoints between devices --------------------------------------------------------------------------------------


def as_if_from_a_gpu(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a checkpoint again, with every tensor marked as one that was in the memory of cuda:0."""
    state = checkpoint.load(path)
    state["device"] = "NVIDIA Test 9000"
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        checkpoint.save(path, state, keep=1)


def test_a_run_from_a_gpu_goes_on_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, whole = train(replace(TINY, out=tmp_path / "whole"))
    _, path = train(replace(TINY, epochs=1, out=tmp_path / "run"))
    capsys.readouterr()
    as_if_from_a_gpu(path, monkeypatch)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(checkpoint.existing(path)[-1] / "state.pt", weights_only=True)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "device": "cuda"}))
    resume(path, epochs=2, device="cpu")
    assert "this run comes from another device (NVIDIA Test 9000): its numbers will be" in capsys.readouterr().out
    assert json.loads((path / "config.json").read_text())["device"] == "cpu"
    assert numbers(path) == numbers(whole)  # the weights were the CPU's own
    assert checkpoint.load(path)["device"] == "cpu"
    resume(path, epochs=3)
    assert "another device" not in capsys.readouterr().out


# --- float32 means float32 --------------------------------------------------------------------------------------------


def test_float32_convolutions_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    convolutions: Any = torch.backends.cudnn.conv
    current: list[torch.device] = []

    class Current:
        def __init__(self, where: torch.device) -> None:
            self.where = where

        def __enter__(self) -> None:
            current.append(self.where)

        def __exit__(self, *_: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Current)
    before, there = convolutions.fp32_precision, torch.device("cuda", 1)
    for tf32, name in ((False, "ieee"), (True, "tf32")):
        with device.in_force(there, tf32=tf32):
            assert convolutions.fp32_precision == name
            assert current == [there]
        assert convolutions.fp32_precision == before
    with pytest.raises(KeyError), device.in_force(there, tf32=False):
        raise KeyError
    assert convolutions.fp32_precision == before
    assert current == []
    with device.in_force(torch.device("cpu"), tf32=False):
        assert convolutions.fp32_precision == before


# --- Triton's interpreter ---------------------------------------------------------------------------------------------

INTERPRETED = """
import torch
torch.set_num_threads(1)
from ep_train import TrainConfig, Trainer
from ep_train.progress import Progress
from ep_train.summary import headline
from ep_kernels import backends

losses = {}
for name in ("reference", "triton"):
    config = TrainConfig(model="4p", train_limit=8, test_limit=10, batch_size=4, free_steps=2, nudged_steps=1,
                         device="cpu", backend=name, quiet=True)
    made = Trainer(config)
    with backends.backend(name), Progress(1, quiet=True) as progress:
        row = made.train_epoch(progress)
        if name == "triton":
            assert backends.choose("cpu") == "triton"
            assert "backend triton" in headline(made)
    losses[name] = [row["train_loss"], *(float(p.detach().double().square().sum()) for p in made.model.parameters())]
    assert row["step"] == 2
torch.testing.assert_close(torch.tensor(losses["triton"]), torch.tensor(losses["reference"]), rtol=1e-4, atol=1e-6)
print("same", losses["triton"][0])
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_two_batches_with_triton_in_its_interpreter() -> None:
    """In a process of its own: triton reads TRITON_INTERPRET when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("same ")


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """One epoch of the digits on the GPU."""
    return train(TrainConfig(epochs=1, device="cuda", quiet=True, out=tmp_path / "run"))


class TestOnAGpu:
    pytestmark = gpu

    def test_the_digits(self, started: tuple[dict[str, Any], Path]) -> None:
        summary, path = started
        assert summary["test_accuracy"] > 0.8
        assert summary["device"].startswith("cuda:0 (")
        assert summary["peak_memory_bytes"] < 2**30
        host, _ = train(TrainConfig(epochs=1, device="cpu", quiet=True, out=path.parent / "cpu"))
        assert summary["train_loss"] == pytest.approx(host["train_loss"], rel=0.02)

    def test_resumes(self, started: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
        _, path = started
        resume(path, epochs=2, quiet=True)
        _, whole = train(TrainConfig(epochs=2, device="cuda", quiet=True, out=tmp_path / "whole"))
        assert numbers(path) == numbers(whole)
        ours, theirs = (checkpoint.load(p) for p in (path, whole))
        assert all(torch.equal(ours["model"][name], tensor) for name, tensor in theirs["model"].items())

    def test_goes_on_elsewhere_and_back(self, started: tuple[dict[str, Any], Path]) -> None:
        _, path = started
        for epochs, name in ((2, "cpu"), (3, "cuda")):
            summary, _ = resume(path, epochs=epochs, device=name, quiet=True)
            assert summary["device"].startswith(name)
        assert summary["test_accuracy"] > 0.95

    def test_everything_is_there_and_no_generator_moves(self) -> None:
        made = Trainer(replace(TINY, device="cuda", estimator="random_sign", flip=True))
        state = torch.cuda.get_rng_state()
        with Progress(1, quiet=True) as progress:
            made.train_epoch(progress)
        assert torch.equal(torch.cuda.get_rng_state(), state)
        tensors: list[Tensor] = list(made.model.parameters())
        tensors += [t for values in made.optimizer.state.values() for t in values.values()]
        tensors += [made.train.images, made.test.labels, *next(iter(made.train.epoch(1)))]
        assert {t.device for t in tensors} == {torch.device("cuda", torch.cuda.current_device())}
        assert all(group["fused"] for group in made.optimizer.param_groups)

    @pytest.mark.filterwarnings("ignore:Synchronization debug mode")
    @pytest.mark.parametrize("resident", [True, False])
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_a_batch_waits_for_nothing(self, backend: Any, resident: bool) -> None:
        """Between two readings: torch raises at anything that waits for the device."""
        made = Trainer(replace(TINY, device="cuda", backend=backend, train_limit=320))
        made.train = Batches(made.dataset, batch_size=20, crop_padding=1, device="cuda", resident=resident)
        original, calls = learners.ep_step, 0

        def strict(*args: Any, **options: Any) -> StepResult:
            nonlocal calls
            calls += 1
            if calls == 6:  # kernels are compiled and graphs captured by then
                torch.cuda.set_sync_debug_mode("error")
            return original(*args, **options)

        with pytest.MonkeyPatch.context() as patch, Progress(1, quiet=True) as progress:
            patch.setattr(learners, "ep_step", strict)
            patch.setattr(epoch, "READ_EVERY", math.inf)
            original_add_up = Trainer._add_up

            def add_up(self: Trainer, unread: Any) -> float | None:
                torch.cuda.set_sync_debug_mode("default")
                return original_add_up(self, unread)

            patch.setattr(Trainer, "_add_up", add_up)
            try:
                row = made.train_epoch(progress)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert calls == 16
        assert math.isfinite(row["train_loss"])

    def test_check(self) -> None:
        network = Network.chain((3, 8, 8), [4, 4], ["max", "none"], classes=5, feedback_gain=0.1)
        options: dict[str, Any] = {"batch_size": 4, "seed": 0, "converge_steps": 12}
        here = check_network(network, RelaxConfig(), **options)
        there = check_network(network, RelaxConfig(), device="cuda", **options)
        assert there.smallest == pytest.approx(here.smallest, abs=1e-6)
        with device.in_force(torch.device("cuda", torch.cuda.current_device()), tf32=False):
            single = check_network(network, RelaxConfig(), device="cuda", precision=torch.float32, **options)
        assert single.smallest == pytest.approx(here.smallest, abs=1e-3)

    def test_low_precision(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"operands": "float16", "storage": "float16", "device": "cuda"}
        summary, _ = train(replace(TINY, out=tmp_path / "run", **options))
        assert math.isfinite(summary["train_loss"])
