"""Downloads, left to torchvision (which checks what it fetched) and only when it is installed."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

from ep_train.data.dataset import DataError

_log = logging.getLogger(__name__)


def download(dataset: str, folder: Path, *, missing: str, advice: str) -> None:
    """Have torchvision download one of its datasets into `folder`.

    Args:
        dataset: the class in torchvision.datasets (`CIFAR10`).
        folder: its root folder; created when missing.
        missing, advice: what was looked for and where, and what else the reader can do; for the message.

    Raises:
        DataError: torchvision cannot be imported, or the download failed.
    """
    try:
        module = importlib.import_module("torchvision.datasets")
    except (ImportError, RuntimeError) as error:  # RuntimeError: its ops do not fit this torch
        raise DataError(
            f"{missing}. They were not found, and torchvision, which could download them, cannot be"
            f" imported ({error}). What to do: {advice}; or pip install torchvision"
        ) from error
    _log.warning("downloading %s with torchvision into %s", dataset, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for train in (True, False):
            getattr(module, dataset)(root=str(folder), train=train, download=True)
    except Exception as error:  # torchvision raises what urllib, tarfile, pickle and its own checks raise
        raise DataError(
            f"{missing}. They were not found, and torchvision's download into {folder} failed"
            f" ({type(error).__name__}: {error}). What to do: {advice}"
        ) from error
