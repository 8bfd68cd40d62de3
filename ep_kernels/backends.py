"""Which backend runs an op, and why the others cannot: ``reference``, ``cpu``, ``triton``, ``cuda`` or ``auto``.

On CUDA tensors ``auto`` takes what was measured to be the fastest (:mod:`ep_kernels.races`). Where nothing was
measured, it takes triton on compute capability 9.0 and newer, whose tensor cores and TMA its kernels use, and cuda on
8.x, where both run the same instructions and nothing has to be compiled at run time.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial

import torch
from torch import Tensor

from . import _library, ops, races, reference, relax_op
from .gradients import AllContrasts
from .graphs import one_capture
from .relaxation import Contrast, Relaxation, Relaxed, relax_reference

BACKENDS = ("reference", "cpu", "triton", "cuda")
ON_GPU = ("cuda", "triton")
ENVIRONMENT = "EP_KERNELS_BACKEND"
TRITON_NEEDED = (3, 6)
GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
log = logging.getLogger("ep_kernels")

Job = Relaxation | tuple[Contrast, ...]
_current: ContextVar[str | None] = ContextVar("ep_kernels_backend", default=None)
_recorder: ContextVar[list[Job] | None] = ContextVar("ep_kernels_recorder", default=None)
_logged: set[tuple[str, str]] = set()


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run."""


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use a backend within a ``with`` block, in this thread (or task); it goes before ``EP_KERNELS_BACKEND``.

    Args:
        name: ``auto`` or one of ``reference``, ``cpu``, ``triton``, ``cuda``.

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
    error = _library.load_error()
    return {
        "reference": None,
        "cpu": error,
        "triton": _triton_missing(),
        "cuda": _cuda_missing() if error is None else error,
    }


def requested() -> str:
    """The name in force: the innermost ``with backend(...)``, else the environment variable, else ``auto``."""
    return _current.get() or _known(os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT)


def choose(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
    *,
    storage: torch.dtype | None = None,
    race: Callable[[], str] | None = None,
) -> str:
    """The backend that runs ops on tensors of this device and dtype, with states in ``storage`` (None: in theirs).

    The same test raises when the user named the backend and logs (once per reason) when the choice is automatic: a
    warning where the compiled library does not load, so that a CPU has nothing but the slow reference.

    Args:
        race: makes the key under which what is to run may have been measured; called only where it is needed.

    Raises:
        ValueError: an unknown name. BackendError: a named backend that cannot run, with the reason.
    """
    name = _known(name, "backend") if name is not None else requested()
    device = torch.device(device)
    if name in ON_GPU and dtype == torch.float64:
        _require(name, device)
        _log_once(name, "it computes in float32 and narrower; float64 falls back to the reference")
        return "reference"
    if name != "auto":
        _require(name, device, dtype, storage)
        return name
    for candidate in _candidates(device, dtype, storage, race):
        reason = why_not(candidate, device, dtype, storage)
        if reason is None and candidate == "triton" and device.type == "cpu":
            reason = "TRITON_INTERPRET runs it on the CPU, slowly and for tests: ask for it by name"
        if reason is None:
            return candidate
        slow = candidate == "cpu" and device.type == "cpu" and _library.load_error() is not None
        _log_once(candidate, reason, logging.WARNING if slow else logging.INFO)
    return "reference"


def relax(relaxation: Relaxation, name: str | None = None) -> Relaxed:
    """Run a relaxation on the chosen backend."""
    _record(relaxation)
    weight = relaxation.weights[0]
    race = partial(races.relaxation_key, relaxation)
    chosen = choose(weight.device, weight.dtype, name, storage=relaxation.storage, race=race)
    if chosen == "cuda" and weight.dtype != torch.float32:
        _log_once(chosen, f"parameters of {weight.dtype} go through the reference")
        chosen = "reference"
    if chosen == "reference":
        return relax_reference(relaxation)
    if chosen == "triton":
        if torch.compiler.is_compiling():
            return relax_op.relax(relaxation, triton=True)
        from . import triton

        return triton.relax(relaxation)
    if chosen == "cuda" and not torch.compiler.is_compiling():
        with one_capture:  # the second call of a signature captures
            return relax_op.relax(relaxation)
    return relax_op.relax(relaxation)


def contrasts(jobs: Sequence[Contrast], name: str | None = None) -> list[tuple[Tensor, Tensor]]:
    """Gradients of the weight and the bias of each connection on the chosen backend.

    ``cpu`` does not round the products' operands, whatever ``operands`` says.
    """
    return list(each_contrast(jobs, name))


