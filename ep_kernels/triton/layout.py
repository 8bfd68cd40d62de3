"""Tensors as the kernels want them: [N, H, W, C] maps whose channels are padded to a multiple of 16, K-major weights.

Padding makes every stride a multiple of 16 bytes (what tensor descriptors and 16-byte loads need) for any number of
channels; it holds zeros, and weights' rows and columns for it are zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PAD = 16
Pair = tuple[Tensor, Tensor]


def padded(channels: int) -> int:
    """Channels of a buffer."""
    return -(-channels // PAD) * PAD


def map_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """(H, W, C) of a node (C, H, W) or (F,): a vector is a map of one position."""
    return (shape[1], shape[2], shape[0]) if len(shape) == 3 else (1, 1, shape[0])


def new_map(n: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[n, H, W, padded C] of zeros for a node's ``shape``."""
    h, w, c = map_shape(shape)
    return torch.zeros(n, h, w, padded(c), dtype=dtype, device=device)


def empty_map(n: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same without zeros, for launches that write every element."""
    h, w, c = map_shape(shape)
    return torch.empty(n, h, w, padded(c), dtype=dtype, device=device)


def as_map(x: Tensor) -> Tensor:
    """A view [N, H, W, C] of [N, C, H, W] or [N, F]."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 else x[:, None, None, :]


def as_tensor(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse: a view [N, C, H, W] or [N, F] of a buffer, without its padding channels."""
    real = buffer[..., : map_shape(shape)[2]]
    return real.permute(0, 3, 1, 2) if len(shape) == 3 else real[:, 0, 0, :]


def fill_views(buffer: Tensor, x: Tensor) -> Pair:
    """The real channels of a buffer, and [N, C, H, W] or [N, F] in that order."""
    source = as_map(x)
    return buffer[..., : source.shape[3]], source


def fill(buffer: Tensor, x: Tensor) -> None:
    """Copy [N, C, H, W] or [N, F] into a buffer, casting."""
    to, values = fill_views(buffer, x)
    to.copy_(values)


def take(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    """A copy as [N, C, H, W] in channels_last memory, or [N, F]."""
    view = as_tensor(buffer, shape)
    layout = torch.channels_last if view.dim() == 4 else torch.contiguous_format
    return torch.empty(view.shape, dtype=view.dtype, device=view.device, memory_format=layout).copy_(view)


def drive_matrix(weight: Tensor, source: Sequence[int], dtype: torch.dtype) -> Tensor:
    """[C_dst, taps C_src], both padded, of a weight [C_dst, C_src, kh, kw], or [F_dst, F_src] of a node ``source``."""
    out = torch.zeros(drive_size(weight, source), dtype=dtype, device=weight.device)
    to, values = drive_views(out, weight, source)
    to.copy_(values)
    return out


def drive_size(weight: Tensor, source: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a drive matrix."""
    w = _as_convolution(weight, source)
    return padded(w.shape[0]), w.shape[2] * w.shape[3] * padded(w.shape[1])


def drive_views(out: Tensor, weight: Tensor, source: Sequence[int]) -> Pair:
    """The part of a drive matrix that a weight fills, and the weight in that order."""
    w = _as_convolution(weight, source)
    view = out.view(out.shape[0], w.shape[2], w.shape[3], -1)
    return view[: w.shape[0], :, :, : w.shape[1]], w.permute(0, 2, 3, 1)


def feedback_matrix(weight: Tensor, source: Sequence[int], dtype: torch.dtype) -> Tensor:
    """[C_src, taps C_dst], both padded. Linear to a map: [H W C_src, C_dst], a row for each feature of its buffer."""
    out = torch.zeros(feedback_size(weight, source), dtype=dtype, device=weight.device)
    to, values = feedback_views(out, weight, source)
    to.copy_(values)
    return out


def feedback_size(weight: Tensor, source: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a feedback matrix."""
    w = _as_convolution(weight, source)
    rows, taps, columns = padded(w.shape[1]), w.shape[2] * w.shape[3], padded(w.shape[0])
    return (taps * rows, columns) if weight.dim() == 2 else (rows, taps * columns)


def feedback_views(out: Tensor, weight: Tensor, source: Sequence[int]) -> Pair:
    """The part of a feedback matrix that a weight fills, and the weight in that order."""
    w = _as_convolution(weight, source)
    if weight.dim() == 2:
        view = out.view(w.shape[2], w.shape[3], -1, out.shape[1])
        return view[:, :, : w.shape[1], : w.shape[0]], w.permute(2, 3, 1, 0)
    view = out.view(out.shape[0], w.shape[2], w.shape[3], -1)
    return view[: w.shape[1], :, :, : w.shape[0]], w.permute(1, 2, 3, 0)


def _as_convolution(weight: Tensor, source: Sequence[int]) -> Tensor:
    """[C_dst, C_src, kh, kw]; a linear connection's kernel covers its whole source."""
    if weight.dim() == 4:
        return weight
    h, w, c = map_shape(source)
    return weight.view(weight.shape[0], c, h, w)
