"""The cache of decoded images: in memory or mapped, whole or absent, and what a full disk leaves behind."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ep_train import locks
from ep_train.config import TrainConfig
from ep_train.data import Batches, DataError, Dataset, cache, folder, load_dataset
from ep_train.data.dataset import channel_statistics
from ep_train.trainer import Trainer

CLASSES = ("cat", "dog")
SIDE = 64  # as in Tiny ImageNet


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_images(tmp_path, SIDE)


def write_images(folder: Path, side: int) -> Path:
    """70 training images, more than one block, and 10 held-out ones."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 35), ("val", 5)):
        for name in CLASSES:
            path = folder / "tiny" / split / name
            path.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / f"{number}.png", compress_level=0)
    return folder / "tiny"


def load(root: Path, how: folder.DataCache, **options: int) -> Dataset:
    return load_dataset(f"folder:{root}", cache_dir=root.parent / "cache", data_cache=how, **options)  # type: ignore[arg-type]


def files(root: Path) -> list[Path]:
    return sorted(path for path in (root.parent / "cache" / "decoded").iterdir() if path.name != locks.LOCK)


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def same(one: Dataset, other: Dataset) -> None:
    assert torch.equal(one.train_images, other.train_images)
    assert torch.equal(one.test_images, other.test_images)
    assert torch.equal(one.train_labels, other.train_labels)
    assert (one.mean, one.std, one.source, one.class_names) == (other.mean, other.std, other.source, other.class_names)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("first", ["memory", "mmap"])
def test_both_give_the_same_and_share_one_file(
    root: Path, first: folder.DataCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = load(root, first)
    (path,) = files(root)
    written = path.read_bytes()
    monkeypatch.setattr(folder, "decode", None)  # from now on, it is read
    in_memory = load(root, "memory")
    assert first == "mmap" or not mapped(path)
    in_file = load(root, "mmap")
    assert mapped(path)
    same(made, in_memory)
    same(made, in_file)
    assert (made.mean, made.std) == channel_statistics(made.train_images.contiguous())
    assert files(root) == [path]
    in_file.train_images.zero_()  # a private map: the file stays as it is
    assert path.read_bytes() == written


def test_mapped_images_make_the_same_batches_without_a_copy(root: Path) -> None:
    options = {"batch_size": 8, "crop_padding": 4, "flip": True, "cutout": 16}
    found = load(root, "mmap")
    there, here = Batches(found, **options), Batches(load(root, "memory"), **options)  # type: ignore[arg-type]
    assert there.images.data_ptr() == found.train_images.data_ptr()
    for ours, theirs in zip(there.epoch(3, start=2), here.epoch(3, start=2), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_limits_of_mapped_images(root: Path) -> None:
    same(load(root, "mmap", train_limit=20, test_limit=4), load(root, "memory", train_limit=20, test_limit=4))
    few = load(root, "mmap", train_limit=20)
    assert (few.mean, few.std) == channel_statistics(few.train_images.contiguous())


def test_a_run_on_mapped_images(root: Path) -> None:
    config = TrainConfig(
        dataset=f"folder:{root}", model="4p-4p", batch_size=16, data_cache="mmap", normalise="unit", quiet=True,
        device="cpu",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root.parent))
        trainer = Trainer(config)
    assert trainer.train.normalise == trainer.test.normalise == "unit"
    images, _ = next(trainer.train.epoch(1))
    assert 0 <= float(images.min()) < 0.01 < 0.99 < float(images.max()) <= 1
    given = Trainer(TrainConfig(model="4p-4p", normalise="standard", quiet=True), dataset=load_dataset("digits"))
    assert given.dataset.normalise == given.test.normalise == "standard"


@pytest.mark.parametrize("value", ["disk", ""])
def test_unknown_names(value: str) -> None:
    with pytest.raises(DataError, match=f"data_cache must be one of memory, mmap; got '{value}'"):
        load_dataset("digits", data_cache=value)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=f"normalise must be one of unit, standard; got '{value}'"):
        load_dataset("digits", normalise=value)  # type: ignore[arg-type]


def test_only_folders_are_mapped() -> None:
    with pytest.raises(DataError, match="data_cache: mmap is for folder:PATH; digits is small"):
        load_dataset("digits", data_cache="mmap")
    with pytest.raises(DataError, match="unknown dataset 'imagenet'"):
        load_dataset("imagenet", data_cache="mmap")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["version", "key", "mean", "sha256", "no metadata", "tensor", "shape", "dtype"])
