"""data_pipeline: images per second of the batches alone, fully augmented, against what a training batch consumes."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.case import Case, Competitor, Row, Timed, compete
from benchmarks.markdown import good, ms, number, table, without_figures
from benchmarks.problem import CLASSES, backends_of, label, precisions, problem_at, relative_error, size_of
from benchmarks.questions.train_batch import FEW, our_batch
from benchmarks.registry import Question, Target
from benchmarks.setting import Setting
from benchmarks.timing import Times
from ep_train.data import Batches, Dataset
from ep_train.data.cache import CacheWriter, read_cache
from ep_train.data.dataset import RawData, finish
from ep_train.data.decode import BLOCK

BOUND = 10.0  # images/s of the pipeline, at least this many times those of training
IN_A_ROW = 8  # batches that one timed call makes: what is made ahead of the last one counts little
SEED = 5
AUGMENTED: dict[str, Any] = {"crop_padding": 4, "flip": True, "cutout": 8}
MEASURE = "images/s of the data pipeline, augmented / images/s of an EP training batch"


def cases(setting: Setting) -> list[Case]:
    """A case a network and batch."""
    models = setting.choose(setting.models, ("vgg8/4",), ("vgg8/4",), ("3p-4",))
    batches = setting.choose(setting.batches, (32,), (256,), (4,))
    return [Case(f"{m}, batch {b}", partial(pipeline_rows, setting, m, b), 240.0) for m in models for b in batches]


def pipeline_rows(setting: Setting, model: str, batch: int) -> list[Row]:
    """Times of a training batch and of the pipelines in turn, a batch each, and images per second."""

    def rate(_name: str, times: Times) -> Row:
        return {"images_per_s": batch / times.median}

    precision = precisions(setting, cuda=("fp16",))[0]
    on = backends_of(setting)[0]
    training = f"EP training, {label(on, setting)}, {precision.name}"
    given = partial(problem_at, setting, model, batch)
    found = [Competitor(training, partial(our_batch, setting, given, on, precision, FEW))]
    for name, options, how in pipelines(setting):
        make = partial(pipeline, setting, batch, options, how)
        found.append(Competitor(f"pipeline, {name}", make))
    rows = compete(setting, found, against=training, least=0.05, warmup=2, after=rate)
    return [{**row, "model": model, "batch": batch, "training": row["name"] == training} for row in rows]


def pipelines(setting: Setting) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, augmentation, and where the images are: ``mapped``, and of `Batches` ``resident``."""
    found: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("augmented", AUGMENTED, {}),
        ("augmented, memory-mapped", AUGMENTED, {"mapped": True, "resident": False}),
        ("not augmented", {}, {}),
    ]
    if setting.cuda:
        found.insert(1, ("augmented, from the host", AUGMENTED, {"resident": False}))
    return found


def pipeline(setting: Setting, batch: int, options: dict[str, Any], how: dict[str, Any]) -> Timed:
    """``IN_A_ROW`` batches, from epochs that follow one another."""
    where = dict(how)
    dataset = images_of(setting, mapped=where.pop("mapped", False))
    batches = Batches(dataset, batch_size=batch, seed=SEED, device=setting.device, **options, **where)
    endless = forever(batches.epoch)

    def work() -> list[tuple[Tensor, Tensor]]:
        return list(itertools.islice(endless, IN_A_ROW))

    def verify() -> float:
        images, labels, places = next(batches.indexed(1))
        expected = by_hand(dataset, places.cpu(), 1, **options).to(images.device)
        if not torch.equal(labels.cpu(), dataset.train_labels[places.cpu()]):
            return float("nan")
        return relative_error(images, expected)

    return Timed(work, verify, 1e-5, calls=IN_A_ROW, values={"augmented": bool(options), "mapped": "mapped" in how})


