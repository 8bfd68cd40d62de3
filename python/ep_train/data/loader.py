"""Ready batches: uint8 images stay on the device, where there is room, and become normalised float32 batches there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ep_train.data.augment import augment, cut_out
from ep_train.data.dataset import DataError, Dataset, Normalise
from ep_train.data.prefetch import ahead

Split = Literal["train", "test"]
RESIDENT = 0.25  # of a GPU's free memory: larger splits stay on the host


def default_normalise(dataset: Dataset) -> Normalise:
    """What the dataset was loaded with; else `unit` for the digits, `standard` for everything else."""
    return dataset.normalise or ("unit" if dataset.name == "digits" else "standard")


class Batches:
    """One split of a dataset as batches, the same for the same (seed, epoch) on every device.

    The order is drawn from (seed, epoch), an image's augmentation from (seed, epoch, image): batch i
    does not depend on which batches were read before it, so a resumed run can start anywhere.

    A batch is (images, labels): float32 [B, C, H, W] in channels_last memory, and int64 [B], on the device.

    A split that stays on the host sends the bytes of each batch through pinned memory without waiting, one batch ahead
    and on a stream of its own: they travel while the GPU computes the batch before.

    Several processes share out an epoch by `shard`: each gets its part of every batch, the same images with the same
    augmentation as one process would have at those places.

    Attributes:
        device: where the batches are made.
        images: uint8 [N, H, W, C], on the device or the host.
        labels: int64 [N], likewise.
        normalise: the normalisation in use.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split = "train",
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool | None = None,
        drop_last: bool | None = None,
        normalise: Normalise | None = None,
        crop_padding: int = 0,
        flip: bool = False,
        cutout: int = 0,
        device: torch.device | str = "cpu",
        resident: bool | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        """Copy the split to the device; memory-mapped images that stay on the host are not copied.

        Args:
            dataset: where the images, and the mean and std of its training split, come from.
            split: `train` or `test`.
            batch_size: images per batch.
            seed: 0 or more.
            shuffle: another order every epoch; default: only for `train`.
            drop_last: leave out a last batch that is not full; default: only for `train`.
            normalise: `unit` is x / 255; `standard` is (x / 255 - mean) / std per channel, where a std
                below half a grey level counts as 1. Default: `default_normalise(dataset)`.
            crop_padding: pad with this many black pixels on every side, then crop at random to the
                old size; 0: off. Black is 0 before normalisation.
            flip: mirror every second image, on average, left to right.
            cutout: put a black square of this side over every image, its centre anywhere in it (DeVries & Taylor 2017);
                0: off.
            device: where the batches are made.
            resident: keep the images there, not on the host; default: when they take at most a quarter of its free
                memory.
            shard: (rank, ranks): of every batch of `batch_size` images, only the rank-th of `ranks` successive parts,
                which differ by at most one image (and may be empty where a batch has fewer images than ranks).

        Raises:
            DataError: an argument is out of range, or there is no full batch and `drop_last` is set.
        """
        if split not in get_args(Split):
            raise DataError(f"split must be one of {', '.join(get_args(Split))}; got {split!r}")
        if normalise is not None and normalise not in get_args(Normalise):
            raise DataError(f"normalise must be one of {', '.join(get_args(Normalise))}; got {normalise!r}")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("crop_padding", crop_padding, 0),
            ("cutout", cutout, 0),
        ):
            if value < least:
                raise DataError(f"{name} must be {least} or more, got {value}")
        rank, ranks = shard
        if not 0 <= rank < ranks:
            raise DataError(f"shard must be (rank, ranks) with 0 <= rank < ranks, got {shard}")
        training = split == "train"
        images = dataset.train_images if training else dataset.test_images
        labels = dataset.train_labels if training else dataset.test_labels
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = training if shuffle is None else shuffle
        self.drop_last = training if drop_last is None else drop_last
        self.normalise: Normalise = default_normalise(dataset) if normalise is None else normalise
        self.crop_padding = crop_padding
        self.flip = flip
        self.cutout = cutout
        self.shard = shard
        self.device = torch.device(device)
        if self.drop_last and len(images) < batch_size:
            raise DataError(
                f"batch_size {batch_size} leaves no full batch of the {len(images)} {split} images;"
                " use a smaller one, or drop_last=False"
            )
        if resident is None:
            on_gpu = self.device.type == "cuda"
            resident = not on_gpu or images.numel() <= RESIDENT * torch.cuda.mem_get_info(self.device)[0]
        store = self.device if resident else torch.device("cpu")
        self.images = images.to(store).permute(0, 2, 3, 1).contiguous()
        self.labels = labels.to(store)
        # One row of pixels [W * C], so that the arithmetic runs over long rows, not over 3 channels.
        width = images.shape[3]
        std = [value if value > 0.5 / 255 else 1.0 for value in dataset.std]
        self._mean = torch.tensor(dataset.mean, dtype=torch.float32, device=self.device).repeat(width)
        self._std = torch.tensor(std, dtype=torch.float32, device=self.device).repeat(width)

    def __len__(self) -> int:
        """Batches per epoch."""
        count = len(self.labels)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    @property
    def images_per_epoch(self) -> int:
        """Images in one epoch of all shards, without what `drop_last` leaves out."""
        return len(self) * self.batch_size if self.drop_last else len(self.labels)

    def epoch(self, epoch: int = 0, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, from batch `start` on.

        Args:
            epoch: 0 or more; another epoch has another order and other crops and flips.
            start: the first batch wanted, 0..len(self).

        Raises:
            DataError: epoch or start out of range.
        """
        return ((images, labels) for images, labels, _ in self.indexed(epoch, start=start))

    def indexed(self, epoch: int = 0, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """As `epoch`, each batch with its images' places in the split, int64 [B]."""
        if epoch < 0:
            raise DataError(f"epoch must be 0 or more, got {epoch}")
        if not 0 <= start <= len(self):
            raise DataError(f"start must be in 0..{len(self)}, got {start}")
        batches = self._epoch(epoch, start)
        if self.device.type == "cuda" and self.images.device.type == "cpu":
            return ahead(batches, self.device)
        return batches

    def _epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        count = len(self.labels)
        rank, ranks = self.shard
        # On the host, so that every device sees the same numbers; copied to where the images are once an epoch.
        order_numbers, shift_numbers, flip_numbers, cut_numbers = (
            np.random.default_rng((self.seed, epoch, stream)) for stream in range(4)
        )
        store = self.images.device
        order = torch.arange(count, device=store)
        shifts = mirror = cuts = None
        if self.shuffle:
            order = torch.from_numpy(order_numbers.permutation(count)).to(store)
        if self.crop_padding:
            drawn = shift_numbers.integers(0, 2 * self.crop_padding + 1, size=(count, 2))
            shifts = torch.from_numpy(drawn).to(store)
        if self.flip:
            mirror = torch.from_numpy(flip_numbers.integers(0, 2, size=count) == 1).to(store)
        if self.cutout:
            drawn = cut_numbers.integers(0, self.images.shape[1:3], size=(count, 2))
            cuts = torch.from_numpy(drawn).to(store)
        for batch in range(start, len(self)):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            if ranks > 1:
                chosen = chosen[len(chosen) * rank // ranks : len(chosen) * (rank + 1) // ranks]
            pixels = self._sent(self.images.index_select(0, chosen))
            if shifts is not None or mirror is not None:
                pixels = augment(
                    pixels,
                    self.crop_padding,
                    None if shifts is None else self._sent(shifts.index_select(0, chosen)),
                    None if mirror is None else self._sent(mirror.index_select(0, chosen)),
                )
            if cuts is not None:
                pixels = cut_out(pixels, self.cutout, self._sent(cuts.index_select(0, chosen)))
            yield self._normalised(pixels), self._sent(self.labels.index_select(0, chosen)), self._sent(chosen)

    def _sent(self, gathered: Tensor) -> Tensor:
        """A part of a batch, on the device: at once, or through pinned memory without waiting."""
        if gathered.device.type == self.device.type:
            return gathered
        return gathered.pin_memory().to(self.device, non_blocking=True)

    def _normalised(self, pixels: Tensor) -> Tensor:
        """uint8 [B, H, W, C] to float32 [B, C, H, W], channels_last."""
        values = pixels.to(torch.float32).div_(255)
        if self.normalise == "standard":
            count, height, width, channels = values.shape
            values.view(count, height, width * channels).sub_(self._mean).div_(self._std)
        return values.permute(0, 3, 1, 2)
