"""CIFAR's official files: both forms, in a folder and in the archive; hostile pickles do nothing."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import tarfile
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ep_train.data import DataError, load_dataset
from ep_train.data.cifar import CIFAR10, CIFAR100, Variant, parse_binary, parse_pickle

PER_FILE = 4
VARIANTS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def rows(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def targets(count: int, seed: int, variant: Variant) -> list[int]:
    numbers = np.random.default_rng(seed + 1000).integers(0, len(variant.class_names), count)
    return [int(number) for number in numbers]


def python2_pickle(pixels: np.ndarray, label_key: bytes, labels: list[int]) -> bytes:
    """A batch as the official files hold it: protocol 2 of Python 2, whose str is bytes here."""

    def text(value: bytes) -> bytes:
        short = b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))
        return short + value

    def integer(value: int) -> bytes:
        return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85q\x09"
        + text(b"b") + b"\x87Rq\x0a(K\x01" + integer(pixels.shape[0]) + integer(pixels.shape[1]) + b"\x86"
        + b"cnumpy\ndtype\nq\x0b" + text(b"u1") + b"K\x00K\x01\x87Rq\x0c(K\x03" + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + text(pixels.tobytes()) + b"tb"
    )  # fmt: skip
    listed = b"]q\x05(" + b"".join(integer(label) for label in labels) + b"e"
    title = text(b"batch_label") + b"q\x02" + text(b"training batch 1 of 5") + b"q\x03"
    return b"\x80\x02}q\x01(" + title + text(label_key) + listed + text(b"data") + array + b"u."


def modern_pickle(pixels: np.ndarray, label_key: bytes, labels: list[int], protocol: int = 4) -> bytes:
    return pickle.dumps({label_key: labels, b"data": pixels, b"filenames": [b"a.png"] * len(labels)}, protocol)


def binary(pixels: np.ndarray, labels: list[int], variant: Variant) -> bytes:
    coarse = b"\x07" * (variant.label_bytes - 1)
    return b"".join(coarse + bytes([label]) + row.tobytes() for label, row in zip(labels, pixels, strict=True))


def files_of(variant: Variant, kind: str) -> dict[str, bytes]:
    form = next(form for form in variant.forms if form.kind == kind)
    made = {}
    for seed, name in enumerate((*form.train, form.test)):
        pixels, labels = rows(PER_FILE, seed), targets(PER_FILE, seed, variant)
        if kind == "python":
            made[name] = python2_pickle(pixels, variant.label_key, labels)
        else:
            made[name] = binary(pixels, labels, variant)
    return made


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def write_archive(path: Path, folder: str, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, data in {**files, "readme.html": b"<html>"}.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture(autouse=True)
def _no_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)


@pytest.mark.parametrize("place", ["files", "folder", "archive", "archive itself"])
@pytest.mark.parametrize("kind", ["python", "binary"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_reads_official_files(tmp_path: Path, name: str, kind: str, place: str) -> None:
    variant = VARIANTS[name]
    form = next(form for form in variant.forms if form.kind == kind)
    files = files_of(variant, kind)
    root = tmp_path
    if place == "files":
        write_files(tmp_path, files)
    elif place == "folder":
        write_files(tmp_path / form.folder, files)
    else:
        write_archive(tmp_path / form.archive, form.folder, files)
        root = tmp_path / form.archive if place == "archive itself" else tmp_path
    data = load_dataset(name, root=root)
    assert data.image_shape == (3, 32, 32)
    assert data.classes == len(variant.class_names)
    seeds = range(len(form.train))
    expected = np.concatenate([rows(PER_FILE, seed) for seed in seeds]).reshape(-1, 3, 32, 32)
    assert torch.equal(data.train_images, torch.from_numpy(expected))
    assert data.train_labels.tolist() == [label for seed in seeds for label in targets(PER_FILE, seed, variant)]
    assert data.test_labels.tolist() == targets(PER_FILE, len(form.train), variant)
    assert kind in data.source
    assert str(tmp_path) not in data.source


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pickles_of_python_3_are_read_too(protocol: int) -> None:
    pixels = rows(3, 0)
    images, labels = parse_pickle(modern_pickle(pixels, b"labels", [0, 9, 5], protocol), CIFAR10, "here")
    assert torch.equal(images.reshape(3, -1), torch.from_numpy(pixels))
    assert labels.tolist() == [0, 9, 5]


class Payload:
    """Calls `function(*arguments)` when it is unpickled in the ordinary way."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    witness = tmp_path / "witness"
    files = files_of(CIFAR10, "python")
    files["data_batch_2"] = pickle.dumps({b"data": Payload(os.mkdir, str(witness))}, protocol)
    write_files(tmp_path, files)
    with pytest.raises(DataError, match=r"data_batch_2: (refused|damaged pickle)"):
        load_dataset("cifar10", root=tmp_path)
    assert not witness.exists()
    pickle.loads(files["data_batch_2"])
    assert witness.exists()  # it would have run


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02cos\nsystem\n(U\x04true\x85R.",
        b"\x80\x02cnumpy\nload\nU\x04file\x85R.",
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00rot\x86R.",
        b"\x80\x02cnumpy\nndarray\n}b.",  # the state of a name
        b"\x80\x02}q\x00)R.",  # calling a value
    ],
    ids=["os.system", "numpy.load", "another codec", "state of a name", "call of a value"],
)
def test_refused_programs(program: bytes) -> None:
    with pytest.raises(DataError, match="refused"):
        parse_pickle(program, CIFAR10, "here")


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # 2 G memo entries: the unpickler in C allocates them
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",  # a bytearray of 1 TiB
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".",  # bytes of 1 EiB
        b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"Ns.",  # a key whose hash overflows the C stack
    ],
    ids=["memo", "bytearray", "bytes", "deep key"],
)
def test_small_programs_cannot_exhaust_memory_or_stack(program: bytes) -> None:
    with pytest.raises(DataError):
        parse_pickle(program, CIFAR10, "here")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1], "expected a dictionary with an array 'data' and a list 'labels'"),
        ({b"labels": [1]}, "expected a dictionary"),
        ({b"data": rows(2, 0), b"labels": [1]}, "2 images but 1 labels"),
        ({b"data": rows(2, 0), b"labels": [1, 10]}, r"every label must be an integer in 0\.\.9"),
        ({b"data": rows(2, 0), b"labels": [1, True]}, "every label must be an integer"),
        ({b"data": rows(2, 0).astype(np.float32), b"labels": [1, 2]}, "expected uint8"),
        ({b"data": rows(2, 0)[:, :100], b"labels": [1, 2]}, r"must be \[N, 3072\], got \[2, 100\]"),
        ({b"data": rows(0, 0), b"labels": []}, r"must be \[N, 3072\], got \[0, 3072\]"),
        ({b"data": np.array([object()]), b"labels": [1]}, "array|damaged|refused"),
    ],
)
def test_wrong_contents(batch: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_pickle(pickle.dumps(batch, 4), CIFAR10, "here")


def test_missing_file_is_named(tmp_path: Path) -> None:
    files = files_of(CIFAR10, "python")
    del files["data_batch_4"]
    write_files(tmp_path / "cifar-10-batches-py", files)
    with pytest.raises(DataError, match="data_batch_4: cannot read"):
        load_dataset("cifar10", root=tmp_path)


def test_archive_without_a_file(tmp_path: Path) -> None:
    files = files_of(CIFAR100, "binary")
    del files["test.bin"]
    write_archive(tmp_path / "cifar-100-binary.tar.gz", "cifar-100-binary", files)
    with pytest.raises(DataError, match=r"test\.bin is not in it"):
        load_dataset("cifar100", root=tmp_path)


def test_truncated_archive(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    write_archive(path, "cifar-10-batches-py", files_of(CIFAR10, "python"))
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz: cannot read the archive"):
        load_dataset("cifar10", root=tmp_path)


def test_truncated_binary(tmp_path: Path) -> None:
    files = files_of(CIFAR10, "binary")
    files["test_batch.bin"] = files["test_batch.bin"][:-1]
    write_files(tmp_path, files)
    with pytest.raises(DataError, match=r"test_batch\.bin: 12,291 bytes are no whole number of 3073-byte records"):
        load_dataset("cifar10", root=tmp_path)


def test_binary_label_out_of_range(tmp_path: Path) -> None:
    files = files_of(CIFAR10, "binary")
    files["data_batch_3.bin"] = b"\x0a" + bytes(3072)
    write_files(tmp_path, files)
    with pytest.raises(DataError, match=r"labels must be in 0\.\.9"):
        load_dataset("cifar10", root=tmp_path)


def test_missing_says_where_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        load_dataset("cifar100", cache_dir=tmp_path)
    for part in ("cifar-100-python.tar.gz", str(tmp_path), "www.cs.toronto.edu", "torchvision", "folder:PATH"):
        assert part in str(error.value)


def test_torchvision_downloads_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cifar10(*, root: str, train: bool, download: bool) -> None:
        assert download
        write_files(Path(root) / "cifar-10-batches-py", files_of(CIFAR10, "python"))

    monkeypatch.setitem(sys.modules, "torchvision.datasets", types.SimpleNamespace(CIFAR10=cifar10))
    assert len(load_dataset("cifar10", cache_dir=tmp_path).train_labels) == 5 * PER_FILE


OFFICIAL = python2_pickle(rows(1, 0), b"labels", [3])
MODERN = modern_pickle(rows(1, 0), b"labels", [3])
PIXELS_AT = OFFICIAL.index(rows(1, 0).tobytes())


def changed(data: bytes, changes: list[tuple[int, int]]) -> bytes:
    copy = bytearray(data)
    for at, value in changes:
        copy[at % len(copy)] = value
    return bytes(copy)


# Positions outside the pixels, where a changed byte is an instruction or a length.
POSITIONS = st.one_of(st.integers(0, PIXELS_AT), st.integers(-20, -1))


@settings(deadline=None, max_examples=400)
@given(
    st.one_of(
        st.binary(max_size=80),
        st.binary(max_size=80).map(lambda tail: b"\x80\x02" + tail + b"."),
        st.builds(
            changed,
            st.sampled_from([OFFICIAL, MODERN]),
            st.lists(st.tuples(POSITIONS, st.integers(0, 255)), min_size=1, max_size=3),
        ),
        st.integers(0, len(OFFICIAL)).map(lambda length: OFFICIAL[:length]),
    )
)
@example(b"")
@example(OFFICIAL)
def test_any_bytes_as_a_pickle_give_a_batch_or_a_data_error(data: bytes) -> None:
    try:
        images, labels = parse_pickle(data, CIFAR10, "here")
    except DataError:
        return
    assert images.dtype == torch.uint8
    assert images.shape[1:] == (3, 32, 32)
    assert len(labels) == len(images) > 0


@settings(deadline=None, max_examples=100)
@given(st.one_of(st.binary(max_size=100), st.integers(0, 4 * 3074).map(bytes)), st.sampled_from([CIFAR10, CIFAR100]))
def test_any_bytes_as_binary_records_give_a_batch_or_a_data_error(data: bytes, variant: Variant) -> None:
    record = variant.label_bytes + 3072
    if data and len(data) % record == 0:
        assert len(parse_binary(data, variant, "here")[0]) == len(data) // record
    else:
        with pytest.raises(DataError, match="records"):
            parse_binary(data, variant, "here")
