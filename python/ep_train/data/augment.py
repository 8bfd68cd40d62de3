"""Augmentation of whole batches: what is random is given, so that it can be drawn per image on the host.

Every function here is a handful of tensor operations, whatever the batch, on the device where the pixels are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def augment(pixels: Tensor, padding: int, shifts: Tensor | None, mirror: Tensor | None) -> Tensor:
    """Crop and mirror a batch with one gather; every image has its own crop.

    Args:
        pixels: [B, H, W, C].
        padding: black pixels added on every side before the crop.
        shifts: int64 [B, 2], the row and column in 0..2*padding where the crop starts; None: no crop.
        mirror: bool [B], which images are mirrored left to right (after the crop); None: none.

    Returns:
        [B, H, W, C], of the same dtype.
    """
    count, height, width, channels = pixels.shape
    device = pixels.device
    rows = torch.arange(height, device=device).expand(count, height)
    columns = torch.arange(width, device=device).expand(count, width)
    if mirror is not None:
        columns = torch.where(mirror[:, None], width - 1 - columns, columns)
    if shifts is not None:
        pixels = pad(pixels, (0, 0, padding, padding, padding, padding))
        rows, columns = rows + shifts[:, :1], columns + shifts[:, 1:]
    padded_height, padded_width = pixels.shape[1:3]
    first = torch.arange(count, device=device) * padded_height
    source = (first[:, None] + rows)[:, :, None] * padded_width + columns[:, None, :]  # [B, H, W]
    return pixels.reshape(-1, channels).index_select(0, source.reshape(-1)).view(count, height, width, channels)


def cut_out(pixels: Tensor, side: int, centres: Tensor) -> Tensor:
    """Put a black square over every image of a batch, cut at the image's edges.

    Args:
        pixels: uint8 [B, H, W, C].
        side: of the square, in pixels.
        centres: int64 [B, 2], row and column of its centre.

    Returns:
        uint8 [B, H, W, C].
    """
    count, height, width, channels = pixels.shape
    outside = []  # 0 inside the square; over rows of W * C values, not over 3 channels
    for axis, (length, repeats) in enumerate(((height, 1), (width, channels))):
        first = centres[:, axis, None] - side // 2
        place = torch.arange(length * repeats, device=pixels.device) // repeats
        outside.append(((place < first) | (place >= first + side)).to(torch.uint8))
    keep = outside[0][:, :, None] | outside[1][:, None, :]
    return (pixels.reshape(count, height, width * channels) * keep).view(count, height, width, channels)
