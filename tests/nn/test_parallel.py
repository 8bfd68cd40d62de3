"""DistributedDataParallel: two processes end at the gradients of one."""

from __future__ import annotations

import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ep_kernels import EquilibriumNet, Network, RelaxConfig

NETWORK = Network.chain((2, 8, 8), [4, 6], ["max", "none"], classes=3, local_heads=[1])


def mixed() -> nn.Sequential:
    torch.manual_seed(0)
    below = nn.Conv2d(1, 2, 3, padding=1)
    return nn.Sequential(below, nn.Sigmoid(), EquilibriumNet(NETWORK, RelaxConfig(estimator="tangent"), seed=1))


def loss_of(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x), y)


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def steps(net: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Two steps; the parameters after them. Local heads, which the readout's loss does not reach, are frozen."""
    plain = net.module if isinstance(net, DistributedDataParallel) else net
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        optimizer.step()
    return [p.detach() for p in plain.parameters()]


def frozen(net: nn.Sequential) -> nn.Sequential:
    net.get_submodule("2.heads.1").requires_grad_(False)
    return net


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    net = DistributedDataParallel(frozen(mixed()), bucket_cap_mb=1)
    x, y = batch()
    torch.save(steps(net, x[rank::2], y[rank::2]), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, args=(port, str(tmp_path)), nprocs=2)
    want = steps(frozen(mixed()), *batch())
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    start = list(mixed().parameters())
    assert any(not torch.equal(a, b) for a, b in zip(want, start, strict=True))
    for a, b, one in zip(first, second, want, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, one, rtol=1e-5, atol=1e-6)
