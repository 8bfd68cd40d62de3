"""EquilibriumNet under Hugging Face Accelerate, between modules that learn by backpropagation.

pip install accelerate && accelerate launch examples/accelerate_loop.py
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ep_kernels import Connection, EquilibriumNet, Head, Network


def build() -> nn.Sequential:
    """A backprop stem, two EP layers whose outputs are their states, and a backprop classifier."""
    network = Network(
        shapes=((16, 8, 8), (32, 4, 4), (64, 2, 2)),
        connections=(Connection(0, 1, pool="max"), Connection(1, 2, pool="max")),
        readout=Head(2, None, loss="mse"),
    )
    stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Sigmoid())
    return nn.Sequential(stem, EquilibriumNet(network), nn.Flatten(), nn.Linear(256, 10))


def main(epochs: int = 6, train: int = 1437, **options: Any) -> float:
    """Trains, and returns the accuracy on the images that were held out."""
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2, **options)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    loader = DataLoader(TensorDataset(images[:train], labels[:train]), batch_size=16, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(epochs):
        model.train()
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        found = model(images[1437:].to(accelerator.device)).argmax(1).cpu()
    return (found == labels[1437:]).float().mean().item()


if __name__ == "__main__":
    print(f"test accuracy {main():.3f}")
