"""Files and folders that are on the disk in full or not there: a temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

PART = ".part"  # ends the name of a folder that is not complete


@contextmanager
def replacing(path: Path, *, suffix: str = ".tmp") -> Iterator[Path]:
    """An empty file of another name in the same folder, which takes the place of ``path`` when the block ends without
    an error; after one it is removed.

    Args:
        suffix: ends its name; by default what a killed process leaves is known by it.

    Raises:
        OSError: it cannot be written; the old file is as it was.
    """
    handle, temporary = new_file(path, suffix=suffix)
    os.close(handle)
    try:
        yield temporary
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def new_file(path: Path, *, suffix: str = ".tmp") -> tuple[int, Path]:
    """A file beside ``path`` under a name that nobody has: its descriptor, for reading and writing, and its path.

    It has the permissions of any new file, where those of :mod:`tempfile` are private.

    Args:
        suffix: see :func:`replacing`.

    Raises:
        OSError: it cannot be made.
    """
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}{suffix}")
    return os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), temporary


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a file of the same folder its name, once all of it is on the disk.

    Raises:
        OSError: it cannot be brought there.
    """
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Replace a file by a new one.

    Raises:
        OSError: it cannot be written; the old one is as it was.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder at ``path``, which appears there with everything that was written into the one that is handed out.

    Raises:
        OSError: it cannot be made, or something is in its place; nothing is left.
    """
    if not path.parent.is_dir():
        path.parent.mkdir()
        sync_folder(path.parent.parent)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-", suffix=PART))
    try:
        os.chmod(temporary, 0o755)  # mkdtemp makes it private
        yield temporary
        sync_folder(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder; whoever looks meanwhile sees all of it, or nothing under its name."""
    if not path.name.endswith(PART):
        hidden = path.with_name(f".{path.name}-old{PART}")
        os.rename(path, hidden)
        path = hidden
    shutil.rmtree(path, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk."""
    if os.name != "posix":  # a folder cannot be opened elsewhere
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class HashedFile:
    """A new binary file that is written from its beginning to its end, and hashed on the way.

    Attributes:
        size: bytes written so far.
        failed: what the system raised at a write that did not succeed; whoever writes may raise something else then.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("xb")
        self._hash = hashlib.sha256()
        self.size = 0
        self.failed: OSError | None = None

    def write(self, data: bytes) -> int:
        """Append bytes.

        Raises:
            OSError: the system does not take them.
        """
        try:
            self._file.write(data)
        except OSError as error:
            self.failed = error
            raise
        self._hash.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._file.flush()

    @property
    def sha256(self) -> str:
        """Of the bytes written so far, in hexadecimal."""
        return self._hash.hexdigest()

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            found.update(data)
    return found.hexdigest()
