"""What the commands write: whole files or none."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import durable
from ..run_folder import to_json


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file in the same folder, which takes the place of ``path`` when the block ends without an error.

    The file is on the disk in full before it gets its name. Its name ends as that of ``path``.

    Raises:
        OSError: the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private
        os.replace(temporary, path)
        durable.sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """As JSON to a file, or to the standard output if it is named ``-``. Numbers that JSON has none for are null, and
    named in the field ``nonfinite`` (ep_train/run_folder.py)."""
    text = json.dumps(to_json(values), indent=2, allow_nan=False)
    text = re.sub(r"\[\n[-+.\deE,\s]+\]", lambda found: " ".join(found[0].split()), text)  # numbers side by side
    if str(path) == "-":
        print(text)
        return
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
