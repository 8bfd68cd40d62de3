"""One small trained run for all commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ep_train import TrainConfig, train
from ep_train.data import load_dataset


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8x8 digits, two layers, one epoch, few sweeps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = TrainConfig(
        model="4p-8",
        epochs=1,
        batch_size=20,
        train_limit=400,
        test_limit=100,
        lr=0.01,
        free_steps=3,
        nudged_steps=1,
        estimator="tangent",
        device="cpu",
        out=tmp_path_factory.mktemp("trained") / "run",
        quiet=True,
    )
    _, path = train(config)
    torch.set_num_threads(threads)
    return path


@pytest.fixture(scope="session")
def test_set() -> tuple[Tensor, Tensor]:
    """The images, uint8 [100, 1, 8, 8], and labels that the run was tested on."""
    data = load_dataset("digits", train_limit=400, test_limit=100, seed=0)
    return data.test_images, data.test_labels
