"""``ep-train eval``: how well the network of a run does, class by class."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from ..config import TrainConfig
from ..config_file import with_free
from ..data import Batches, Dataset, load_dataset
from ..device import check_name
from ..trained import Backend, Trained, load_trained
from .output import write_json


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate the network of a run: accuracy, loss, residual, accuracy by class, confusion matrix."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    dataset: str | None = None
    """Other images than the run's own: as --dataset of ep-train; of the same size and classes."""
    data_root: Path | None = None
    """Folder that holds the dataset's files, or that a folder:PATH is in, unless that is absolute (default: the run's,
    or the dataset's usual place)."""
    data_cache: Literal["memory", "mmap"] | None = None
    """Where the images of a folder:PATH are: memory or mmap (default: as in the run)."""
    threads: int | None = None
    """CPU threads (default: as in the run)."""
    split: Literal["test", "train"] = "test"
    """Which images."""
    free_steps: int | None = None
    """Sweeps of the free phase (default: those of the run's own evaluation)."""
    batch_size: int = 256
    """Images at a time."""
    json: Path | None = None
    """Write everything here as JSON (-: to the standard output, in place of the table)."""
    device: str = "auto"
    """auto (a GPU where torch sees one, else the CPU), cpu, cuda, or cuda:N."""
    backend: Backend = "auto"
    """Which kernels run."""

    def __post_init__(self) -> None:
        check_name(self.device, "EvalConfig")
        if self.batch_size < 1:
            raise ValueError(f"EvalConfig: argument 'batch_size': expected an integer >= 1, got {self.batch_size}")


def run_eval(config: EvalConfig) -> int:
    """The command; returns its exit code."""
    trained = load_trained(config.run, device=config.device, backend=config.backend, free_steps=config.free_steps)
    own = trained.config if config.dataset is None else replace(trained.config, dataset=config.dataset)
    own = with_free(own, data_root=config.data_root, data_cache=config.data_cache, threads=config.threads)
    if own.threads is not None:
        torch.set_num_threads(own.threads)
    dataset = _dataset(config, own)
    trained.check(dataset)
    result = {"run": str(config.run), **evaluate(trained, dataset, config.split, batch_size=config.batch_size)}
    if config.json is None or str(config.json) != "-":
        print(_table(result))
    if config.json is not None:
        write_json(config.json, result)
    return 0


def evaluate(
    trained: Trained, dataset: Dataset, split: Literal["test", "train"], *, batch_size: int = 256
) -> dict[str, Any]:
    """Accuracies are fractions; the loss is the readout's, its mean over images; residuals are of the free phase.

    Images are normalised as the run's were, and not augmented.

    Returns:
        ``confusion``: [classes][classes] counts, of the true class in rows and the predicted one in columns. The
        accuracy of a class without images is None; so is the residual of what has no free phase.
    """
    reads = trained.normalisation
    batches = Batches(
        replace(dataset, mean=reads.mean, std=reads.std),
        split,
        batch_size=batch_size,
        shuffle=False,
        drop_last=False,
        normalise="standard",
        device=trained.device,
    )
    classes = dataset.classes
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=trained.device)
    losses, residuals = [], []
    with trained.in_force():
        for images, labels in batches.epoch(0):
            outputs, residual = trained.predict(images)
            losses.append(trained.loss(outputs, labels).double())
            confusion += torch.bincount(labels * classes + outputs.argmax(1), minlength=classes * classes)
            if residual is not None:
                residuals.append(residual)
    table = confusion.view(classes, classes).cpu()
    count, right = table.sum(1).tolist(), table.diagonal().tolist()
    residual = torch.cat(residuals) if residuals else None
    return {
        "data": dataset.source,
        "split": split,
        "images": sum(count),
        "free_steps": None if trained.relax is None else trained.relax.free_steps,
        "accuracy": sum(right) / sum(count),
        "loss": float(torch.cat(losses).mean()),
        "residual": None if residual is None else float(residual.double().mean()),
        "largest_residual": None if residual is None else float(residual.max()),
        "classes": [
            {"name": name, "images": n, "accuracy": r / n if n else None}
            for name, n, r in zip(dataset.class_names, count, right, strict=True)
        ],
        "confusion": table.tolist(),
    }


def _dataset(config: EvalConfig, own: TrainConfig) -> Dataset:
    """The run's own, with its limits and the images that its seed held out, or another one whole."""
    if config.dataset is not None:
        cache = own.data_cache if config.data_cache is not None or config.dataset.startswith("folder:") else "memory"
        return load_dataset(config.dataset, root=config.data_root, seed=own.seed, data_cache=cache)
    return load_dataset(
        own.dataset,
        root=own.data_root,
        train_limit=own.train_limit,
        test_limit=own.test_limit,
        seed=own.seed,
        data_cache=own.data_cache,
    )


def _table(result: dict[str, Any]) -> str:
    sweeps = "" if result["free_steps"] is None else f", {result['free_steps']} sweeps"
    lines = [
        f"{result['data']}: {result['images']:,} {result['split']} images{sweeps}",
        f"accuracy {100 * result['accuracy']:.2f} %  loss {result['loss']:.4f}",
    ]
    if result["residual"] is not None:
        lines[-1] += f"  residual {result['residual']:.1e} (largest {result['largest_residual']:.1e})"
    width = max(len(entry["name"]) for entry in result["classes"])
    for label, entry in enumerate(result["classes"]):
        if not entry["images"]:
            continue
        row = result["confusion"][label]
        taken = [(n, other) for other, n in enumerate(row) if n and other != label]
        worst = f"  most often taken for {result['classes'][max(taken)[1]]['name']} ({max(taken)[0]})" if taken else ""
        lines.append(f"  {entry['name']:{width}}  {100 * entry['accuracy']:6.2f} % of {entry['images']:,}{worst}")
    return "\n".join(lines)
