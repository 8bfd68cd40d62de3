"""Decoded images kept on disk: one .npz file with the key of what was decoded.

A file that is damaged (zip's CRC covers every byte of an array) or whose key differs reads as absent.
"""

from __future__ import annotations

import logging
import os
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_log = logging.getLogger(__name__)

_KEY = "key"
_Arrays = dict[str, npt.NDArray[np.uint8]]


def read_cache(path: Path, key: str) -> _Arrays | None:
    """The arrays stored at `path` under `key`; None if there is no such file, or it must be rebuilt."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored[_KEY]) != key:
                _log.info("%s is out of date; it is rebuilt", path)
                return None
            return {name: stored[name] for name in stored.files if name != _KEY}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, SyntaxError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        _log.warning("%s is damaged (%s); it is rebuilt", path, error)
        return None


def write_cache(path: Path, key: str, arrays: _Arrays) -> None:
    """Store arrays under `key`, atomically: readers see the old file or the new one.

    A disk that is full or read-only costs the cache, not the run: it is logged and nothing is written.
    """
    members: dict[str, Any] = {_KEY: np.array(key), **arrays}
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **members)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _log.warning("cannot keep the decoded images in %s (%s); the next run decodes them again", path, error)
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
