"""Named chains of 3x3 convolutions, and specs such as ``64p-128p-256``.

Widths and pools are the VGG pattern (Simonyan & Zisserman 2015) as the EP literature uses it: 3x3 convolutions, 2x2 max
pooling, one linear readout outside the dynamics. The number in a name counts the convolutions and the readout, except
``vgg11``: the eight convolutions of VGG-A with one readout instead of its three linear layers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Widths of the convolutions, and which of them are pooled (counted from 1)."""

    channels: tuple[int, ...]
    pooled: tuple[int, ...]

    @property
    def least(self) -> int:
        """The smallest side of an input."""
        return 1 << len(self.pooled)


ARCHITECTURES: dict[str, Architecture] = {
    "digits": Architecture((32, 32, 64, 64), (2, 4)),
    "vgg5": Architecture((128, 256, 512, 512), (1, 2, 3, 4)),
    "vgg7": Architecture((128, 128, 256, 256, 512, 512), (2, 4, 6)),
    "vgg8": Architecture((128, 128, 256, 256, 512, 512, 512), (2, 4, 6, 7)),
    "vgg11": Architecture((64, 128, 256, 256, 512, 512, 512, 512), (1, 2, 4, 6, 8)),
}


def architecture_of(model: str, argument: str) -> Architecture:
    """A name of ``ARCHITECTURES``, or a spec: widths with ``p`` after the pooled ones, as ``32-32p-64-64p``.

    Raises:
        ValueError: neither; ``argument`` says whose it is.
    """
    if model in ARCHITECTURES:
        return ARCHITECTURES[model]
    parts = model.split("-")
    widths = [part.removesuffix("p") for part in parts]
    if not all(width.isdecimal() and int(width) > 0 for width in widths):
        names = ", ".join(ARCHITECTURES)
        raise ValueError(f"{argument}: expected one of {names}, or widths as 32-32p-64-64p (p: pooled), got {model!r}")
    pooled = tuple(i for i, part in enumerate(parts, 1) if part.endswith("p"))
    return Architecture(tuple(map(int, widths)), pooled)
