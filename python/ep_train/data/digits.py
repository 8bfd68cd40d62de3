"""scikit-learn's digits: 1,797 grey images of 8x8 pixels, installed with scikit-learn."""

from __future__ import annotations

import importlib

import numpy as np
import torch

from ep_train.data.dataset import DataError, RawData

HELD_OUT = 360
LEVELS = 16


def load_digits(seed: int) -> RawData:
    """Read the digits, shuffle them with `seed` and hold out 360 for testing.

    scikit-learn's pixels are 0..16. They become round(255 value / 16), so that uint8 / 255 is within
    0.002 of value / 16 (half a grey level; exact at 0 and 16).

    Raises:
        DataError: scikit-learn is not installed, or the seed is negative.
    """
    if seed < 0:
        raise DataError(f"seed must be 0 or more, got {seed}")
    try:
        module = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise DataError(
            f"dataset 'digits' comes with scikit-learn, which cannot be imported ({error});"
            " run: pip install scikit-learn"
        ) from error
    bunch = module.load_digits()
    pixels = np.rint(np.asarray(bunch.images, dtype=np.float64) * (255 / LEVELS)).astype(np.uint8)
    labels = np.asarray(bunch.target, dtype=np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    images = torch.from_numpy(pixels[order]).unsqueeze(1)
    targets = torch.from_numpy(labels[order])
    return RawData(
        name="digits",
        train_images=images[HELD_OUT:],
        train_labels=targets[HELD_OUT:],
        test_images=images[:HELD_OUT],
        test_labels=targets[:HELD_OUT],
        class_names=tuple(str(digit) for digit in range(10)),
        source=f"digits (scikit-learn), {HELD_OUT} held out by seed {seed}",
    )
