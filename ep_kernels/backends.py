"""Which backend runs an op, and why the others cannot: ``reference``, ``cpu``, ``triton``, ``cuda`` or ``auto``."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from . import _library, reference, relax_op
from .network import Connection
from .relaxation import Relaxation, Relaxed, relax_reference

BACKENDS = ("reference", "cpu", "triton", "cuda")
ENVIRONMENT = "EP_KERNELS_BACKEND"
log = logging.getLogger("ep_kernels")

_current: ContextVar[str | None] = ContextVar("ep_kernels_backend", default=None)
_logged: set[tuple[str, str]] = set()


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run."""


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use a backend within a ``with`` block: ``auto`` or one of ``reference``, ``cpu``, ``triton``, ``cuda``.

    Raises:
        ValueError: an unknown name.
        BackendError: the backend cannot run here, with the reason.
    """
    if _known(name, "ep_kernels.backend") != "auto":
        _require(name)
    token = _current.set(name)
    try:
        yield
    finally:
        _current.reset(token)


def status() -> dict[str, str | None]:
    """Per backend: None if it can run here, else the reason why it cannot."""
    later = "not part of this version: see CHANGELOG.md"
    return {"reference": None, "cpu": _library.load_error(), "triton": later, "cuda": later}


def requested() -> str:
    """The name in force: the innermost ``with backend(...)``, else the environment variable, else ``auto``."""
    return _current.get() or _known(os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT)


def choose(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, name: str | None = None) -> str:
    """The backend that runs ops on tensors of this device and dtype.

    The same test raises when the user named the backend and logs (once per reason) when the choice is automatic.

    Raises:
        ValueError: an unknown name. BackendError: a named backend that cannot run, with the reason.
    """
    name = _known(name, "backend") if name is not None else requested()
    if name != "auto":
        _require(name, torch.device(device), dtype)
        return name
    for candidate in ("cuda", "triton", "cpu"):
        reason = _refusal(candidate, torch.device(device), dtype)
        if reason is None:
            return candidate
        if (candidate, reason) not in _logged:
            _logged.add((candidate, reason))
            log.info("backend %s is not used: %s", candidate, reason)
    return "reference"


def relax(relaxation: Relaxation, name: str | None = None) -> Relaxed:
    """Run a relaxation on the chosen backend."""
    weight = relaxation.weights[0]
    if choose(weight.device, weight.dtype, name) == "reference":
        return relax_reference(relaxation)
    return relax_op.relax(relaxation)


def contrast(
    source: Tensor,
    source_delta: Tensor | None,
    target: Tensor,
    target_delta: Tensor,
    weight: Tensor,
    conn: Connection,
    winners: Tensor | None,
    *,
    source_gain: float,
    target_gain: float,
    centre: float,
    scale: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Contrast of one connection on the chosen backend; see :func:`ep_kernels.reference.contrast`."""
    run = reference.contrast if choose(weight.device, weight.dtype, backend) == "reference" else relax_op.contrast
    return run(
        source,
        source_delta,
        target,
        target_delta,
        weight.shape,
        conn.stride,
        conn.padding,
        conn.pool,
        winners if conn.pool == "max" else None,
        source_gain=source_gain,
        target_gain=target_gain,
        centre=centre,
        scale=scale,
    )


def _known(name: str, where: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{where}: expected one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return name


def _refusal(name: str, device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    reason = status()[name]
    if reason is not None or name == "reference":
        return reason
    if name == "cpu" and device is not None and device.type not in ("cpu", "meta"):
        return f"it runs on cpu tensors, these are on {device}"
    if name == "cpu" and dtype is not None and dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64, these are {dtype}"
    return None


def _require(name: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
    reason = _refusal(name, device, dtype)
    if reason is not None:
        raise BackendError(f"backend '{name}' cannot run: {reason}")
