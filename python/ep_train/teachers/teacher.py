"""A module that is only looked at: logits and features by name, from one pass without gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Dataset
from ..data.loader import default_normalise


@dataclass(frozen=True)
class Normalisation:
    """How images were normalised: ``(pixels - mean) / std`` per channel, pixels in [0, 1].

    Attributes:
        mean, std: one number per channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @staticmethod
    def of(dataset: Dataset) -> Normalisation:
        """That of the batches of a dataset (``ep_train.data.Batches`` with its default)."""
        if default_normalise(dataset) == "unit":
            return Normalisation((0.0,) * len(dataset.mean), (1.0,) * len(dataset.mean))
        return Normalisation(dataset.mean, tuple(s if s > 0.5 / 255 else 1.0 for s in dataset.std))


Hook = Callable[[nn.Module, tuple[Any, ...], Any], None]
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Teacher(nn.Module):
    """A frozen module: in evaluation mode whatever ``train`` is called with, and without gradients.

    Attributes:
        classes: outputs of the module.
        names: the modules whose outputs :meth:`outputs` returns (:meth:`watch`).
    """

    _scale: Tensor
    _shift: Tensor

    def __init__(
        self,
        module: nn.Module,
        *,
        image_shape: tuple[int, int, int],
        names: Sequence[str] = (),
        images: Normalisation | None = None,
        reads: Normalisation | None = None,
        identity: str = "",
    ) -> None:
        """
        Args:
            module: images [B, C, H, W] to logits [B, classes].
            image_shape: (C, H, W) of the batches that :meth:`outputs` will be given. Grey images are repeated for a
                module that reads three channels (by ``reads``).
            names: modules to watch, as in ``module.named_modules()``.
            images: how those batches are normalised.
            reads: how the module wants them; None: as they come.
            identity: what else its outputs depend on, for :meth:`digest`.

        Raises:
            ValueError: an unknown name; ``reads`` without ``images``; a module whose output is not [B, classes].
        """
        super().__init__()
        if reads is not None and images is None:
            raise ValueError(
                "Teacher: argument 'images': expected how the batches are normalised (Normalisation.of(dataset)), as "
                "this teacher normalises pixels itself, got None"
            )
        self.module = module.requires_grad_(False)
        self.train()
        self.image_shape = image_shape
        self.identity = identity
        channels = image_shape[0] if reads is None else len(reads.mean)
        if channels not in (image_shape[0], 3) or (channels != image_shape[0] and image_shape[0] != 1):
            raise ValueError(
                f"Teacher: argument 'image_shape': expected {channels} channels, as the teacher reads, got "
                f"{image_shape[0]}"
            )
        scale, shift = torch.ones(channels), torch.zeros(channels)
        if reads is not None and images is not None:
            mean, std, want, spread = (
                torch.tensor(v, dtype=torch.float64).expand(channels)
                for v in (images.mean, images.std, reads.mean, reads.std)
            )
            scale, shift = (std / spread).float(), ((mean - want) / spread).float()
        self.register_buffer("_scale", scale.view(-1, 1, 1))
        self.register_buffer("_shift", shift.view(-1, 1, 1))
        self._as_they_come = reads is None
        self.names: tuple[str, ...] = ()
        self.watch(names)
        logits, _ = self.outputs(self._blank())
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"Teacher: argument 'module': expected outputs of shape [B, classes], got {got}")
        self.classes = logits.shape[1]

    def train(self, mode: bool = True) -> Teacher:
        """Nothing: a teacher stays in evaluation mode."""
        return super().train(False)

    def watch(self, names: Sequence[str]) -> None:
        """Watch these modules from now on. Raises ValueError for an unknown name."""
        known = dict(self.module.named_modules())
        for name in names:
            if name not in known or not name:
                names = self._worth_watching()
                shown = ", ".join(names[:40]) + (", ..." if len(names) > 40 else "")
                raise ValueError(f"Teacher: argument 'names': expected modules of the teacher ({shown}), got {name!r}")
        self.names = tuple(dict.fromkeys(names))

    @torch.no_grad()
    def outputs(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [B, classes] and, by name, the features of the watched modules ([B, C, H, W] or [B, F]).

        One pass. Both come in the dtype of ``images``; what a module puts out first is taken if it is a tuple.
        """
        found: dict[str, Tensor] = {}
        hooks = [self.module.get_submodule(n).register_forward_hook(_keep(found, n, images.dtype)) for n in self.names]
        try:
            logits = self.module.eval()(self._read(images))
        finally:
            for hook in hooks:
                hook.remove()
        missing = [name for name in self.names if name not in found]
        if missing:
            raise ValueError(f"Teacher: argument 'names': expected modules that put out a tensor, got {missing}")
        return logits.to(images.dtype) if isinstance(logits, Tensor) else logits, found

    @torch.no_grad()
    def layers(self) -> list[tuple[str, tuple[int, ...], int]]:
        """Every module in the order of its last call: name, output shape of one image, convolutions so far.

        Those that only pass on what they are given (nn.Identity, a dropout in evaluation mode) are left out.
        """
        calls: dict[str, tuple[tuple[int, ...], int]] = {}
        given: dict[str, tuple[Tensor, int]] = {}  # to modules that are running; how often it has been written to
        convolutions = 0

        def enter(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
                if arguments and isinstance(arguments[0], Tensor):
                    given[name] = arguments[0], arguments[0]._version

            return hook

        def note(name: str, kind: nn.Module) -> Hook:
            def hook(_: nn.Module, __: object, output: object) -> None:
                nonlocal convolutions
                convolutions += isinstance(kind, nn.Conv2d) and max(kind.kernel_size) > 1
                entered, version = given.pop(name, (None, 0))
                passed_on = entered is not None and output is entered and entered._version == version
                if isinstance(output, Tensor) and not passed_on:  # one that works in place has written to it
                    calls.pop(name, None)
                    calls[name] = (tuple(output.shape[1:]), convolutions)

            return hook

        parts = [(n, m) for n, m in self.module.named_modules() if n]
        hooks = [module.register_forward_hook(note(name, module)) for name, module in parts]
        hooks += [module.register_forward_pre_hook(enter(name)) for name, module in parts]
        try:
            self.module.eval()(self._read(self._blank()))
        finally:
            for hook in hooks:
                hook.remove()
        return [(name, *call) for name, call in calls.items()]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the features of every watched module, for one image."""
        return {name: tuple(t.shape[1:]) for name, t in self.outputs(self._blank())[1].items()}

    def digest(self) -> str:
        """sha256 of everything that its outputs depend on, in hexadecimal."""
        total = hashlib.sha256(f"{self.identity}|{type(self.module).__qualname__}|{self.image_shape}".encode())
        for name, tensor in self.state_dict().items():
            total.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    def _worth_watching(self) -> list[str]:
        """Names of modules: blocks that put out maps, in order, then single modules that do, then the others."""
        layers = self.layers()
        maps = [name for name, shape, _ in layers if len(shape) == 3]
        blocks = [name for name in maps if list(self.module.get_submodule(name).children())]
        single = [name for name in maps if name not in blocks]
        return [*blocks, *single, *(name for name, shape, _ in layers if len(shape) != 3)]

    def _blank(self) -> Tensor:
        return torch.zeros(1, *self.image_shape, device=self._scale.device, dtype=self._scale.dtype)

    def _read(self, images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"Teacher: argument 'images': expected shape [B, {', '.join(map(str, self.image_shape))}], got "
                f"{list(images.shape)}"
            )
        images = images.to(self._scale.dtype)
        return images if self._as_they_come else images * self._scale + self._shift


def _keep(found: dict[str, Tensor], name: str, dtype: torch.dtype) -> Hook:
    """A hook that keeps a copy: the next module may work in place."""

    def hook(_: nn.Module, __: object, output: object) -> None:
        if isinstance(output, tuple) and output:
            output = output[0]
        if isinstance(output, Tensor):
            found[name] = output.detach().to(dtype, copy=True)

    return hook
