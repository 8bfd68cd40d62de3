"""Networks layer by layer: what the op-level questions (``drive``, ``relax_step``, ``contrast``) share.

A layer is a node of a chain of convolutions, with the connection into it. Every competitor reads the same numbers, in
channels_last memory. On a GPU each is a CUDA graph that goes through several input sets where one would stay in the
L2 cache; on a CPU it is called.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case, Competitor, Row, Timed, check, compete
from benchmarks.graphs import captured, sets_beyond_cache
from benchmarks.markdown import good, ms, number, ratio, table, without_figures
from benchmarks.problem import COMPILED as MODES
from benchmarks.problem import (
    PRECISIONS,
    Precision,
    Problem,
    backends_of,
    connection_flops,
    label,
    network_of,
    precisions,
    problem_of,
    size_of,
    tf32,
)
from benchmarks.questions.roofline import against_roof
from benchmarks.setting import Setting
from benchmarks.timing import Times
from ep_kernels import Connection, Network, RelaxConfig, backends, free_phase

SWEEPS = 3  # of the relaxation whose states are read
EAGER = "eager PyTorch"  # what ratios are to; on a GPU baselines also name what they compute in
ALONE = "its convolutions alone"
REFERENCE = "reference (eager ops)"
COMPILED = "torch.compile"
SETS = 6  # input sets at most: with all competitors ready at once, more of them would fill a small GPU
Make = Callable[[], Timed]
Tensors = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Layer:
    """Node ``node`` (1 is the lowest) of a network with a batch."""

    setting: Setting
    model: str
    batch: int
    node: int

    @property
    def problem(self) -> Problem:
        """Parameters and images; made once."""
        return problem_of(network_at(self.setting, self.model), self.batch, self.setting.device)

    @property
    def network(self) -> Network:
        """The whole of it."""
        return self.problem.network

    @property
    def below(self) -> int:
        """The connection into the node, by number."""
        return self.network.into[self.node][0]

    @property
    def connection(self) -> Connection:
        """The connection into the node."""
        return self.network.connections[self.below]

    @property
    def map_size(self) -> tuple[int, int]:
        """Of the connection's convolution, before it pools."""
        return self.connection.map_size(*self.network.shapes[self.connection.src][1:])

    @property
    def dtype(self) -> torch.dtype:
        """Of everything that PyTorch computes for comparison."""
        return torch.float16 if self.setting.cuda else torch.float32

    @property
    def rate(self) -> str:
        """The matmul rate of that dtype."""
        return "fp16" if self.setting.cuda else "fp32"

    def baseline(self, name: str) -> str:
        """Name of what PyTorch computes; on a GPU, where ours has several precisions, with that of this one."""
        return f"{name}, {self.rate}" if self.setting.cuda else name

    @property
    def key(self) -> str:
        """Of its case."""
        return f"{self.model}, layer {self.node}, batch {self.batch}"

    def flops(self) -> int:
        """Of its drive."""
        return connection_flops(self.network, self.below, self.batch)


@dataclass(frozen=True)
class Traffic:
    """What has to be read and written at least once: numbers of states and of weights, and single bytes (winners)."""

    states: int
    weights: int
    bytes: int = 0

    def moved(self, state: int, weight: int) -> int:
        """Bytes, where a state takes ``state`` and a weight ``weight`` of them."""
        return self.states * state + self.weights * weight + self.bytes


def _nothing(_: Layer) -> dict[str, Make]:
    return {}


def _forget() -> None:
    """Give back what backends keep of a case."""
    gc.collect()
    backends.release()


@dataclass(frozen=True)
class Op:
    """One of the ops, as the questions and ``benchmarks/test_ops.py`` run it.

    Args:
        ours: on a backend, in a precision.
        eager: PyTorch's own calls; with a mode under torch.compile.
        alone: the convolutions in it and nothing else.
        flops: operations of a call.
        precisions: of ours, that the op has.
        more: other competitors of ours.
        forget: called after each case, whatever became of it.
    """

    name: str
    ours: Callable[[Layer, str, Precision], Timed]
    eager: Callable[[Layer, str | None], Timed]
    alone: Callable[[Layer], Timed]
    flops: Callable[[Layer], int]
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    more: Callable[[Layer], dict[str, Make]] = field(default=_nothing)
    forget: Callable[[], None] = field(default=_forget)


# --- inputs -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def network_at(setting: Setting, model: str) -> Network:
    """The network on the setting's images.

    Raises:
        ValueError: it is no chain of convolutions with stride 1, which is all that PyTorch's side is written for.
    """
    network = network_of(model, size_of(setting))
    for i in range(1, len(network.shapes)):
        into, out_of = network.into[i], network.out_of[i]
        conn = network.connections[into[0]]
        if len(into) != 1 or len(out_of) > 1 or conn.kernel_size is None or tuple(conn.stride) != (1, 1):
            raise ValueError(f"{model}: node {i}: expected a chain of convolutions with stride 1")
    return network


