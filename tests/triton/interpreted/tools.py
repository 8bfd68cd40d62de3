"""Poisoned buffers, random tensors, and comparisons in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ep_kernels.triton import layout, tiling
from ep_kernels.triton.arch import INTERPRETER, Arch
from ep_kernels.triton.tiling import Tile

CPU = torch.device("cpu")
# tiles are loaded through tensor descriptors, or through pointers
ARCHS: dict[str, Arch] = {"descriptors": INTERPRETER, "pointers": replace(INTERPRETER, tma=False)}
ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3}  # of sums of some hundred products; of one fp16 number
nan = float("nan")


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """NaN everywhere, 255 as uint8."""
    return torch.full(shape, nan if dtype.is_floating_point else 255, dtype=dtype)


def poisoned_map(n: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """[n, H, W, padded C] of poison for a node of ``shape``."""
    h, w, c = layout.map_shape(shape)
    return poison(n, h, w, layout.padded(c), dtype=dtype)


def is_poison(x: Tensor) -> Tensor:
    return x.isnan() if x.dtype.is_floating_point else x == 255


def filled(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A buffer that holds [N, C, H, W] or [N, F], zero in its padding channels."""
    out = layout.new_map(x.shape[0], tuple(x.shape[1:]), dtype or x.dtype, CPU)
    layout.fill(out, x)
    return out


def filled_poison(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The same with poison in its padding channels: for buffers of which a kernel reads no others."""
    out = poisoned_map(x.shape[0], tuple(x.shape[1:]), dtype or x.dtype)
    layout.fill(out, x)
    return out


def control(stop: int = 0, sweep: int = 0) -> Tensor:
    return torch.tensor([stop, sweep, 0], dtype=torch.int32)


def fresh_residual(sweeps: int, n: int) -> Tensor:
    """No residual is known: -1, as a run begins."""
    return torch.full((sweeps, n), -1.0).view(torch.int32)


def close(what: str, got: Tensor, expected: Tensor, tolerance: float, scale: float = 1.0) -> None:
    """Largest difference over the largest expected magnitude, or ``scale`` where that is larger. NaN is a failure."""
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if expected.numel():
        error = (got.double() - expected.double()).abs().max()
        bound = tolerance * max(float(expected.double().abs().max()), scale)
        assert float(error) <= bound, f"{what}: error {float(error):.2e}, bound {bound:.2e}"


def padding_is_zero(what: str, buffer: Tensor, channels: int) -> None:
    assert (buffer[..., channels:] == 0).all(), f"{what}: padding channels"


def use_tiles(monkeypatch: pytest.MonkeyPatch, *tiles: Tile) -> None:
    """The interpreter's whole table. The fixture ``no_programs`` forgets earlier choices."""
    for size in (2, 4):
        monkeypatch.setitem(tiling.TABLE, (INTERPRETER.name, size), tiles)
