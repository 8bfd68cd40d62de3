"""Named networks, and specs such as ``64p-128p-256``. docs/networks.md is the table of them.

Most are chains of 3x3 convolutions with 2x2 max pooling (the VGG pattern of Simonyan & Zisserman 2015) and one linear
readout. The number in ``vgg5`` to ``vgg9`` counts the convolutions and the readout; ``vgg11``, ``vgg13`` and ``vgg16``
are the 8, 10 and 13 convolutions of the columns A, B and D of that paper's table 1, with one readout instead of its
three linear layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from .network import Connection, Pool


@dataclass(frozen=True)
class Architecture:
    """What a network is before its input, its classes and its constants are known.

    Attributes:
        channels: widths of the convolutional nodes, from node 1.
        pooled: of a chain, the convolutions with 2x2 pooling (counted from 1).
        paddings: of a chain, one number per convolution (default: 1 for all).
        hidden: widths of the linear nodes above.
        edges: the connections between the nodes, if it is no chain; these carry their own geometry.
        spare_pool: on an input too small for every pool, one that would leave no map is left out.
        source: where its layout comes from.
    """

    channels: tuple[int, ...]
    pooled: tuple[int, ...] = ()
    paddings: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()
    edges: tuple[Connection, ...] = ()
    spare_pool: bool = False
    source: str = ""

    @property
    def least(self) -> int:
        """The smallest side of an input."""
        return next(side for side in count(1) if self._pools(side) is not None)

    def layout(
        self, input_shape: tuple[int, int, int], *, width: float = 1.0, pool: Pool = "max"
    ) -> tuple[list[int], list[int], list[Connection]]:
        """Widths of the convolutional nodes, of the linear ones, and the connections between the former.

        What :meth:`ep_kernels.Network.graph` takes.

        Args:
            input_shape: (C, H, W); the layout depends on the smaller side where a pool may be left out.
            width: factor of every width (rounded, at least 1).
            pool: kind of the pooling.

        Returns:
            The widths of the convolutional nodes from node 1 on, those of the linear nodes above, and the connections
            between the convolutional ones.

        Raises:
            ValueError: a side below ``least``.
        """
        channels, hidden = ([max(1, round(width * w)) for w in group] for group in (self.channels, self.hidden))
        if self.edges:
            return channels, hidden, list(self.edges)
        pooled = self._pools(min(input_shape[1:]))
        if pooled is None:
            raise ValueError(
                f"Architecture.layout: argument 'input_shape': expected at least {self.least}x{self.least} (so that "
                f"pooling leaves a map of at least 1x1), got {input_shape[1]}x{input_shape[2]}"
            )
        connections = [
            Connection(i - 1, i, padding=(pad, pad), pool=pool if i in pooled else "none")
            for i, pad in enumerate(self._paddings, 1)
        ]
        return channels, hidden, connections

    @property
    def _paddings(self) -> tuple[int, ...]:
        return self.paddings or (1,) * len(self.channels)

    def _pools(self, side: int) -> tuple[int, ...] | None:
        """The convolutions that are pooled on an input of this side; None where a map would vanish."""
        if self.edges:
            return ()
        done = []
        spare = self.spare_pool
        for i, pad in enumerate(self._paddings, 1):
            side += 2 * pad - 2
            if side < 1:
                return None
            if i not in self.pooled:
                continue
            if side >= 2:
                side //= 2
                done.append(i)
            elif spare:
                spare = False
            else:
                return None
        return tuple(done)


def _strided(src: int, dst: int, kernel: int) -> Connection:
    return Connection(src, dst, (kernel, kernel), (2, 2), (kernel // 2, kernel // 2))


# Blocks of two nodes, (2b, 2b + 1, 2b + 2): 3x3, then 3x3 with stride 2 beside a 1x1 skip with stride 2. The order of
# the connections is that of the published gains.
_RESIDUAL = (
    (Connection(0, 1), _strided(1, 2, 3), _strided(0, 2, 1)),
    *((Connection(i, i + 1), _strided(i, i + 2, 1), _strided(i + 1, i + 2, 3)) for i in (2, 4, 6)),
)

_VGG = "Simonyan & Zisserman 2015 (arXiv 1409.1556), table 1"
_DOUBLED = "this project: the widths of vgg5, more convolutions"

ARCHITECTURES: dict[str, Architecture] = {
    "digits": Architecture((32, 32, 64, 64), (2, 4), source="this project, for 8x8 images"),
    "vgg5": Architecture(
        (128, 256, 512, 512), (1, 2, 3, 4), source="the VGG5 of Scellier et al. 2023 and of arXiv 2509.26003"
    ),
    "vgg7": Architecture((128, 128, 256, 256, 512, 512), (2, 4, 6), source=_DOUBLED),
    "vgg8": Architecture((128, 128, 256, 256, 512, 512, 512), (2, 4, 6, 7), source=_DOUBLED),
    "vgg9": Architecture((128, 128, 256, 256, 512, 512, 512, 512), (2, 4, 6, 8), source=_DOUBLED),
    "vgg11": Architecture(
        (64, 128, 256, 256, 512, 512, 512, 512), (1, 2, 4, 6, 8), spare_pool=True, source=f"{_VGG}, column A"
    ),
    "vgg13": Architecture(
        (64, 64, 128, 128, 256, 256, 512, 512, 512, 512),
        (2, 4, 6, 8, 10),
        spare_pool=True,
        source=f"{_VGG}, column B",
    ),
    "vgg16": Architecture(
        (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512),
        (2, 4, 7, 10, 13),
        spare_pool=True,
        source=f"{_VGG}, column D",
    ),
    "laborieux": Architecture(
        (128, 256, 512, 512),
        (1, 2, 3, 4),
        (1, 1, 1, 0),
        spare_pool=True,
        source="Laborieux et al. 2021 (arXiv 2006.03824), README of its code",
    ),
    "dchn": Architecture(
        (128, 256, 512, 512),
        (1, 2, 3, 4),
        source="Scellier et al. 2023 (arXiv 2312.15103), ConvHopfieldEnergy32 of its code",
    ),
    "hopfield_resnet13": Architecture(
        (128, 128, 256, 256, 512, 512, 512, 512),
        edges=tuple(edge for block in _RESIDUAL for edge in block),
        source="arXiv 2509.26003, ConvHopfieldResEnergy32 of its code",
    ),
}


def architecture_of(model: str, argument: str) -> Architecture:
    """A name of ``ARCHITECTURES``, or a spec: widths with ``p`` after the pooled ones, as ``32-32p-64-64p``; linear
    layers follow as ``fc128``.

    Args:
        model: the name or spec.
        argument: whose it is, for the error.

    Returns:
        The architecture.

    Raises:
        ValueError: neither.
    """
    if model in ARCHITECTURES:
        return ARCHITECTURES[model]
    parts = model.split("-")
    linear = [part.startswith("fc") for part in parts]
    widths = [part.removeprefix("fc") if fc else part.removesuffix("p") for part, fc in zip(parts, linear, strict=True)]
    numbers = all(width.isdecimal() and int(width) > 0 for width in widths)
    if not numbers or linear[0] or linear != sorted(linear):
        names = ", ".join(ARCHITECTURES)
        raise ValueError(f"{argument}: expected one of {names}, or widths as 32-32p-64-64p (p: pooled), got {model!r}")
    pooled = tuple(i for i, part in enumerate(parts, 1) if part.endswith("p"))
    convolutions = linear.count(False)
    sizes = tuple(map(int, widths))
    return Architecture(sizes[:convolutions], pooled, hidden=sizes[convolutions:])
