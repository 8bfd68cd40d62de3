"""Sample inputs of the ops on tensors: one generator feeds the correctness, layout, gradient and opcheck tests."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ep_kernels import backend, functional, ops, relax_op
from ep_kernels.functional import Neighbour

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
DTYPES = tuple(TOLERANCE)
RELAX = {name: i for i, name in enumerate(inspect.signature(relax_op.relaxation_of).parameters)}  # its arguments
TENSOR_LISTS = tuple(RELAX)[: RELAX["shapes"]]


@dataclass(frozen=True)
class Sample:
    """Arguments of ``ep_kernels.functional.<op>``."""

    op: str
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def run(self, on: str = "cpu") -> tuple[Tensor | None, ...]:
        with backend(on):
            out: tuple[Tensor | None, ...] = getattr(functional, self.op)(*self.args, **self.kwargs)
        return out

    def raw(self) -> tuple[Any, ...]:
        """Arguments of ``torch.ops.ep_kernels.<op>`` for the same call."""
        return capture(self.op, self.run)[0]

    def change(self, f: Callable[[Tensor], Tensor]) -> Sample:
        """The same sample with every tensor replaced by ``f(tensor)``."""

        def walk(value: Any) -> Any:
            if isinstance(value, Tensor):
                return f(value)
            if isinstance(value, Neighbour):
                return replace(value, **{k: walk(getattr(value, k)) for k in ("state", "weight", "winners")})
            return type(value)(map(walk, value)) if isinstance(value, (list, tuple)) else value

        return replace(self, args=walk(self.args), kwargs={k: walk(v) for k, v in self.kwargs.items()})


def capture(op: str, run: Callable[[], object]) -> list[tuple[Any, ...]]:
    """Arguments of every call of ``torch.ops.ep_kernels.<op>`` that ``run`` makes."""
    calls: list[tuple[Any, ...]] = []
    original = getattr(ops, op)

    def record(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, op, record)
        run()
    return calls


@dataclass(frozen=True)
class Geometry:
    """One connection from a map of ``size``, or from a vector when ``size`` is empty; linear without a kernel."""

    channels: tuple[int, int]
    kernel: tuple[int, int] | None = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    pool: str = "none"
    batch: int = 2
    size: tuple[int, ...] = (7, 5)

    def __str__(self) -> str:
        kernel = "linear" if self.kernel is None else "{}x{}".format(*self.kernel)
        return f"{self.batch}x{self.channels}{self.size}-{kernel}-{self.stride}-{self.padding}-{self.pool}".replace(
            " ", ""
        )

    def source(self, new: Maker, batch: int | None = None) -> Tensor:
        return new(self.batch if batch is None else batch, self.channels[0], *self.size)

    def weight(self, new: Maker) -> Tensor:
        features = self.channels[0]
        if self.kernel is not None:
            return new(self.channels[1], features, *self.kernel) / (features * self.kernel[0] * self.kernel[1]) ** 0.5
        for n in self.size:
            features *= n
        return new(self.channels[1], features) / features**0.5

    def options(self) -> tuple[tuple[int, int], tuple[int, int], str]:
        return self.stride, self.padding, self.pool

    def valid(self) -> bool:
        if self.kernel is None:
            return True
        size = [
            (n + 2 * p - k) // s + 1
            for n, k, s, p in zip(self.size, self.kernel, self.stride, self.padding, strict=True)
        ]
        return min(size) >= (1 if self.pool == "none" else 2)


class Maker:
    """Random tensors of one dtype, the same in every run."""

    def __init__(self, dtype: torch.dtype, seed: int = 0):
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def winners(self, *shape: int) -> Tensor:
        return torch.randint(0, 4, shape, generator=self.generator).to(torch.uint8)


# Small, and one of each kind: what every test runs on.
BASE = (
    Geometry((3, 17), pool="max"),
    Geometry((17, 3), batch=1),
    Geometry((3, 64), (5, 3), (2, 1), (2, 0), "avg"),
    Geometry((64, 1), (1, 1), padding=(0, 0)),
    Geometry((1, 3), stride=(2, 2), padding=(2, 2), pool="max", batch=4),
    Geometry((3, 3), pool="max", batch=0),
    Geometry((17, 6), None, batch=3),
    Geometry((17, 6), None, size=()),
)


def geometries(*, thorough: bool) -> tuple[Geometry, ...]:
    """The base ones, and when thorough every kernel, stride, padding and pooling, with channels and batches in turn."""
    if not thorough:
        return BASE
    channels = itertools.cycle([(1, 3), (3, 17), (17, 64), (64, 1), (17, 17)])
    batches = itertools.cycle([1, 2, 4, 0, 2, 3, 1])
    every = [
        Geometry(next(channels), kernel, (stride, stride), (padding, padding), pool, next(batches))
        for kernel, stride, padding, pool in itertools.product(
            ((1, 1), (3, 3), (5, 3)), (1, 2), (0, 1, 2), ("none", "max", "avg")
        )
    ]
    large = Geometry((3, 20), pool="max", size=(41, 43))  # more than one chunk of work per thread
    return (*BASE, *(g for g in every if g.valid()), large, replace(large, pool="avg"))


def sample_inputs(op: str, dtype: torch.dtype = torch.float64, *, thorough: bool = False) -> Iterator[Sample]:
    """Samples of ``drive``, ``relax_step`` or ``contrast``; a representative few unless ``thorough``."""
    yield from {"drive": _drive, "relax_step": _relax_step, "contrast": _contrast}[op](dtype, thorough)


def _drive(dtype: torch.dtype, thorough: bool) -> Iterator[Sample]:
    for i, g in enumerate(geometries(thorough=thorough)):
        new = Maker(dtype, i)
        args = (g.source(new), g.weight(new), *g.options())
        yield Sample("drive", str(g), args)
        if g.pool == "max":
            shape = ops.drive_shape(args[0], args[1], list(g.stride), list(g.padding), 1)
            yield Sample("drive", f"{g}-frozen", (*args, new.winners(*shape)))
            if g.batch > 1:
                yield Sample("drive", f"{g}-frozen-half", (*args, new.winners(g.batch // 2, *shape[1:])))


def _contrast(dtype: torch.dtype, thorough: bool) -> Iterator[Sample]:
    for i, g in enumerate(geometries(thorough=thorough)):
        new = Maker(dtype, 1000 + i)
        source, weight = g.source(new), g.weight(new)
        shape = ops.drive_shape(source, weight, list(g.stride), list(g.padding), ("none", "max", "avg").index(g.pool))
        winners = new.winners(*shape) if g.pool == "max" else None
        gains = {"source_gain": 0.25, "target_gain": 0.5, "scale": -0.3}
        kinds = [(2, 2, 0.5), (1, 1, 0.5), (1, 1, 0.0), (2, 0, 0.5), (1, 0, 0.5)]
        for phases, source_phases, centre in kinds if i < len(BASE) else (kinds[i % 5], kinds[(i + 2) % 5]):
            source_delta = g.source(new, source_phases * g.batch) if source_phases else None
            target_delta = new(phases * shape[0], *shape[1:])
            args = (source, source_delta, new(*shape), target_delta, tuple(weight.shape), *g.options())
            name = f"{g}-{phases}-{source_phases}-{centre}"
            yield Sample("contrast", name, (*args, winners), {**gains, "centre": centre})
            if winners is not None and centre == 0.5:
                live = new.winners(2 * g.batch, *shape[1:])
                yield Sample("contrast", f"{name}-live", (*args, live), {**gains, "centre": centre})
            if winners is not None and g.batch > 1:
                yield Sample("contrast", f"{name}-half", (*args, winners[: g.batch // 2]), {**gains, "centre": centre})


def _relax_step(dtype: torch.dtype, thorough: bool) -> Iterator[Sample]:
    structures = (_finished, _small_batches, _between_maps, _between_vectors, _alone, _none, _large, _large_ragged)
    every = list(itertools.product(("states", "delta", "tangent"), (1, 2), (1.0, 0.7), (1.0, 0.5)))
    every += [("states", 1, 1.4, 1.0), ("states", 2, 1.4, 0.5)]  # over-relaxed
    if not thorough:
        structures, every = structures[:6], every[::5]
    for i, (structure, (form, phases, damping, slope)) in enumerate(itertools.product(structures, every)):
        if structure in (_large, _large_ragged) and slope != 1.0:
            continue
        new = Maker(dtype, 2000 + i)
        state, bias, kwargs = structure(new)
        if form != "states":
            free = state.shape[0] // phases
            kwargs |= {"preactivation": 0.5 + 0.6 * new(free, *state.shape[1:]), "scale": 4.0}
        kwargs |= {"form": form, "phases": phases, "damping": damping, "slope": slope}
        name = f"{structure.__name__}-{form}-{phases}-{damping}-{slope}"
        yield Sample("relax_step", name, (state, bias), kwargs)


def _finished(new: Maker) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    shape = (4, 3, 7, 5)
    return new(*shape), new(3), {"drives": [new(*shape)], "nudge": new(*shape), "nudge_gain": -0.4}


def _small_batches(new: Maker) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Every summand that may have a smaller batch has one; feedback through max pooling."""
    below, above = Geometry((1, 3), batch=2), Geometry((3, 17), pool="max", batch=4)
    kwargs = {
        "drives": [new(2, 3, 7, 5), new(1, 3, 7, 5)],
        "below": [Neighbour(below.source(new), below.weight(new), *below.options(), gain=0.8)],
        "above": [
            Neighbour(new(4, 17, 3, 2), above.weight(new), *above.options(), new.winners(2, 17, 3, 2), gain=0.3),
        ],
        "nudge": new(2, 3, 7, 5),
        "nudge_gain": 0.2,
        "lo": -0.2,
        "hi": 0.7,
    }
    return new(4, 3, 7, 5), new(3), kwargs


