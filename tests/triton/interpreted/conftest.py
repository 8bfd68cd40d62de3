"""The kernels in Triton's interpreter, on CPU tensors. tests/triton/test_interpreter.py runs this folder in its own
process: triton reads TRITON_INTERPRET when it is imported."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ep_kernels.backends import interpreting
from tests.core.threads import one_thread  # noqa: F401  (autouse)


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")[:2]))


def reason() -> str:
    """Why nothing here can run, or an empty string."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not interpreting():
        return "runs in its own process: tests/triton/test_interpreter.py"
    import numpy as np
    import triton

    if version(triton.__version__) < (3, 7) and version(np.__version__) >= (2, 4):
        return f"the interpreter of triton {triton.__version__} needs numpy < 2.4, this is {np.__version__}"
    return ""


REASON = reason()


class Skipped(pytest.Module):
    """A module that is not even imported: its imports need triton's interpreter."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip(REASON, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return Skipped.from_parent(parent, path=module_path) if REASON else None


@pytest.fixture(autouse=True)
def older_interpreters() -> None:
    """Up to triton 3.6 they make a range of arrays with one element. The filter ends with the test."""
    warnings.filterwarnings("ignore", "Conversion of an array", DeprecationWarning)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN (255 as uint8), so an output that is not written in full differs from the reference."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_programs() -> Iterator[None]:
    """Every test starts without programs of earlier ones, whose tiles may be others."""
    from ep_kernels.triton import clear, tiling

    clear()
    tiling._estimated.cache_clear()
    yield
    clear()
    tiling._estimated.cache_clear()


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs in the opposite order."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    original = builder.set_grid_idx

    def reversed_(x: int, y: int, z: int) -> None:
        nx, ny, nz = builder.grid_dim
        original(nx - 1 - x, ny - 1 - y, nz - 1 - z)

    monkeypatch.setattr(builder, "set_grid_idx", reversed_)
