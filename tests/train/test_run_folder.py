"""The run's folder, its metrics through interruptions, peak memory and the picture of the curves."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ep_train import locks, memory, run_folder
from ep_train.curves import plot_curves
from ep_train.memory import peak_memory_bytes
from ep_train.run_folder import RunFolder, RunFolderError, read_metrics, to_json

NAMES: dict[str, Any] = {"dataset": "folder:my data", "model": "vgg8", "method": "ep", "seed": 3}


def make(path: Path, *, overwrite: bool = False) -> RunFolder:
    return RunFolder.create(path, overwrite=overwrite, **NAMES)


def used(path: Path) -> RunFolder:
    run = make(path)
    run.write_config({"seed": 3})
    run.append_metrics({"epoch": 1})
    return run


def test_default_name(tmp_path: Path) -> None:
    first, second = (RunFolder.create(runs=tmp_path / "runs", **NAMES) for _ in range(2))
    assert first.path.parent == tmp_path / "runs"
    assert first.path.name.startswith("folder-my-data-vgg8-ep-2")
    assert first.path.name.endswith("-3")
    assert first.path != second.path  # in the same second
    assert first.path.is_dir()
    assert second.path.is_dir()


def test_given_folder_is_made(tmp_path: Path) -> None:
    assert make(tmp_path / "a" / "b").path == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()


def test_run_that_never_started_is_used_again(tmp_path: Path) -> None:
    make(tmp_path / "run").write_config({"seed": 1})
    (tmp_path / "run" / "metrics.jsonl").touch()
    make(tmp_path / "run").write_config({"seed": 2})
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"seed": 2}


def test_used_folder_is_refused(tmp_path: Path) -> None:
    used(tmp_path / "run")
    with pytest.raises(RunFolderError, match=r"is not empty \(config\.json, metrics\.jsonl\).*--overwrite"):
        make(tmp_path / "run")
    assert len(read_metrics(tmp_path / "run")) == 1


def test_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years of work")
    with pytest.raises(RunFolderError, match=r"thesis\.tex"):
        make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_overwrite_removes_the_old_run_and_nothing_else(tmp_path: Path) -> None:
    run = used(tmp_path)
    run.write_summary({})
    (tmp_path / "checkpoint.pt").write_bytes(b"old")
    (tmp_path / "checkpoint.pt.part").write_bytes(b"old")
    (tmp_path / ".config.json-abc.tmp").write_bytes(b"torn")
    (tmp_path / ".notes.json-abc.tmp").write_bytes(b"of somebody else")
    for name in ("checkpoints/step-00000004", "checkpoints/.step-00000005-x.part", "diverged/step-00000007"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "weights.safetensors").write_bytes(b"old")
    (tmp_path / "diverged" / "mine").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    make(tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".notes.json-abc.tmp", "diverged", "notes.txt"}
    assert [path.name for path in (tmp_path / "diverged").iterdir()] == ["mine"]


def lock_elsewhere(path: Path) -> str:
    """What another process gets that locks the file ``.lock`` by its name, as one on another machine does."""
    code = "import fcntl, sys\nwith open(sys.argv[1], 'a') as f: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    return done.stderr.strip().rpartition("\n")[2].partition(":")[0]


def test_the_lock_is_a_file_of_its_own(tmp_path: Path) -> None:
    run = used(tmp_path)
    with run.in_use():
        assert (tmp_path / ".lock").is_file()
        assert lock_elsewhere(tmp_path / ".lock") == "BlockingIOError"
        with run.in_use():  # again in this process
            pass
        assert lock_elsewhere(tmp_path / ".lock") == "BlockingIOError"
    assert lock_elsewhere(tmp_path / ".lock") == ""
    other = locks.take(tmp_path)
    with pytest.raises(RunFolderError, match="another process is running"), run.in_use():
        pass
    os.close(other)
    with run.in_use():
        pass


def test_a_folder_with_a_lock_alone_is_empty(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    number = (tmp_path / ".lock").stat().st_ino
    make(tmp_path)
    used(tmp_path)
    make(tmp_path, overwrite=True)
    assert [(path.name, path.stat().st_ino) for path in tmp_path.iterdir()] == [(".lock", number)]


def test_a_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    with used(tmp_path).in_use():
        pass


def replaced(patch: pytest.MonkeyPatch, module: str, **functions: Any) -> None:
    """For the locks alone: others open files, too."""
    patch.setattr(locks, module, SimpleNamespace(**{**vars(getattr(locks, module)), **functions}))


@pytest.mark.parametrize("number", sorted(locks.NO_LOCKS))
def test_a_file_system_without_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = used(tmp_path)

    def flock(*_: object) -> None:
        raise OSError(number, "that is not to be had")

    replaced(monkeypatch, "fcntl", flock=flock)
    with run.in_use():
        pass
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "cannot be locked (that is not to be had): nothing keeps other processes out of it" in caplog.text


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE, errno.ENOSPC])
@pytest.mark.parametrize("call", ["open", "flock"])
def test_a_lock_that_cannot_be_had_is_no_lock(
    number: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether there is another process is not known then."""
    run = used(tmp_path)

    def broken(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        replaced(patch, "os" if call == "open" else "fcntl", **{call: broken})
        with pytest.raises(RunFolderError, match=rf"\.lock: cannot be locked: {os.strerror(number)}"), run.in_use():
            pass
    with run.in_use():  # nothing is left of it
        pass


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks may only be read, as those of another user."""
    original = os.open

    def refused(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if Path(path).name == locks.LOCK and flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(errno.EACCES, "Permission denied")
        return original(path, flags, *more, **options)

    replaced(monkeypatch, "os", open=refused)


@pytest.mark.usefixtures("foreign")
def test_the_lock_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(RunFolderError, match=r"\.lock: cannot be locked: Permission denied"), run.in_use():
        pass  # there is none, and it cannot be made
    (tmp_path / ".lock").touch()
    with run.in_use():
        assert lock_elsewhere(tmp_path / ".lock") == "BlockingIOError"
    other = locks.take(tmp_path)
    with pytest.raises(RunFolderError, match="another process is running"), run.in_use():
        pass
    os.close(other)

    def flock(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    replaced(monkeypatch, "fcntl", flock=flock)  # as NFS
    with pytest.raises(RunFolderError, match="cannot be locked: Permission denied"), run.in_use():
        pass


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="cannot use"):
        make(tmp_path / "file")
    with pytest.raises(RunFolderError, match="cannot make"):
        RunFolder.create(runs=tmp_path / "file", **NAMES)


def test_metrics_are_one_valid_json_object_per_line(tmp_path: Path) -> None:
    run = make(tmp_path)
    rows = [{"epoch": 1, "train_loss": 2.5}, {"epoch": 2, "train_loss": math.nan, "residual": math.inf, "lr": 0.1}]
    for number, row in enumerate(rows, start=1):
        run.append_metrics(row)
        assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == number  # it is on the disk already

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1], parse_constant=refuse) == {
        "epoch": 2,
        "train_loss": None,
        "residual": None,
        "lr": 0.1,
        "nonfinite": {"train_loss": "nan", "residual": "inf"},
    }
    back = run.read_metrics()
    assert back[0] == rows[0]
    assert math.isnan(back[1].pop("train_loss"))
    assert back[1] == {"epoch": 2, "residual": math.inf, "lr": 0.1}


KEYS = st.text("ab/~01", max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("a\n\u00e9\U0001f600", max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KEYS, VALUES, max_size=4))
@example({"~1": math.inf, "/": {"a/~0": [-math.inf]}})
def test_any_row_comes_back(row: dict[str, Any]) -> None:
    line = json.dumps(to_json(row), allow_nan=False)
    assert "\n" not in line
    assert run_folder._restore(json.loads(line)) == row


@dataclass
class Options:
    gain: float
    layers: tuple[int, ...]


def test_values_of_other_types(tmp_path: Path) -> None:
    path = make(tmp_path).write_config(
        {
            "options": Options(0.1, (1, 2)),
            "out": tmp_path,
            "dtype": torch.float16,
            "device": torch.device("cpu"),
            "tensor": torch.tensor(2.5),
            "numpy": np.float32(0.5),
            "count": np.int64(7),
            "bad": {"nested": [1.0, -math.inf]},
        }
    )
    assert json.loads(path.read_text()) == {
        "options": {"gain": 0.1, "layers": [1, 2]},
        "out": str(tmp_path),
        "dtype": "torch.float16",
        "device": "cpu",
        "tensor": 2.5,
        "numpy": 0.5,
        "count": 7,
        "bad": {"nested": [1.0, None]},
        "nonfinite": {"bad/nested/1": "-inf"},
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": {"b": object()}}, "a/b: a object has no form in JSON"),
        ({"loss": torch.zeros(2)}, "loss: a Tensor has no form"),
        ({"nonfinite": 1}, "'nonfinite' is reserved"),
    ],
)
def test_row_that_cannot_be_written_writes_nothing(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    run = used(tmp_path)
    with pytest.raises(TypeError, match=message):
        run.append_metrics(row)
    assert run.read_metrics() == [{"epoch": 1}]


@pytest.mark.parametrize("torn", [b'{"epoch": 3, "tra', b"{", b'{"epoch": "\xc3', b"\0\0\0\0", b"\n\n"])
def test_torn_last_line_is_left_out_and_resume_goes_on_after_it(tmp_path: Path, torn: bytes) -> None:
    run = used(tmp_path)
    run.append_metrics({"epoch": 2})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert [row["epoch"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    RunFolder.resume(tmp_path).append_metrics({"epoch": 3})
    assert [row["epoch"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_every_cut_of_the_file_reads_as_the_rows_before_it(tmp_path: Path) -> None:
    run = make(tmp_path)
    for epoch in range(3):
        run.append_metrics({"epoch": epoch, "train_loss": math.nan})
    data = (tmp_path / "metrics.jsonl").read_bytes()
    for length in range(len(data)):
        (tmp_path / "metrics.jsonl").write_bytes(data[:length])
        complete = (data[:length] + b"\n").count(b"}}\n")
        assert [row["epoch"] for row in run.read_metrics()] == list(range(complete))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2: not JSON"),
        ("[1]", "line 2: expected a JSON object, got list"),
        ('{"nonfinite": {"a/b": "nan"}}', "line 2: its field 'nonfinite' does not fit"),
    ],
)
def test_damage_before_the_last_line_is_reported(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"epoch": 1}}\n{line}\n{{"epoch": 3}}\n')
    with pytest.raises(RunFolderError, match=message):
        read_metrics(tmp_path)


def test_missing_metrics(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot read the metrics"):
        read_metrics(tmp_path)
    assert make(tmp_path).read_metrics() == []


def test_resume_drops_the_epochs_that_are_run_again(tmp_path: Path) -> None:
    run = used(tmp_path)
    for row in ({"epoch": 2, "train_loss": math.nan}, {"epoch": 3}, {"epoch": 4}):
        run.append_metrics(row)
    resumed = RunFolder.resume(tmp_path, before_epoch=3)
    assert [row["epoch"] for row in resumed.read_metrics()] == [1, 2]
    assert math.isnan(resumed.read_metrics()[1]["train_loss"])


def test_resume_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run to resume"):
        RunFolder.resume(tmp_path)


def test_summary_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path)
    run.write_summary({"test_accuracy": 0.5})

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("ep_train.run_folder.os.fsync", full)
    with pytest.raises(RunFolderError, match="no space"):
        run.write_summary({"test_accuracy": 0.9})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"test_accuracy": 0.5}
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "summary.json"}


def test_peak_memory_grows_with_what_is_used() -> None:
    before = peak_memory_bytes()
    assert before is not None
    assert 10 << 20 < before < 1 << 40
    block = np.ones(before + (64 << 20), dtype=np.uint8)  # more than the peak so far
    after = peak_memory_bytes()
    assert after is not None
    assert after >= len(block)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_not_the_parent_s() -> None:
    block = np.ones(256 << 20, dtype=np.uint8)
    code = "import sys; sys.modules['torch'] = __import__('types').SimpleNamespace(device=lambda name: name);"
    code += f"exec(open({memory.__file__!r}).read()); print(_linux_high_water())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(child.stdout) < block.nbytes


def test_peak_memory_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reference = peak_memory_bytes()
    assert reference is not None
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "missing")
    fallback = peak_memory_bytes()
    assert fallback is not None
    assert fallback > reference / 2  # in bytes, not in kilobytes
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory_bytes() is None


PNG = b"\x89PNG\r\n\x1a\n"
FULL = [
    {"epoch": epoch, "train_loss": 1 / epoch, "train_accuracy": 0.5, "test_accuracy": 0.4, "residual": 10.0**-epoch}
    for epoch in range(1, 6)
]


@pytest.mark.parametrize(
    "rows",
    [
        FULL,
        FULL[:1],
        [{"train_loss": 1.0}, {"train_loss": 0.5}],
        [{**FULL[0], "train_loss": math.nan, "residual": 0.0, "test_accuracy": None}, FULL[1], {"epoch": 3}],
        [{"epoch": 1, "test_accuracy": 0.5}],
    ],
    ids=["full", "one epoch", "loss only", "gaps", "test accuracy only"],
)
def test_curves_are_drawn_from_whatever_there_is(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib")
    path = plot_curves(rows, tmp_path / "curves.png", title="digits, 5 epochs")
    assert path.read_bytes().startswith(PNG)
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_curves_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no row has a loss"):
        plot_curves([{"epoch": 1, "residual": 0.0}], tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == []
