"""What all processes do after the same batch, though each may wish for it at a time of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .processes import Processes


class Agreement:
    """Wishes that count for all processes once any of them has one: to stop, or to read losses from a GPU.

    ``ask`` before a batch is computed, ``answer`` after it: the question travels meanwhile, on the host.

    Args:
        names: of the wishes.

    Attributes:
        agreed: the last answer; before the first one, none of them.
    """

    def __init__(self, processes: Processes, names: Sequence[str]) -> None:
        self.processes, self.names = processes, tuple(names)
        self._asked: Tensor = torch.zeros(len(self.names), dtype=torch.int32)
        self._work: dist.Work | None = None
        self.agreed = dict.fromkeys(self.names, False)

    def ask(self, **wishes: bool) -> None:
        """Send this process's wishes.

        Raises:
            LostContact: another process is gone.
        """
        self._asked = torch.tensor([int(wishes[name]) for name in self.names], dtype=torch.int32)
        if self.processes.several:
            with self.processes.contact():
                self._work = dist.all_reduce(self._asked, dist.ReduceOp.MAX, async_op=True)

    def answer(self) -> dict[str, bool]:
        """Which of them any process had.

        Raises:
            LostContact: another process is gone.
        """
        if self._work is not None:
            with self.processes.contact():
                self._work.wait()
            self._work = None
        self.agreed = {name: bool(wish) for name, wish in zip(self.names, self._asked.tolist(), strict=True)}
        return self.agreed