def forever(epoch: Callable[[int], Iterator[tuple[Tensor, Tensor]]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of epoch 0, 1, and so on."""
    return itertools.chain.from_iterable(epoch(number) for number in itertools.count())


@lru_cache(maxsize=2)
def images_of(setting: Setting, *, mapped: bool) -> Dataset:
    """Noise of CIFAR's size; ``mapped``: the same in a cache file, which has no name any more."""
    count, side = 64 if setting.quick else 20_000, size_of(setting)
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    if mapped:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "images.safetensors"
            with CacheWriter(path, "noise", count) as writer:
                writer.begin((count, side, side, 3))
                for start in range(0, count, BLOCK):
                    writer.put(start, images[start : start + BLOCK].numpy())
                writer.finish()
            found = read_cache(path, "noise", count, mapped=True)
            if found is None:
                raise RuntimeError("the cache of decoded images cannot be read back")
            images = found.images
    nchw = images.permute(0, 3, 1, 2)
    names = tuple(str(number) for number in range(CLASSES))
    return finish(RawData("noise", nchw, labels, nchw[:1], labels[:1], names, "noise"))


def by_hand(
    dataset: Dataset, places: Tensor, epoch: int, *, crop_padding: int = 0, flip: bool = False, cutout: int = 0
) -> Tensor:
    """The batch of these images in float64, image by image, from the numbers that `Batches` documents."""
    count, channels, height, width = dataset.train_images.shape
    shift, mirror, cut = (np.random.default_rng((SEED, epoch, stream)) for stream in (1, 2, 3))
    shifts = shift.integers(0, 2 * crop_padding + 1, size=(count, 2))
    mirrored = mirror.integers(0, 2, size=count) if flip else np.zeros(count)
    centres = cut.integers(0, (height, width), size=(count, 2))
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (dataset.mean, dataset.std))
    out = []
    for place in places.tolist():
        padded = torch.zeros(channels, height + 2 * crop_padding, width + 2 * crop_padding, dtype=torch.float64)
        inner = slice(crop_padding, crop_padding + height), slice(crop_padding, crop_padding + width)
        padded[:, inner[0], inner[1]] = dataset.train_images[place].double() / 255
        row, column = shifts[place].tolist()
        image = padded[:, row : row + height, column : column + width]
        image = image.flip(2) if mirrored[place] else image.clone()
        top, left = (int(centre) - cutout // 2 for centre in centres[place])
        image[:, max(top, 0) : max(top + cutout, 0), max(left, 0) : max(left + cutout, 0)] = 0
        out.append((image - mean) / std)
    return torch.stack(out)


# --- report -----------------------------------------------------------------------------------------------------------


def lines(rows: Sequence[Row]) -> list[str]:
    """A line a network, batch and competitor."""
    cells = [
        [row["model"], str(row["batch"]), row["name"], number(row["images_per_s"], 4), ms(row), number(times(row))]
        for row in good(rows)
    ]
    head = ("network", "batch", "what", "images/s", "ms a batch (quantiles 0.2 to 0.8)", "times training")
    return [*table(head, cells), *without_figures(rows)]


def times(row: Row) -> float | None:
    """Images per second, divided by training's of the same round."""
    return 1 / row["ratio"]["0.5"] if row.get("ratio") else None


def targets(rows: Sequence[Row]) -> list[Target]:
    """Of the pipelines with augmentation; those without have less to do."""
    return [
        Target(MEASURE, times(row), ">=", BOUND, f"{row['model']}, batch {row['batch']}, {row['name']}")
        for row in good(rows)
        if row.get("augmented")
    ]


QUESTION = Question(
    "data_pipeline",
    "images/s of the data pipeline alone, against those of an EP training batch",
    cases,
    lines,
    conditions=(
        "20,000 uint8 images of 3x32x32, noise, in random order, normalised by mean and standard deviation; augmented: "
        "crops after padding by 4, mirroring, cutout of 8; training: k 0.02, T 2 + K 1 tangent, the fastest setting, "
        "without the optimizer's step, of the same batch; one process, in turn"
    ),
    targets=targets,
    asked=(Target(MEASURE, None, ">=", BOUND, "vgg8/4, batch 256"),),
    seconds={"cpu": 30.0, "cuda": 15.0},
)
