"""Decoded images kept on disk: one safetensors file, which can be read into memory or memory-mapped.

It holds one tensor, `images`, uint8 [N, H, W, C], and as its metadata the version of this layout, the key of what was
decoded, the statistics of the training images, and a sha256 over all of that and over the pixels. A file that is
truncated, changed, of another version or of another key reads as absent.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ep_train import durable, locks
from ep_train.data.dataset import DataError, Statistics, histograms_of, statistics_of
from ep_train.data.decode import BLOCK, Pixels, cores

_log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
_VERSION = "1"
_NAME = "images"
_HEADER = 4096  # bytes before the pixels: a page, so that they are aligned when mapped
_UNWRITTEN = frozenset({errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT})  # a file there cannot be made either
_OLD = 3600.0  # seconds since a file was written to, after which it may be what a killed process left


class Cached(NamedTuple):
    """What a cache holds: images uint8 [N, H, W, C], and the mean and std of the training images."""

    images: Tensor
    statistics: Statistics


def read_cache(path: Path, key: str, count: int, *, mapped: bool) -> Cached | None:
    """What is stored at `path` under `key`; None if there is no such file, or it must be rebuilt.

    Every byte is read once, to compare its digest.

    Args:
        count: how many images there must be.
        mapped: leave the images in the file: pages are read when they are used, and given back when memory is short.
    """
    try:
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            found = dict(file.metadata() or {})
            if (found.get("version"), found.get("key")) != (_VERSION, key):
                _log.warning("%s is out of date; the images are decoded again", path)
                return None
            images: Tensor = file.get_tensor(_NAME)
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != count or images.numel() == 0:
            raise ValueError(f"it holds {images.dtype} {list(images.shape)}, expected uint8 [{count}, H, W, C]")
        if not mapped:
            images = images.clone()
        if _digest(found, images.shape, _block_digests(images)) != found.get("sha256"):
            raise ValueError("its contents are not those that were written")
        mean, std = (tuple(float(value) for value in json.loads(found[name])) for name in ("mean", "std"))
        return Cached(images, (mean, std))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:
        _log.warning("%s is damaged (%s); the images are decoded again", path, error)
        return None


class CacheWriter:
    """A sink for decoded images that becomes a cache file, atomically: readers see the old file or the new one.

    A context manager; without `finish`, nothing is left of it. Needs no memory for the images.

    Raises:
        OSError: the disk is full or read-only.
    """

    def __init__(self, path: Path, key: str, train: int) -> None:
        """
        Args:
            path: the file to be; its folder is created.
            key: what the file will be read with.
            train: the first so many images are the training images.
        """
        self.path, self.key, self.train = path, key, train
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._temporary = durable.new_file(path)
        with suppress(OSError):  # where files cannot be locked, no other process removes it
            locks.lock(self._file)

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._file)
        self._temporary.unlink(missing_ok=True)

    def begin(self, shape: tuple[int, int, int, int]) -> None:
        """Make room for [N, H, W, C]: a disk that is too small is found before anything is decoded."""
        self.shape = torch.Size(shape)
        self._histograms = torch.zeros(shape[3], 256, dtype=torch.int64)
        self._digests: dict[int, bytes] = {}
        os.ftruncate(self._file, 0)
        os.posix_fallocate(self._file, 0, _HEADER + self.shape.numel())

    def put(self, start: int, images: Pixels) -> None:
        """Write a block: the images from `start` on, a multiple of `BLOCK`."""
        _write(self._file, images.data.cast("B"), _HEADER + start * self.shape[1:].numel())
        histograms = histograms_of(torch.from_numpy(images[: max(self.train - start, 0)]).permute(0, 3, 1, 2))
        digest = hashlib.sha256(images.data).digest()
        with self._lock:
            self._histograms += histograms
            self._digests[start] = digest

    def finish(self) -> Statistics:
        """Give the file its header, and its name once it is on the disk; the training images' mean and std."""
        mean, std = statistics_of(self._histograms)
        metadata = {"version": _VERSION, "key": self.key, "mean": json.dumps(mean), "std": json.dumps(std)}
        digests = [self._digests[start] for start in range(0, self.shape[0], BLOCK)]
        metadata["sha256"] = _digest(metadata, self.shape, digests)
        tensor = {"dtype": "U8", "shape": list(self.shape), "data_offsets": [0, self.shape.numel()]}
        header = json.dumps({"__metadata__": metadata, _NAME: tensor}).encode()
        size = _HEADER - 8  # a number of 8 bytes comes first
        _write(self._file, memoryview(struct.pack("<Q", size) + header.ljust(size)), 0)
        durable.put_in_place(self._temporary, self.path)
        return mean, std


def write_cache(path: Path, key: str, images: Pixels, train: int) -> Statistics | None:
    """Store images [N, H, W, C], of which the first `train` are the training images; their mean and std.

    A disk that is full or read-only costs the cache, not the run: it is logged, nothing is written, and None returned.
    """
    try:
        with CacheWriter(path, key, train) as writer:
            writer.begin(images.shape)
            for start in range(0, len(images), BLOCK):
                writer.put(start, images[start : start + BLOCK])
            return writer.finish()
    except OSError as error:
        _log.warning("cannot keep the decoded images in %s (%s); the next run decodes them again", path, error)
        return None


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """One process at a time in here; True: another one was, so what it made may be there by now.

    What killed processes left half-written is removed once it is an hour old.

    Where files cannot be locked or not be made, which is worth a warning in the log, processes do the same work side by
    side, each in its own temporary file.

    Raises:
        DataError: the folder cannot be locked for another reason.
    """
    descriptor = None
    waited = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _log.debug("%s cannot be made (%s)", folder, error)  # who writes to it says so
    else:
        try:
            descriptor, waited = _lock(folder)
        except OSError as error:
            reason = error.strerror or error
            if error.errno not in locks.NO_LOCKS | _UNWRITTEN:
                raise DataError(f"{folder / locks.LOCK}: cannot be locked: {reason}") from error
            _log.warning("%s cannot be locked (%s): other processes may decode the same images", folder, reason)
    try:
        if descriptor is not None:
            with suppress(OSError):
                _remove_left(folder)
        yield waited
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(folder: Path) -> tuple[int, bool]:
    """A descriptor with the folder's lock, and whether another process had it before."""
    try:
        return locks.take(folder), False
    except BlockingIOError:
        _log.info("another process decodes images into %s: waiting for it", folder)
        return locks.take(folder, wait=True), True


def _remove_left(folder: Path) -> None:
    """What killed processes left: nobody has written to it for an hour, and nobody holds its lock (a process that could
    not lock the folder still writes)."""
    for left in folder.glob(".*.tmp"):
        with suppress(OSError):  # it is gone, or somebody's
            if time.time() - left.stat().st_mtime < _OLD:
                continue
            file = os.open(left, os.O_RDWR)
            try:
                locks.lock(file)
                left.unlink()
            finally:
                os.close(file)


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _block_digests(images: Tensor) -> list[bytes]:
    """Of every `BLOCK` images, in threads: hashlib releases the GIL."""
    blocks: list[Any] = [part.numpy() for part in images.split(BLOCK)]
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(lambda block: hashlib.sha256(block).digest(), blocks))


def _digest(metadata: dict[str, str], shape: torch.Size, blocks: list[bytes]) -> str:
    """sha256 over the metadata but itself, the shape and the blocks' digests."""
    known = {name: value for name, value in metadata.items() if name != "sha256"}
    total = hashlib.sha256(json.dumps([known, list(shape)], sort_keys=True).encode())
    total.update(b"".join(blocks))
    return total.hexdigest()
