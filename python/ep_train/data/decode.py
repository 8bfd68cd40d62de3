"""JPEG and PNG files of one size decoded in threads (Pillow releases the GIL while it decodes), block by block."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ep_train.data.dataset import DataError

BLOCK = 64  # images that a thread decodes at a time
Pixels = npt.NDArray[np.uint8]
_GREY_MODES = frozenset({"1", "L", "LA"})
_COLOUR_MODES = frozenset({"RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"})


class Sink(Protocol):
    """Where decoded images go."""

    def begin(self, shape: tuple[int, int, int, int]) -> None:
        """Every image will be part of [N, H, W, C]; called again when the first guess of C was wrong."""

    def put(self, start: int, images: Pixels) -> None:
        """uint8 [B, H, W, C], the images from ``start`` on (a multiple of ``BLOCK``); called from several threads."""


class Memory:
    """A sink in memory.

    Attributes:
        images: uint8 [N, H, W, C].
    """

    images: Pixels

    def begin(self, shape: tuple[int, int, int, int]) -> None:
        try:
            self.images = np.empty(shape, dtype=np.uint8)
        except MemoryError as error:
            count, height, width, channels = shape
            raise DataError(
                f"{count:,} images of {channels}x{height}x{width} do not fit into memory; with --data-cache mmap"
                " (data_cache=) they stay in a file"
            ) from error

    def put(self, start: int, images: Pixels) -> None:
        self.images[start : start + len(images)] = images


class _Colour(Exception):
    """A file is not grey, as the first one is."""


def decode(paths: list[Path], sink: Sink, *, workers: int | None = None) -> None:
    """Decode image files of one size into uint8 [N, H, W, C]; C is 1 when every file is grey, else 3.

    Args:
        paths: the files, at least one.
        sink: gets the blocks, in any order.
        workers: threads; default: the CPU cores this process may use.

    Raises:
        DataError: a file cannot be decoded, or has another size than the first one; of several such
            files, the first is named.
    """
    size, first = _open(paths[0], None)
    if first.ndim == 2:
        try:
            _decode(paths, sink, size, workers, grey=True)
        except _Colour:
            pass
        else:
            return
    _decode(paths, sink, size, workers, grey=False)


def _decode(paths: list[Path], sink: Sink, size: tuple[int, int], workers: int | None, *, grey: bool) -> None:
    width, height = size
    channels = 1 if grey else 3
    sink.begin((len(paths), height, width, channels))

    def block(start: int) -> None:
        part = paths[start : start + BLOCK]
        images = np.empty((len(part), height, width, channels), dtype=np.uint8)
        for index, path in enumerate(part):
            _, array = _open(path, size)
            if grey and array.ndim == 3:
                raise _Colour
            images[index] = array[:, :, None] if array.ndim == 2 else array
        sink.put(start, images)

    with ThreadPoolExecutor(workers or cores()) as pool:
        blocks = [pool.submit(block, start) for start in range(0, len(paths), BLOCK)]
        try:
            for done in blocks:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def read_image(path: Path, size: tuple[int, int]) -> Pixels:
    """One image file of exactly this (width, height): uint8 [H, W] if grey, else [H, W, 3].

    Raises:
        DataError: it cannot be decoded, or has another size.
    """
    return _open(path, size, "the size must be")[1]


def _open(
    path: Path, size: tuple[int, int] | None, whose: str = "the first image has"
) -> tuple[tuple[int, int], Pixels]:
    """The (width, height) of an image, and its pixels: uint8 [H, W] if grey, else [H, W, 3]."""
    from PIL import Image

    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            if size is not None and image.size != size:
                raise DataError(
                    f"{path}: {image.size[0]}x{image.size[1]} pixels, but {whose} {size[0]}x{size[1]};"
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


def cores() -> int:
    """CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
