"""Files that are replaced: the old one or the new one, whole, whatever happens; the same for all that write one."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ep_train import durable
from ep_train.commands import output
from ep_train.curves import plot_curves
from ep_train.data.cache import write_cache
from ep_train.distill import LogitCache

Write = Callable[[Path], object]


def images(path: Path) -> None:
    if write_cache(path, "key", np.zeros((3, 4, 4, 1), np.uint8), 2) is None:
        raise OSError  # which costs a run its cache only


def logits(path: Path) -> None:
    if path.exists():
        path.unlink()  # of another key, here
    LogitCache(path, 2, 3, "key").put(torch.arange(2), torch.zeros(2, 3))


WRITERS: dict[str, Write] = {
    "text": lambda path: durable.replace_text(path, "new"),
    "json": lambda path: output.write_json(path, {"a": 1}),
    "curves": lambda path: plot_curves([{"epoch": 1, "train_loss": 1.0}], path),
    "images": images,
    "logits": logits,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_after(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        sync(handle)

    def replaced(*paths: Path) -> None:
        events.append("name")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    path = tmp_path / "it.json"
    usual = os.umask(0o027)
    try:
        write(path)
    finally:
        os.umask(usual)
    assert events == ["file", "name", "folder"]
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640  # those of any new file


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_leaves_the_old_file_alone(
    write: Write, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "it.json"
    if write is not logits:
        path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, where, full)
        with pytest.raises(OSError):  # noqa: PT011
            write(path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ([] if write is logits else ["old"])


def test_an_error_within_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_text("old")

    def half() -> None:
        with output.replacing(path) as temporary:
            assert temporary.parent == tmp_path
            assert temporary.suffix == ".onnx"
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"net.onnx": "old"}
