"""Loads the compiled library, once, when it is first needed; and says why when it cannot.

Importing this module never loads anything, so ``import ep_kernels`` works without a compiled library.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch

TORCH_NEEDED = "2.10"
PACKAGE = Path(__file__).resolve().parent
LIBRARY = PACKAGE / "lib" / "libep_kernels.so"

_lock = threading.Lock()
_loaded = False


def load() -> None:
    """Register the compiled ops under ``torch.ops.ep_kernels``. Later calls do nothing; a failed one may be repeated.

    Raises:
        ImportError: the library is missing or does not load; the message says why and what to run.
    """
    global _loaded
    with _lock:
        if _loaded:
            return
        if not LIBRARY.is_file():
            raise ImportError(_missing())
        try:
            torch.ops.load_library(str(LIBRARY))
        except OSError as error:
            raise ImportError(_broken(error)) from error
        _loaded = True


def load_error() -> str | None:
    """Why the compiled library cannot be used, or None when it can (it is then loaded). Never raises."""
    try:
        load()
    except ImportError as error:
        return str(error)
    return None


def build_info() -> dict[str, Any]:
    """What was built, when and by what, as setup.py wrote it beside the library; empty where nothing was built."""
    try:
        info = json.loads(LIBRARY.with_name("build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def _missing() -> str:
    looked = f"the compiled library was looked for at {LIBRARY} and is not there."
    root = PACKAGE.parent
    command = f"pip install --no-build-isolation -e {root}"
    if not (root / "CMakeLists.txt").is_file():
        return f"{looked} The installation is incomplete. Run: pip install --force-reinstall --no-deps ep-kernels"
    installed = _shadowed()
    if installed:
        return (
            f"{looked} Python imports ep_kernels from the source tree {root}, which shadows the wheel installed in "
            f"{installed}. Start Python from another directory, or build in this tree: {command}"
        )
    return f"{looked} {root} is a source tree in which it has not been built. Run: {command}"


def _shadowed() -> Path | None:
    """A directory on sys.path that holds a built ep_kernels other than this one."""
    inside = LIBRARY.relative_to(PACKAGE.parent)
    others = (Path(entry) for entry in sys.path if entry and Path(entry).resolve() != PACKAGE.parent)
    return next((other for other in others if (other / inside).is_file()), None)


def _broken(error: BaseException) -> str:
    cause = error.__cause__ or error  # torch wraps what the dynamic loader said
    return (
        f"{LIBRARY} does not load with torch {torch.__version__} (needed: torch >= {TORCH_NEEDED}): {cause}. "
        "If torch is new enough, the build does not fit this machine: "
        "run pip install --force-reinstall --no-deps --no-binary ep-kernels ep-kernels"
    )
