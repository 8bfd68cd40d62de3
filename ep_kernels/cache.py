"""The user's cache of measurements: JSON files, one for each device, written by ``ep-kernels tune``.

A file holds whose it is (format, device, versions) and a table of entries by key. A file that is missing, damaged or
somebody else's counts as empty; readers see the old file or the new one, never half of one.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger("ep_kernels")

ENVIRONMENT = "EP_KERNELS_CACHE"


def cache_folder() -> Path:
    """``$EP_KERNELS_CACHE``, else ``$XDG_CACHE_HOME/ep-kernels``, else ``~/.cache/ep-kernels``.

    Raises:
        RuntimeError: there is no home folder.
    """
    own = os.environ.get(ENVIRONMENT)
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "ep-kernels"


def slug(device: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def read(path: Path, table: str, identity: Mapping[str, object], what: str) -> dict[str, Any]:
    """Entries of a file by key; of one that cannot be used none, with a warning. Never raises.

    Args:
        table: name of the table in the file.
        identity: what the file must say of itself.
        what: the entries, for the warning.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s are not used: %s cannot be read (%s); run ep-kernels tune again", what, path, error)
        return {}
    if not isinstance(content, dict) or not isinstance(content.get(table), dict):
        log.warning("%s are not used: %s does not hold any; run ep-kernels tune again", what, path)
        return {}
    wrong = [
        f"{name} {value!r}, got {content.get(name)!r}" for name, value in identity.items() if content.get(name) != value
    ]
    if wrong:
        log.warning("%s are not used: %s: expected %s; run ep-kernels tune again", what, path, "; ".join(wrong))
        return {}
    entries: dict[str, Any] = content[table]
    return entries


def write(path: Path, table: str, identity: Mapping[str, object], entries: Mapping[str, object]) -> None:
    """Replace a file atomically.

    Raises:
        OSError: it cannot be written.
    """
    content = {**identity, table: dict(sorted(entries.items()))}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
