"""A dataset in class folders: `train/<class>/*.jpg|jpeg|png` and `test/<class>/...` (or `val/`).

The images are decoded once and kept in a cache file, which later runs read into memory or map.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ep_train.data.cache import SUFFIX, CacheWriter, alone, read_cache, write_cache
from ep_train.data.dataset import DataError, RawData, Statistics
from ep_train.data.decode import Memory, decode

_log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png")
_CACHE_VERSION = 2

DataCache = Literal["memory", "mmap"]


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


def load_folder(folder: Path, cache_dir: Path, data_cache: DataCache = "memory") -> RawData:
    """Read a dataset in class folders, from the cache when no file has changed.

    The held-out split is `test`; where there is none, `val`. Images are grey ([N, 1, H, W]) when every
    file of both splits is, else RGB ([N, 3, H, W]); transparency is dropped. Other files are ignored.

    Args:
        folder: the folder that holds `train`.
        cache_dir: where the decoded images are kept, one file per folder.
        data_cache: `memory` reads that file; `mmap` maps it, for images that memory has no room for.

    Raises:
        DataError: a folder is missing, unreadable or without images, the splits have different classes, a file
            cannot be decoded (it is named), images differ in size, or memory or, for `mmap`, the disk is too small.
    """
    try:
        scan = _scan(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error})") from error
    images, statistics = _decoded(scan, cache_dir / "decoded", mapped=data_cache == "mmap")
    images = images.permute(0, 3, 1, 2)
    png = {image.relative.lower().endswith(".png") for image in (*scan.train, *scan.test)}
    kinds = " and ".join(("PNG" if is_png else "JPEG") for is_png in sorted(png))
    name = f"folder:{scan.folder.name}"
    return RawData(
        name=name,
        train_images=images[: len(scan.train)],
        train_labels=torch.tensor([image.label for image in scan.train], dtype=torch.int64),
        test_images=images[len(scan.train) :],
        test_labels=torch.tensor([image.label for image in scan.test], dtype=torch.int64),
        class_names=scan.class_names,
        source=f"{name} ({kinds} images, train/ and {scan.test_split}/)",
        statistics=statistics,
    )


def _decoded(scan: _Scan, store: Path, *, mapped: bool) -> tuple[Tensor, Statistics | None]:
    """Both splits' images, uint8 [N, H, W, C], the training images first; their mean and std, if known."""
    stem = re.sub(r"[^\w.-]", "_", scan.folder.name[:80] or "root", flags=re.ASCII)  # for people: the digest names it
    path = store / f"{stem}-{_digest(str(scan.folder))}{SUFFIX}"
    key = scan.key()
    files = [scan.folder / image.relative for image in (*scan.train, *scan.test)]
    found = read_cache(path, key, len(files), mapped=mapped)
    if found is not None:
        return found
    with alone(store) as waited:
        if waited and (found := read_cache(path, key, len(files), mapped=mapped)) is not None:
            return found
        _log.info("decoding %s images of %s (once; kept in %s)", f"{len(files):,}", scan.folder, path)
        if not mapped:
            memory = Memory()
            decode(files, memory)
            return torch.from_numpy(memory.images), write_cache(path, key, memory.images, len(scan.train))
        try:
            with CacheWriter(path, key, len(scan.train)) as writer:
                decode(files, writer)
                writer.finish()
        except OSError as error:
            raise DataError(
                f"{path}: cannot keep the decoded images, which --data-cache mmap maps ({error}); make room there, or"
                " set XDG_CACHE_HOME to a folder on another disk"
            ) from error
        found = read_cache(path, key, len(files), mapped=True)
    if found is None:
        raise DataError(f"{path}: the decoded images were written, but do not read back the same: check that disk")
    return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


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
