"""Fashion-MNIST, and the idx file format it is stored in.

An idx file is big-endian: two zero bytes, a type byte (8: unsigned byte), the number of dimensions,
one uint32 for each, then the values.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ep_train.data.dataset import DataError, RawData
from ep_train.data.download import download

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_SUBFOLDERS = (".", "fashion-mnist", "FashionMNIST/raw")
_FILES = {
    "train images": "train-images-idx3-ubyte",
    "train labels": "train-labels-idx1-ubyte",
    "test images": "t10k-images-idx3-ubyte",
    "test labels": "t10k-labels-idx1-ubyte",
}
_UNSIGNED_BYTE = 8
_MAX_BYTES = 1 << 31
_READ_CHUNK = 1 << 24


def read_idx(path: Path, *, dimensions: int) -> npt.NDArray[np.uint8]:
    """Read one idx file of unsigned bytes, plain or compressed (`.gz`).

    Args:
        path: the file.
        dimensions: how many dimensions it must have (3 for images, 1 for labels).

    Raises:
        DataError: the file cannot be read, is no idx file of that kind, or holds fewer or more bytes
            than its header says.
    """
    try:
        with path.open("rb") as raw:
            return _parse_idx(path, gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw, dimensions)
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise DataError(f"{path}: cannot read the file ({error}); get it again") from error


def _parse_idx(path: Path, file: gzip.GzipFile | BinaryIO, dimensions: int) -> npt.NDArray[np.uint8]:
    header = file.read(4)
    expected = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    if header != expected:
        raise DataError(
            f"{path}: not an idx file of unsigned bytes with {dimensions} dimension(s):"
            f" it starts with {header.hex() or 'nothing'}, expected {expected.hex()}; get it again"
        )
    sizes = file.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise DataError(f"{path}: truncated in its header; get it again")
    shape = struct.unpack(f">{dimensions}I", sizes)
    count = math.prod(shape)
    if count > _MAX_BYTES:
        raise DataError(f"{path}: its header claims {count:,} bytes {list(shape)}, more than {_MAX_BYTES:,}")
    values = bytearray()
    while len(values) <= count and (chunk := file.read(min(_READ_CHUNK, count + 1 - len(values)))):
        values += chunk
    if len(values) != count:
        found = f"{len(values):,}" if len(values) < count else "more"
        raise DataError(f"{path}: the header says {count:,} bytes {list(shape)}, the file has {found}; get it again")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def load_fashion_mnist(root: Path | None, cache_dir: Path) -> RawData:
    """Read Fashion-MNIST from the first of: `root`, Debian's package, an earlier download, torchvision.

    Args:
        root: a folder with the four idx files, plain or `.gz` (also looked for in its subfolders
            `fashion-mnist` and `FashionMNIST/raw`); a download goes here too.
        cache_dir: where a download goes when `root` is None.

    Raises:
        DataError: the files are nowhere, or damaged.
    """
    store = root if root is not None else cache_dir / "downloads"
    folders = [*([root] if root is not None else []), DEBIAN_FOLDER, store]
    found = _find(folders)
    if found is None:
        looked = ", ".join(str(folder) for folder in dict.fromkeys(folders))
        download(
            "FashionMNIST",
            store,
            missing=f"Fashion-MNIST's idx files (such as {_FILES['train images']}.gz) were looked for in: {looked}",
            advice="on Debian or Ubuntu run: apt-get install dataset-fashion-mnist; elsewhere put the four"
            " files in a folder and name it as --data-root (root=)",
        )
        found = _find([store])
    if found is None:
        raise DataError(f"torchvision reported success, but Fashion-MNIST's idx files are not in {store}")
    return _load_folder(found)


def _locate(folder: Path, stem: str) -> Path | None:
    candidates = (folder / stem, folder / f"{stem}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _find(folders: Iterable[Path]) -> Path | None:
    """The first folder, or subfolder, that holds any of the four files."""
    for folder in folders:
        for sub in _SUBFOLDERS:
            if any(_locate(folder / sub, stem) for stem in _FILES.values()):
                return folder / sub
    return None


def _load_folder(folder: Path) -> RawData:
    paths = {}
    for what, stem in _FILES.items():
        path = _locate(folder, stem)
        if path is None:
            raise DataError(f"{folder}: {stem} (or {stem}.gz), the {what}, is missing; get it again")
        paths[what] = path

    def images(what: str) -> Tensor:
        return torch.from_numpy(read_idx(paths[what], dimensions=3)).unsqueeze(1)

    def labels(what: str) -> Tensor:
        return torch.from_numpy(read_idx(paths[what], dimensions=1)).to(torch.int64)

    return RawData(
        name="fashion-mnist",
        train_images=images("train images"),
        train_labels=labels("train labels"),
        test_images=images("test images"),
        test_labels=labels("test labels"),
        class_names=CLASS_NAMES,
        source=f"Fashion-MNIST (idx files, folder {folder.resolve().name})",
    )
