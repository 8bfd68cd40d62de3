"""Where a run computes: the device that ``--device`` names, and how many digits float32 has there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ep_kernels import backends

DEVICES = "auto, cpu, cuda or cuda:N"
_NAME = re.compile(r"auto|cpu|cuda(:[0-9]+)?")


def check_name(name: str, owner: str) -> None:
    """Raise ValueError, naming ``owner``'s argument, unless ``name`` is one of ``DEVICES``; no device is looked for."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{owner}: argument 'device': expected {DEVICES}, got {name!r}")


def resolve(name: str, owner: str, *, backend: str = "auto") -> torch.device:
    """The device of that name, with its index: ``cuda`` is torch's current one.

    Args:
        name: ``auto`` is ``cuda`` if torch sees a CUDA device and the backend asked for is not ``cpu``, else ``cpu``.
        owner: the configuration, for the message.
        backend: ``auto`` is the one in force (:func:`ep_kernels.backend`, ``EP_KERNELS_BACKEND``).

    Raises:
        ValueError: another name, or a CUDA device that is not there, with what there is.
    """
    check_name(name, owner)
    count = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if name == "auto":
        asked = backends.requested() if backend == "auto" else backend
        name = "cuda" if count and asked != "cpu" else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not count:
        built = torch.version.cuda is not None or torch.version.hip is not None
        why = "torch sees no CUDA device" if built else f"torch {torch.__version__} is built without CUDA"
        raise ValueError(f"{owner}: argument 'device': expected auto or cpu ({why}), got {name!r}")
    index = int(name.partition(":")[2] or torch.cuda.current_device())
    if index >= count:
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ValueError(f"{owner}: argument 'device': expected auto, cpu, cuda or {there}, got {name!r}")
    return torch.device("cuda", index)


def kind(device: torch.device) -> str:
    """What a device is, whatever its index: ``cpu``, or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def describe(device: torch.device) -> str:
    """``cpu``, or a GPU's index and name: ``cuda:0 (NVIDIA H200)``."""
    return f"{device} ({kind(device)})" if device.type == "cuda" else device.type


@contextmanager
def kernels(backend: str) -> Iterator[None]:
    """Compute by that backend; ``auto`` leaves the one in force, as an environment variable may say."""
    if backend == "auto":
        yield
        return
    with backends.backend(backend):
        yield


@contextmanager
def in_force(device: torch.device, *, tf32: bool, backend: str = "auto") -> Iterator[None]:
    """Compute on ``device`` by ``backend`` (:func:`kernels`): it is the current one, and cuDNN's float32 convolutions
    take tf32 operands only if asked.

    torch's own default is to take them, which would make float32 mean tf32 wherever the reference runs. The CPU has
    nothing to set.
    """
    with kernels(backend), _current(device, tf32=tf32):
        yield


@contextmanager
def _current(device: torch.device, *, tf32: bool) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    convolutions = cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        with torch.cuda.device(device):
            yield
    finally:
        convolutions.fp32_precision = before
