"""Batches: values, order, augmentation, and that a batch depends on nothing but (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ep_train.data import Batches, DataError, Dataset, default_normalise, loader, prefetch
from ep_train.data.augment import augment, cut_out
from ep_train.data.dataset import RawData, finish

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


def dataset(count: int = 23, channels: int = 3, height: int = 6, width: int = 5, name: str = "made") -> Dataset:
    """The label of an image is its index, so that a batch tells which images it holds."""
    generator = torch.Generator().manual_seed(count)

    def images(number: int) -> Tensor:
        return torch.randint(0, 256, (number, channels, height, width), dtype=torch.uint8, generator=generator)

    return finish(
        RawData(
            name=name,
            train_images=images(count),
            train_labels=torch.arange(count),
            test_images=images(7),
            test_labels=torch.arange(7),
            class_names=tuple(str(label) for label in range(count)),
            source="made here",
        )
    )


def indices(batches: Batches, epoch: int = 0, start: int = 0) -> list[int]:
    return torch.cat([labels for _, labels in batches.epoch(epoch, start=start)]).tolist()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augmented", [False, True])
def test_form_of_a_batch(channels: int, augmented: bool) -> None:
    batches = Batches(
        dataset(channels=channels), batch_size=4, crop_padding=2 if augmented else 0, flip=augmented, normalise="unit"
    )
    for images, labels in batches.epoch(0):
        assert images.dtype == torch.float32
        assert images.shape == (4, channels, 6, 5)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64
        assert labels.shape == (4,)


def test_unit_values_are_exact() -> None:
    data = dataset()
    for images, labels in Batches(data, batch_size=4, normalise="unit").epoch(3):
        assert torch.equal(images, data.train_images[labels].float() / 255)


def test_standard_values() -> None:
    data = dataset()
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (data.mean, data.std))
    seen = []
    for images, labels in Batches(data, batch_size=4, normalise="standard", drop_last=False).epoch(3):
        expected = (data.train_images[labels].double() / 255 - mean) / std
        torch.testing.assert_close(images.double(), expected, rtol=1e-5, atol=1e-6)
        seen.append(images)
    everything = torch.cat(seen)
    assert everything.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert (everything.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-5


def test_test_split_uses_the_training_statistics() -> None:
    data = dataset()
    (images, labels), *_ = Batches(data, "test", batch_size=7, normalise="standard").epoch(0)
    expected = (data.test_images[labels].double() / 255 - torch.tensor(data.mean).view(1, 3, 1, 1)) / torch.tensor(
        data.std
    ).view(1, 3, 1, 1)
    torch.testing.assert_close(images.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_constant_channel_stays_finite() -> None:
    raw = dataset()
    black = raw.train_images.clone()
    black[:, 1] = 9
    data = finish(
        RawData("made", black, raw.train_labels, raw.test_images, raw.test_labels, raw.class_names, "made here")
    )
    assert data.std[1] == 0
    (images, _), *_ = Batches(data, batch_size=23, normalise="standard").epoch(0)
    assert images[:, 1].abs().max() < 1e-6


def test_default_normalisation() -> None:
    assert default_normalise(dataset(name="digits")) == "unit"
    assert Batches(dataset(name="digits"), batch_size=4).normalise == "unit"
    assert Batches(dataset(name="cifar10"), batch_size=4).normalise == "standard"


@pytest.mark.parametrize(("drop_last", "count"), [(True, 5), (False, 6)])
def test_length_and_drop_last(drop_last: bool, count: int) -> None:
    batches = Batches(dataset(), batch_size=4, drop_last=drop_last)
    assert len(batches) == count
    sizes = [len(labels) for _, labels in batches.epoch(0)]
    assert sizes == [4] * 5 + ([] if drop_last else [3])
    assert batches.images_per_epoch == sum(sizes)


def test_training_defaults_shuffle_and_drop_the_last_batch() -> None:
    batches = Batches(dataset(), batch_size=4)
    assert (batches.shuffle, batches.drop_last) == (True, True)
    assert indices(batches) != sorted(indices(batches))


def test_test_split_is_complete_and_in_order() -> None:
    assert indices(Batches(dataset(), "test", batch_size=4)) == list(range(7))


def test_every_image_once_an_epoch_in_another_order() -> None:
    batches = Batches(dataset(), batch_size=4, drop_last=False)
    first, second = indices(batches, 0), indices(batches, 1)
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second


def test_same_seed_and_epoch_give_the_same_batches() -> None:
    one, two = (Batches(dataset(), batch_size=4, seed=5, crop_padding=2, flip=True) for _ in range(2))
    list(two.epoch(0))  # what was read before does not matter
    for (images, labels), (images_two, labels_two) in zip(one.epoch(9), two.epoch(9), strict=True):
        assert torch.equal(images, images_two)
        assert torch.equal(labels, labels_two)
    assert indices(one, 9) != indices(Batches(dataset(), batch_size=4, seed=6), 9)


def test_torch_s_global_generator_is_neither_read_nor_moved() -> None:
    batches = Batches(dataset(), batch_size=4, crop_padding=2, flip=True)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = [images for images, _ in batches.epoch(2)]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, (b, _) in zip(first, batches.epoch(2), strict=True))


@pytest.mark.parametrize("start", range(7))
def test_an_epoch_can_start_at_any_batch(start: int) -> None:
    batches = Batches(dataset(), batch_size=4, drop_last=False, crop_padding=1, flip=True)
    whole, rest = list(batches.epoch(4)), list(batches.epoch(4, start=start))
    assert len(rest) == len(whole) - start
    for (images, labels), (images_rest, labels_rest) in zip(whole[start:], rest, strict=True):
        assert torch.equal(images, images_rest)
        assert torch.equal(labels, labels_rest)


def test_augmentation_of_an_image_does_not_depend_on_the_batch_size() -> None:
    data = dataset()

    def by_label(batch_size: int) -> dict[int, Tensor]:
        batches = Batches(data, batch_size=batch_size, drop_last=False, crop_padding=2, flip=True)
        return {int(label): image for images, labels in batches.epoch(1) for image, label in zip(images, labels)}  # noqa: B905

    small, large = by_label(3), by_label(8)
    assert all(torch.equal(small[label], large[label]) for label in range(23))


def test_order_does_not_depend_on_augmentation() -> None:
    plain, augmented = Batches(dataset(), batch_size=4), Batches(dataset(), batch_size=4, crop_padding=2, flip=True)
    assert indices(plain, 2) == indices(augmented, 2)


def by_hand(image: Tensor, padding: int, row: int, column: int, mirrored: bool) -> Tensor:
    """uint8 [C, H, W]: pad, crop, mirror, one image at a time."""
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=image.dtype)
    padded[:, padding : padding + height, padding : padding + width] = image
    crop = padded[:, row : row + height, column : column + width]
    return crop.flip(2) if mirrored else crop


def test_augment_equals_one_image_at_a_time() -> None:
    images = dataset(count=50).train_images
    generator = torch.Generator().manual_seed(0)
    shifts = torch.randint(0, 5, (50, 2), generator=generator)
    mirror = torch.rand(50, generator=generator) < 0.5
    pixels = images.permute(0, 2, 3, 1).contiguous()
    both = augment(pixels, 2, shifts, mirror).permute(0, 3, 1, 2)
    mirrored = augment(pixels, 0, None, mirror).permute(0, 3, 1, 2)
    cropped = augment(pixels, 2, shifts, None).permute(0, 3, 1, 2)
    for index, image in enumerate(images):
        row, column, flipped = int(shifts[index, 0]), int(shifts[index, 1]), bool(mirror[index])
        assert torch.equal(both[index], by_hand(image, 2, row, column, flipped))
        assert torch.equal(mirrored[index], by_hand(image, 0, 0, 0, flipped))
        assert torch.equal(cropped[index], by_hand(image, 2, row, column, False))


def test_crops_and_flips_are_spread_evenly() -> None:
    """A picture of one white pixel shows where it was moved to."""
    count = 4000
    image = torch.zeros(1, 7, 7, dtype=torch.uint8)
    image[0, 3, 2] = 255
    data = finish(
        RawData(
            "made", image.repeat(count, 1, 1, 1), torch.zeros(count, dtype=torch.int64), image[None],
            torch.zeros(1, dtype=torch.int64), ("only",), "made here",
        )
    )  # fmt: skip
    batches = Batches(data, batch_size=500, normalise="unit", crop_padding=1, flip=True)
    total = torch.stack([images.sum(dim=0) for images, _ in batches.epoch(0)]).sum(dim=0)[0]
    assert total.sum() == count
    # Columns 1, 2, 3 unmirrored and 5, 4, 3 mirrored: column 3 is hit twice as often.
    expected = torch.zeros(7, 7)
    expected[2:5, 1:6] = torch.tensor([1.0, 1, 2, 1, 1]) * count / 18
    assert (total - expected).abs().max() < 6 * (count / 9) ** 0.5


def test_images_are_not_changed() -> None:
    data = dataset()
    before = data.train_images.clone()
    batches = Batches(data, batch_size=4, crop_padding=2, flip=True)
    for images, labels in batches.epoch(0):
        images.zero_()
        labels.zero_()
    assert torch.equal(data.train_images, before)
    assert data.train_labels.tolist() == list(range(23))
    assert sorted(set(indices(batches, 1))) == sorted(indices(batches, 1))


def test_cut_out_equals_one_image_at_a_time() -> None:
    images = dataset(count=40).train_images
    generator = torch.Generator().manual_seed(0)
    centres = torch.stack([torch.randint(0, n, (40,), generator=generator) for n in (6, 5)], dim=1)
    for side in (1, 2, 3, 9):
        cut = cut_out(images.permute(0, 2, 3, 1).contiguous(), side, centres).permute(0, 3, 1, 2)
        for index, image in enumerate(images):
            expected = image.clone()
            row, column = (int(centre) - side // 2 for centre in centres[index])
            expected[:, max(row, 0) : row + side, max(column, 0) : column + side] = 0
            assert torch.equal(cut[index], expected)


AUGMENTED = {"crop_padding": 2, "flip": True, "cutout": 2}


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("drop_last", [True, False])
def test_shards_of_every_batch_are_the_batch(ranks: int, drop_last: bool) -> None:
    """Of 5 ranks, some have nothing of the last batch, which has 3 images."""
    options = {"batch_size": 10, "drop_last": drop_last, "seed": 4, **AUGMENTED}
    whole = Batches(dataset(), **options)  # type: ignore[arg-type]
    shards = [Batches(dataset(), shard=(rank, ranks), **options) for rank in range(ranks)]  # type: ignore[arg-type]
    assert {len(shard) for shard in shards} == {len(whole)}
    assert {shard.images_per_epoch for shard in shards} == {whole.images_per_epoch}
    parts = zip(*(shard.indexed(3, start=1) for shard in shards), strict=True)
    for batch, part in zip(whole.indexed(3, start=1), parts, strict=True):
        assert max(len(p[1]) for p in part) - min(len(p[1]) for p in part) <= 1
        for one, pieces in zip(batch, zip(*part, strict=True), strict=True):
            assert torch.equal(one, torch.cat(pieces))


def test_normalise_of_the_dataset() -> None:
    data = replace(dataset(name="digits"), normalise="standard")
    assert default_normalise(data) == Batches(data, batch_size=4).normalise == "standard"
    assert Batches(data, batch_size=4, normalise="unit").normalise == "unit"


# --- one batch ahead --------------------------------------------------------------------------------------------------


class FakeTensor:
    """Says which stream uses it besides its own."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_stream(self, stream: FakeStream) -> None:
        self.log.append(f"{self.name} used on {stream.name}")


