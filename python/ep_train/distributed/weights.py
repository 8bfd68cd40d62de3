"""The same weights in all processes: at first by copying, then because all make the same steps; checked."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .processes import ProcessError, Processes

DRIFT = 1e-4  # relative difference of a tensor's norm: far above what rounding adds up to on unlike processors


@torch.no_grad()
def spread(processes: Processes, module: nn.Module) -> None:
    """Give all processes the first one's parameters and buffers, in place.

    Raises:
        LostContact: another process is gone.
    """
    if not processes.several:
        return
    with processes.contact():
        for tensor in module.state_dict().values():
            dense = tensor.detach().clone(memory_format=torch.contiguous_format)
            dist.broadcast(dense, 0)
            tensor.copy_(dense)


@torch.no_grad()
def check_alike(processes: Processes, module: nn.Module) -> None:
    """Make sure that all processes have the same weights still.

    Raises:
        ProcessError: a tensor's norm is another one than the first process's, in all processes.
        LostContact: another process is gone.
    """
    if not processes.several:
        return
    named = {name: t for name, t in module.state_dict().items() if t.is_floating_point()}
    ours = torch.stack([_norm(t) for t in named.values()]).cpu()
    first = ours.clone()
    with processes.contact():
        dist.broadcast(first, 0)
    odd = torch.zeros(len(named), processes.count, dtype=torch.int64)
    odd[:, processes.rank] = ~torch.isclose(ours, first, rtol=DRIFT, atol=0.0, equal_nan=True)
    processes.sum(odd)
    if odd.any():
        index, rank = odd.nonzero()[0].tolist()
        raise ProcessError(
            f"'{list(named)[index]}' is no longer the same in process {rank} as in the first one: every process has to "
            "make the same steps (is something changed in one of them alone?)"
        )


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return norm
