"""The CUDA backend on CPU tensors (tests/host): its ops in place of the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ep_kernels import _library, backends, functional, ops
from tests.host.build import host_module, missing

OPS = ("drive", "relax_step", "contrast", "relax")


def harness() -> Any:
    """The module of the host run: its settings and counters; skips where it cannot be built or lacks the library."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    error = _library.load_error()  # which checks the arguments' shapes for the host run as well
    if error is not None:
        pytest.skip(f"needs the compiled library too: {error}")
    return host_module("ep_host")


def op(name: str) -> Any:
    """One of the CUDA backend's ops."""
    harness()
    return getattr(torch.ops.ep_kernels_host, name)


@contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """Within, every call takes the backend ``cuda``, on CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        for name in OPS:
            patch.setattr(ops, name, op(name))
        for module in (backends, functional):
            patch.setattr(module, "choose", lambda *_, **__: "cuda")
        yield
