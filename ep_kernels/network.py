"""What a network is: nodes, connections, heads and the constants of its energy. No tensors live here.

Equations and words: docs/concepts.md. Node 0 is the clamped input; node ``i`` holds the state ``s^i``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Pool = Literal["none", "max", "avg"]
Loss = Literal["cross_entropy", "mse", "cosine"]
Feedback = Literal["tied", "separate"]
POOLS: tuple[Pool, ...] = ("none", "max", "avg")
LOSSES: tuple[Loss, ...] = ("cross_entropy", "mse", "cosine")
FEEDBACKS: tuple[Feedback, ...] = ("tied", "separate")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Connection:
    """One weight between two nodes: ``drive = P(W * s^src)``.

    ``kernel_size=None`` makes it linear: the source is flattened in (C, H, W) order, as ``nn.Flatten`` does.

    Args:
        src, dst: node indices, ``src < dst``; 0 is the clamped input.
        kernel_size, stride, padding: of the convolution, as in ``torch.nn.functional.conv2d``.
        pool: 2x2 pooling (stride 2, floor) of the convolution's output: ``none``, ``max`` or ``avg``.
    """

    src: int
    dst: int
    kernel_size: tuple[int, int] | None = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    pool: Pool = "none"

    def __post_init__(self) -> None:
        _require(0 <= self.src < self.dst, "Connection", "src, dst", "0 <= src < dst", f"{self.src}, {self.dst}")
        _require(self.pool in POOLS, "Connection", "pool", f"one of {', '.join(POOLS)}", repr(self.pool))
        if self.kernel_size is None:
            _require(self.pool == "none", "Connection", "pool", "'none' for a linear connection", repr(self.pool))
        else:
            for name, pair, least in (
                ("kernel_size", self.kernel_size, 1),
                ("stride", self.stride, 1),
                ("padding", self.padding, 0),
            ):
                ok = isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(v, int) and v >= least for v in pair)
                _require(ok, "Connection", name, f"two integers >= {least}", repr(pair))

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the convolution's output, before pooling."""
        assert self.kernel_size is not None
        (kh, kw), (sh, sw), (ph, pw) = self.kernel_size, self.stride, self.padding
        return (height + 2 * ph - kh) // sh + 1, (width + 2 * pw - kw) // sw + 1

    def weight_shape(self, src: Shape, dst: Shape) -> Shape:
        """Shape of ``W``: [C_dst, C_src, kh, kw], or [F_dst, F_src] for a linear connection."""
        if self.kernel_size is None:
            return (math.prod(dst), math.prod(src))
        return (dst[0], src[0], *self.kernel_size)


