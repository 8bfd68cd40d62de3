"""Fixtures of the CUDA backend's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.core.threads import one_thread  # noqa: F401  (autouse)
from tests.cuda.host import harness


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN (255 as uint8), so an output that is not written in full differs from the reference."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> Iterator[object]:
    """``set_device`` and ``set_order`` of the host run; both are as before after the test."""
    module = harness()
    yield module
    module.set_device()
    module.set_order("forward")
