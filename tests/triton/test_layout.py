"""Layouts of the kernels: maps with padded channels, packed weights as matrices of the same convolutions. No GPU."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from ep_kernels.graphs import copy_all
from ep_kernels.triton import layout
from tests.ops.inputs import LAYOUTS, Maker
from tests.ops.inputs import _strided as strided

CPU = torch.device("cpu")
SHAPES = [(1, 4, 3), (3, 1, 1), (16, 5, 7), (17, 2, 2), (64, 1, 3), (1,), (16,), (33,)]


def test_padded_channels() -> None:
    assert [layout.padded(c) for c in (1, 15, 16, 17, 64, 65)] == [16, 16, 16, 32, 64, 80]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_maps_there_and_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randint(0, 4, (3, *shape), generator=torch.Generator().manual_seed(0)).to(dtype)
    for memory in LAYOUTS.values():
        buffer = layout.new_map(3, shape, dtype, CPU)
        layout.fill(buffer, memory(x))
        h, w, c = layout.map_shape(shape)
        assert buffer.shape == (3, h, w, layout.padded(c))
        assert buffer.is_contiguous()
        assert (buffer[..., c:] == 0).all()
        assert torch.equal(layout.as_tensor(buffer, shape), x)
        assert layout.as_tensor(buffer, shape).data_ptr() == buffer.data_ptr()
        taken = layout.take(buffer, shape)
        assert torch.equal(taken, x)
        assert taken.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)
        assert taken.data_ptr() != buffer.data_ptr()
        assert torch.equal(layout.as_map(x)[1], buffer[1, ..., :c])


def test_strides_are_multiples_of_16_bytes() -> None:
    """What tensor descriptors need, for every element size of the operands."""
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float16):
            buffer = layout.new_map(2, shape, dtype, CPU)
            strides = [s * buffer.element_size() for s in buffer.stride()[:-1]]
            assert all(s % 16 == 0 for s in strides)
            assert buffer.stride(-1) == 1


def test_filling_casts_and_leaves_the_padding() -> None:
    x = Maker(torch.float64)(2, 5, 3, 2)
    buffer = torch.full((2, 3, 2, 16), 7.0, dtype=torch.float16)
    layout.fill(buffer, x)
    assert torch.equal(layout.as_tensor(buffer, (5, 3, 2)), x.half())
    assert (buffer[..., 5:] == 7).all()
    assert layout.empty_map(2, (5, 3, 2), torch.float16, CPU).shape == buffer.shape


KERNELS = [((1, 1), (0, 0)), ((3, 3), (1, 1)), ((3, 3), (0, 2)), ((5, 3), (2, 0)), ((2, 4), (1, 1)), ((1, 1), (2, 1))]


def patches(a: Tensor, kernel: tuple[int, int], offset: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """[N h w, taps C] of a map [N, H, W, C]: what a K loop reads at tap (r, s) of (h, w) is (h + r, w + s) + offset."""
    n, height, width, c = a.shape
    out = torch.zeros(n, *size, *kernel, c, dtype=a.dtype)
    for h in range(size[0]):
        for w in range(size[1]):
            for r in range(kernel[0]):
                for s in range(kernel[1]):
                    y, x = h + r + offset[0], w + s + offset[1]
                    if 0 <= y < height and 0 <= x < width:
                        out[:, h, w, r, s] = a[:, y, x]
    return out.view(n * size[0] * size[1], -1)


@pytest.mark.parametrize(("kernel", "padding"), KERNELS, ids=str)
@pytest.mark.parametrize("channels", [(3, 5), (17, 16), (1, 33)])
def test_matrices_are_those_of_the_convolution(
    channels: tuple[int, int], kernel: tuple[int, int], padding: tuple[int, int]
) -> None:
    """Patches times matrix are conv2d, and conv_transpose2d with the taps reversed (tiles.py, ``convolve``)."""
    new = Maker(torch.float64)
    c_src, c_dst = channels
    source, weight = new(2, c_src, 4, 5), new(c_dst, c_src, *kernel)
    expected = F.conv2d(source, weight, padding=padding)
    size = (expected.shape[2], expected.shape[3])
    a = layout.new_map(2, (c_src, 4, 5), torch.float64, CPU)
    layout.fill(a, source)
    matrix = layout.drive_matrix(weight, (c_src, 4, 5), torch.float64)
    assert matrix.shape == (layout.padded(c_dst), math.prod(kernel) * layout.padded(c_src))
    product = patches(a, kernel, (-padding[0], -padding[1]), size) @ matrix.t()
    found = layout.as_tensor(product.view(2, *size, -1), (c_dst, *size))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (product[:, c_dst:] == 0).all()

    above = new(*expected.shape)
    back = F.conv_transpose2d(above, weight, padding=padding)
    up = layout.new_map(2, (c_dst, *size), torch.float64, CPU)
    layout.fill(up, above)
    matrix = layout.feedback_matrix(weight, (c_src, 4, 5), torch.float64)
    reversed_taps = matrix.view(matrix.shape[0], math.prod(kernel), -1).flip(1).flatten(1)
    offset = (padding[0] - kernel[0] + 1, padding[1] - kernel[1] + 1)
    product = patches(up, kernel, offset, (4, 5)) @ reversed_taps.t()
    torch.testing.assert_close(layout.as_tensor(product.view(2, 4, 5, -1), (c_src, 4, 5)), back, rtol=0, atol=1e-12)
    assert (product[:, c_src:] == 0).all()


@pytest.mark.parametrize("shape", [(3, 4, 2), (16, 1, 3), (17, 2, 2), (20,), (16,)], ids=str)
def test_matrices_of_linear_connections(shape: tuple[int, ...]) -> None:
    """A vector's features are those of its buffer: channels last, padded."""
    new = Maker(torch.float64)
    source, weight = new(2, *shape), new(5, math.prod(shape))
    a = layout.new_map(2, shape, torch.float64, CPU)
    layout.fill(a, source)
    product = a.view(2, -1) @ layout.drive_matrix(weight, shape, torch.float64).t()
    torch.testing.assert_close(product[:, :5], source.flatten(1) @ weight.t(), rtol=0, atol=1e-12)
    assert (product[:, 5:] == 0).all()

    above = torch.zeros(2, 16, dtype=torch.float64)
    above[:, :5] = new(2, 5)
    matrix = layout.feedback_matrix(weight, shape, torch.float64)
    back = (above @ matrix.t()).view(a.shape)
    expected = (above[:, :5] @ weight).view(2, *shape)
    torch.testing.assert_close(layout.as_tensor(back, shape), expected, rtol=0, atol=1e-12)
    assert (back[..., layout.map_shape(shape)[2] :] == 0).all()


@pytest.mark.parametrize("memory", LAYOUTS)
def test_weights_in_any_memory_layout(memory: str) -> None:
    weight = Maker(torch.float64)(5, 3, 3, 2)
    for pack in (layout.drive_matrix, layout.feedback_matrix):
        expected = pack(weight, (3, 4, 4), torch.float32)
        assert expected.dtype == torch.float32
        assert torch.equal(pack(LAYOUTS[memory](weight), (3, 4, 4), torch.float32), expected)


def test_copies_of_many_tensors() -> None:
    """Of equal and other strides and dtypes, in one call."""
    new = Maker(torch.float32)
    sources = [new(2, 3), new(4, 5).t(), strided(new(3, 3)), new(2, 2).half(), new(7), new(7).double(), new(2, 6)]
    dtypes = [torch.float32] * 5 + [torch.float16] * 2
    to = [torch.zeros(s.shape, dtype=d) for s, d in zip(sources, dtypes, strict=True)]
    copy_all(list(zip(to, sources, strict=True)))
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(to, sources, strict=True))
    copy_all([])