@dataclass(frozen=True)
class Head:
    """A loss on one node: the readout, a local head, or a distillation term.

    The output is ``z = V pool(s) + c`` (``outputs`` features), or ``z = s`` itself when ``outputs`` is None (the
    ``mse`` readout, whose output units are a node of the dynamics). The loss of one sample is

    * ``cross_entropy``: ``weight tau^2 H(p, softmax(z / tau))`` with target probabilities ``p`` (one-hot labels at
      tau = 1; a teacher's softened ones for distillation; its gradient is that of ``tau^2 KL``),
    * ``mse``: ``weight / 2 |z - t|^2``, summed over outputs,
    * ``cosine``: ``weight (1 - <z, t> / (|z| |t|))``, summed over the pixels of a map; where z or t is zero (a norm of
      at most 1e-6) it has no direction: the loss is ``weight`` and its gradient zero.

    Args:
        node: the node that it reads and nudges.
        outputs: rows of ``V``; None for the identity.
        loss: ``cross_entropy``, ``mse`` or ``cosine``.
        pool: maps are averaged to ``pool x pool`` (adaptive) before ``V``; None keeps them.
        pointwise: ``V`` is a 1x1 convolution (a map between student and teacher widths), not a linear layer.
        weight: lambda of the augmented loss.
        temperature: tau of ``cross_entropy``.
        tied: index in ``Network.heads`` of an earlier head of the same node and shape whose ``V`` and ``c`` it uses: a
            teacher's softened logits on the readout, beside its labels.
    """

    node: int
    outputs: int | None
    loss: Loss = "cross_entropy"
    pool: int | None = None
    pointwise: bool = False
    weight: float = 1.0
    temperature: float = 1.0
    tied: int | None = None

    def __post_init__(self) -> None:
        _require(self.loss in LOSSES, "Head", "loss", f"one of {', '.join(LOSSES)}", repr(self.loss))
        _require(self.outputs is None or self.outputs > 0, "Head", "outputs", "None or > 0", repr(self.outputs))
        _require(self.pool is None or self.pool > 0, "Head", "pool", "None or > 0", repr(self.pool))
        _require(math.isfinite(self.weight), "Head", "weight", "a finite number", repr(self.weight))
        ok = math.isfinite(self.temperature) and self.temperature > 0
        _require(ok, "Head", "temperature", "a finite number > 0", repr(self.temperature))
        ok = self.tied is None or (isinstance(self.tied, int) and self.tied >= 0)
        _require(ok, "Head", "tied", "None or the index of a head", repr(self.tied))
        _require(
            not (self.pointwise and self.outputs is None), "Head", "outputs", "a number of channels (pointwise)", "None"
        )

    def feature_shape(self, node: Shape) -> Shape:
        """Shape of what ``V`` reads: the node's, with its map averaged to ``pool x pool``."""
        return (node[0], self.pool, self.pool) if self.pool is not None and len(node) == 3 else node

    def weight_shape(self, node: Shape) -> Shape | None:
        """Shape of ``V``: [outputs, features], [outputs, C, 1, 1] if pointwise, None for the identity."""
        if self.outputs is None:
            return None
        feature = self.feature_shape(node)
        return (self.outputs, feature[0], 1, 1) if self.pointwise else (self.outputs, math.prod(feature))

    def output_shape(self, node: Shape) -> Shape:
        """Shape of ``z`` for one sample."""
        feature = self.feature_shape(node)
        if self.outputs is None:
            return feature
        return (self.outputs, *feature[1:]) if self.pointwise else (self.outputs,)


