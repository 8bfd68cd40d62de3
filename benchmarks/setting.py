"""How the questions are asked: on what, in which precisions, with which batches and networks, and for how long."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch

Values = tuple[Any, ...]


@dataclass(frozen=True)
class Setting:
    """What ``python -m benchmarks run`` was given. An empty tuple: the question's own choice.

    ``quick`` shrinks networks and rounds to what tries the code in seconds; its figures mean nothing. ``wgmma``: this
    process has the opt-in main loop of the backend cuda (EP_KERNELS_WGMMA=1), whose cases are apart.
    """

    device: str = "cpu"
    models: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    precisions: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    threads: int = 2
    rounds: int = 5
    quick: bool = False
    only: str = ""
    wgmma: bool = False

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    def choose(self, given: Values, cpu: Values, cuda: Values, quick: Values) -> Any:
        """What the command line gave, else the question's choice for this device."""
        return given or (quick if self.quick else cuda if self.cuda else cpu)

    def apply(self) -> None:
        """Set this process up."""
        torch.set_num_threads(self.threads)
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True

    def json(self) -> str:
        """For a child process."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def parse(text: str) -> Setting:
        """Of :meth:`json`."""
        return Setting(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()})
