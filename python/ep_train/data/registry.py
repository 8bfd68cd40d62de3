"""From a dataset's spec, as written on a command line, to the dataset."""

from __future__ import annotations

import os
from pathlib import Path
from typing import get_args

from ep_train.data.cifar import CIFAR10, CIFAR100, load_cifar
from ep_train.data.dataset import DataError, Dataset, Normalise, RawData, finish
from ep_train.data.digits import load_digits
from ep_train.data.folder import DataCache, load_folder
from ep_train.data.idx import load_fashion_mnist

DATASET_SPECS: dict[str, str] = {
    "digits": "1,797 grey 8x8 digits, installed with scikit-learn",
    "fashion-mnist": "70,000 grey 28x28 images: idx files, Debian's dataset-fashion-mnist, or torchvision",
    "cifar10": "60,000 colour 32x32 images in 10 classes: official files, or torchvision",
    "cifar100": "60,000 colour 32x32 images in 100 classes: official files, or torchvision",
    "folder:PATH": "JPEG or PNG images of one size in PATH/train/<class>/ and PATH/test/<class>/ (or val/)",
}
_FOLDER = "folder:"


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/ep-kernels`, or `~/.cache/ep-kernels`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "ep-kernels"


def load_dataset(
    spec: str,
    *,
    root: Path | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    seed: int = 0,
    cache_dir: Path | None = None,
    data_cache: DataCache = "memory",
    normalise: Normalise | None = None,
) -> Dataset:
    """Load a dataset.

    Args:
        spec: a key of `DATASET_SPECS`, with a path for `folder:PATH`.
        root: folder with the dataset's files, and where a download goes; for `folder:PATH`, what a
            relative PATH is relative to (default: the working directory). The digits, and an absolute
            PATH, are where they are.
        train_limit, test_limit: at most this many images, a class-balanced random choice.
        seed: chooses that subset, and which digits are held out; 0 or more.
        cache_dir: for decoded images and downloads; default `default_cache_dir()`.
        data_cache: where the images are: in `memory`, or for `folder:PATH` in a memory-mapped file (`mmap`), of
            which what is not in use takes no memory. A limit copies the chosen images into memory.
        normalise: of the dataset's batches, `unit` or `standard`; default: `unit` for the digits, else `standard`.

    Returns:
        Its images, uint8, and labels, on the host.

    Raises:
        DataError: the spec is unknown, its data is missing or damaged, or `data_cache` does not suit it.
    """
    if data_cache not in get_args(DataCache):
        raise DataError(f"data_cache must be one of {', '.join(get_args(DataCache))}; got {data_cache!r}")
    if data_cache == "mmap" and spec in DATASET_SPECS:
        raise DataError(f"data_cache: mmap is for folder:PATH; {spec} is small and always in memory")
    cache = (cache_dir if cache_dir is not None else default_cache_dir()).expanduser()
    raw = _read(spec, root.expanduser() if root is not None else None, seed, cache, data_cache)
    return finish(raw, train_limit=train_limit, test_limit=test_limit, seed=seed, normalise=normalise)


def _read(spec: str, root: Path | None, seed: int, cache: Path, data_cache: DataCache) -> RawData:
    if spec.startswith(_FOLDER) and spec != _FOLDER:
        path = Path(spec.removeprefix(_FOLDER)).expanduser()
        return load_folder(root / path if root is not None else path, cache, data_cache)
    match spec:
        case "digits":
            return load_digits(seed)
        case "fashion-mnist":
            return load_fashion_mnist(root, cache)
        case "cifar10":
            return load_cifar(CIFAR10, root, cache)
        case "cifar100":
            return load_cifar(CIFAR100, root, cache)
    known = "\n".join(f"  {name:14} {what}" for name, what in DATASET_SPECS.items())
    raise DataError(f"unknown dataset {spec!r}; the datasets are:\n{known}")
