"""``ep-train predict``: the classes of image files, by the network of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from ..data import DataError
from ..data.decode import read_image
from ..device import check_name
from ..trained import Backend, Trained, load_trained
from .output import write_json

BATCH = 256


@dataclass(frozen=True)
class PredictConfig:
    """The classes of image files (JPEG or PNG, of the size that the run had), by the network of a run."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    files: tyro.conf.Positional[tuple[Path, ...]]
    """The images."""
    top: int = 1
    """How many classes to show, the likeliest first."""
    free_steps: int | None = None
    """Sweeps of the free phase (default: those of the run's own evaluation)."""
    json: Path | None = None
    """Write the predictions here as JSON (-: to the standard output, in place of the lines)."""
    device: str = "auto"
    """auto (a GPU where torch sees one, else the CPU), cpu, cuda, or cuda:N."""
    backend: Backend = "auto"
    """Which kernels run."""

    def __post_init__(self) -> None:
        check_name(self.device, "PredictConfig")
        if self.top < 1:
            raise ValueError(f"PredictConfig: argument 'top': expected an integer >= 1, got {self.top}")
        if not self.files:
            raise ValueError("PredictConfig: argument 'files': expected at least one image, got none")


def run_predict(config: PredictConfig) -> int:
    """The command; returns its exit code. Nothing is shown or written unless every file could be read."""
    trained = load_trained(config.run, device=config.device, backend=config.backend, free_steps=config.free_steps)
    found = predict_files(trained, config.files, top=config.top)
    if config.json is None or str(config.json) != "-":
        for entry in found:
            print(f"{entry['file']}: {', '.join(_shown(one) for one in entry['top'])}")
    if config.json is not None:
        write_json(config.json, {"run": str(config.run), "predictions": found})
    return 0


def predict_files(trained: Trained, files: tuple[Path, ...], *, top: int = 1) -> list[dict[str, Any]]:
    """One entry per file: ``file``, ``top`` (``class``, ``label``, and its ``probability``; of an mse readout, which
    has none, the output unit's ``value``) and the ``residual`` of the free phase (None without one).

    Args:
        files: JPEG or PNG. Grey ones are also read by a network of colour images.
        top: at most the number of classes.

    Raises:
        DataError: a file cannot be read, or is of another size, or in colour where the network reads grey.
    """
    entries = []
    for start in range(0, len(files), BATCH):
        chunk = files[start : start + BATCH]
        pixels = torch.stack([read_pixels(file, trained.image_shape) for file in chunk])
        with trained.in_force():
            outputs, residual = trained.predict(trained.normalised(pixels))
        scores = outputs.softmax(1) if trained.probabilities else outputs
        values, labels = (t.tolist() for t in scores.topk(min(top, scores.shape[1]), dim=1))
        residuals = [None] * len(chunk) if residual is None else residual.tolist()
        name = "probability" if trained.probabilities else "value"
        for i, file in enumerate(chunk):
            best = [
                {"class": trained.class_names[label], "label": label, name: value}
                for label, value in zip(labels[i], values[i], strict=True)
            ]
            entries.append({"file": str(file), "top": best, "residual": residuals[i]})
    return entries


def read_pixels(file: Path, shape: tuple[int, int, int]) -> torch.Tensor:
    """An image file as uint8 in ``shape`` (C, H, W).

    Raises:
        DataError: it cannot be decoded, or has another size, or colours where C is 1.
    """
    channels, height, width = shape
    read = read_image(file, (width, height))
    pixels = torch.from_numpy(read.reshape(height, width, -1).transpose(2, 0, 1).copy())
    if len(pixels) == 1 and channels == 3:
        return pixels.expand(3, -1, -1)
    if len(pixels) != channels:
        kinds = {1: "grey", 3: "colour"}
        expected, got = (kinds.get(n, f"{n}-channel") for n in (channels, len(pixels)))
        raise DataError(f"{file}: expected a {expected} image, as the run's are, got a {got} one")
    return pixels


def _shown(one: dict[str, Any]) -> str:
    if "probability" in one:
        return f"{one['class']} ({100 * one['probability']:.1f} %)"
    return f"{one['class']} ({one['value']:.3f})"