@pytest.mark.parametrize("how", ["memory", "mmap"])
def test_a_valid_file_with_something_else_in_it_is_rebuilt(
    root: Path, how: folder.DataCache, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = load(root, how)
    (path,) = files(root)
    with cache.safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    if what == "tensor":
        tensors = {"others": tensors["images"]}
    elif what == "shape":
        tensors = {"images": tensors["images"].permute(0, 1, 3, 2).reshape(80, 3 * SIDE, SIDE, 1)}
    elif what == "dtype":
        tensors = {"images": tensors["images"].view(torch.int8)}
    else:
        metadata[what] = {"mean": "[0.5, 0.5, 0.5]"}.get(what, "2")
    save_file(tensors, path, metadata=None if what == "no metadata" else metadata)
    del tensors
    same(load(root, how), first)
    assert ("out of date" if what in ("version", "key", "no metadata") else "is damaged") in caplog.text
    caplog.clear()
    same(load(root, how), first)
    assert not caplog.text
    assert files(root) == [path]


@pytest.mark.parametrize("how", ["memory", "mmap"])
def test_every_single_changed_byte_is_noticed(tmp_path: Path, how: folder.DataCache) -> None:
    """Of the header all, but the spaces that fill it up; of the pixels some."""
    root = write_images(tmp_path, 4)
    load(root, how)
    (path,) = files(root)
    whole = path.read_bytes()
    with cache.safe_open(path, framework="pt") as file:
        key = file.metadata()["key"]
    header = whole[: cache._HEADER].rstrip()
    for at in [*range(len(header)), cache._HEADER, len(whole) // 2, len(whole) - 1]:
        changed = bytearray(whole)
        changed[at] ^= 0x01
        path.write_bytes(changed)
        assert cache.read_cache(path, key, 80, mapped=how == "mmap") is None, at
    for length in (0, 7, len(header), cache._HEADER, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert cache.read_cache(path, key, 80, mapped=how == "mmap") is None
    path.write_bytes(whole + b"\0")
    assert cache.read_cache(path, key, 80, mapped=how == "mmap") is None
    path.write_bytes(whole)
    assert cache.read_cache(path, key, 80, mapped=how == "mmap") is not None
    assert cache.read_cache(path, key, 79, mapped=how == "mmap") is None


# --- what fails while it is written -----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["new_file", "posix_fallocate", "pwrite", "fsync", "replace"])
@pytest.mark.parametrize("how", ["memory", "mmap"])
def test_a_full_disk_leaves_nothing(
    root: Path, how: folder.DataCache, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"ep_train.data.cache.{'durable' if where == 'new_file' else 'os'}.{where}", full)
    if how == "memory":
        assert len(load(root, how).train_labels) == 70
        assert "cannot keep the decoded images" in caplog.text
    else:
        with pytest.raises(DataError, match=r"No space left on device\); make room there, or set XDG_CACHE_HOME"):
            load(root, how)
    assert files(root) == []


def test_a_broken_image_leaves_nothing(root: Path) -> None:
    (root / "train" / "dog" / "7.png").write_bytes(b"\x89PNG")
    for how in ("memory", "mmap"):
        with pytest.raises(DataError, match=r"train/dog/7\.png: cannot decode"):
            load(root, how)  # type: ignore[arg-type]
    assert files(root) == []


def test_a_write_may_be_cut_short(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.pwrite
    monkeypatch.setattr("ep_train.data.cache.os.pwrite", lambda file, data, at: original(file, data[:5000], at))
    first = load(root, "mmap")
    monkeypatch.undo()
    same(load(root, "memory"), first)
    assert len(files(root)) == 1


def test_a_second_process_waits_and_reads(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is of the open folder, so another descriptor here stands for another process."""
    expected = load(root, "memory")
    (path,) = files(root)
    done = path.read_bytes()
    path.unlink()
    monkeypatch.setattr(folder, "decode", None)
    other = locks.take(path.parent)
    found: list[Dataset] = []
    waiting = threading.Event()
    monkeypatch.setattr(cache._log, "info", lambda *_: waiting.set())
    thread = threading.Thread(target=lambda: found.append(load(root, "mmap")))
    thread.start()
    assert waiting.wait(20)
    path.write_bytes(done)
    os.close(other)
    thread.join(20)
    same(found[0], expected)


def age(path: Path, seconds: float) -> None:
    when = time.time() - seconds
    os.utime(path, (when, when))


def test_a_killed_process_leaves_a_file_until_the_next_one_decodes(root: Path) -> None:
    """A child that is killed by SIGKILL when the pixels have been written, before the file gets its name."""
    child = (
        "import os, signal, sys; from pathlib import Path; from ep_train.data import cache, load_dataset\n"
        "cache._digest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "load_dataset('folder:' + sys.argv[1], cache_dir=Path(sys.argv[2]), data_cache='mmap')\n"
    )
    done = subprocess.run([sys.executable, "-c", child, str(root), str(root.parent / "cache")], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = files(root)
    assert left.name.startswith(".")
    with cache.alone(left.parent):
        assert left.exists()  # it may be in use
    age(left, 4000)
    assert len(load(root, "mmap").train_labels) == 70
    (path,) = files(root)
    assert not path.name.startswith(".")


def test_a_file_that_is_being_written_stays(root: Path) -> None:
    """Its process could not lock the folder, or it would be the only one here."""
    with cache.CacheWriter(root.parent / "cache" / "decoded" / "x.safetensors", "key", 1):
        (left,) = files(root)
        age(left, 4000)
        with cache.alone(left.parent) as waited:
            assert not waited
        assert files(root) == [left]
    assert files(root) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_folders_that_cannot_be_locked(
    number: int, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(number, "No locks available")

    monkeypatch.setattr("ep_train.locks.fcntl.flock", unsupported)
    assert len(load(root, "mmap").train_labels) == 70
    assert caplog.text.count("cannot be locked (No locks available): other processes may decode the same images") == 1


def test_a_lock_that_fails_otherwise(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("ep_train.locks.fcntl.flock", broken)
    for how in ("mmap", "memory"):
        with pytest.raises(DataError, match=r"\.lock: cannot be locked: Input/output error"):
            load(root, how)  # type: ignore[arg-type]


def test_one_note_when_a_cache_is_out_of_date(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(root, "mmap")
    (root / "train" / "dog" / "3.png").unlink()
    with caplog.at_level(logging.WARNING):
        assert len(load(root, "mmap").train_labels) == 69
    assert caplog.text.count("is out of date; the images are decoded again") == 1
