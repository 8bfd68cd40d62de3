"""EquilibriumNet in an ordinary training loop: scikit-learn's digits on one core, in seconds.

python examples/plain_loop.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from ep_kernels import EquilibriumNet, Network


def main(epochs: int = 6, train: int = 1437) -> float:
    """Trains, and returns the accuracy on the images that were held out."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [N, 1, 8, 8] in 0..1
    labels = torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(images[:train], labels[:train]), batch_size=32, shuffle=True)

    net = EquilibriumNet(Network.chain((1, 8, 8), [32, 32, 64], ["none", "max", "max"], classes=10))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for epoch in range(epochs):
        for x, y in loader:
            loss = F.cross_entropy(net(x), y)  # the free phase
            optimizer.zero_grad()
            loss.backward()  # the nudged phases
            optimizer.step()
        assert net.residual is not None
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, residual {net.residual.max().item():.1e}")
    with torch.no_grad():
        accuracy = (net(images[-360:]).argmax(1) == labels[-360:]).float().mean().item()
    print(f"test accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
