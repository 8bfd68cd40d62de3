"""Where these tests run, and how close a precision has to come.

With a CUDA device, on it. With TRITON_INTERPRET=1 on the CPU in Triton's interpreter, to try the tests themselves;
those that need a device skip there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ep_kernels import Network, Parameters, RelaxConfig, backends
from ep_kernels.precision import Operands
from tests.core.nets import Problem, problem

CUDA = torch.cuda.is_available()
INTERPRETED = not CUDA and backends.interpreting() and importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if CUDA else "cpu"
REASON = None if CUDA or INTERPRETED else "needs a CUDA device (or TRITON_INTERPRET=1 and triton, to try the tests)"

T = TypeVar("T")
LOW_GAIN = 0.05  # k of networks in low precision: a winner that falls the other way changes the feedback by its gain


@dataclass(frozen=True)
class Precision:
    """``states`` and ``deltas``: largest relative L2 error against float64 with the same operands and storage. Those of
    the low ones leave room for a winner of a max pooling that falls the other way (the reference leaves tf32 exact)."""

    operands: Operands
    storage: torch.dtype | None
    states: float
    deltas: float

    def config(self, **settings: object) -> RelaxConfig:
        return RelaxConfig(operands=self.operands, storage=self.storage, **settings)  # type: ignore[arg-type]


PRECISIONS = {
    "fp32": Precision(None, None, 1e-5, 1e-4),
    "tf32": Precision("tf32", None, 2e-2, 5e-2),
    "fp16": Precision(torch.float16, torch.float16, 5e-3, 1e-2),
    "fp16-fp32": Precision(torch.float16, None, 5e-3, 1e-2),
    "bf16": Precision(torch.bfloat16, None, 2e-2, 5e-2),
}


def moved(value: T, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> T:
    """Tensors (in lists, mappings and :class:`Parameters` too) on the device; floating-point ones in ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.dtype.is_floating_point else value.dtype)  # type: ignore[return-value]
    if isinstance(value, Parameters):
        fields = (value.weights, value.biases, value.head_weights, value.head_biases, value.feedback_weights)
        once = {id(t): moved(t, dtype, device) for f in fields for t in f if t is not None}  # tied ones stay tied
        return Parameters(*([None if t is None else once[id(t)] for t in f] for f in fields))  # type: ignore[arg-type, return-value]
    if isinstance(value, Mapping):
        return {k: moved(v, dtype, device) for k, v in value.items()}  # type: ignore[return-value]
    if isinstance(value, (list, tuple)):
        return type(value)(moved(v, dtype, device) for v in value)  # type: ignore[return-value, call-arg]
    return value


def on_device(p: Problem, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Problem:
    """A problem on the device."""
    return Problem(
        p.network, moved(p.parameters, dtype, device), moved(p.x, dtype, device), moved(p.targets, dtype, device)
    )


def random_problem(network: Network, seed: int = 0, batch: int = 3, **options: float) -> Problem:
    """In float64 on the CPU."""
    return problem(network, seed, batch=batch, **options)  # type: ignore[arg-type]


def error(out: Tensor, expected: Tensor) -> float:
    """``|out - expected| / |expected|`` in float64, wherever they are; 0 for two zeros, infinite for NaN."""
    a, b = out.detach().cpu().double(), expected.detach().cpu().double()
    if a.shape != b.shape:
        return float("inf")
    norm, off = float(b.norm()), float((a - b).norm())
    if off == 0:
        return 0.0
    found = off / norm if norm else float("inf")
    return found if found == found else float("inf")


def assert_close(
    out: Sequence[Tensor | None], expected: Sequence[Tensor | None], limit: float, what: str = "output"
) -> None:
    """Every pair, naming the one that is off."""
    assert len(out) == len(expected)
    for i, (a, b) in enumerate(zip(out, expected, strict=True)):
        assert (a is None) == (b is None), f"{what} {i}"
        if a is not None and b is not None:
            assert error(a, b) <= limit, f"{what} {i}: relative error {error(a, b):.2e}, expected at most {limit:.0e}"


def assert_equal(out: Sequence[Tensor | None], expected: Sequence[Tensor | None], what: str = "output") -> None:
    """Bit for bit."""
    assert len(out) == len(expected)
    for i, (a, b) in enumerate(zip(out, expected, strict=True)):
        if a is not None and b is not None:
            assert torch.equal(a, b), f"{what} {i}: differs by {float((a.double() - b.double()).abs().max()):.2e}"
