"""Warm starts: every training image's free equilibrium, kept from epoch to epoch (persistent particles)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ep_kernels import Network

STORED: tuple[torch.dtype, ...] = (torch.float32, torch.float16)


class WarmStates:
    """Free equilibria by image, in host memory (Scellier & Bengio 2017, "persistent particles").

    The free phase of an image starts where it ended an epoch ago, so that its sweeps only have to follow what the
    weights have moved since. Images must not be augmented, or they would not be the same ones. An image that was never
    seen starts from zero states, as without a warm start.

    Every checkpoint holds the states of all images: as many bytes on disk as in memory (:meth:`bytes_needed`), written
    anew at the end of every epoch, beside the old one until it is complete.

    Args:
        network: whose states these are.
        count: training images.
        dtype: float32, or float16 for half the memory: states within [-1, 1] to 5e-4.
        limit: bytes that the states may take; default half of the machine's memory, or of what its control
            group may use where that is less.

    Raises:
        ValueError: another dtype; or more memory than ``limit``, with the numbers.
    """

    def __init__(
        self, network: Network, count: int, *, dtype: torch.dtype = torch.float32, limit: int | None = None
    ) -> None:
        if dtype not in STORED:
            raise ValueError(f"WarmStates: argument 'dtype': expected torch.float32 or torch.float16, got {dtype}")
        needed, limit = self.bytes_needed(network, count, dtype), _half_of_memory() if limit is None else limit
        if needed > limit:
            per_image = needed // max(count, 1)
            less = " store them as float16, or" if dtype == torch.float32 else ""
            raise ValueError(
                f"WarmStates: argument 'count': the states of {count} images take {needed / 1e9:.2f} GB "
                f"({per_image / 1e3:.1f} kB each), more than the limit of {limit / 1e9:.2f} GB:{less} train without a "
                "warm start, on fewer images, or with a narrower network"
            )
        self.shapes = network.shapes
        self.states = [torch.zeros(count, *shape, dtype=dtype) for shape in network.shapes[1:]]  # no page until used

    @staticmethod
    def bytes_needed(network: Network, count: int, dtype: torch.dtype = torch.float32) -> int:
        """Host memory of the states of ``count`` images."""
        return count * sum(math.prod(shape) for shape in network.shapes[1:]) * dtype.itemsize

    def get(self, indices: Tensor, like: Tensor) -> list[Tensor | None]:
        """Where the free phase of these images starts: per node, [B, ...] in the dtype and on the device of ``like``;
        index 0, the clamped input, is None."""
        chosen = indices.to("cpu")
        return [None, *(s.index_select(0, chosen).to(like.device, like.dtype) for s in self.states)]

    def put(self, indices: Tensor, states: Sequence[Tensor | None]) -> None:
        """Keep the free equilibrium of these images (per node; index 0 is not read). Waits for a GPU.

        States that are not finite are not kept: those images start from zero again.
        """
        chosen = indices.to("cpu")
        found = [s.detach().to("cpu") for s in states[1:] if s is not None]
        finite = torch.stack([s.isfinite().flatten(1).all(1) for s in found]).all(0)
        for kept, state in zip(self.states, found, strict=True):
            own = finite.view(-1, *[1] * (state.dim() - 1))
            kept.index_copy_(0, chosen, torch.where(own, state, torch.zeros_like(state)).to(kept.dtype))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: the states themselves."""
        return {"states": self.states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the states of a checkpoint: the same bits.

        The tensors are taken over, not copied, so that there is never a second set of them in memory: they change with
        every :meth:`put`.

        Raises:
            ValueError: they are of another network, number of images or dtype.
        """
        given: list[Tensor] = list(state["states"])
        for name, ours, theirs in (
            ("shapes", [list(s.shape) for s in self.states], [list(s.shape) for s in given]),
            ("dtypes", [s.dtype for s in self.states], [s.dtype for s in given]),
        ):
            if ours != theirs:
                raise ValueError(f"WarmStates: argument 'state': expected states of {name} {ours}, got {theirs}")
        self.states = given


def _half_of_memory() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *_group_limits()]) // 2


def _group_limits(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes that this process's control group, and those around it, may use (of a container or a batch job).

    ``own`` has lines as ``0::/a/b`` (version 2: memory.max) and ``4:memory:/a/b`` (version 1). In a container the path
    may be the host's, and the group is then at the top of what is mounted.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:  # another system than Linux
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = groups / "memory" if controllers else groups
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # not there; "max"
                limits.append(int((folder / name).read_text()))
            if folder == top:
                break
    return limits
