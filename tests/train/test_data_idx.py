"""Fashion-MNIST's idx files: what is read, where it is looked for, and what damaged files say."""

from __future__ import annotations

import gzip
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ep_train.data import DataError, load_dataset
from ep_train.data import idx as idx_module
from ep_train.data.idx import read_idx

STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def images(count: int, seed: int = 0, side: int = 28) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side), dtype=np.uint8)


def labels(count: int) -> np.ndarray:
    return (np.arange(count) % 10).astype(np.uint8)


def write_dataset(folder: Path, *, compressed: bool = False, train: int = 30, test: int = 20) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = (images(train), labels(train), images(test, seed=1), labels(test))
    for stem, array in zip(STEMS, arrays, strict=True):
        data = idx_bytes(array)
        if compressed:
            (folder / f"{stem}.gz").write_bytes(gzip.compress(data, 1))
        else:
            (folder / stem).write_bytes(data)


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither Debian's package nor the network answers."""
    monkeypatch.setattr(idx_module, "DEBIAN_FOLDER", tmp_path / "no-such-package")
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("sub", [".", "fashion-mnist", "FashionMNIST/raw"])
def test_reads_idx_files(tmp_path: Path, compressed: bool, sub: str) -> None:
    write_dataset(tmp_path / "root" / sub, compressed=compressed)
    data = load_dataset("fashion-mnist", root=tmp_path / "root", cache_dir=tmp_path)
    assert data.image_shape == (1, 28, 28)
    assert data.classes == 10
    assert data.class_names[9] == "Ankle boot"
    assert torch.equal(data.train_images[:, 0], torch.from_numpy(images(30)))
    assert torch.equal(data.test_images[:, 0], torch.from_numpy(images(20, seed=1)))
    assert data.train_labels.tolist() == labels(30).tolist()
    assert str(tmp_path) not in data.source


def test_debian_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "package", compressed=True)
    monkeypatch.setattr(idx_module, "DEBIAN_FOLDER", tmp_path / "package")
    assert load_dataset("fashion-mnist", cache_dir=tmp_path / "cache").source.endswith("folder package)")


def test_root_comes_before_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "package")
    write_dataset(tmp_path / "mine", train=40)
    monkeypatch.setattr(idx_module, "DEBIAN_FOLDER", tmp_path / "package")
    data = load_dataset("fashion-mnist", root=tmp_path / "mine", cache_dir=tmp_path)
    assert len(data.train_labels) == 40


def test_missing_says_where_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        load_dataset("fashion-mnist", root=tmp_path / "nowhere", cache_dir=tmp_path)
    message = str(error.value)
    for part in ("train-images-idx3-ubyte", str(tmp_path / "nowhere"), "apt-get install", "pip install torchvision"):
        assert part in message


def test_missing_one_file_names_it(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    (tmp_path / STEMS[3]).unlink()
    with pytest.raises(DataError, match=rf"{STEMS[3]}.*test labels.*missing"):
        load_dataset("fashion-mnist", root=tmp_path)


def test_torchvision_downloads_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fashion_mnist(*, root: str, train: bool, download: bool) -> None:
        calls.append((train, download))
        write_dataset(Path(root) / "FashionMNIST" / "raw", compressed=True)

    monkeypatch.setitem(sys.modules, "torchvision.datasets", types.SimpleNamespace(FashionMNIST=fashion_mnist))
    for _ in range(2):  # the second time, the download is found
        data = load_dataset("fashion-mnist", cache_dir=tmp_path)
        assert len(data.train_labels) == 30
    assert calls == [(True, True), (False, True)]


def test_failed_download_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fashion_mnist(**_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "torchvision.datasets", types.SimpleNamespace(FashionMNIST=fashion_mnist))
    with pytest.raises(DataError, match=r"download into .* failed .*no route to host.*apt-get install"):
        load_dataset("fashion-mnist", cache_dir=tmp_path)


def test_truncated_file(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    path = tmp_path / STEMS[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{STEMS[0]}: the header says 23,520 bytes \[30, 28, 28\], .* has 23,519"):
        load_dataset("fashion-mnist", root=tmp_path)


def test_truncated_gzip(tmp_path: Path) -> None:
    write_dataset(tmp_path, compressed=True)
    path = tmp_path / f"{STEMS[0]}.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"cannot read the file .*; get it again"):
        load_dataset("fashion-mnist", root=tmp_path)


def test_labels_in_place_of_images(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    (tmp_path / STEMS[0]).write_bytes((tmp_path / STEMS[1]).read_bytes())
    with pytest.raises(DataError, match=r"starts with 00000801, expected 00000803"):
        load_dataset("fashion-mnist", root=tmp_path)


def test_bytes_after_the_end(tmp_path: Path) -> None:
    path = tmp_path / "labels"
    path.write_bytes(idx_bytes(labels(5)) + b"x")
    with pytest.raises(DataError, match=r"5 bytes \[5\], the file has more"):
        read_idx(path, dimensions=1)


def test_wrong_number_of_labels(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    (tmp_path / STEMS[1]).write_bytes(idx_bytes(labels(29)))
    with pytest.raises(DataError, match=r"train split: 30 images but 29 labels"):
        load_dataset("fashion-mnist", root=tmp_path)


def test_label_out_of_range(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    (tmp_path / STEMS[3]).write_bytes(idx_bytes(np.full(20, 10, dtype=np.uint8)))
    with pytest.raises(DataError, match=r"test split: labels must be in 0\.\.9, found 10\.\.10"):
        load_dataset("fashion-mnist", root=tmp_path)


def test_splits_of_different_size(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    (tmp_path / STEMS[2]).write_bytes(idx_bytes(images(20, side=27)))
    with pytest.raises(DataError, match=r"1x28x28 and test images 1x27x27"):
        load_dataset("fashion-mnist", root=tmp_path)


def test_header_cannot_make_it_allocate(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(bytes([0, 0, 8, 3]) + b"\xff" * 12)
    with pytest.raises(DataError, match="claims"):
        read_idx(path, dimensions=3)


SMALL = idx_bytes(images(2, side=2))


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.one_of(
        st.binary(max_size=64),
        st.binary(max_size=64).map(lambda tail: bytes([0, 0, 8, 3]) + tail),
        st.tuples(st.integers(0, len(SMALL) - 1), st.binary(max_size=4)).map(
            lambda change: SMALL[: change[0]] + change[1] + SMALL[change[0] + len(change[1]) :]
        ),
    ),
    suffix=st.sampled_from(["", ".gz", ".packed.gz"]),
)
@example(data=b"", suffix="")
@example(data=SMALL, suffix="")
@example(data=SMALL, suffix=".packed.gz")
@example(data=bytes([0, 0, 8, 3]) + bytes(12), suffix="")
def test_any_bytes_give_an_array_or_a_data_error(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(gzip.compress(data, 1) if suffix == ".packed.gz" else data)
    try:
        array = read_idx(path, dimensions=3)
    except DataError:
        return
    assert idx_bytes(array) == data
