"""Contrasts of all connections with the Triton kernels."""

from __future__ import annotations

from ..gradients import AllContrasts, Gradients
from ..network import POOLS
from ..precision import OPERANDS
from ..relaxation import Contrast
from . import ops


def contrast(job: Contrast) -> Gradients:
    """One of them, launch by launch."""
    conn = job.connection
    return ops.contrast(
        job.source,
        job.source_delta,
        job.target,
        job.target_delta,
        job.weight.shape,
        conn.stride,
        conn.padding,
        POOLS.index(conn.pool),
        job.winners,
        job.source_gain,
        job.target_gain,
        job.centre,
        job.scale,
        OPERANDS.index(job.operands),
        dtype=job.weight.dtype,
    )


contrasts = AllContrasts(contrast)


def clear() -> None:
    """Forget every graph and its buffers."""
    contrasts.clear()
