"""Damaged files of every kind: a dataset or a DataError, the same in every mode, and nothing left behind."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ep_train.data import DataError, Dataset, folder, load_dataset
from ep_train.data.cifar import CIFAR100

FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Changes = list[tuple[int, int]]
CHANGES = st.lists(st.tuples(st.integers(0, 2**31), st.integers(1, 255)), max_size=4)
CUT = st.one_of(st.none(), st.integers(0, 2**31))


def damaged(data: bytes, changes: Changes, cut: int | None) -> bytes:
    """With some bytes changed, and cut off anywhere."""
    copy = bytearray(data)
    for at, value in changes:
        copy[at % len(copy)] ^= value
    return bytes(copy if cut is None else copy[: cut % len(copy)])


def encoded(kind: str, mode: str, **options: object) -> bytes:
    shape = {"RGB": (6, 5, 3), "L": (6, 5), "P": (6, 5)}[mode]
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(pixels) if mode != "P" else Image.fromarray(pixels).convert("P")
    file = io.BytesIO()
    image.save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


GOOD = encoded("PNG", "RGB")
IMAGES = {
    "png": GOOD,
    "grey png": encoded("PNG", "L"),
    "palette": encoded("PNG", "P"),
    "jpeg": encoded("JPEG", "RGB"),
    "progressive": encoded("JPEG", "RGB", progressive=True),
    "grey jpeg": encoded("JPEG", "L"),
}


def write_folder(root: Path) -> Path:
    for split in ("train", "test"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            (root / split / name / "0.png").write_bytes(GOOD)
    return root


def load(root: Path, how: folder.DataCache) -> Dataset | str:
    """The dataset, or the error's message."""
    cache = root.parent / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    try:
        data = load_dataset(f"folder:{root}", cache_dir=cache, data_cache=how)
    except DataError as error:
        assert [path.name for path in (cache / "decoded").iterdir()] == [".lock"]
        return str(error)
    assert len(list((cache / "decoded").iterdir())) == 1 + len([".lock"])
    return data


@settings(FUZZ, max_examples=150)
@given(
    data=st.one_of(st.binary(max_size=60), st.builds(damaged, st.sampled_from([*IMAGES.values()]), CHANGES, CUT)),
    place=st.sampled_from(["train/a", "test/b"]),
)
@example(data=IMAGES["grey png"], place="train/a")
@example(data=IMAGES["palette"], place="test/b")
@example(data=b"", place="train/a")
def test_any_bytes_as_an_image(tmp_path: Path, data: bytes, place: str) -> None:
    """Under .png a JPEG is read as well: Pillow looks at the bytes."""
    root = tmp_path / "images"
    if not root.exists():
        write_folder(root)
    path = root / place / "0.png"
    path.write_bytes(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about metadata
            one, other = load(root, "memory"), load(root, "mmap")
    finally:
        path.write_bytes(GOOD)
    if isinstance(one, str) or isinstance(other, str):
        assert one == other
        assert str(path) in str(one) or "first image has" in str(one)
        return
    assert torch.equal(one.train_images, other.train_images)
    assert torch.equal(one.test_images, other.test_images)
    assert (one.mean, one.std) == (other.mean, other.std)
    assert one.train_images.dtype == torch.uint8
    assert len(one.train_labels) == len(one.test_labels) == 2


@pytest.mark.parametrize("side", [20_000, 100_000])
def test_a_header_cannot_make_it_allocate(tmp_path: Path, side: int) -> None:
    """A small PNG whose header promises gigabytes, as the first file, whose size all must have."""
    root = write_folder(tmp_path / "images")
    data = bytearray(GOOD)
    data[16:24] = side.to_bytes(4, "big") * 2
    (root / "train" / "a" / "0.png").write_bytes(data)
    for how in ("memory", "mmap"):
        message = load(root, how)  # type: ignore[arg-type]
        assert isinstance(message, str)
        assert "0.png: cannot decode this image" in message


@settings(FUZZ, max_examples=100)
@given(changes=CHANGES, cut=CUT, tail=st.binary(max_size=9), how=st.sampled_from(["memory", "mmap"]))
@example(changes=[(0, 255)], cut=None, tail=b"", how="mmap")
@example(changes=[(7, 255)], cut=None, tail=b"", how="memory")
@example(changes=[], cut=0, tail=b"", how="mmap")
@example(changes=[(4000, 0x20 ^ 0x09)], cut=None, tail=b"", how="mmap")
def test_any_damage_of_the_cache_is_repaired(
    tmp_path: Path, changes: Changes, cut: int | None, tail: bytes, how: folder.DataCache
) -> None:
    root, cache = tmp_path / "images", tmp_path / "cache"
    if not root.exists():
        write_folder(root)
    first = load_dataset(f"folder:{root}", cache_dir=cache)
    (path,) = (cache / "decoded").glob("[!.]*")
    whole = path.read_bytes()
    path.unlink()  # it may be mapped
    path.write_bytes(damaged(whole, changes, cut) + tail)
    data = load_dataset(f"folder:{root}", cache_dir=cache, data_cache=how)
    assert torch.equal(data.train_images, first.train_images)
    assert torch.equal(data.test_images, first.test_images)
    assert (data.mean, data.std) == (first.mean, first.std)
    assert {file.name for file in (cache / "decoded").iterdir()} == {path.name, ".lock"}
    assert path.read_bytes().split() == whole.split()  # among the spaces that fill up the header, a tab is no damage


def archive() -> bytes:
    """CIFAR-100's binary form, uncompressed."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("train.bin", "test.bin"):
            record = bytes([3, 5]) + bytes(range(256)) * 12
            info = tarfile.TarInfo(f"cifar-100-binary/{name}")
            info.size = 2 * len(record)
            tar.addfile(info, io.BytesIO(2 * record))
    return file.getvalue()


ARCHIVE = archive()
HEADERS = st.tuples(st.one_of(st.integers(0, 511), st.integers(6656, 7167)), st.integers(1, 255))  # of both members


@settings(FUZZ, max_examples=150)
@given(
    changes=st.one_of(CHANGES, st.lists(HEADERS, max_size=4)), cut=CUT, packed=CHANGES, packed_cut=CUT,
)  # fmt: skip
@example(changes=[], cut=None, packed=[], packed_cut=None)
@example(changes=[], cut=None, packed=[(0, 1)], packed_cut=None)
def test_any_archive(
    tmp_path: Path, changes: Changes, cut: int | None, packed: Changes, packed_cut: int | None
) -> None:
    data = damaged(gzip.compress(damaged(ARCHIVE, changes, cut), 1, mtime=0), packed, packed_cut)
    (tmp_path / CIFAR100.forms[1].archive).write_bytes(data)
    try:
        found = load_dataset("cifar100", root=tmp_path)
    except DataError as error:
        assert "cifar-100-binary" in str(error) or "CIFAR-100" in str(error)  # noqa: PT017 - either is right
    else:
        assert found.image_shape == (3, 32, 32)
        assert found.classes == 100
    assert [path.name for path in tmp_path.iterdir()] == [CIFAR100.forms[1].archive]


@pytest.mark.parametrize("name", [b"\xff\xfe", "ç é".encode(), b"a" * 255])
def test_names_that_are_no_text(tmp_path: Path, name: bytes) -> None:
    root = tmp_path / os.fsdecode(name)
    write_folder(root)
    for split in ("train", "test"):
        (root / split / "a").rename(root / split / os.fsdecode(name))
    for how in ("memory", "mmap"):
        data = load(root, how)  # type: ignore[arg-type]
        assert isinstance(data, Dataset)
        assert set(data.class_names) == {"b", os.fsdecode(name)}
