"""A dataset in class folders: `train/<class>/*.jpg|jpeg|png` and `test/<class>/...` (or `val/`).

The images are decoded once, in threads (Pillow releases the GIL while it decodes), and cached.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ep_train.data.cache import read_cache, write_cache
from ep_train.data.dataset import DataError, RawData

_log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png")
_GREY_MODES = frozenset({"1", "L", "LA"})
_COLOUR_MODES = frozenset({"RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"})
_CHUNK = 256
_CACHE_VERSION = 1

_Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Image:
    relative: str
    label: int
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class _Scan:
    """Every image file of both splits, in order of class, then name."""

    folder: Path
    class_names: tuple[str, ...]
    train: tuple[_Image, ...]
    test: tuple[_Image, ...]
    test_split: str

    def key(self) -> str:
        """Changes when the folder, any file's name, size or modification time changes."""
        digest = hashlib.sha256(json.dumps([_CACHE_VERSION, str(self.folder), self.test_split]).encode())
        for image in (*self.train, *self.test):
            digest.update(json.dumps([image.relative, image.size, image.mtime_ns]).encode())
        return digest.hexdigest()


def load_folder(folder: Path, cache_dir: Path) -> RawData:
    """Read a dataset in class folders, from the cache when no file has changed.

    The held-out split is `test`; where there is none, `val`. Images are grey ([N, 1, H, W]) when every
    file of both splits is, else RGB ([N, 3, H, W]); transparency is dropped. Other files are ignored.

    Args:
        folder: the folder that holds `train`.
        cache_dir: where the decoded images are kept, one file per folder.

    Raises:
        DataError: a folder is missing or without images, the splits have different classes, a file
            cannot be decoded (it is named), or images differ in size.
    """
    scan = _scan(folder)
    path = cache_dir / "decoded" / f"{scan.folder.name or 'root'}-{_digest(str(scan.folder))}.npz"
    key = scan.key()
    arrays = read_cache(path, key)
    if arrays is None or not _fits(arrays, scan):
        count = len(scan.train) + len(scan.test)
        _log.info("decoding %s images of %s (once; kept in %s)", f"{count:,}", folder, path)
        images = decode([scan.folder / image.relative for image in (*scan.train, *scan.test)])
        arrays = {"train": images[: len(scan.train)], "test": images[len(scan.train) :]}
        write_cache(path, key, arrays)
    png = {image.relative.lower().endswith(".png") for image in (*scan.train, *scan.test)}
    kinds = " and ".join(("PNG" if is_png else "JPEG") for is_png in sorted(png))
    name = f"folder:{scan.folder.name}"
    return RawData(
        name=name,
        train_images=torch.from_numpy(arrays["train"]),
        train_labels=torch.tensor([image.label for image in scan.train], dtype=torch.int64),
        test_images=torch.from_numpy(arrays["test"]),
        test_labels=torch.tensor([image.label for image in scan.test], dtype=torch.int64),
        class_names=scan.class_names,
        source=f"{name} ({kinds} images, train/ and {scan.test_split}/)",
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def _fits(arrays: dict[str, _Pixels], scan: _Scan) -> bool:
    return (
        set(arrays) == {"train", "test"}
        and all(array.dtype == np.uint8 and array.ndim == 4 for array in arrays.values())
        and len(arrays["train"]) == len(scan.train)
        and len(arrays["test"]) == len(scan.test)
    )


def _scan(folder: Path) -> _Scan:
    if not folder.is_dir():
        raise DataError(
            f"folder:{folder}: no such folder; it must hold train/<class>/ and test/<class>/ (or val/<class>/)"
            f" with {', '.join(EXTENSIONS)} images"
        )
    folder = folder.resolve()
    if not (folder / "train").is_dir():
        raise DataError(f"{folder}: no folder train/ in it; images are expected in train/<class>/ and test/<class>/")
    test_split = next((name for name in ("test", "val") if (folder / name).is_dir()), None)
    if test_split is None:
        raise DataError(f"{folder}: neither test/ nor val/ in it; the held-out images are expected there")
    train_classes, test_classes = _subfolders(folder / "train"), _subfolders(folder / test_split)
    if train_classes != test_classes:
        only = sorted(set(train_classes) ^ set(test_classes))
        raise DataError(
            f"{folder}: train/ and {test_split}/ must have the same class folders; in one only: {', '.join(only)}"
        )
    if not train_classes:
        raise DataError(f"{folder / 'train'}: no class folders in it")
    return _Scan(
        folder=folder,
        class_names=train_classes,
        train=tuple(_images(folder, "train", train_classes)),
        test=tuple(_images(folder, test_split, train_classes)),
        test_split=test_split,
    )


def _subfolders(split: Path) -> tuple[str, ...]:
    with os.scandir(split) as entries:
        return tuple(sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")))


def _images(folder: Path, split: str, class_names: tuple[str, ...]) -> Iterator[_Image]:
    for label, name in enumerate(class_names):
        files = []
        with os.scandir(folder / split / name) as entries:
            for entry in entries:
                wanted = entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".")
                if wanted and entry.is_file():
                    files.append((entry.name, entry.stat()))
        if not files:
            raise DataError(f"{folder / split / name}: no {', '.join(EXTENSIONS)} images in this class folder")
        for file, stat in sorted(files, key=lambda pair: pair[0]):
            yield _Image(f"{split}/{name}/{file}", label, stat.st_size, stat.st_mtime_ns)


def decode(paths: list[Path], *, workers: int | None = None) -> _Pixels:
    """Decode image files of one size into uint8 [N, C, H, W]; C is 1 when every file is grey, else 3.

    Args:
        paths: the files, at least one.
        workers: threads; default: the CPU cores this process may use.

    Raises:
        DataError: a file cannot be decoded, or has another size than the first one; of several such
            files, the first is named.
    """
    size, _ = _open(paths[0], None)
    width, height = size
    pixels = np.empty((len(paths), height, width, 3), dtype=np.uint8)
    grey = np.zeros(len(paths), dtype=bool)

    def decode_chunk(start: int) -> None:
        for index in range(start, min(start + _CHUNK, len(paths))):
            _, array = _open(paths[index], size)
            grey[index] = array.ndim == 2
            pixels[index] = array[:, :, None] if array.ndim == 2 else array

    with ThreadPoolExecutor(workers or _cores()) as pool:
        chunks = [pool.submit(decode_chunk, start) for start in range(0, len(paths), _CHUNK)]
        try:
            for chunk in chunks:
                chunk.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    channels = pixels[..., :1] if grey.all() else pixels
    return np.ascontiguousarray(channels.transpose(0, 3, 1, 2))


def _open(path: Path, size: tuple[int, int] | None) -> tuple[tuple[int, int], _Pixels]:
    """The (width, height) of an image, and its pixels: uint8 [H, W] if grey, else [H, W, 3]."""
    from PIL import Image

    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            if size is not None and image.size != size:
                raise DataError(
                    f"{path}: {image.size[0]}x{image.size[1]} pixels, but the first image has {size[0]}x{size[1]};"
                    " all images must have one size: resize them first"
                )
            if image.mode in _GREY_MODES:
                return image.size, np.asarray(image if image.mode == "L" else image.convert("L"))
            if image.mode in _COLOUR_MODES:
                return image.size, np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
            raise DataError(f"{path}: pixels of kind {image.mode} are not 8 bits per channel; convert it first")
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise many things on damaged files
        raise DataError(f"{path}: cannot decode this image ({type(error).__name__}: {error})") from error


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