@lru_cache(maxsize=2)
def settled(p: Problem) -> list[Tensor]:
    """States by node after ``SWEEPS`` sweeps of the reference in float32, rounded to float16: exact in both."""
    states = free_phase(p.network, p.parameters, p.x, RelaxConfig(free_steps=SWEEPS), backend="reference").states
    return [s.half() for s in states]


def cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """In this dtype (winners in their own), channels_last where it is a map."""
    if t is None:
        return None
    layout = torch.channels_last if t.dim() == 4 else torch.contiguous_format
    return t.to(dtype if t.is_floating_point() else t.dtype).contiguous(memory_format=layout)


# --- competitors ------------------------------------------------------------------------------------------------------


def timed(
    layer: Layer,
    function: Callable[..., Any],
    tensors: Tensors,
    error: Callable[[Any], float],
    limit: float,
    *,
    rate: str,
    traffic: Traffic,
    mode: str | None = None,
    values: Row | None = None,
) -> Timed:
    """``function(*tensors)`` as it is timed on this device.

    Args:
        error: of what the function returns, against the truth.
        rate: name of the matmul rate that it is compared with; ``tf32`` also allows it.
        traffic: becomes the column ``moved``, at the sizes of the largest of the tensors and of a weight.
        mode: of torch.compile.
    """
    if mode is not None:
        torch.compiler.reset()
        function = torch.compile(function, mode=mode, dynamic=False, fullgraph=True)
    cuda = layer.setting.cuda

    def run(given: Tensors) -> Any:
        with torch.no_grad(), tf32(rate == "tf32") if cuda else nullcontext():
            return function(*given)

    values = {"rate": rate, "moved": traffic.moved(*_sizes(tensors)), **(values or {})}
    if not cuda:
        return Timed(lambda: run(tensors), lambda: error(run(tensors)), limit, values=values)
    found = check(error(run(tensors)), limit)
    count = sets_beyond_cache(sum(t.numel() * t.element_size() for t in tensors if t is not None), limit=SETS)
    sets = [tuple(None if t is None else t.clone() for t in tensors) for _ in range(count)]
    replay, calls = captured([partial(run, given) for given in sets], error, limit)
    return Timed(replay, lambda: found, limit, calls, {**values, "sets": count})


def _sizes(tensors: Tensors) -> tuple[int, int]:
    size = max(t.element_size() for t in tensors if t is not None and t.is_floating_point())
    return size, size


def makers(op: Op, layer: Layer) -> dict[str, Make]:
    """Competitors by name, all but what compiles. Ours first."""
    setting = layer.setting
    found: dict[str, Make] = {}
    for on in backends_of(setting):
        if on != "reference":
            for precision in precisions_of(op, setting):
                key = f"ours, {label(on, setting)}, {precision.name}"
                found[key] = partial(op.ours, layer, on, precision)
    eager = {layer.baseline(EAGER): partial(op.eager, layer, None)}
    if setting.wgmma:
        return {**found, **eager}
    found |= op.more(layer)
    found[layer.baseline(REFERENCE)] = partial(op.ours, layer, "reference", PRECISIONS[layer.rate])
    return {**found, **eager, layer.baseline(ALONE): partial(op.alone, layer)}


def precisions_of(op: Op, setting: Setting) -> list[Precision]:
    """Those of the setting that the op has."""
    return [precision for precision in precisions(setting) if precision.name in op.precisions]


# --- cases ------------------------------------------------------------------------------------------------------------


def cases(op: Op, setting: Setting) -> list[Case]:
    """A case a layer, the largest batch first; then what torch.compile makes of the same, which takes long.

    On a CPU one layer is compiled, the one with the most operations.
    """
    layers = layers_of(setting)
    found = [Case(layer.key, partial(rows, op, layer)) for layer in layers]
    if setting.quick or setting.wgmma:
        return found

    def size(layer: Layer) -> int:
        network = network_at(setting, layer.model)
        return connection_flops(network, network.into[layer.node][0], layer.batch)

    most = sorted((layer for layer in layers if layer.batch == layers[0].batch), key=size, reverse=True)
    compiled = most if setting.cuda else most[:1]
    return [*found, *(Case(f"{layer.key}, {COMPILED}", partial(compiled_rows, op, layer), 60.0) for layer in compiled)]


