"""Specs, the digits, limits and statistics."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_train.data import DATASET_SPECS, DataError, Dataset, default_cache_dir, load_dataset
from ep_train.data.dataset import RawData, balanced_subset, channel_statistics, finish

sklearn_datasets = pytest.importorskip("sklearn.datasets")


def raw(train: int = 20, test: int = 10, classes: int = 4, channels: int = 3) -> RawData:
    generator = torch.Generator().manual_seed(0)
    return RawData(
        name="made",
        train_images=torch.randint(0, 256, (train, channels, 5, 4), dtype=torch.uint8, generator=generator),
        train_labels=torch.arange(train) % classes,
        test_images=torch.randint(0, 256, (test, channels, 5, 4), dtype=torch.uint8, generator=generator),
        test_labels=torch.arange(test) % classes,
        class_names=tuple("abcdefgh"[:classes]),
        source="made here",
    )


@pytest.mark.parametrize("spec", ["", "mnist", "CIFAR10", "cifar10 ", "folder", "folder:"])
def test_unknown_spec_lists_the_valid_ones(spec: str) -> None:
    with pytest.raises(DataError) as error:
        load_dataset(spec)
    assert repr(spec) in str(error.value)
    assert all(name in str(error.value) for name in DATASET_SPECS)


def test_digits_values_and_split() -> None:
    data = load_dataset("digits")
    assert data.image_shape == (1, 8, 8)
    assert data.classes == 10
    assert (len(data.train_labels), len(data.test_labels)) == (1437, 360)
    stored = torch.cat([data.train_images, data.test_images]).double() / 255
    assert float((stored - (stored * 16).round() / 16).abs().max()) <= 0.5 / 255
    bunch = sklearn_datasets.load_digits()
    original = {image.tobytes(): int(label) for image, label in zip(bunch.images, bunch.target, strict=True)}
    back = (stored[:, 0] * 16).round().numpy()
    labels = torch.cat([data.train_labels, data.test_labels]).tolist()
    assert [original[image.tobytes()] for image in back] == labels  # every image has kept its label
    assert sorted(image.tobytes() for image in back) == sorted(image.tobytes() for image in bunch.images)


def test_digits_split_is_the_seed_s() -> None:
    again, same, other = (load_dataset("digits", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(again.train_images, same.train_images)
    assert torch.equal(again.test_labels, same.test_labels)
    assert not torch.equal(again.test_images, other.test_images)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        load_dataset("digits")


def test_limits_are_balanced_and_noted_in_the_source() -> None:
    data = load_dataset("digits", train_limit=100, test_limit=55, seed=3)
    assert torch.bincount(data.train_labels).tolist() == [10] * 10
    assert sorted(torch.bincount(data.test_labels).tolist()) == [5] * 5 + [6] * 5
    assert "100 of 1,437 training images, seed 3" in data.source
    assert "55 of 360 test images, seed 3" in data.source


def test_limit_that_limits_nothing() -> None:
    data = load_dataset("digits", train_limit=1437, test_limit=9999)
    assert torch.equal(data.train_images, load_dataset("digits").train_images)
    assert "of 1,437" not in data.source


@pytest.mark.parametrize("argument", ["train_limit", "test_limit"])
def test_limit_below_one(argument: str) -> None:
    with pytest.raises(DataError, match=f"{argument} must be 1 or more, got 0"):
        load_dataset("digits", **{argument: 0})  # type: ignore[arg-type]


def test_negative_seed() -> None:
    with pytest.raises(DataError, match="seed must be 0 or more, got -1"):
        load_dataset("digits", seed=-1)
    with pytest.raises(DataError, match="seed must be 0 or more, got -1"):
        finish(raw(), seed=-1)


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    limit=st.integers(1, 70),
    seed=st.integers(0, 3),
)
def test_balanced_subset(labels: list[int], limit: int, seed: int) -> None:
    chosen = balanced_subset(torch.tensor(labels), limit, seed=(seed,)).tolist()
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(limit, len(labels))
    present, total = np.bincount(labels, minlength=6), np.bincount([labels[i] for i in chosen], minlength=6)
    room = present > total  # classes with images left are at most one behind the fullest
    assert not room.any() or total[room].min() >= total.max() - 1
    more = balanced_subset(torch.tensor(labels), limit + 3, seed=(seed,)).tolist()
    assert set(chosen) <= set(more)


def test_subset_differs_by_seed() -> None:
    labels = torch.arange(1000) % 10
    first, second = (balanced_subset(labels, 100, seed=(seed,)) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_statistics_are_those_of_the_training_images_in_use() -> None:
    data = finish(raw(train=200), train_limit=50)
    values = data.train_images.double() / 255
    assert data.mean == pytest.approx(values.mean(dim=(0, 2, 3)).tolist(), rel=1e-12)
    assert data.std == pytest.approx(values.std(dim=(0, 2, 3), correction=0).tolist(), rel=1e-12)


def test_statistics_of_a_constant_are_exact() -> None:
    mean, std = channel_statistics(torch.full((5000, 1, 3, 3), 255, dtype=torch.uint8))
    assert (mean, std) == ((1.0,), (0.0,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train_images": torch.zeros(20, 3, 5, 4)},
            r"train split: images must be uint8 \[N, C, H, W\], got torch.float",
        ),
        ({"test_labels": torch.zeros(10)}, r"test split: labels must be int64 \[N\], got torch.float32"),
        ({"test_labels": torch.zeros(9, dtype=torch.int64)}, "test split: 10 images but 9 labels"),
        ({"train_labels": torch.full((20,), -1)}, r"labels must be in 0\.\.3, found -1\.\.-1"),
        ({"test_images": torch.zeros(10, 3, 4, 5, dtype=torch.uint8)}, "3x5x4 and test images 3x4x5"),
        ({"test_images": torch.zeros(0, 3, 5, 4, dtype=torch.uint8), "test_labels": torch.arange(0)}, "no images"),
        ({"mean": (0.5,)}, r"one number per channel \(3\), got 1 and 3"),
    ],
)
def test_dataset_refuses_what_does_not_fit(change: dict[str, object], message: str) -> None:
    data = finish(raw())
    with pytest.raises(DataError, match=message):
        replace(data, **change)  # type: ignore[arg-type]


def test_limits_on_wrong_labels_are_data_errors() -> None:
    with pytest.raises(DataError, match="20 images but 19 labels"):
        finish(raw()._replace(train_labels=torch.arange(19) % 4), train_limit=4)


def test_dataset_cannot_be_changed() -> None:
    data: Dataset = finish(raw())
    with pytest.raises(AttributeError):
        data.name = "other"  # type: ignore[misc]


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "ep-kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the XDG specification: to be ignored
    assert default_cache_dir() == Path.home() / ".cache" / "ep-kernels"