@dataclass(frozen=True)
class Network:
    """Nodes, connections and heads, with the constants of the energy.

    Args:
        shapes: per node, (C, H, W) or (F,); ``shapes[0]`` is the clamped input's.
        connections: every weight; chain, skip and strided connections alike.
        readout: the head that classifies.
        local_heads: further heads (intermediate error signals, distillation).
        feedback_gain: k in (0, 1]; 1 is classical EP.
        slope: gamma of ``clip(gamma a, lo, hi)``; 1 is the hard sigmoid, 1/2 the variant of Laborieux et al. 2021.
        lo, hi: the box of the states.
        linear_nodes: nodes that are not clipped, as the output units of Scellier et al. 2023.
        feedback: ``tied``: feedback is the adjoint of the drive (an energy exists); ``separate``: every connection
            between two hidden nodes has feedback weights of its own (vector-field EP, Scellier et al. 2018).

    Raises:
        ValueError: naming the field, what was expected and what came.
    """

    shapes: tuple[Shape, ...]
    connections: tuple[Connection, ...]
    readout: Head
    local_heads: tuple[Head, ...] = ()
    feedback_gain: float = 0.1
    slope: float = 1.0
    lo: float = 0.0
    hi: float = 1.0
    linear_nodes: tuple[int, ...] = ()
    feedback: Feedback = "tied"

    def __post_init__(self) -> None:
        for name in (
            "shapes",
            "connections",
            "local_heads",
            "linear_nodes",
        ):  # lists are taken too; a Network must be hashable
            value = getattr(self, name)
            _require(isinstance(value, (tuple, list)), "Network", name, "a tuple", repr(value))
            object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "shapes", tuple(tuple(shape) for shape in self.shapes))
        _require(len(self.shapes) >= 2, "Network", "shapes", "the input and at least one node", repr(self.shapes))
        for i, shape in enumerate(self.shapes):
            ok = len(shape) in (1, 3) and all(isinstance(v, int) and v > 0 for v in shape)
            _require(ok, "Network", f"shapes[{i}]", "(C, H, W) or (F,) of positive integers", repr(shape))
        k = self.feedback_gain
        _require(math.isfinite(k) and 0 < k <= 1, "Network", "feedback_gain", "a number in (0, 1]", repr(k))
        ok = math.isfinite(self.slope) and self.slope > 0
        _require(ok, "Network", "slope", "a finite number > 0", repr(self.slope))
        ok = math.isfinite(self.lo) and math.isfinite(self.hi) and self.lo < self.hi
        _require(ok, "Network", "lo, hi", "finite, lo < hi", f"{self.lo}, {self.hi}")
        ok = all(isinstance(i, int) and 1 <= i < len(self.shapes) for i in self.linear_nodes)
        _require(ok, "Network", "linear_nodes", f"nodes from 1 to {len(self.shapes) - 1}", repr(self.linear_nodes))
        _require(
            self.feedback in FEEDBACKS, "Network", "feedback", f"one of {', '.join(FEEDBACKS)}", repr(self.feedback)
        )
        for c, conn in enumerate(self.connections):
            _require(conn.dst < len(self.shapes), "Network", f"connections[{c}].dst", "a node index", str(conn.dst))
            self._check_geometry(c, conn)
        for i in range(1, len(self.shapes)):
            _require(bool(self.into[i]), "Network", "connections", f"one into every node; node {i} has", "none")
        reach = (self.top - 1) * math.log10(k)
        expected = "k^(levels - 1) >= 1e-30 (float32 holds no smaller deltas)"
        _require(reach >= -30, "Network", "feedback_gain", expected, f"{k} with {self.top} levels")
        for h, head in enumerate(self.heads):
            ok = 1 <= head.node < len(self.shapes)
            _require(ok, "Network", f"heads[{h}].node", f"1 to {len(self.shapes) - 1}", str(head.node))
            ok = len(self.shapes[head.node]) == 3 or not (head.pointwise or head.pool)
            _require(ok, "Network", f"heads[{h}]", "no pool and no pointwise map on a vector node", repr(head))
            if head.tied is not None:
                expected = "the index of an earlier head with weights of its own, of the same node and shape"
                _require(self._can_tie(h, head.tied), "Network", f"heads[{h}].tied", expected, repr(head.tied))

    def _can_tie(self, h: int, tied: int) -> bool:
        if not 0 <= tied < h:
            return False
        ours, other = self.heads[h], self.heads[tied]
        same = all(getattr(ours, name) == getattr(other, name) for name in ("node", "outputs", "pool", "pointwise"))
        return same and other.tied is None and other.outputs is not None

    def _check_geometry(self, c: int, conn: Connection) -> None:
        src, dst = self.shapes[conn.src], self.shapes[conn.dst]
        if conn.kernel_size is None:
            _require(len(dst) == 1, "Network", f"connections[{c}]", "a vector node as dst of a linear one", repr(dst))
            return
        ok = len(src) == 3 and len(dst) == 3
        _require(ok, "Network", f"connections[{c}]", "(C, H, W) nodes at both ends of a convolution", f"{src}, {dst}")
        height, width = conn.map_size(*src[1:])
        if conn.pool != "none":
            height, width = height // 2, width // 2
        ok = height > 0 and width > 0 and dst[1:] == (height, width)
        _require(ok, "Network", f"shapes[{conn.dst}]", f"a {height}x{width} map (connection {c})", repr(dst))

    @property
    def heads(self) -> tuple[Head, ...]:
        """The readout, then the local heads."""
        return (self.readout, *self.local_heads)

    @cached_property
    def into(self) -> tuple[tuple[int, ...], ...]:
        """Per node, the connections that drive it."""
        return self._incident("dst")

    @cached_property
    def out_of(self) -> tuple[tuple[int, ...], ...]:
        """Per node, the connections through which it receives feedback."""
        return self._incident("src")

    def _incident(self, end: str) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(c for c, conn in enumerate(self.connections) if getattr(conn, end) == i)
            for i in range(len(self.shapes))
        )

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """Level of each node: the longest path from the clamped input (level 0)."""
        levels = [0] * len(self.shapes)
        for i in range(1, len(self.shapes)):  # src < dst, so one pass settles every level
            levels[i] = 1 + max(levels[self.connections[c].src] for c in self.into[i])
        return tuple(levels)

    @cached_property
    def top(self) -> int:
        """N, the top level."""
        return max(self.levels)

    def box(self, node: int) -> tuple[float, float]:
        """Bounds of a node's states: ``(lo, hi)``, infinite for a linear node."""
        return (-math.inf, math.inf) if node in self.linear_nodes else (self.lo, self.hi)

    def has_feedback_weight(self, c: int) -> bool:
        """Connection c has feedback weights of its own (nothing is fed back to the clamped input)."""
        return self.feedback == "separate" and self.connections[c].src != 0

    def feedback_coefficient(self, c: int) -> float:
        """k^(level(dst) - level(src)) of connection c."""
        conn = self.connections[c]
        return float(self.feedback_gain ** (self.levels[conn.dst] - self.levels[conn.src]))

    def nudge_coefficient(self, node: int) -> float:
        """k^(N - level) of a node."""
        return float(self.feedback_gain ** (self.top - self.levels[node]))

    @staticmethod
    def chain(
        input_shape: tuple[int, int, int],
        channels: Sequence[int],
        pools: Sequence[Pool],
        *,
        classes: int,
        kernel_size: int = 3,
        padding: int | Sequence[int] = 1,
        hidden: Sequence[int] = (),
        readout: Literal["softmax", "mse"] = "softmax",
        local_heads: Sequence[int] = (),
        local_weight: float = 0.2,
        local_pool: int = 2,
        feedback_gain: float = 0.1,
        slope: float = 1.0,
        lo: float = 0.0,
        hi: float = 1.0,
        linear_output: bool = False,
        feedback: Feedback = "tied",
    ) -> Network:
        """A VGG-style chain of convolutions, then linear nodes ``hidden``, then the readout.

        Args:
            input_shape: (C, H, W) of the clamped input.
            channels: width of each convolutional node.
            pools: 2x2 pooling after each, same length.
            classes: outputs of the readout. ``mse`` appends them as a linear node of the dynamics.
            kernel_size: of every convolution; stride is 1.
            padding: of every convolution, or one number for each.
            hidden: widths of linear nodes above the convolutions.
            readout: ``softmax`` (outside the dynamics, cross-entropy) or ``mse`` (output units inside).
            local_heads: nodes (1 is the first) that get a cross-entropy head of weight ``local_weight`` on their map
                averaged to at most ``local_pool`` squared.
            lo, hi: the box of the states.
            linear_output: the output units of ``mse`` are not clipped (Scellier et al. 2023).
            local_weight: lambda of those heads.
            local_pool: height and width that their maps are averaged to.
            feedback_gain: k in (0, 1].
            slope: gamma of ``clip(gamma a, lo, hi)``.
            feedback: as in :class:`Network`.

        Returns:
            The network.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        _require(len(channels) > 0, "Network.chain", "channels", "at least one width", repr(channels))
        _require(
            len(pools) == len(channels),
            "Network.chain",
            "pools",
            f"{len(channels)} entries, one per width",
            str(len(pools)),
        )
        paddings = [padding] * len(channels) if isinstance(padding, int) else list(padding)
        _require(
            len(paddings) == len(channels),
            "Network.chain",
            "padding",
            f"one number or {len(channels)} of them",
            str(len(paddings)),
        )
        connections = [
            Connection(i - 1, i, (kernel_size, kernel_size), (1, 1), (pad, pad), pool)
            for i, (pool, pad) in enumerate(zip(pools, paddings, strict=True), 1)
        ]
        shapes = _maps("Network.chain", "pools, padding", input_shape, channels, connections)
        return _with_readout(
            "Network.chain", shapes, connections, classes, hidden, readout, linear_output, local_heads, local_weight,
            local_pool, feedback_gain, slope, lo, hi, feedback,
        )  # fmt: skip

    @staticmethod
    def graph(
        input_shape: tuple[int, int, int],
        channels: Sequence[int],
        connections: Sequence[Connection],
        *,
        classes: int,
        hidden: Sequence[int] = (),
        readout: Literal["softmax", "mse"] = "softmax",
        local_heads: Sequence[int] = (),
        local_weight: float = 0.2,
        local_pool: int = 2,
        feedback_gain: float = 0.1,
        slope: float = 1.0,
        lo: float = 0.0,
        hi: float = 1.0,
        linear_output: bool = False,
        feedback: Feedback = "tied",
    ) -> Network:
        """Maps joined by any convolutions (skips, strides), then linear nodes ``hidden``, then the readout.

        Args:
            input_shape: (C, H, W) of the clamped input, node 0.
            channels: width of node 1, 2, ...; a node's map is what its connections make of their sources'.
            connections: convolutions between those nodes. Linear ones above the last node are added: do not list them.
            classes, hidden, readout, local_heads, local_weight, local_pool: as in :meth:`chain`.
            feedback_gain, slope, lo, hi, linear_output, feedback: as in :meth:`chain`.

        Returns:
            The network.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        where = "Network.graph"
        _require(len(channels) > 0, where, "channels", "at least one width", repr(channels))
        shapes = _maps(where, "connections", input_shape, channels, connections)
        return _with_readout(
            where, shapes, list(connections), classes, hidden, readout, linear_output, local_heads, local_weight,
            local_pool, feedback_gain, slope, lo, hi, feedback,
        )  # fmt: skip