def each_contrast(jobs: Sequence[Contrast], name: str | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """The same one by one, in the order of the jobs: each is computed when it is asked for.

    On a GPU all of them are one graph: asking for the first computes all.
    """
    _record(tuple(jobs))
    weight = jobs[0].weight
    chosen = choose(weight.device, weight.dtype, name, race=partial(races.contrasts_key, jobs))
    if chosen in ON_GPU and not torch.compiler.is_compiling():
        if chosen == "cuda":
            yield from _cuda_contrasts(jobs)
            return
        from . import triton

        yield from triton.contrasts(jobs)
        return
    one = reference.contrast if chosen == "reference" else partial(relax_op.contrast, triton=chosen == "triton")
    for job in jobs:
        yield _contrast(one, job)


@contextmanager
def recorded() -> Iterator[list[Job]]:
    """Within, every relaxation and every group of contrasts that runs is also put into the list, in order."""
    jobs: list[Job] = []
    token = _recorder.set(jobs)
    try:
        yield jobs
    finally:
        _recorder.reset(token)


def run_job(job: Job, name: str) -> object:
    """A recorded job on a backend."""
    return relax(job, name) if isinstance(job, Relaxation) else contrasts(job, name)


def machine(device: torch.device) -> races.Machine:
    """A CUDA device and what runs on it, as the times of races are kept."""
    return _machine(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=16)
def _machine(index: int) -> races.Machine:
    from . import __version__

    build = _library.build_info()
    compiled = (
        f"{build.get('cuda')} {' '.join(_archs())}{' wgmma' if os.environ.get('EP_KERNELS_WGMMA') == '1' else ''}"
    )
    return races.Machine(torch.cuda.get_device_name(index), __version__, _triton_version(), compiled)


def _record(job: Job) -> None:
    jobs = _recorder.get()
    if jobs is not None:
        jobs.append(job)


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


def release() -> None:
    """Give back the memory that GPU backends keep between calls: buffers and CUDA graphs of their last relaxations and
    contrasts. Later calls make them anew."""
    _cuda_contrasts.clear()
    if _library.load_error() is None and ops.has_cuda():
        torch.ops.ep_kernels.release()
    if "ep_kernels.triton" in sys.modules:
        sys.modules["ep_kernels.triton"].clear()


_cuda_contrasts = AllContrasts(lambda job: _contrast(relax_op.contrast, job))


def _known(name: str, where: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{where}: expected one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return name


def _candidates(
    device: torch.device, dtype: torch.dtype, storage: torch.dtype | None, race: Callable[[], str] | None
) -> tuple[str, ...]:
    """What ``auto`` tries, in order. Never raises."""
    order = (*ON_GPU, "cpu")
    if device.type != "cuda" or any(why_not(name, device, dtype, storage) is not None for name in ON_GPU):
        return order  # at most one of them can run
    won = None
    if race is not None and not torch.compiler.is_compiling():
        won = races.winner(race, machine(device))
    if won is not None:
        return (won, *(name for name in order if name != won))
    major, minor = torch.cuda.get_device_capability(device)
    first, other = ("triton", "cuda") if major >= 9 else ("cuda", "triton")
    why = "its kernels use this device's TMA and wgmma or tcgen05" if major >= 9 else "it has nothing to compile"
    _log_once(
        other,
        f"nothing was measured (ep-kernels tune), and on compute capability {major}.{minor} auto takes {first}: {why}",
    )
    return (first, other, "cpu")


def why_not(
    name: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    storage: torch.dtype | None = None,
) -> str | None:
    """Why a backend cannot run, on tensors of this device and dtype if they are given; None if it can."""
    reason = status()[name]
    if reason is not None or name == "reference":
        return reason
    device = None if device is None else torch.device(device)
    if name in ON_GPU:
        return _gpu_refusal(name, device, dtype)
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


@lru_cache(maxsize=2)
def _cuda_missing() -> str | None:
    """Of a library that loads."""
    if torch.version.hip:
        return "PyTorch is built for ROCm; the kernels are for NVIDIA GPUs"
    if not ops.has_cuda():
        note = _library.build_info().get("note")
        built = f"this build has no CUDA kernels, it is built for the CPU only{f' ({note})' if note else ''}"
        return f"{built}. Where nvcc is installed, run: {_rebuild()}"
    if torch.cuda.is_available():
        return None
    return "no CUDA device is available" + ("" if torch.version.cuda else f": torch {torch.__version__} has no CUDA")


def _rebuild() -> str:
    root = _library.PACKAGE.parent
    if (root / "CMakeLists.txt").is_file():
        return f"EP_KERNELS_BUILD=cuda pip install --no-build-isolation -e {root}"
    command = "EP_KERNELS_BUILD=cuda pip install --no-build-isolation --force-reinstall --no-deps ."
    return f"{command} (in a clone of ep-kernels)"


def _gpu_refusal(name: str, device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    interpreted = name == "triton" and device is not None and device.type == "cpu" and interpreting()
    if device is not None and device.type != "cuda" and not interpreted:
        return f"it runs on cuda tensors, these are on {device}"
    if device is not None and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"it needs compute capability 8.0 or newer, {device} has {major}.{minor}"
        archs = _archs() if name == "cuda" else ()
        if archs and not covered(archs, (major, minor)):
            return (
                f"this build has kernels for compute capability {', '.join(archs)}; {device} has {major}.{minor}: "
                f"build again with TORCH_CUDA_ARCH_LIST={major}.{minor}"
            )
    if dtype is not None and dtype not in GPU_DTYPES:
        return f"it computes in float32, float16 and bfloat16, these are {dtype}"
    return None


@lru_cache(maxsize=2)
def _archs() -> tuple[str, ...]:
    """Architectures of the CUDA build; empty where it does not say."""
    return tuple(map(str, _library.build_info().get("cuda_archs") or ()))


def covered(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for one of these architectures (``8.0``, ``9.0a``, ``12.0+PTX``) runs on a compute capability.

    Machine code runs on the same major number from its own minor number on, that of an ``a`` only on its own; PTX also
    on everything newer.
    """
    for arch in archs:
        parts = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if parts is None:
            continue
        own = int(parts[1]), int(parts[2])
        if own == capability:
            return True
        if parts[3] != "a" and own[0] == capability[0] and own < capability:
            return True
        if not parts[3] and parts[4] and own < capability:
            return True
    return False


def _log_once(name: str, reason: str, level: int = logging.INFO) -> None:
    if (name, reason) not in _logged:
        _logged.add((name, reason))
        log.log(level, "backend %s is not used: %s", name, reason)


def _require(
    name: str,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    storage: torch.dtype | None = None,
) -> None:
    reason = why_not(name, device, dtype, storage)
    if reason is not None:
        raise BackendError(f"backend '{name}' cannot run: {reason}")
