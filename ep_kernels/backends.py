"""Which backend runs an op, and why the others cannot: ``reference``, ``cpu``, ``triton``, ``cuda`` or ``auto``."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch
from torch import Tensor

from . import _library, reference, relax_op
from .relaxation import Contrast, Relaxation, Relaxed, relax_reference

BACKENDS = ("reference", "cpu", "triton", "cuda")
ENVIRONMENT = "EP_KERNELS_BACKEND"
TRITON_NEEDED = (3, 6)
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
    return {"reference": None, "cpu": _library.load_error(), "triton": _triton_missing(), "cuda": later}


def requested() -> str:
    """The name in force: the innermost ``with backend(...)``, else the environment variable, else ``auto``."""
    return _current.get() or _known(os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT)


def choose(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
    *,
    storage: torch.dtype | None = None,
) -> str:
    """The backend that runs ops on tensors of this device and dtype, with states in ``storage`` (None: in theirs).

    The same test raises when the user named the backend and logs (once per reason) when the choice is automatic.

    Raises:
        ValueError: an unknown name. BackendError: a named backend that cannot run, with the reason.
    """
    name = _known(name, "backend") if name is not None else requested()
    if name == "triton" and dtype == torch.float64:
        _require(name, torch.device(device))
        _log_once(name, "it computes in float32 and narrower; float64 falls back to the reference")
        return "reference"
    if name != "auto":
        _require(name, torch.device(device), dtype, storage)
        return name
    for candidate in ("cuda", "triton", "cpu"):
        reason = _refusal(candidate, torch.device(device), dtype, storage)
        if reason is None and candidate == "triton" and torch.device(device).type == "cpu":
            reason = "TRITON_INTERPRET runs it on the CPU, slowly and for tests: ask for it by name"
        if reason is None:
            return candidate
        _log_once(candidate, reason)
    return "reference"


def relax(relaxation: Relaxation, name: str | None = None) -> Relaxed:
    """Run a relaxation on the chosen backend."""
    weight = relaxation.weights[0]
    chosen = choose(weight.device, weight.dtype, name, storage=relaxation.storage)
    if chosen == "reference":
        return relax_reference(relaxation)
    if chosen == "triton" and not torch.compiler.is_compiling():
        from . import triton

        return triton.relax(relaxation)
    return relax_op.relax(relaxation)


def contrasts(jobs: Sequence[Contrast], name: str | None = None) -> list[tuple[Tensor, Tensor]]:
    """Gradients of the weight and the bias of each connection on the chosen backend.

    ``cpu`` does not round the products' operands, whatever ``operands`` says.
    """
    weight = jobs[0].weight
    chosen = choose(weight.device, weight.dtype, name)
    if chosen == "triton" and not torch.compiler.is_compiling():
        from . import triton

        return triton.contrasts(jobs)
    run = reference.contrast if chosen == "reference" else relax_op.contrast
    return [_contrast(run, job) for job in jobs]


def _contrast(run: Callable[..., tuple[Tensor, Tensor]], job: Contrast) -> tuple[Tensor, Tensor]:
    conn, dtype = job.connection, job.weight.dtype
    return run(
        job.source.to(dtype),
        None if job.source_delta is None else job.source_delta.to(dtype),
        job.target.to(dtype),
        job.target_delta.to(dtype),
        job.weight.shape,
        conn.stride,
        conn.padding,
        conn.pool,
        job.winners,
        source_gain=job.source_gain,
        target_gain=job.target_gain,
        centre=job.centre,
        scale=job.scale,
        operands=job.operands,
    )


def _known(name: str, where: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{where}: expected one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return name


def _refusal(
    name: str,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    storage: torch.dtype | None = None,
) -> str | None:
    reason = status()[name]
    if reason is not None or name == "reference":
        return reason
    if name == "triton":
        return _triton_refusal(device, dtype)
    if device is not None and device.type not in ("cpu", "meta"):
        return f"it runs on cpu tensors, these are on {device}"
    if dtype is not None and dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64, these are {dtype}"
    if storage is not None:
        return f"it stores states in the parameters' dtype, not in {storage}"
    return None


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@lru_cache(maxsize=2)
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'ep-kernels[triton]'"
    version = _triton_version()
    if tuple(int(part) for part in version.split(".")[:2]) < TRITON_NEEDED:
        return f"it needs triton >= {'.'.join(map(str, TRITON_NEEDED))}, this is {version}"
    if interpreting() or torch.cuda.is_available():
        return "PyTorch is built for ROCm; the kernels are for NVIDIA GPUs" if torch.version.hip else None
    return "no CUDA device is available"


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # part of another distribution: nightly builds' pytorch-triton
        return str(importlib.import_module("triton").__version__)


def _triton_refusal(device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    if device is not None and device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"it runs on cuda tensors, these are on {device}"
    if device is not None and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"it needs compute capability 8.0 or newer, {device} has {major}.{minor}"
    if dtype is not None and dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, float16 and bfloat16, these are {dtype}"
    return None


def _log_once(name: str, reason: str) -> None:
    if (name, reason) not in _logged:
        _logged.add((name, reason))
        log.info("backend %s is not used: %s", name, reason)


def _require(
    name: str,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    storage: torch.dtype | None = None,
) -> None:
    reason = _refusal(name, device, dtype, storage)
    if reason is not None:
        raise BackendError(f"backend '{name}' cannot run: {reason}")
