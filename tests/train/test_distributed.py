"""Two processes with gloo: gradients of the whole batch, a run with the same numbers, and an end for all of them."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from ep_train import TrainConfig, checkpoint, resume, train
from ep_train.run_folder import read_metrics
from tests.core.threads import one_thread  # noqa: F401  (autouse)
from tests.train import distributed_worker as worker

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    """What both processes found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker.main, (port, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The same run in one process."""
    return train(TrainConfig(**worker.RUN, out=folder / "alone"))[1]


def assert_same_run(path: Path, alone: Path) -> None:
    """Other parts of a batch are summed in another order; accuracies are counts."""
    ours, theirs = read_metrics(path), read_metrics(alone)
    assert len(ours) == len(theirs) == worker.RUN["epochs"]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in ("train_loss", "residual", "lr", "spectral_radius"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
        assert (a["step"], a["test_accuracy"], a["train_accuracy"]) == (
            b["step"],
            b["test_accuracy"],
            pytest.approx(b["train_accuracy"], abs=0.01),
        )
    ours, theirs = (checkpoint.load(p)["model"] for p in (path, alone))
    for name, tensor in theirs.items():
        assert float((ours[name] - tensor).norm()) <= 1e-3 * float(tensor.norm()), name


def test_gradients_are_those_of_the_whole_batch(found: Found) -> None:
    cases = found[0]["gradients"]
    assert len(cases) == 21
    for rank in range(2):
        for name, case in found[rank]["gradients"].items():
            limit = 1e-12 if "float64" in name else 1e-6
            assert case["error"] <= limit, name
            assert case["loss apart"] <= limit, name
            assert case["correct"][0] == case["correct"][1]
            assert case["compared"] >= 4, name
            assert sum(case["buckets"]) == case["bytes"] == sum(cases[name]["buckets"])
            assert len(case["buckets"]) > 1, name


def test_buckets_go_out_between_contrasts(found: Found) -> None:
    # more than 600 bytes: the readout's weights, the top's (7x6x3x3 floats), those below (6x5x3x3); then the rest
    for rank in range(2):
        assert found[rank]["early"] == ["bucket", "contrast", "bucket", "contrast", "bucket", "contrast", "bucket"]


def test_batch_normalisation_has_the_mean_of_both(found: Found) -> None:
    first, second = (found[rank]["normalised"] for rank in range(2))
    assert "1.running_mean" in first
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_part_without_images_counts_for_nothing(found: Found) -> None:
    assert [found[rank]["empty"].tolist() for rank in range(2)] == [[2.0] * 3] * 2


def test_what_differs_ends_all_processes(found: Found) -> None:
    first, second = (found[rank]["refusals"] for rank in range(2))
    assert first == {
        "same": "FirstFailed: options: others in process 1 than in the first one",
        "first": "OSError: disk full",
        "gradients": "FirstFailed: gradients: others in process 1 than in the first one",
        "alike": second["alike"],
    }
    assert second["same"] == "ProcessError: options: expected those of the first process, {'lr': 0.1}, got {'lr': 0.2}"
    assert second["first"] == "FirstFailed: the first process failed: disk full"
    assert second["gradients"].startswith("ProcessError: gradients: expected those of the first process, [('a', (2,)")
    assert second["alike"].startswith("ProcessError: 'connections.1.weight' is no longer the same in process 1 as in")
    assert second.keys() == first.keys()


def test_a_wish_counts_for_all_after_the_same_batch(found: Found) -> None:
    want = [{"stop": b >= 2, "read": b == 1} for b in range(4)]
    assert [found[rank]["wishes"] for rank in range(2)] == [want, want]


def test_the_first_process_asks_the_teacher_for_all(found: Found) -> None:
    first, second = (found[rank]["cached"] for rank in range(2))
    assert [first[name]["seen"] for name in ("shared", "again", "elsewhere", "elsewhere, again")] == [300, 0, 300, 0]
    for name in ("shared", "again", "elsewhere", "elsewhere, again"):
        assert second[name]["seen"] == 0
        assert torch.equal(first[name]["logits"], second[name]["logits"])
        assert first[name]["logits"].any(1).all()
        assert (first[name]["file"], second[name]["file"]) == (True, not name.startswith("elsewhere"))
    assert first["blocked"].startswith(("FileExistsError: ", "NotADirectoryError: "))
    assert second["blocked"].startswith("FirstFailed: the first process failed: [Errno ")
    assert [found[rank]["distilled"]["status"] for rank in range(2)] == ["finished"] * 2
    assert [found[rank]["distilled"]["seen"] for rank in range(2)] == [worker.RUN["train_limit"], 0]


def test_a_run_has_the_numbers_of_one_process(found: Found, folder: Path, alone: Path) -> None:
    assert_same_run(folder / "whole", alone)
    summary = json.loads((folder / "whole" / "summary.json").read_text())
    assert (summary["status"], summary["processes"]) == ("finished", 2)
    assert {f.name for f in (folder / "whole").iterdir()} == {f.name for f in alone.iterdir()}
    assert [found[rank]["whole"]["calls"] for rank in range(2)] == [15, 15]


def test_a_signal_to_one_process_stops_all_after_the_same_batch(found: Found, folder: Path, alone: Path) -> None:
    assert [found[rank]["stopped"]["status"] for rank in range(2)] == ["interrupted"] * 2
    assert [found[rank]["stopped"]["calls"] for rank in range(2)] == [8, 8]  # seen in step 7, told in step 8
    assert [found[rank]["stopped"]["signal"] for rank in range(2)] == ["SIGUSR1"] * 2
    state = checkpoint.load(folder / "stopped")
    assert (state["epoch"], state["partial"]["batches"]) == (1, 3)
    resume(folder / "stopped", quiet=True)  # in one process
    assert_same_run(folder / "stopped", alone)


def test_the_signal_that_came_is_the_one_that_is_told(found: Found, folder: Path) -> None:
    assert [found[rank]["interrupted"]["status"] for rank in range(2)] == ["interrupted"] * 2
    assert [found[rank]["interrupted"]["signal"] for rank in range(2)] == ["SIGINT"] * 2
    assert json.loads((folder / "interrupted" / "summary.json").read_text())["signal"] == "SIGINT"


def test_a_signal_to_the_first_one_stops_all_while_the_cache_is_filled(found: Found, folder: Path) -> None:
    first, second = (found[rank]["filling"] for rank in range(2))
    for one, seen in ((first, [20, 20]), (second, [])):
        assert (one["status"], one["signal"], one["calls"], one["file"]) == ("interrupted", "SIGUSR1", 0, False)
        assert one["seen"] == seen
    assert json.loads((folder / "filling" / "summary.json").read_text())["status"] == "interrupted"


def test_a_loss_that_is_no_number_in_one_process_ends_all(found: Found, folder: Path) -> None:
    first, second = (found[rank]["nan"] for rank in range(2))
    assert first["error"].startswith("Diverged: the loss became nan in epoch 1 after 42 images")
    assert second["error"].startswith("FirstFailed: the loss became nan in epoch 1 after 42 images")
    assert first["calls"] == second["calls"] == 3
    assert json.loads((folder / "nan" / "summary.json").read_text())["status"] == "diverged"
    assert [found[rank]["left out"]["calls"] for rank in range(2)] == [5, 5]
    assert read_metrics(folder / "left out")[0]["skipped_batches"] == 1
    assert [found[rank]["rolled back"]["calls"] for rank in range(2)] == [8, 8]  # 3, then the epoch's 5 once more
    assert read_metrics(folder / "rolled back")[0]["rollbacks"] == 1


def test_the_first_process_alone_writes_the_board(found: Found, folder: Path) -> None:
    assert [found[rank]["shown"]["status"] for rank in range(2)] == ["finished"] * 2
    rows = read_metrics(folder / "shown")
    assert [row["gradient_cosine_smallest"] > 0.5 for row in rows] == [True, True]
    if worker.BOARD:
        from tests.train.test_board import expected, shown

        assert len(list((folder / "shown" / "tensorboard").iterdir())) == 1
        assert shown(folder / "shown") == expected(folder / "shown")


def test_a_process_that_hangs_is_given_up(found: Found) -> None:
    message, seconds = found[0]["hung"]
    assert message.startswith("no contact with the other processes: one has ended or hangs (")
    assert 1.5 <= seconds < 5.5
