"""Tensors of more than 2^31 bytes: offsets must not be computed in 32 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ep_kernels import functional, ops

LIMIT = 1 << 31  # bytes
NEEDED = 6 << 20  # kilobytes of free memory


def available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 0)


@pytest.fixture(autouse=True)
def fast_memory(poisoned_memory: None) -> None:
    if available() < NEEDED:
        pytest.skip(f"needs {NEEDED >> 20} GiB of free memory")
    torch.use_deterministic_algorithms(False)


def test_relax_step() -> None:
    state, drive = torch.zeros(2, 2**28 + 3), torch.zeros(1, 2**28 + 3)
    assert state.nbytes > LIMIT
    state[:, -1], drive[:, -1] = torch.tensor([0.5, -1.0]), 0.25
    lists: tuple[list[object], ...] = ([], [], [], [], [], [], [], [], [])
    dynamics = (0, 1, 0.5, 1.0, 0.0, 1.0, 1.0, False)
    new, residual, _ = ops.relax_step(state, None, [drive], [1.0], *lists, None, 0.0, None, *dynamics)
    assert new[:, -1].tolist() == [0.375, -0.375]
    assert residual.tolist() == [0.125, 0.625]
    assert not new[:, -1000:-1].any()


def test_drive() -> None:
    """The map before pooling is large, its source is not."""
    channels, height, width = 136, 2050, 2048
    assert 4 * channels * height * width > LIMIT
    source = torch.zeros(1, 1, height, width)
    source[..., -2:, -4:] = torch.tensor([[1, 2, 3, 3], [2, 1, 4, 3]])
    pooled, winners = functional.drive(source, torch.ones(channels, 1, 1, 1), pool="max")
    assert winners is not None
    assert pooled[0, :, -1, -2:].unique(dim=0).tolist() == [[2, 4]]
    assert winners[0, :, -1, -2:].unique(dim=0).tolist() == [[1, 2]]
    assert not pooled[0, :, -1, :-2].any()
