"""EquilibriumNet in a LightningModule: nothing about it is special.

pip install lightning && python examples/lightning_module.py
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ep_kernels import EquilibriumNet, Network


class Digits(lightning.LightningModule):
    """Ten classes from 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = EquilibriumNet(Network.chain((1, 8, 8), [32, 64], ["max", "max"], classes=10))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        assert self.net.residual is not None
        self.log("residual", self.net.residual.max(), prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main(epochs: int = 6, train: int = 1437, **trainer: Any) -> float:
    """Trains with gradient accumulation and clipping, and returns the accuracy on the images that were held out."""
    lightning.seed_everything(0, verbose=False)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    fit = DataLoader(torch.utils.data.Subset(data, range(train)), batch_size=16, shuffle=True)
    held_out = DataLoader(torch.utils.data.Subset(data, range(1437, 1797)), batch_size=360)
    run = lightning.Trainer(max_epochs=epochs, accumulate_grad_batches=2, gradient_clip_val=1.0, **trainer)
    run.fit(Digits(), fit, held_out)
    return float(run.callback_metrics["accuracy"])


if __name__ == "__main__":
    main()
