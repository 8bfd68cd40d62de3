"""Who a process is, what it takes of a batch, and what is refused before anything starts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ep_train import TrainConfig, Trainer, resume, train
from ep_train.distributed import LostContact, ProcessError, Processes, from_environment, own_device, voice
from ep_train.run_folder import RunFolder, RunFolderError, read_metrics
from tests.core.threads import one_thread  # noqa: F401  (autouse)

GIVEN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}
TINY = TrainConfig(model="4p", train_limit=20, test_limit=10, batch_size=10, epochs=1, device="cpu", quiet=True)


def test_torchrun_says_who_this_is() -> None:
    assert from_environment({"PATH": "/bin"}) == Processes()
    assert from_environment(GIVEN) == Processes(5, 8, 1, 4, 600.0)
    assert from_environment({**GIVEN, "EP_TRAIN_TIMEOUT": "30"}).timeout == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_PORT": None, "LOCAL_RANK": None}, "WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR without LOCAL_RANK, "),
        ({"RANK": "-1"}, "environment variable RANK: expected an integer >= 0, got '-1'"),
        ({"RANK": "8"}, "environment variable RANK: expected at most 7 \\(WORLD_SIZE 8\\), got 8"),
        ({"LOCAL_WORLD_SIZE": "9"}, "environment variable LOCAL_WORLD_SIZE: expected at most 8"),
        ({"EP_TRAIN_TIMEOUT": "soon"}, "environment variable EP_TRAIN_TIMEOUT: expected seconds > 0, got 'soon'"),
        ({"EP_TRAIN_TIMEOUT": "0"}, "environment variable EP_TRAIN_TIMEOUT"),
    ],
)
def test_variables_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    given = {name: value for name, value in {**GIVEN, **changes}.items() if value is not None}
    with pytest.raises(ProcessError, match=message):
        from_environment(given)


def test_messages_say_which_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert voice() == ("ep-train", True)
    for name, value in GIVEN.items():
        monkeypatch.setenv(name, value)
    assert voice() == ("ep-train (process 5 of 8)", False)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("total", [0, 1, 5, 21])
def test_parts_put_together_are_the_whole(total: int, count: int) -> None:
    parts = [Processes(rank, count).part(total) for rank in range(count)]
    assert [i for part in parts for i in range(total)[part]] == list(range(total))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sum(Processes(rank, count).share(total) for rank in range(count)) == pytest.approx(float(total > 0))


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    processes, gpu = from_environment(GIVEN), torch.device("cuda", 0)
    assert own_device(processes, gpu, "auto") == torch.device("cuda", 1)
    assert own_device(processes, torch.device("cpu"), "auto") == torch.device("cpu")
    assert own_device(Processes(), torch.device("cuda", 3), "cuda:3") == torch.device("cuda", 3)
    with pytest.raises(ValueError, match="expected auto, cpu or cuda with 8 processes"):
        own_device(processes, gpu, "cuda:0")
    with pytest.raises(ValueError, match="expected at most 4 processes on this machine"):
        own_device(replace(processes, local_count=5), gpu, "cuda")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warm_start": True}, "argument 'warm_start': expected none with 16 processes"),
        ({}, "argument 'batch_size': expected at least 16, an image for each process, got 10"),
    ],
)
def test_what_several_processes_cannot_serve(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(replace(TINY, **changes), processes=Processes(3, 16))


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited"),
        dist.DistNetworkError("The client socket has timed out"),
        RuntimeError(
            "[/w/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:34452. "
            "This is typically caused by a remote worker crashing."
        ),
        RuntimeError("[/w/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation"),
        RuntimeError("Application timeout caused pair closure"),
        RuntimeError("NCCL communicator was aborted on rank 1."),
    ],
)
def test_an_exchange_that_fails(error: Exception) -> None:
    with pytest.raises(LostContact, match=r"no contact with .*: one has ended or hangs \(") as caught, lose(error):
        pass
    assert caught.value.__cause__ is error
    assert str(error).splitlines()[0] in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB (NCCL holds 2 GiB)"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("[enforce fail at /w/gloo/gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes"),
        ProcessError("options: expected those of the first process"),
        ValueError("Default process group has not been initialized"),
    ],
)
def test_an_error_of_another_kind_passes(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, lose(error):
        pass
    assert caught.value is error


@contextmanager
def lose(error: Exception) -> Iterator[None]:
    with Processes(0, 2).contact():
        raise error
    yield


def test_a_run_that_lost_contact_leaves_no_older_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = train(replace(TINY, out=tmp_path / "run"))

    def lost(*_: object) -> None:
        raise LostContact("no contact with the other processes")

    monkeypatch.setattr(Trainer, "learn", lost)
    with pytest.raises(LostContact, match=r"^no contact with the other processes; continue with: ep-train resume "):
        resume(path, epochs=2, quiet=True)
    summary = json.loads((path / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("failed", "no contact with the other processes")
    assert summary["epochs"] == 1

    def full(*_: object) -> None:
        raise RunFolderError("no space left")

    monkeypatch.setattr(RunFolder, "write_summary", full)
    with pytest.raises(LostContact):
        resume(path, epochs=2, quiet=True)


def test_resume_or_start(tmp_path: Path) -> None:
    config = replace(TINY, epochs=2, out=tmp_path / "run", resume_or_start=True)
    with pytest.raises(ValueError, match="argument 'resume_or_start': expected --out with it, got none"):
        replace(config, out=None)
    assert train(config)[0]["status"] == "finished"
    before = read_metrics(tmp_path / "run")
    assert train(replace(config, threads=1))[0]["epochs"] == 2  # goes on, and has nothing left to do
    assert read_metrics(tmp_path / "run") == before
    with pytest.raises(RunFolderError, match=r"a run of another configuration \(lr 0.001 and not 0.01\): choose"):
        train(replace(config, lr=0.01))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("mine")
    with pytest.raises(RunFolderError, match="is not empty"):
        train(replace(config, out=tmp_path / "other"))