def _maps(
    where: str,
    argument: str,
    input_shape: tuple[int, int, int],
    channels: Sequence[int],
    connections: Sequence[Connection],
) -> list[Shape]:
    """The input's shape, and the map of every node: what its first connection makes of its source's."""
    plain = isinstance(input_shape, Sequence) and all(isinstance(n, int) and n > 0 for n in input_shape)
    expected = "(channels, height, width), each at least 1 (vectors are (n, 1, 1))"
    _require(plain and len(input_shape) == 3, where, "input_shape", expected, repr(input_shape))
    shapes: list[Shape] = [tuple(input_shape)]
    for node, width in enumerate(channels, 1):
        first = next((c for c in connections if c.dst == node), None)
        ok = first is not None and first.kernel_size is not None
        _require(ok, where, argument, f"a convolution into node {node}", repr(first))
        assert first is not None
        height, wide = first.map_size(*shapes[first.src][1:])
        if first.pool != "none":
            height, wide = height // 2, wide // 2
        expected = f"a map of at least 1x1 at node {node}"
        got = f"{height}x{wide} (from an input of {input_shape[1]}x{input_shape[2]})"
        _require(height > 0 and wide > 0, where, argument, expected, got)
        shapes.append((width, height, wide))
    return shapes


def _with_readout(
    where: str,
    shapes: list[Shape],
    connections: list[Connection],
    classes: int,
    hidden: Sequence[int],
    readout: Literal["softmax", "mse"],
    linear_output: bool,
    local_heads: Sequence[int],
    local_weight: float,
    local_pool: int,
    feedback_gain: float,
    slope: float,
    lo: float,
    hi: float,
    feedback: Feedback,
) -> Network:
    """The network of these maps, with linear nodes and the readout above the last."""
    _require(readout in ("softmax", "mse"), where, "readout", "'softmax' or 'mse'", repr(readout))
    expected = "readout 'mse', whose output units it is of"
    _require(readout == "mse" or not linear_output, where, "linear_output", expected, repr(readout))
    for width in (*hidden, *((classes,) if readout == "mse" else ())):
        connections.append(Connection(len(shapes) - 1, len(shapes), None))
        shapes.append((width,))
    top = len(shapes) - 1
    head = Head(top, classes) if readout == "softmax" else Head(top, None, loss="mse")
    local = []
    for node in local_heads:
        _require(1 <= node <= top, where, "local_heads", f"nodes from 1 to {top}", str(node))
        shape = shapes[node]
        pool_size = min(local_pool, shape[1], shape[2]) if len(shape) == 3 else None
        local.append(Head(node, classes, pool=pool_size, weight=local_weight))
    linear = (top,) if linear_output else ()
    return Network(
        tuple(shapes), tuple(connections), head, tuple(local), feedback_gain, slope, lo, hi, linear, feedback
    )


def _require(condition: bool, where: str, argument: str, expected: str, got: str) -> None:
    if not condition:
        raise ValueError(f"{where}: argument '{argument}': expected {expected}, got {got}")
