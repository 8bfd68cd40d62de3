"""The mean of gradients over processes, in flat buckets: a message has a price, so small tensors travel together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ep_kernels import Parameters

BUCKET = 25 * 2**20  # bytes; as torch's DistributedDataParallel


def split(tensors: Sequence[Tensor], size: int = BUCKET) -> list[list[Tensor]]:
    """In order, in groups of one dtype and at most ``size`` bytes (a larger tensor is a group of its own)."""
    groups: list[list[Tensor]] = []
    filled = 0
    for tensor in tensors:
        more = tensor.numel() * tensor.element_size()
        if not groups or filled + more > size or tensor.dtype != groups[-1][0].dtype:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += more
    return groups


class GradientMean:
    """Call it with gradients: they become the mean over the processes of ``group``, in place.

    Every process has to hold gradients of the same network. Buffers are kept for the next call.

    Args:
        size: bytes of a bucket.
        group: of torch.distributed; None is all processes.
    """

    def __init__(self, size: int = BUCKET, group: dist.ProcessGroup | None = None) -> None:
        self.size, self.group = size, group
        self._buffers: dict[int, Tensor] = {}

    def __call__(self, gradients: Parameters) -> None:
        """Without effect where there is one process."""
        count = dist.get_world_size(self.group)
        if count == 1:
            return
        for i, tensors in enumerate(split(list(gradients.named().values()), self.size)):
            bucket = self.pack(i, tensors)
            dist.all_reduce(bucket, group=self.group)
            self.unpack(bucket, tensors, count)

    def pack(self, index: int, tensors: Sequence[Tensor]) -> Tensor:
        """All of ``tensors`` in one buffer, [numbers]."""
        count, like = sum(t.numel() for t in tensors), tensors[0]
        buffer = self._buffers.get(index)
        if buffer is None or (buffer.numel(), buffer.dtype, buffer.device) != (count, like.dtype, like.device):
            buffer = self._buffers[index] = torch.empty(count, dtype=like.dtype, device=like.device)
        return torch.cat([_ordered(t).reshape(-1) for t in tensors], out=buffer)

    def unpack(self, bucket: Tensor, tensors: Sequence[Tensor], count: int) -> None:
        """``bucket / count`` back into the tensors."""
        bucket.div_(count)
        for tensor, part in zip(tensors, bucket.split([t.numel() for t in tensors]), strict=True):
            view = _ordered(tensor)
            view.copy_(part.view(view.shape))

    def copies(self, gradients: Parameters) -> None:
        """All that a call does beside the exchange itself: what a cost model adds to it."""
        for i, tensors in enumerate(split(list(gradients.named().values()), self.size)):
            self.unpack(self.pack(i, tensors), tensors, 1)


def _ordered(tensor: Tensor) -> Tensor:
    """Convolution weights with channels last, as they lie in memory; all processes agree on it, whatever theirs is."""
    return tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor
