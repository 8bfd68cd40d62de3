"""Augmentation of whole batches: what is random is given, so that it can be drawn per image on the host.

Every function here is a handful of tensor operations, whatever the batch, on the device where the pixels are. Images
are [B, H, W, C] and are copied as rows of W * C bytes, so that no operation runs over 3 channels at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def augment(pixels: Tensor, padding: int, shifts: Tensor | None, mirror: Tensor | None) -> Tensor:
    """Crop and mirror a batch; every image has its own crop.

    Args:
        pixels: [B, H, W, C].
        padding: black pixels added on every side before the crop.
        shifts: int64 [B, 2], the row and column in 0..2*padding where the crop starts; None: no crop.
        mirror: bool [B], which images are mirrored left to right (after the crop); None: none.

    Returns:
        [B, H, W, C], of the same dtype.
    """
    count, height, width, channels = pixels.shape
    if shifts is not None:
        side = padding * channels
        rows = pad(pixels.reshape(count, height, width * channels), (side, side, padding, padding))
        windows = rows.unfold(1, height, 1).unfold(2, width * channels, channels)  # a view: [B, row, column, H, W * C]
        each = torch.arange(count, device=pixels.device)
        pixels = windows[each, shifts[:, 0], shifts[:, 1]].reshape(count, height, width, channels)
    if mirror is not None:
        # as NCHW in channels_last memory, which torch.flip has a fast path for
        mirrored = pixels.permute(0, 3, 1, 2).flip(3).permute(0, 2, 3, 1)
        pixels = torch.where(mirror[:, None, None, None], mirrored, pixels)
    return pixels


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
    outside = []
    for axis, (length, repeats) in enumerate(((height, 1), (width, channels))):
        first = centres[:, axis, None] - side // 2
        place = torch.arange(length * repeats, device=pixels.device) // repeats
        outside.append(((place < first) | (place >= first + side)).to(torch.uint8))
    keep = outside[0][:, :, None] | outside[1][:, None, :]  # 0 in the square: a product, several times masked_fill
    return (pixels.reshape(count, height, width * channels) * keep).view(count, height, width, channels)