def _between_maps(new: Maker) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Drive through average pooling, feedback of strided, average-pooled and linear connections."""
    below = Geometry((3, 17), (5, 3), padding=(2, 1), pool="avg", size=(15, 10))
    strided = Geometry((17, 3), stride=(2, 2), padding=(0, 1))
    pooled = Geometry((17, 1), (1, 1), padding=(0, 0), pool="avg")
    linear = Geometry((17, 6), None)
    kwargs = {
        "below": [Neighbour(below.source(new), below.weight(new), *below.options(), gain=0.8)],
        "above": [
            Neighbour(new(2, 3, 3, 3), strided.weight(new), *strided.options(), gain=0.5),
            Neighbour(new(2, 1, 3, 2), pooled.weight(new), *pooled.options(), gain=0.5),
            Neighbour(new(2, 6), linear.weight(new), gain=0.5),
        ],
    }
    return new(2, 17, 7, 5), new(17), kwargs


def _between_vectors(new: Maker) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    kwargs = {
        "below": [Neighbour(new(4, 3, 7, 5), new(17, 105) / 10), Neighbour(new(2, 6), new(17, 6), gain=-0.5)],
        "above": [Neighbour(new(4, 64), new(64, 17) / 8, gain=0.1)],
        "nudge": new(4, 17),
        "nudge_gain": 0.3,
    }
    return new(4, 17), new(17), kwargs


def _alone(new: Maker) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    return new(2, 1, 7, 5), None, {}


def _none(new: Maker) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    above = Geometry((3, 17), pool="max", batch=0)
    neighbour = Neighbour(new(0, 17, 3, 2), above.weight(new), *above.options(), new.winners(0, 17, 3, 2))
    return new(0, 3, 7, 5), new(3), {"drives": [new(0, 3, 7, 5)], "above": [neighbour]}


def _large(new: Maker) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """More than one chunk of work per sample."""
    return new(2, 64, 20, 17), new(64), {"drives": [new(2, 64, 20, 17), new(1, 64, 20, 17)]}


def _large_ragged(new: Maker) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    return new(2, 17, 41, 25), new(17), {"drives": [new(2, 17, 41, 25)]}


def relative_error(got: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """Largest difference over the largest expected magnitude (or ``scale``, where that is larger); infinite where
    shapes or dtypes differ, or NaN is involved."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    error = (got.double() - expected.double()).abs().max()
    error = error / expected.double().abs().max().clamp(min=max(scale, 1e-30))
    return float(torch.nan_to_num(error, nan=float("inf")))


def assert_same(
    got: Sequence[Tensor | None], expected: Sequence[Tensor | None], tolerance: float, scale: float = 0.0
) -> None:
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert (a is None) == (b is None), f"output {i}"
        if a is None or b is None:
            continue
        error = relative_error(a, b, scale)
        assert error <= (tolerance if b.dtype.is_floating_point else 0), f"output {i}: relative error {error:.2e}"


def _strided(t: Tensor) -> Tensor:
    out = torch.full([2 * n + 1 for n in t.shape], 77, dtype=t.dtype)[tuple(slice(1, None, 2) for _ in t.shape)]
    return out.copy_(t)


# The same values in other memory. A vector or a matrix takes its channels_last as a plain copy.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda t: t.contiguous(),
    "nhwc": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.clone(),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": _strided,
    "offset": lambda t: torch.cat([t.new_full((3,), 77), t.flatten()])[3:].view(t.shape),
}
