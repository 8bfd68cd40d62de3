"""CIFAR-10 and CIFAR-100 in either official form: Python pickles or binary records.

A row is 3,072 bytes, channels x height x width = 3x32x32. A binary record is the label (CIFAR-100:
coarse label, then fine label) and a row. A pickle is a dictionary with `data`, uint8 [N, 3072], and
`labels` (CIFAR-100: `fine_labels`), a list.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ep_train.data.cifar_classes import CIFAR10_CLASSES, CIFAR100_CLASSES
from ep_train.data.dataset import DataError, RawData
from ep_train.data.download import download
from ep_train.data.safe_pickle import PickledArray, UnsafePickleError, load_plain_pickle

IMAGE_SHAPE = (3, 32, 32)
ROW_BYTES = 3072
_MAX_FILE_BYTES = 1 << 28  # the largest official file, CIFAR-100's train, has 155 MB


@dataclass(frozen=True)
class Form:
    """One form in which a dataset is published: what its files are called."""

    kind: str
    folder: str
    archive: str
    train: tuple[str, ...]
    test: str


@dataclass(frozen=True)
class Variant:
    """CIFAR-10 or CIFAR-100."""

    name: str
    title: str
    label_key: bytes
    label_bytes: int
    class_names: tuple[str, ...]
    forms: tuple[Form, ...]


CIFAR10 = Variant(
    name="cifar10",
    title="CIFAR-10",
    label_key=b"labels",
    label_bytes=1,
    class_names=CIFAR10_CLASSES,
    forms=(
        Form(
            "python",
            "cifar-10-batches-py",
            "cifar-10-python.tar.gz",
            tuple(f"data_batch_{number}" for number in range(1, 6)),
            "test_batch",
        ),
        Form(
            "binary",
            "cifar-10-batches-bin",
            "cifar-10-binary.tar.gz",
            tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
            "test_batch.bin",
        ),
    ),
)
CIFAR100 = Variant(
    name="cifar100",
    title="CIFAR-100",
    label_key=b"fine_labels",
    label_bytes=2,
    class_names=CIFAR100_CLASSES,
    forms=(
        Form("python", "cifar-100-python", "cifar-100-python.tar.gz", ("train",), "test"),
        Form("binary", "cifar-100-binary", "cifar-100-binary.tar.gz", ("train.bin",), "test.bin"),
    ),
)


def load_cifar(variant: Variant, root: Path | None, cache_dir: Path) -> RawData:
    """Read CIFAR from `root`, from an earlier download, or through torchvision.

    Args:
        variant: `CIFAR10` or `CIFAR100`.
        root: a folder with the official files, their folder, or their `.tar.gz`, or that archive
            itself; a download goes here too.
        cache_dir: where a download goes when `root` is None.

    Raises:
        DataError: the files are nowhere, or damaged.
    """
    store = root if root is not None else cache_dir / "downloads"
    found = _read_any(variant, store)
    if found is None:
        archives = " or ".join(form.archive for form in variant.forms)
        download(
            variant.title.replace("-", ""),
            store,
            missing=f"{variant.title}'s files ({archives}, or what they contain) were looked for in {store}",
            advice=f"get {variant.forms[0].archive} from https://www.cs.toronto.edu/~kriz/cifar.html, put it"
            " in a folder and name that folder as --data-root (root=); images in class folders load as folder:PATH",
        )
        found = _read_any(variant, store)
    if found is None:
        raise DataError(f"torchvision reported success, but {variant.title}'s files are not in {store}")
    return found


def _read_any(variant: Variant, store: Path) -> RawData | None:
    """The first form that is there: files, or their folder, before the archive they came in."""
    for form in variant.forms:
        for folder, enough in ((store / form.folder, any), (store, all)):
            if enough((folder / name).is_file() for name in (*form.train, form.test)):
                source = f"{variant.title} ({form.kind} files, folder {folder.resolve().name})"
                return _assemble(variant, form, _folder_reader(folder), source)
        archive = store if store.name == form.archive else store / form.archive
        if archive.is_file():
            source = f"{variant.title} ({form.kind} files, {form.archive})"
            return _assemble(variant, form, _archive_reader(archive, form), source)
    return None


def _folder_reader(folder: Path) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        path = folder / name
        try:
            if path.stat().st_size > _MAX_FILE_BYTES:
                raise DataError(f"{path}: larger than any official file ({_MAX_FILE_BYTES:,} bytes)")
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot read the file ({error}); get it again") from error

    return read


def _archive_reader(archive: Path, form: Form) -> Callable[[str], bytes]:
    wanted = {*form.train, form.test}
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and name in wanted:
                    if member.size > _MAX_FILE_BYTES:
                        raise DataError(f"{archive}: {name} is larger than any official file")
                    file = tar.extractfile(member)
                    contents[name] = file.read() if file is not None else b""
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{archive}: cannot read the archive ({error}); get it again") from error

    def read(name: str) -> bytes:
        if name not in contents:
            raise DataError(f"{archive}: {name} is not in it; get the archive again")
        return contents[name]

    return read


def _assemble(variant: Variant, form: Form, read: Callable[[str], bytes], source: str) -> RawData:
    parse = parse_pickle if form.kind == "python" else parse_binary

    def part(name: str) -> tuple[Tensor, Tensor]:
        return parse(read(name), variant, f"{source}, {name}")

    parts = [part(name) for name in form.train]
    test_images, test_labels = part(form.test)
    return RawData(
        name=variant.name,
        train_images=torch.cat([images for images, _ in parts]),
        train_labels=torch.cat([labels for _, labels in parts]),
        test_images=test_images,
        test_labels=test_labels,
        class_names=variant.class_names,
        source=source,
    )


def parse_binary(data: bytes, variant: Variant, where: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, 32, 32] and labels int64 [N] of a binary file.

    Raises:
        DataError: the file is empty, or no whole number of records.
    """
    record = variant.label_bytes + ROW_BYTES
    if not data or len(data) % record:
        raise DataError(f"{where}: {len(data):,} bytes are no whole number of {record}-byte records; get it again")
    rows = np.frombuffer(bytearray(data), dtype=np.uint8).reshape(-1, record)
    images = np.ascontiguousarray(rows[:, variant.label_bytes :]).reshape(-1, *IMAGE_SHAPE)
    labels = rows[:, variant.label_bytes - 1].astype(np.int64)
    return torch.from_numpy(images), torch.from_numpy(labels)


