"""The box by cases: ``delta_clip``, its limit ``tangent_clip``, and ``update`` with damping and over-relaxation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ep_kernels import reference

BOXES = [(0.0, 1.0), (-0.5, 0.25), (-1.0, 1.0)]


def grid(lo: float, hi: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Preactivations under, at, inside, at and over the box, each with increments up to across the whole box."""
    pre = torch.tensor([lo - 3, lo - 0.1, lo, lo + 1e-9, (lo + hi) / 2, hi - 1e-9, hi, hi + 0.1, hi + 3], dtype=dtype)
    increment = torch.tensor([-9, -1.3, -0.3, -0.1, -1e-6, 0, 1e-6, 0.1, 0.3, 1.3, 9], dtype=dtype)
    a, b = torch.meshgrid(pre, increment, indexing="ij")
    return a.flatten(), b.flatten()


@pytest.mark.parametrize(("lo", "hi"), BOXES)
@pytest.mark.parametrize("scale", [1.0, 2.0**20, 2.0**-5])
def test_delta_clip_is_the_difference_of_clips(lo: float, hi: float, scale: float) -> None:
    pre, increment = grid(lo, hi)
    generator = torch.Generator().manual_seed(0)
    pre = torch.cat([pre, 3 * torch.randn(5000, generator=generator, dtype=torch.float64)])
    increment = torch.cat([increment, torch.randn(5000, generator=generator, dtype=torch.float64)])
    want = (pre + increment).clamp(lo, hi) - pre.clamp(lo, hi)
    got = reference.delta_clip(pre, increment * scale, lo, hi, scale) / scale
    torch.testing.assert_close(got, want, rtol=0, atol=2e-14)
    assert len(want.unique()) > 500


def test_an_infinite_box_cuts_nothing() -> None:
    """And makes no NaN of its bounds, over-relaxed or stored in float16 either."""
    inf = float("inf")
    for dtype in (torch.float64, torch.float32, torch.float16):
        pre, increment = grid(0.0, 1.0, dtype)
        for scale in (1.0, 2.0**20, 2.0**-5):
            assert torch.equal(reference.delta_clip(pre, increment, -inf, inf, scale), increment)
        assert torch.equal(reference.tangent_clip(pre, increment, -inf, inf), increment)
        got = reference.update(pre, increment, 1.5, 1.0, -inf, inf)
        assert torch.equal(got, reference.damp(pre, increment, 1.5))


def test_delta_clip_keeps_a_small_increment_exactly() -> None:
    pre = torch.linspace(0.1, 0.9, 99, dtype=torch.float32)
    increment = torch.full_like(pre, 1e-9)
    got = reference.delta_clip(pre, increment, 0.0, 1.0)
    assert torch.equal(got, increment)
    naive = (pre + increment).clamp(0, 1) - pre.clamp(0, 1)
    assert float(naive.sum()) == 0.0  # every digit lost


@pytest.mark.parametrize(
    ("pre", "increment", "expected"),
    [
        (-0.25, 0.125, 0.0),  # saturated units send exactly zero,
        (1.25, -0.125, 0.0),
        (1.25, -0.375, -0.125),  # or what passes the wall;
        (1.0 - 2.0**-24, 0.125, 2.0**-24),  # one near a wall goes exactly to it;
        (0.0, 0.5, 0.5),  # one on a wall leaves it inwards only
        (0.0, -0.5, 0.0),
    ],
)
def test_delta_clip_at_the_walls(pre: float, increment: float, expected: float) -> None:
    got = reference.delta_clip(torch.tensor([pre]), torch.tensor([increment]), 0.0, 1.0)
    assert float(got) == expected


@pytest.mark.parametrize(("lo", "hi"), BOXES)
def test_tangent_clip_is_the_limit_of_small_increments(lo: float, hi: float) -> None:
    generator = torch.Generator().manual_seed(1)
    pre = torch.cat([grid(lo, hi)[0], torch.randn(5000, generator=generator, dtype=torch.float64)])
    pre = pre[(pre - lo).abs().minimum((pre - hi).abs()) > 1e-7]
    direction = torch.randn(len(pre), generator=generator, dtype=torch.float64)
    scale = 2.0**40
    limit = reference.delta_clip(pre, direction, lo, hi, scale)  # the increment is direction / scale
    got = reference.tangent_clip(pre, direction, lo, hi)
    assert torch.equal(got, limit)
    assert 0 < int((got == 0).sum()) < len(got)


def test_tangent_clip_passes_nothing_on_the_walls() -> None:
    pre = torch.tensor([0.0, 1.0, -0.0, 0.5])
    assert reference.tangent_clip(pre, torch.ones(4), 0.0, 1.0).tolist() == [0, 0, 0, 1]


def test_update_by_hand() -> None:
    state, a = torch.tensor([0.5, 0.5, 0.5, 0.5]), torch.tensor([0.75, 4.0, -4.0, 0.0])

    def run(damping: float, slope: float) -> list[float]:
        return reference.update(state, a, damping, slope, 0.0, 1.0).tolist()

    assert run(1.0, 1.0) == [0.75, 1.0, 0.0, 0.0]
    assert run(1.0, 0.5) == [0.375, 1.0, 0.0, 0.0]
    assert run(0.5, 1.0) == [0.625, 0.75, 0.25, 0.25]
    assert run(1.5, 1.0) == [0.875, 1.0, 0.0, 0.0]  # over-relaxed, and still in the box
