"""A run under torchrun whose processes are killed: it starts again by itself, ends with a message, and can go on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ep_train import TrainConfig, resume, train
from ep_train.run_folder import read_metrics
from tests.core.threads import one_thread  # noqa: F401  (autouse)

OPTIONS = {"model": "6p-8", "train_limit": 200, "test_limit": 30, "batch_size": 5, "epochs": 40, "device": "cpu"}


@contextlib.contextmanager
def torchrun(*more: str) -> Iterator[subprocess.Popen[str]]:
    options = [part for name, value in OPTIONS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "ep_train", *options, "--threads", "1", *more]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            for pid in workers(process).values():
                os.kill(pid, signal.SIGKILL)
            process.kill()
            print(*process.communicate(), sep="\n")  # shown where a test fails


def workers(process: subprocess.Popen[str]) -> dict[int, int]:
    """Process numbers by rank."""
    found = {}
    with contextlib.suppress(OSError):  # it has ended
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                ranks = [int(v[5:]) for v in variables if v.startswith(b"RANK=")]
                found.update({rank: int(pid) for rank in ranks})
    return found


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while not what():
        if process.poll() is not None:
            pytest.fail("\n".join(["it has ended:", *process.communicate()]))
        if time.monotonic() > deadline:
            pytest.fail("it did not come")
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are found in /proc")
def test_killed_workers_are_started_again_and_then_end_the_run(tmp_path: Path) -> None:
    path = tmp_path / "run"

    def epochs() -> int:
        return len(read_metrics(path)) if (path / "metrics.jsonl").exists() else 0

    with torchrun("--out", str(path), "--resume-or-start") as process:
        wait_for(lambda: epochs() >= 2, process)
        first = workers(process)
        os.kill(first[1], signal.SIGKILL)
        done = epochs()
        wait_for(lambda: workers(process).keys() == {0, 1} and not workers(process).items() & first.items(), process)
        wait_for(lambda: epochs() >= done + 3, process)  # it went on
        os.kill(workers(process)[0], signal.SIGKILL)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    # once each by the process that was left over
    assert "ep-train (process 0 of 2): no contact with the other processes: one has ended or hangs (" in err
    assert "ep-train (process 1 of 2): no contact with the other processes: one has ended or hangs (" in err
    assert err.count(f"; continue with: ep-train resume {path}") == 2
    assert "ep_train FAILED" in err.replace("\n", " ")  # torchrun's own account, with the signal
    assert [row["epoch"] for row in read_metrics(path)] == list(range(1, epochs() + 1))
    assert out.count(", 2 processes") == 2  # the first process alone speaks
    total = epochs() + 1
    resume(path, epochs=total, quiet=True)  # in one process
    _, alone = train(TrainConfig(**{**OPTIONS, "epochs": total}, out=tmp_path / "alone", quiet=True))  # type: ignore[arg-type]
    for ours, theirs in zip(read_metrics(path), read_metrics(alone), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
