"""What the kernels may use on a device: by compute capability, and in the interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Arch:
    """One architecture.

    Attributes:
        name: ``sm_80`` and so on, or ``interpreter``: a row of the table in tiling.py.
        capability: major times 10 plus minor.
        tma: tensor descriptors are bulk copies by hardware (9.0 and newer); else tiles are loaded through pointers.
        shared_memory: bytes that one program may use.
        processors: number of multiprocessors.
    """

    name: str
    capability: int
    tma: bool
    shared_memory: int
    processors: int


# shared memory of one block, CUDA C++ programming guide, table of compute capabilities
KNOWN = {
    80: Arch("sm_80", 80, False, 163 * 1024, 108),
    86: Arch("sm_86", 86, False, 99 * 1024, 84),
    90: Arch("sm_90", 90, True, 227 * 1024, 132),
    100: Arch("sm_100", 100, True, 227 * 1024, 148),
    120: Arch("sm_120", 120, True, 99 * 1024, 170),
}
INTERPRETER = Arch("interpreter", 90, True, 1 << 30, 1)


def family(capability: int) -> int:
    """The row of the table for a capability: 87 and 89 are like 86, 103 like 100, and so on.

    Raises:
        ValueError: older than 8.0.
    """
    if capability < 80:
        raise ValueError(f"the Triton kernels need compute capability 8.0 or newer, this device has {capability / 10}")
    return max(known for known in KNOWN if known <= capability)


@lru_cache(maxsize=64)
def arch_of(device: torch.device) -> Arch:
    """The architecture of a device; CPU tensors run in the interpreter."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    known = KNOWN[family(10 * properties.major + properties.minor)]
    return Arch(known.name, known.capability, known.tma, known.shared_memory, properties.multi_processor_count)