class FakeStream:
    """Writes down what waits for what."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_batches_from_the_host_are_one_ahead_on_a_side_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    main, side = FakeStream("main", log), FakeStream("side", log)
    streams = [main]

    @contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        streams.append(stream)
        yield
        streams.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)

    def make() -> Iterator[tuple[FakeTensor]]:
        for number in range(3):
            log.append(f"{number} made on {streams[-1].name}")
            yield (FakeTensor(str(number), log),)

    for (tensor,) in prefetch.ahead(make(), torch.device("cuda")):  # type: ignore[arg-type]
        assert streams == [main]
        log.append(f"{tensor.name} computed")
    assert log == [
        "side waits for main",
        "0 made on side", "main waits for side", "0 used on main", "1 made on side", "0 computed",
        "main waits for side", "1 used on main", "2 made on side", "1 computed",
        "main waits for side", "2 used on main", "2 computed",
    ]  # fmt: skip


def test_only_batches_that_a_gpu_gets_from_the_host_are_made_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def ahead(batches: Iterator[tuple[Tensor, ...]], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
        asked.append(device)
        return batches

    monkeypatch.setattr(loader, "ahead", ahead)
    batches = Batches(dataset(), batch_size=4)
    batches.epoch(0)
    assert asked == []
    batches.device = torch.device("cuda", 0)
    batches.epoch(0)
    assert asked == [torch.device("cuda", 0)]


@pytest.mark.parametrize("device", [CUDA])
def test_batches_made_ahead_are_the_same_while_the_gpu_is_busy(device: str) -> None:
    """The caller's stream lags behind, so memory that was used again too early would show."""
    data = dataset(count=2000, height=32, width=32)
    host = Batches(data, batch_size=100, **AUGMENTED)  # type: ignore[arg-type]
    sent = Batches(data, batch_size=100, device=device, resident=False, **AUGMENTED)  # type: ignore[arg-type]
    found = []
    busy = torch.rand(2048, 2048, device=device)
    for images, labels in sent.epoch(1):
        for _ in range(20):
            busy = torch.tanh(busy @ busy)
        found.append((images + 0 * busy[0, 0], labels + 0))
        del images, labels
    for (images, labels), (images_found, labels_found) in zip(host.epoch(1), found, strict=True):
        torch.testing.assert_close(images_found.cpu(), images, rtol=1e-6, atol=1e-6)
        assert torch.equal(labels_found.cpu(), labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"crop_padding": -1}, "crop_padding must be 0 or more"),
        ({"shard": (2, 2)}, r"shard must be \(rank, ranks\) with 0 <= rank < ranks, got \(2, 2\)"),
        ({"normalise": "zscore"}, "normalise must be one of unit, standard; got 'zscore'"),
        ({"split": "val"}, "split must be one of train, test; got 'val'"),
        ({"batch_size": 24}, "batch_size 24 leaves no full batch of the 23 train images"),
    ],
)
def test_wrong_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Batches(dataset(), **{"batch_size": 4, **options})  # type: ignore[arg-type]


def test_wrong_epoch_and_start_are_refused_at_once() -> None:
    batches = Batches(dataset(), batch_size=4)
    with pytest.raises(DataError, match=r"start must be in 0\.\.5, got 6"):
        batches.epoch(0, start=6)
    with pytest.raises(DataError, match="epoch must be 0 or more, got -1"):
        batches.epoch(-1)


@pytest.mark.parametrize("device", [CUDA])
def test_batches_are_the_same_on_every_device(device: str) -> None:
    for normalise in ("unit", "standard"):
        options = {"batch_size": 4, "crop_padding": 2, "flip": True, "normalise": normalise}
        host = Batches(dataset(), **options)  # type: ignore[arg-type]
        other = Batches(dataset(), device=device, **options)  # type: ignore[arg-type]
        for (images, labels), (images_other, labels_other) in zip(host.epoch(1), other.epoch(1), strict=True):
            assert images_other.device.type == device
            assert images_other.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(images_other.cpu(), images, rtol=1e-6, atol=1e-6)
            assert torch.equal(labels_other.cpu(), labels)