def parse_pickle(data: bytes, variant: Variant, where: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, 32, 32] and labels int64 [N] of a pickled batch; no code in it can run.

    Raises:
        DataError: the pickle asks for code, is damaged, or holds something else.
    """
    try:
        batch = load_plain_pickle(data)
    except UnsafePickleError as error:
        raise DataError(f"{where}: refused, {error}: this is not an official file, do not open it") from error
    except ValueError as error:
        raise DataError(f"{where}: damaged pickle ({error}); get it again") from error
    images, labels = (_entry(batch, key) for key in (b"data", variant.label_key))
    if not isinstance(images, PickledArray) or not isinstance(labels, list):
        key = variant.label_key.decode()
        raise DataError(f"{where}: expected a dictionary with an array 'data' and a list '{key}'; get it again")
    try:
        rows = images.to_numpy()
    except ValueError as error:
        raise DataError(f"{where}: {error}; get it again") from error
    if rows.ndim != 2 or rows.shape[1] != ROW_BYTES or len(rows) == 0:
        raise DataError(f"{where}: 'data' must be [N, {ROW_BYTES}], got {list(rows.shape)}; get it again")
    if len(labels) != len(rows):
        raise DataError(f"{where}: {len(rows):,} images but {len(labels):,} labels; get it again")
    classes = len(variant.class_names)
    if not all(type(label) is int and 0 <= label < classes for label in labels):
        raise DataError(f"{where}: every label must be an integer in 0..{classes - 1}; get it again")
    pixels = np.ascontiguousarray(rows).reshape(-1, *IMAGE_SHAPE)
    return torch.from_numpy(pixels), torch.tensor(labels, dtype=torch.int64)


def _entry(batch: object, key: bytes) -> object:
    """`batch[key]`, whether the pickle's strings are Python 2's (bytes) or Python 3's."""
    if not isinstance(batch, dict):
        return None
    return batch.get(key, batch.get(key.decode()))
