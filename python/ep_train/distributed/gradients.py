"""The mean of gradients over processes, sent in buckets while later gradients are still being computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .processes import Processes

BUCKET = 25 * 2**20  # bytes; as torch's DistributedDataParallel


@dataclass
class _Sent:
    """A bucket on its way: all of ``tensors`` in one flat buffer."""

    buffer: Tensor
    tensors: list[Tensor]
    work: dist.Work | None


class GradientMean:
    """Gradients of local batches become the gradient of the global batch: their mean weighted by local batch sizes.

    ``begin``, then ``add`` for each gradient once it is computed, then ``finish``. A message has a price, so tensors
    travel together, in the order in which they came: a bucket goes out as soon as it has ``size`` bytes, and ``finish``
    sends the rest and waits for all. All processes have to add the same tensors in the same order.

    Args:
        size: bytes of a bucket, at least, but for the last one.

    Attributes:
        buckets: bytes of those of the last batch.
    """

    def __init__(self, processes: Processes, *, size: int = BUCKET) -> None:
        self.processes, self.size = processes, size
        self.buckets: list[int] = []
        self._share = 1.0
        self._waiting: list[Tensor] = []
        self._sent: list[_Sent] = []
        self._buffers: list[Tensor] = []  # kept from batch to batch
        self._layout: list[tuple[str, tuple[int, ...], str]] = []
        self._checked = False

    def begin(self, share: float) -> None:
        """A new batch, of which this process has the fraction ``share``; what a broken one has left is forgotten."""
        self._share = share
        self._waiting, self._sent, self.buckets, self._layout = [], [], [], []

    def add(self, name: str, gradient: Tensor) -> None:
        """Take a gradient of the local batch's mean loss; after :meth:`finish` it is that of the global batch's.

        Raises:
            LostContact: another process is gone.
        """
        if not self.processes.several:
            return
        if not self._checked:  # of the first batch nothing goes out before it is known that all send the same
            self._layout.append((name, tuple(gradient.shape), str(gradient.dtype)))
            self._waiting.append(gradient)
            return
        if self._waiting and gradient.dtype != self._waiting[0].dtype:
            self._send()
        self._waiting.append(gradient)
        if sum(t.numel() * t.element_size() for t in self._waiting) >= self.size:
            self._send()

    def finish(self) -> None:
        """Wait for all buckets (on a GPU, the device does) and write the means into the tensors that were added.

        Raises:
            LostContact: another process is gone.
            ProcessError: in the first batch: the processes have not added the same gradients.
        """
        if not self.processes.several:
            return
        if not self._checked:
            self.processes.same("gradients", self._layout)
            self._checked = True
            held, self._waiting = self._waiting, []
            for (name, *_), gradient in zip(self._layout, held, strict=True):
                self.add(name, gradient)
        if self._waiting:
            self._send()
        for sent in self._sent:
            if sent.work is not None:
                with self.processes.contact():
                    sent.work.wait()
            for tensor, part in zip(sent.tensors, sent.buffer.split([t.numel() for t in sent.tensors]), strict=True):
                view = _ordered(tensor)
                view.copy_(part.view(view.shape))
        self._sent = []

    def _send(self) -> None:
        tensors, self._waiting = self._waiting, []
        count, like, index = sum(t.numel() for t in tensors), tensors[0], len(self._sent)
        if index == len(self._buffers):
            self._buffers.append(like.new_empty(0))
        buffer = self._buffers[index]
        if (buffer.numel(), buffer.dtype, buffer.device) != (count, like.dtype, like.device):
            buffer = self._buffers[index] = torch.empty(count, dtype=like.dtype, device=like.device)
        torch.cat([_ordered(t).reshape(-1) for t in tensors], out=buffer)
        if self._share:
            buffer.mul_(self._share)
        else:
            buffer.zero_()  # of no images; their mean may be no number
        with self.processes.contact():
            work = dist.all_reduce(buffer, async_op=True)
        self._sent.append(_Sent(buffer, tensors, work))
        self.buckets.append(buffer.numel() * buffer.element_size())


def _ordered(tensor: Tensor) -> Tensor:
    """Convolution weights with channels last, as they lie in memory; all processes agree on it, whatever theirs is."""
    return tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor
