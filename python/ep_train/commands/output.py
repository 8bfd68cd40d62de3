"""What the commands write: whole files or none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import durable
from ..run_folder import to_json


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """:func:`ep_train.durable.replacing` for a file that a user has named: its folder is made where there is none, and
    the temporary file's name ends as that of ``path``, which some writers go by."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable.replacing(path, suffix=path.suffix) as temporary:
        yield temporary


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
