"""The ``triton`` backend: fused kernels for NVIDIA GPUs of compute capability 8.0 and newer.

A relaxation goes through small rooms: ``lower`` (plan to launches, symbolic), ``program`` with ``buffers`` and
``nudges`` (binding), ``launch`` (arguments and grids), ``tiling`` (which tile), ``runner`` (programs kept, cut into
CUDA graphs: :mod:`ep_kernels.graphs`). ``gradients`` and ``ops`` are the contrasts and the single ops, ``kernels`` the
device code. Importing this package imports triton; :mod:`ep_kernels.backends` does so only when it is needed.
"""

from . import gradients, runner
from .gradients import contrasts
from .runner import relax

__all__ = ["clear", "contrasts", "relax"]


def clear() -> None:
    """Forget every program and graph: their buffers are free again."""
    runner.clear()
    gradients.clear()