def layers_of(setting: Setting) -> list[Layer]:
    """Of every network and batch, the largest batch first."""
    models = setting.choose(setting.models, ("vgg11/4", "laborieux/4"), ("vgg11", "laborieux"), ("3p-4",))
    return [
        Layer(setting, model, batch, node)
        for batch in sorted(setting.choose(setting.batches, (32,), (256,), (2,)), reverse=True)
        for model in models
        for node in range(1, len(network_at(setting, model).shapes))
    ]


def rows(op: Op, layer: Layer) -> list[Row]:
    """Everything that needs no compiler, in turn."""
    return against(op, layer, makers(op, layer))


def compiled_rows(op: Op, layer: Layer) -> list[Row]:
    """The eager calls compiled, and again as they are: their row is there for the ratio, tables leave it out."""
    mode = "max-autotune" if layer.setting.cuda else "default"
    eager, name = layer.baseline(EAGER), layer.baseline(f"{COMPILED} ({mode})")
    found = against(op, layer, {eager: partial(op.eager, layer, None), name: partial(op.eager, layer, MODES[mode])})
    return [{**row, "repeated": True} if row["name"] == eager else row for row in found]


def against(op: Op, layer: Layer, made: dict[str, Make]) -> list[Row]:
    """Rows with the layer, and the part of the roofline that each time is (operations are dense-equivalent)."""
    setting, flops = layer.setting, op.flops(layer)
    kept: dict[str, Row] = {}

    def keep(name: str, make: Make) -> Timed:
        timed = make()
        kept[name] = timed.values
        return timed

    def roof(name: str, times: Times) -> Row:
        return against_roof(setting, times.median, flops, kept[name]["moved"], kept[name]["rate"])

    competitors = [Competitor(name, partial(keep, name, make)) for name, make in made.items()]
    least = 0.0 if setting.cuda else 0.02  # a graph is repeated as it is
    try:
        found = compete(setting, competitors, against=layer.baseline(EAGER), least=least, after=roof)
    finally:
        op.forget()
    shape = "x".join(map(str, layer.network.shapes[layer.node]))
    of = {"model": layer.model, "batch": layer.batch, "layer": layer.node, "shape": shape, "gflop": flops / 1e9}
    return [{**row, **of} for row in found]


# --- report -----------------------------------------------------------------------------------------------------------


def _shown(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows with figures, of each network and batch, by layer."""
    found: dict[str, list[Row]] = {}
    for row in good(rows):
        if not row.get("repeated"):
            found.setdefault(f"{row['model']}, batch {row['batch']}", []).append(row)
    return {name: sorted(mine, key=lambda row: int(row["layer"])) for name, mine in found.items()}


def lines(what: str, rows: Sequence[Row]) -> list[str]:
    """A table a network and batch; ``what`` heads the column of competitors."""
    out: list[str] = []
    for name, mine in _shown(rows).items():
        tera = max(row["tflops"] for row in mine) >= 10
        cells, last = [], None
        for row in mine:
            first = ["", ""] if row["layer"] == last else [str(row["layer"]), row["shape"]]
            speed = number(row["tflops"] * (1 if tera else 1e3))
            roof = number(row["roof_percent"])
            cells.append([*first, row["name"], ms(row), ratio(row) or "1", speed, roof, row["bound"]])
            last = row["layer"]
        unit = "TFLOP/s" if tera else "GFLOP/s"
        head = ("layer", "shape", what, "ms (quantiles 0.2 to 0.8)", f"/ {EAGER}", unit, "% of roofline", "bound")
        out += [f"{name}:", "", *table(head, cells), ""]
    return [*out[:-1], *without_figures(rows)]


def draw(rows: Sequence[Row], figure: Any) -> None:
    """Percent of the roofline by layer, a panel a network, a line a competitor."""
    shown = _shown(rows)
    for axes, (name, mine) in zip(
        figure.subplots(1, max(1, len(shown)), squeeze=False)[0], shown.items(), strict=False
    ):
        for competitor in dict.fromkeys(row["name"] for row in mine):
            points = [row for row in mine if row["name"] == competitor]
            style = "-o" if competitor.startswith("our") else "--x"
            at, height = [row["layer"] for row in points], [row["roof_percent"] for row in points]
            axes.plot(at, height, style, label=competitor, markersize=4, linewidth=1)
        axes.set_xlabel("layer")
        axes.set_xticks(sorted({row["layer"] for row in mine}))
        axes.set_ylabel("% of the roofline")
        axes.set_ylim(bottom=0)
        axes.set_title(name, fontsize=10)
        axes.legend(fontsize=7)


CONDITIONS = (
    "random 3x32x32 images, k 0.02, states of a relaxation under way in channels_last memory, the largest relative "
    "error against float64 checked first; ratios are times over eager PyTorch's; the roofline is the matmul and copy "
    "rate of the same run, and operations are dense-equivalent: zeros of unpooled feedback and of the halo count"
)
