"""Optional packages: imported where they are needed, and named with what to install where they are missing."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtra(ImportError):
    """A package that comes with one of the extras is not installed; the message says how to get it."""


def require(module: str, *, extra: str, what: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: its full name.
        extra: the extra of ``ep-kernels`` that brings it.
        what: what needs it, as the user asked for it (``--tensorboard``).

    Raises:
        MissingExtra: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(f"{what} needs its extra: pip install 'ep-kernels[{extra}]' ({error})") from error
