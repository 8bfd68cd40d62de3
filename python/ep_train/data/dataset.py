"""What a dataset is: two splits of uint8 images with labels, checked once when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

Normalise = Literal["unit", "standard"]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std per channel, in units where white is 1
_STATISTICS_CHUNK = 4096
_TRAIN_STREAM, _TEST_STREAM = 1, 2


class DataError(ValueError):
    """Data that is missing, damaged or not what was asked for; the message says what to do."""


class RawData(NamedTuple):
    """What a reader returns: every image it found, before limits and statistics.

    Images are uint8 [N, C, H, W], labels int64 [N]; `source` says what was read. `statistics` are the mean and std of
    all training images, where they are known already.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    source: str
    statistics: Statistics | None = None


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification dataset, in memory or memory-mapped.

    Attributes:
        name: short name, as in the spec (`cifar10`, `folder:<basename>`).
        train_images, test_images: uint8 [N, C, H, W], C, H and W the same in both.
        train_labels, test_labels: int64 [N], each in [0, classes).
        class_names: the name of each label.
        mean, std: per channel, in units where white is 1, over the training images held here (so
            after `train_limit`); std is the population standard deviation and may be 0.
        source: what was read, for reports. It holds no absolute path.
        normalise: how its batches are normalised unless they are asked for otherwise: `unit`, x / 255, or `standard`,
            (x / 255 - mean) / std; None: `default_normalise`'s choice.

    Raises:
        DataError: a tensor has another dtype or shape, a split is empty, the numbers of images and
            labels differ, a label is out of range, the splits differ in image shape, or an unknown `normalise`.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    normalise: Normalise | None = None

    def __post_init__(self) -> None:
        if self.normalise is not None and self.normalise not in get_args(Normalise):
            raise DataError(f"normalise must be one of {', '.join(get_args(Normalise))}; got {self.normalise!r}")
        _check_split(self.source, "train", self.train_images, self.train_labels, len(self.class_names))
        _check_split(self.source, "test", self.test_images, self.test_labels, len(self.class_names))
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise DataError(
                f"{self.source}: training images are {_shape(self.train_images)} and test images"
                f" {_shape(self.test_images)} (channels x height x width); they must be the same"
            )
        channels = self.train_images.shape[1]
        if len(self.mean) != channels or len(self.std) != channels:
            raise DataError(
                f"{self.source}: mean and std need one number per channel ({channels}),"
                f" got {len(self.mean)} and {len(self.std)}"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, channels, height, width = self.train_images.shape
        return channels, height, width

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def _shape(images: Tensor) -> str:
    return "x".join(str(size) for size in images.shape[1:])


def _check_split(source: str, split: str, images: Tensor, labels: Tensor, classes: int) -> None:
    where = f"{source}, {split} split"
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise DataError(f"{where}: images must be uint8 [N, C, H, W], got {images.dtype} {list(images.shape)}")
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise DataError(f"{where}: labels must be int64 [N], got {labels.dtype} {list(labels.shape)}")
    if len(images) != len(labels):
        raise DataError(f"{where}: {len(images):,} images but {len(labels):,} labels; get the files again")
    if images.numel() == 0:
        raise DataError(f"{where}: no images ({list(images.shape)})")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(f"{where}: labels must be in 0..{classes - 1}, found {low}..{high}")


def finish(
    raw: RawData,
    *,
    train_limit: int | None = None,
    test_limit: int | None = None,
    seed: int = 0,
    normalise: Normalise | None = None,
) -> Dataset:
    """Apply the limits to what a reader found, and compute the statistics.

    Args:
        raw: the reader's result.
        train_limit, test_limit: at most this many images, chosen by `balanced_subset`.
        seed: non-negative seed of that choice.
        normalise: of the dataset's batches.

    Raises:
        DataError: a limit below 1, a negative seed, or data that `Dataset` refuses.
    """
    if seed < 0:
        raise DataError(f"seed must be 0 or more, got {seed}")
    _check_split(raw.source, "train", raw.train_images, raw.train_labels, len(raw.class_names))
    _check_split(raw.source, "test", raw.test_images, raw.test_labels, len(raw.class_names))
    train_images, train_labels = raw.train_images, raw.train_labels
    test_images, test_labels = raw.test_images, raw.test_labels
    notes = []
    if train_limit is not None:
        chosen = balanced_subset(train_labels, train_limit, seed=(seed, _TRAIN_STREAM), what="train_limit")
        if len(chosen) < len(train_labels):
            notes.append(f"{len(chosen):,} of {len(train_labels):,} training images, seed {seed}")
        train_images, train_labels = train_images[chosen], train_labels[chosen]
    if test_limit is not None:
        chosen = balanced_subset(test_labels, test_limit, seed=(seed, _TEST_STREAM), what="test_limit")
        if len(chosen) < len(test_labels):
            notes.append(f"{len(chosen):,} of {len(test_labels):,} test images, seed {seed}")
        test_images, test_labels = test_images[chosen], test_labels[chosen]
    whole = len(train_images) == len(raw.train_images)
    mean, std = raw.statistics if raw.statistics is not None and whole else channel_statistics(train_images)
    return Dataset(
        name=raw.name,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        class_names=raw.class_names,
        mean=mean,
        std=std,
        source="; ".join([raw.source, *notes]),
        normalise=normalise,
    )


def channel_statistics(images: Tensor) -> Statistics:
    """Mean and population standard deviation per channel, in units where 255 is 1.

    Args:
        images: uint8 [N, C, H, W], N >= 1. Counts of the 256 values are exact, so the result does not
            depend on the number of threads.
    """
    return statistics_of(histograms_of(images))


def histograms_of(images: Tensor) -> Tensor:
    """How often every value occurs per channel: uint8 [N, C, H, W] to int64 [C, 256]."""
    count, channels, _, _ = images.shape
    histograms = torch.zeros(channels, 256, dtype=torch.int64)
    for start in range(0, count, _STATISTICS_CHUNK):
        chunk = images[start : start + _STATISTICS_CHUNK]
        for channel in range(channels):
            histograms[channel] += torch.bincount(chunk[:, channel].reshape(-1), minlength=256)
    return histograms


def statistics_of(histograms: Tensor) -> Statistics:
    """Mean and population standard deviation per channel, from `histograms_of`."""
    pixels = int(histograms[0].sum())
    means, stds = [], []
    for histogram in histograms.tolist():
        total = sum(value * times for value, times in enumerate(histogram))
        squares = sum(value * value * times for value, times in enumerate(histogram))
        variance = (squares * pixels - total * total) / (pixels * pixels)  # integers before the division
        means.append(total / pixels / 255)
        stds.append(variance**0.5 / 255)
    return tuple(means), tuple(stds)


def balanced_subset(labels: Tensor, limit: int, *, seed: tuple[int, ...], what: str = "limit") -> Tensor:
    """Indices of a class-balanced random subset, ascending: int64 [min(limit, N)].

    Classes differ by at most one image, except where a class runs out: then the others fill up. With
    one seed, a smaller subset is contained in every larger one.

    Args:
        labels: int64 [N].
        limit: how many to choose, at least 1.
        seed: non-negative integers.
        what: the argument's name, for the message.

    Raises:
        DataError: limit below 1.
    """
    if limit < 1:
        raise DataError(f"{what} must be 1 or more, got {limit}")
    if limit >= len(labels):
        return torch.arange(len(labels))
    generator = np.random.default_rng(seed)
    values = labels.numpy()
    turn = generator.permutation(int(values.max()) + 1)  # which class comes first in each round
    order = generator.permutation(len(values))
    rank = np.empty(len(values), dtype=np.int64)  # how many of its class come before it in `order`
    for label in range(len(turn)):
        members = order[values[order] == label]
        rank[members] = np.arange(len(members))
    chosen = np.lexsort((turn[values], rank))[:limit]
    return torch.from_numpy(np.sort(chosen))
