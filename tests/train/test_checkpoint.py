"""Checkpoints: written whole or not at all, and refused with a reason when they are not what they should be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ep_train import TrainConfig, Trainer, checkpoint
from ep_train.checkpoint import CheckpointError
from tests.core.threads import one_thread  # noqa: F401  (autouse)

TINY = TrainConfig(model="4p-4", train_limit=40, test_limit=10, batch_size=10, epochs=1, device="cpu", quiet=True)


def test_a_round_trip(tmp_path: Path) -> None:
    state = Trainer(TINY).state()
    path = checkpoint.save(tmp_path, state)
    assert path == tmp_path / "checkpoint.pt"
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint.pt"]
    found = checkpoint.load(tmp_path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found["model"][name], t) for name, t in state["model"].items())
    checkpoint.save(tmp_path, {**state, "epoch": 3})
    assert checkpoint.load(tmp_path)["epoch"] == 3


def test_a_crash_while_writing_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = Trainer(TINY).state()
    checkpoint.save(tmp_path, state)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def torn(values: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(tmp_path, {**state, "epoch": 9})
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert checkpoint.load(tmp_path)["epoch"] == 0


class Boom:
    """What a malicious pickle would hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code from a checkpoint ran",)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: expected a checkpoint, got no such file \(the first"):
        checkpoint.load(tmp_path)
    whole = Trainer(TINY).state()
    checkpoint.save(tmp_path, whole)
    data = path.read_bytes()
    for damaged in (b"", b"not a checkpoint", data[: len(data) // 2], data[:200] + b"\0" * 400 + data[600:]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt: not a readable checkpoint: "):
            checkpoint.load(tmp_path)
    torch.save({"model": Boom()}, path)
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path)
    assert "code from a checkpoint ran" not in capsys.readouterr().out
    for other in ([1, 2], {"model": {}}, {k: v for k, v in whole.items() if k != "partial"}):
        torch.save(other, path)
        with pytest.raises(CheckpointError, match="not a checkpoint of ep-train"):
            checkpoint.load(tmp_path)


def test_a_checkpoint_of_another_run_is_refused() -> None:
    state = Trainer(TINY).state()
    for other in (replace(TINY, model="4p-5"), replace(TINY, model="4p"), replace(TINY, local_heads="1")):
        with pytest.raises(CheckpointError, match=r"the checkpoint does not fit config\.json: "):
            Trainer(other).restore(state, [])
    with pytest.raises(CheckpointError, match=r"the checkpoint does not fit config\.json: "):
        Trainer(TINY).restore({**state, "partial": {"weeks": 3}}, [])
    Trainer(TINY).restore(state, [])
