"""Fixtures of the tests on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ep_kernels import _library, backends
from tests.gpu.device import CUDA, DEVICE, INTERPRETED, PRECISIONS, REASON


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marker and skip for every test of this folder. On a device a library that does not load is no reason to skip."""
    error = _library.load_error()
    if CUDA and error is not None:
        pytest.exit(f"tests/gpu: {error}", returncode=4)
    for item in items:
        if item.path.parent.name == "gpu" and item.path.parent.parent.name == "tests":
            item.add_marker(pytest.mark.gpu)
            if REASON is not None:
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(autouse=True)
def ready() -> Iterator[None]:
    """No programs of earlier tests; float32 products as PyTorch is set by default; errors of the device show here."""
    backends.release()
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if INTERPRETED else threads)
    yield
    torch.set_num_threads(threads)
    backends.release()
    if CUDA:
        torch.cuda.synchronize()


@pytest.fixture(params=["triton", "cuda"])
def on(request: pytest.FixtureRequest) -> str:
    """Both backends, where they can run; in Triton's interpreter only its own."""
    name = str(request.param)
    if INTERPRETED and name != "triton":
        pytest.skip("Triton's interpreter runs the backend triton only")
    reason = backends.why_not(name, DEVICE)
    if reason is not None:
        pytest.skip(f"backend {name} cannot run: {reason}")
    return name


@pytest.fixture
def cuda() -> torch.device:
    """For tests of streams, graphs and devices."""
    if not CUDA:
        pytest.skip("needs a CUDA device")
    return torch.device(DEVICE)


@pytest.fixture(params=list(PRECISIONS))
def precision(request: pytest.FixtureRequest) -> str:
    """Every precision; bfloat16 only on a device (the interpreter multiplies its bits)."""
    if request.param == "bf16" and INTERPRETED:
        pytest.skip("Triton's interpreter multiplies bfloat16 as raw bits")
    return str(request.param)
