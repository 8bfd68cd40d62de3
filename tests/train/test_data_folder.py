"""Datasets in class folders: decoding, the cache, and what wrong folders say."""

from __future__ import annotations

import logging
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ep_train.data import DataError, Dataset, decode, folder, load_dataset

ARCHIVE = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10-jpeg.tar.xz"
CLASSES = ("ant", "bee", "cow")


def pixels(seed: int, channels: int = 3, height: int = 6, width: int = 5) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_image(path: Path, array: np.ndarray) -> None:
    """Uncompressed if PNG, so that images of one shape make files of one size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, compress_level=0)


def write_dataset(root: Path, *, suffix: str = ".png", channels: int = 3, held_out: str = "test") -> None:
    """Three training images and two held-out ones per class, each with its own seed."""
    for split, count in (("train", 3), (held_out, 2)):
        for label, name in enumerate(CLASSES):
            for number in range(count):
                seed = number + 10 * label + (100 if split != "train" else 0)
                write_image(root / split / name / f"{number:03}{suffix}", pixels(seed, channels))


def load(root: Path) -> Dataset:
    return load_dataset(f"folder:{root}", cache_dir=root.parent / "cache")


def cache_file(root: Path) -> Path:
    (path,) = (root.parent / "cache" / "decoded").glob("[!.]*")
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "animals")
    return tmp_path / "animals"


def test_pixels_labels_and_names(root: Path) -> None:
    data = load(root)
    assert data.name == "folder:animals"
    assert data.source == "folder:animals (PNG images, train/ and test/)"
    assert data.class_names == CLASSES
    assert data.image_shape == (3, 6, 5)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(data.train_images[4], torch.from_numpy(pixels(11)).permute(2, 0, 1))
    assert torch.equal(data.test_images[5], torch.from_numpy(pixels(121)).permute(2, 0, 1))


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".JPG"])
def test_jpeg_is_what_pillow_decodes(tmp_path: Path, suffix: str) -> None:
    root = tmp_path / "animals"
    write_dataset(root, suffix=suffix)
    data = load(root)
    with Image.open(root / "train" / "ant" / f"000{suffix}") as image:
        expected = np.asarray(image)
    assert torch.equal(data.train_images[0].permute(1, 2, 0), torch.from_numpy(expected.copy()))
    assert "JPEG" in data.source


def test_grey_only_when_every_file_is(tmp_path: Path) -> None:
    root = tmp_path / "animals"
    write_dataset(root, channels=1)
    data = load(root)
    assert data.image_shape == (1, 6, 5)
    assert torch.equal(data.train_images[0, 0], torch.from_numpy(pixels(0, 1)))
    write_image(root / "test" / "cow" / "more.png", pixels(7))
    mixed = load(root)
    assert mixed.image_shape == (3, 6, 5)
    assert torch.equal(mixed.train_images[0], torch.from_numpy(pixels(0, 1)).expand(3, 6, 5))


def test_transparency_and_palettes_become_rgb(root: Path) -> None:
    write_image(root / "train" / "ant" / "000.png", pixels(5, channels=4))
    path = root / "train" / "ant" / "001.png"
    Image.fromarray(pixels(1)).quantize(8).save(path)
    data = load(root)
    assert torch.equal(data.train_images[0].permute(1, 2, 0), torch.from_numpy(pixels(5, channels=4)[:, :, :3].copy()))
    with Image.open(path) as image:
        assert torch.equal(data.train_images[1].permute(1, 2, 0), torch.from_numpy(np.array(image.convert("RGB"))))


def test_val_is_held_out_when_there_is_no_test(tmp_path: Path) -> None:
    write_dataset(tmp_path / "animals", held_out="val")
    data = load(tmp_path / "animals")
    assert len(data.test_labels) == 6
    assert data.source.endswith("train/ and val/)")
    write_dataset(tmp_path / "animals")  # test/ wins when it is there
    assert load(tmp_path / "animals").source.endswith("train/ and test/)")


def test_other_files_are_ignored(root: Path) -> None:
    (root / "train" / "ant" / "notes.txt").write_text("none of these is an image")
    (root / "train" / "ant" / ".hidden.png").write_text("nor this")
    (root / "train" / ".git").mkdir()
    (root / "train" / "list.txt").touch()
    assert len(load(root).train_labels) == 9


def test_relative_path_is_relative_to_root(root: Path) -> None:
    data = load_dataset("folder:animals", root=root.parent, cache_dir=root.parent / "cache")
    assert len(data.train_labels) == 9


def test_second_load_comes_from_the_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(root)

    def no_decoding(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(folder, "decode", no_decoding)
    second = load(root)
    assert torch.equal(first.train_images, second.train_images)
    assert torch.equal(first.test_images, second.test_images)
    assert first.mean == second.mean
    assert {path.name for path in cache_file(root).parent.iterdir()} == {cache_file(root).name, ".lock"}


def test_cache_goes_to_the_user_cache_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(root.parent / "xdg"))
    load_dataset(f"folder:{root}")
    assert len(list((root.parent / "xdg" / "ep-kernels" / "decoded").glob("[!.]*"))) == 1


@pytest.mark.parametrize("change", ["content", "more", "fewer", "swapped"])
def test_stale_cache_is_rebuilt(root: Path, change: str) -> None:
    path = root / "train" / "bee" / "001.png"
    for number in range(3):
        os.utime(path.with_name(f"{number:03}.png"), ns=(1_000_000_000, 1_000_000_000))
    load(root)
    if change == "content":  # of the same size, so that only the time tells
        before = path.stat()
        write_image(path, pixels(77))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        assert path.stat().st_size == before.st_size
    elif change == "more":
        write_image(root / "train" / "bee" / "0005.png", pixels(79))
    elif change == "fewer":
        path.unlink()
    else:
        path.rename(path.with_name("zzz.png"))  # to the end: the list of sizes and times stays the same
    data = load(root)
    files = sorted((root / "train" / "bee").iterdir())
    assert int((data.train_labels == 1).sum()) == len(files)
    for file, image in zip(files, data.train_images[data.train_labels == 1], strict=True):
        with Image.open(file) as stored:
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(stored))
    assert cache_file(root).is_file()  # replaced, not added to


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "other"])
def test_corrupt_cache_is_rebuilt(root: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    first = load(root)
    path = cache_file(root)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        at = data.index(first.train_images.permute(0, 2, 3, 1).numpy().tobytes()[:64]) + 10
        data[at] ^= 0x10
    elif damage == "truncated":
        del data[len(data) // 2 :]
    elif damage == "empty":
        data.clear()
    else:
        data = bytearray(b"not a cache")
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        second = load(root)
    assert "is damaged" in caplog.text
    assert torch.equal(first.train_images, second.train_images)
    caplog.clear()
    load(root)
    assert "is damaged" not in caplog.text


def test_cache_that_cannot_be_written_costs_only_time(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = root.parent / "blocked"
    blocked.write_text("a file where the cache's folder should be")
    data = load_dataset(f"folder:{root}", cache_dir=blocked)
    assert len(data.train_labels) == 9
    assert "cannot keep the decoded images" in caplog.text


def test_interrupted_write_leaves_the_old_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(root)
    before = cache_file(root).read_bytes()
    write_image(root / "train" / "ant" / "new.png", pixels(1))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ep_train.data.cache.os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(root)
    assert cache_file(root).read_bytes() == before


def decoded(paths: list[Path], workers: int) -> np.ndarray:
    memory = decode.Memory()
    decode.decode(paths, memory, workers=workers)
    return memory.images


def test_result_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    paths = []
    for number in range(600):
        path = tmp_path / f"{number:04}.png"
        write_image(path, pixels(number))
        paths.append(path)
    assert np.array_equal(decoded(paths, 1), decoded(paths, 5))
    paths[300].write_bytes(b"x")
    paths[590].write_bytes(b"x")
    for workers in (1, 5):
        with pytest.raises(DataError, match=r"0300\.png: cannot decode"):
            decoded(paths, workers)


def test_unreadable_image_is_named(root: Path) -> None:
    path = root / "test" / "bee" / "001.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"test/bee/001\.png: cannot decode this image"):
        load(root)


def test_images_of_another_size(root: Path) -> None:
    write_image(root / "train" / "cow" / "002.png", pixels(0, height=7))
    with pytest.raises(DataError, match=r"cow/002\.png: 5x7 pixels, but the first image has 5x6.*resize"):
        load(root)


@pytest.mark.parametrize("at", [0, 1, 70])
def test_one_colour_file_makes_all_of_them_rgb(tmp_path: Path, at: int) -> None:
    """Wherever it is: the first file, in the first block, in a later one."""
    paths = []
    for number in range(75):
        paths.append(tmp_path / f"{number:02}.png")
        write_image(paths[-1], pixels(number, 3 if number == at else 1))
    images = decoded(paths, 2)
    assert images.shape == (75, 6, 5, 3)
    for number in range(75):
        expected = pixels(number) if number == at else np.repeat(pixels(number, 1)[:, :, None], 3, axis=2)
        assert np.array_equal(images[number], expected)


def test_more_than_fits_into_memory_says_what_to_do(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("ep_train.data.decode.Memory.images", property(too_much, too_much), raising=False)
    with pytest.raises(DataError, match=r"15 images of 3x6x5 do not fit into memory; with --data-cache mmap"):
        load(root)


def test_unreadable_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("ep_train.data.folder.os.scandir", refuse)
    with pytest.raises(DataError, match=r"animals: cannot be read .*Permission denied"):
        load(root)


def test_sixteen_bits_are_refused(root: Path) -> None:
    write_image(root / "train" / "cow" / "002.png", np.full((6, 5), 1000, dtype=np.uint16))
    with pytest.raises(DataError, match=r"cow/002\.png: pixels of kind I;16 are not 8 bits"):
        load(root)


def test_empty_class_folder(root: Path) -> None:
    for path in (root / "train" / "bee").iterdir():
        path.rename(path.with_suffix(".gif"))
    with pytest.raises(DataError, match=r"train/bee: no \.jpg, \.jpeg, \.png images"):
        load(root)


def test_splits_with_different_classes(root: Path) -> None:
    (root / "test" / "dog").mkdir()
    with pytest.raises(DataError, match="same class folders; in one only: dog"):
        load(root)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ([], r"no such folder; it must hold train/<class>/"),
        (["test/ant"], r"no folder train/ in it"),
        (["train/ant"], r"neither test/ nor val/ in it"),
        (["train", "test"], r"no class folders"),
    ],
)
def test_missing_folders(tmp_path: Path, folders: list[str], message: str) -> None:
    for name in folders:
        (tmp_path / "data" / name).mkdir(parents=True)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "data")


@pytest.mark.skipif(not ARCHIVE.is_file(), reason="shared/data/cifar10-jpeg.tar.xz is not beside the repository")
def test_real_cifar10_jpegs(tmp_path: Path) -> None:
    """The first images of the archive, laid out as the archive is."""
    count = 0
    with tarfile.open(ARCHIVE, "r|xz") as tar:
        for member in tar:
            parts = Path(member.name).parts
            if not member.isfile() or parts[-3] not in ("train", "test"):
                continue
            file = tar.extractfile(member)
            assert file is not None
            data = file.read()
            for split in ("train", "test"):
                path = tmp_path / "cifar" / split / parts[-2] / parts[-1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            count += 1
            if count == 300:
                break
    dataset = load(tmp_path / "cifar")
    assert dataset.image_shape == (3, 32, 32)
    assert len(dataset.train_labels) == 300
    assert 0.2 < min(dataset.mean) < max(dataset.mean) < 0.7
    assert 0.1 < min(dataset.std) < max(dataset.std) < 0.4
    values = dataset.train_images.int()
    horizontal = (values[..., 1:] - values[..., :-1]).abs().float().mean()
    assert horizontal < 15  # neighbouring pixels are alike: photographs, not noise
