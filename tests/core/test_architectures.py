"""Named architectures: their layouts, their parameters, and specs."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from ep_kernels import Connection, Network, Parameters
from ep_kernels.architectures import ARCHITECTURES, architecture_of


def network(name: str, side: int, classes: int = 10) -> Network:
    architecture = architecture_of(name, "test")
    shape = (3, side, side)
    channels, hidden, connections = architecture.layout(shape)
    return Network.graph(shape, channels, connections, classes=classes, hidden=hidden)


def conv(*widths: int) -> int:
    """Weights and biases of a chain of 3x3 convolutions."""
    return sum(9 * a * b + b for a, b in pairwise(widths))


# Weights and biases of the convolutions, and features of the readout at 28, 32 and 64 pixels.
COUNTS: dict[str, tuple[int, tuple[int, int, int]]] = {
    "digits": (conv(3, 32, 32, 64, 64), (64 * 7 * 7, 64 * 8 * 8, 64 * 16 * 16)),
    "vgg5": (conv(3, 128, 256, 512, 512), (512, 512 * 4, 512 * 16)),
    "vgg7": (conv(3, 128, 128, 256, 256, 512, 512), (512 * 9, 512 * 16, 512 * 64)),
    "vgg8": (conv(3, 128, 128, 256, 256, 512, 512, 512), (512, 512 * 4, 512 * 16)),
    "vgg9": (conv(3, 128, 128, 256, 256, 512, 512, 512, 512), (512, 512 * 4, 512 * 16)),
    "vgg11": (9_220_480, (512, 512, 512 * 4)),  # of torchvision's vgg11().features
    "vgg13": (9_404_992, (512, 512, 512 * 4)),  # vgg13().features
    "vgg16": (14_714_688, (512, 512, 512 * 4)),  # vgg16().features
    "laborieux": (conv(3, 128, 256, 512, 512), (512, 512, 512 * 9)),
    "dchn": (conv(3, 128, 256, 512, 512), (512, 512 * 4, 512 * 16)),
    "hopfield_resnet13": (
        9 * (3 * 128 + 128**2 + 128 * 256 + 256**2 + 256 * 512 + 3 * 512**2)
        + (3 * 128 + 128 * 256 + 256 * 512 + 512**2)
        + 2 * (128 + 256 + 512 + 512),
        (512 * 4, 512 * 4, 512 * 16),
    ),
}


def test_every_architecture_is_counted_above_and_has_a_source() -> None:
    assert set(COUNTS) == set(ARCHITECTURES)
    assert all(architecture.source for architecture in ARCHITECTURES.values())


@pytest.mark.parametrize("classes", [10, 100, 200])
@pytest.mark.parametrize("side", [28, 32, 64])
@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str, side: int, classes: int) -> None:
    convolutions, features = COUNTS[name]
    built = network(name, side, classes)
    total = sum(math.prod(shape) for shape in Parameters.shapes(built).values())
    assert total == convolutions + classes * (features[(28, 32, 64).index(side)] + 1)


@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if not a.edges])
def test_the_smallest_input(name: str) -> None:
    architecture = ARCHITECTURES[name]
    least = architecture.least
    assert min(min(shape[1:]) for shape in network(name, least).shapes[1:]) == 1
    with pytest.raises(ValueError, match=f"expected at least {least}x{least} .*, got {least + 3}x{least - 1}"):
        architecture.layout((1, least + 3, least - 1))


def test_at_most_one_pool_is_left_out() -> None:
    heights = [shape[1] for shape in network("vgg11", 28).shapes]
    assert heights == [28, 14, 7, 7, 3, 3, 1, 1, 1]
    assert network("vgg11", 28).connections[-1].pool == "none"
    assert [conn.pool for conn in network("vgg11", 32).connections].count("max") == 5
    assert [shape[1] for shape in network("laborieux", 28).shapes] == [28, 14, 7, 3, 1]
    assert [shape[1] for shape in network("laborieux", 32).shapes] == [32, 16, 8, 4, 1]
    assert ARCHITECTURES["vgg16"].least == 16  # 16 8 4 2 1, and one pool left out; 15 would need two
    with pytest.raises(ValueError, match="expected at least 4x4"):  # a spec's pools are what was asked for
        architecture_of("4p-4p", "test").layout((1, 2, 2))


def test_hopfield_resnet13() -> None:
    """Nine states and thirteen connections, as in table and code of arXiv 2509.26003."""
    architecture = ARCHITECTURES["hopfield_resnet13"]
    channels, _, edges = architecture.layout((3, 32, 32))
    built = Network.graph((3, 32, 32), channels, edges, classes=10, readout="mse", linear_output=True, hi=6.0)
    assert built.shapes == (
        (3, 32, 32),
        (128, 32, 32), (128, 16, 16), (256, 16, 16), (256, 8, 8),
        (512, 8, 8), (512, 4, 4), (512, 4, 4), (512, 2, 2),
        (10,),
    )  # fmt: skip
    assert len(built.shapes) - 1 == 9
    assert len(built.connections) == 13
    ends = [(conn.src, conn.dst) for conn in built.connections]
    assert ends == [
        (0, 1), (1, 2), (0, 2), (2, 3), (2, 4), (3, 4), (4, 5), (4, 6), (5, 6), (6, 7), (6, 8), (7, 8), (8, 9)
    ]  # fmt: skip
    skips = [conn for conn in built.connections if conn.kernel_size == (1, 1)]
    assert [(conn.src, conn.dst) for conn in skips] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert all(conn.stride == (2, 2) and conn.padding == (0, 0) for conn in skips)
    assert built.levels == tuple(range(10))
    assert built.box(9) == (-math.inf, math.inf)
    assert built.box(8) == (0.0, 6.0)
    assert [shape[1] for shape in network("hopfield_resnet13", 28).shapes] == [28, 28, 14, 14, 7, 7, 4, 4, 2]


def test_specs() -> None:
    built = network("8p-16-fc32-fc5", 8, 3)
    assert built.shapes == ((3, 8, 8), (8, 4, 4), (16, 4, 4), (32,), (5,))
    assert built.readout.outputs == 3
    assert architecture_of("64-128p", "test").pooled == (2,)
    for spec in ("fc8", "fc8-8", "8-fc8-8p", "8-fc", "8-fc8p", "8-fc0", "8-cf8"):
        with pytest.raises(ValueError, match=r"test: expected one of digits, .*, or widths as 32-32p-64-64p"):
            architecture_of(spec, "test")


def test_a_layout_of_another_width() -> None:
    channels, hidden, connections = architecture_of("8p-16-fc32", "test").layout((1, 8, 8), width=0.25, pool="avg")
    assert (channels, hidden) == ([2, 4], [8])
    assert [conn.pool for conn in connections] == ["avg", "none"]
    narrow, _, _ = ARCHITECTURES["hopfield_resnet13"].layout((3, 32, 32), width=1e-9)
    assert narrow == [1] * 8


def test_a_chain_and_a_graph_are_the_same_network() -> None:
    options = {"classes": 4, "hidden": (6,), "readout": "mse", "linear_output": True, "lo": -1.0, "hi": 2.0}
    chain = Network.chain((2, 8, 8), [3, 5], ["max", "none"], padding=(1, 0), feedback="separate", **options)  # type: ignore[arg-type]
    edges = [Connection(0, 1, pool="max"), Connection(1, 2, padding=(0, 0))]
    assert Network.graph((2, 8, 8), [3, 5], edges, feedback="separate", **options) == chain  # type: ignore[arg-type]
    assert (chain.lo, chain.hi, chain.linear_nodes, chain.feedback) == (-1.0, 2.0, (4,), "separate")


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([], "argument 'connections': expected a convolution into node 1, got None"),
        ([Connection(0, 1, None)], "argument 'connections': expected a convolution into node 1, got Connection"),
        (
            [Connection(0, 1, padding=(0, 0), pool="max")],
            r"expected a map of at least 1x1 at node 1, got 0x0 \(from an input of 3x3\)",
        ),
    ],
)
def test_graphs_that_are_none(edges: list[Connection], message: str) -> None:
    with pytest.raises(ValueError, match=f"Network.graph: .*{message}"):
        Network.graph((1, 3, 3), [2], edges, classes=2)


def test_linear_output_is_of_output_units() -> None:
    with pytest.raises(ValueError, match="'linear_output': expected readout 'mse', whose output units"):
        Network.graph((1, 3, 3), [2], [Connection(0, 1)], classes=2, linear_output=True)
    with pytest.raises(ValueError, match=r"Network.chain: argument 'readout': expected 'softmax' or 'mse', got 'l2'"):
        Network.chain((1, 3, 3), [2], ["none"], classes=2, readout="l2")  # type: ignore[arg-type]
