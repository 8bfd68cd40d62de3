"""torch.compile without graph breaks: the functional API, and the ops themselves, equal to eager."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ep_kernels import RelaxConfig, backend, ep_gradients, functional
from ep_kernels.functional import Neighbour
from tests.ops.inputs import TENSOR_LISTS, Maker, assert_same, capture
from tests.ops.networks import SKIP, problem

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    torch.use_deterministic_algorithms(False)  # inductor would warn
    yield
    torch.compiler.reset()


def two_layers(x: Tensor, state: Tensor, above: Tensor, weight: Tensor, weight_above: Tensor, bias: Tensor) -> Any:
    """A pooled drive, one step of the node that it drives, and the contrast of its connection."""
    drive, winners = functional.drive(x, weight, (1, 1), (1, 1), "max")
    up, won = functional.drive(state.relu(), weight_above, (1, 1), (1, 1), "max")
    neighbour = Neighbour(above, weight_above, (1, 1), (1, 1), "max", won, gain=0.3)
    new, residual, a = functional.relax_step(
        state, bias, drives=[drive], above=[neighbour], nudge=up.mean() * state, nudge_gain=-0.1, damping=0.9
    )
    options = ([1, 1], [1, 1], 1, winners, 1.0, 1.0, 0.5, -0.25, 0)
    raw = torch.ops.ep_kernels.contrast(x, None, new, new - state, list(weight.shape), *options)
    same = functional.contrast(
        x, None, new, new - state, weight.shape, (1, 1), (1, 1), "max", winners, scale=-0.25, operands="tf32"
    )
    return new.sin(), residual, a, *raw, *same


def arguments(batch: int = 2, size: tuple[int, int] = (14, 10)) -> tuple[Tensor, ...]:
    new = Maker(torch.float32)
    height, width = size
    maps = new(batch, 2, height, width), new(batch, 3, height // 2, width // 2), new(batch, 4, height // 4, width // 4)
    return *maps, new(3, 2, 3, 3), new(4, 3, 3, 3), new(3)


def test_functional_without_graph_breaks() -> None:
    compiled = torch.compile(two_layers, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*arguments()), two_layers(*arguments()), 1e-6)


def test_dynamic_shapes_compile_once() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(two_layers, fullgraph=True, backend=count, dynamic=True)
    for batch, size in ((5, (26, 34)), (9, (38, 46)), (7, (54, 62))):  # no size that equals another one by chance
        assert_same(compiled(*arguments(batch, size)), two_layers(*arguments(batch, size)), 1e-6)
    assert len(graphs) == 1


def test_gradients_of_drive() -> None:
    def loss(source: Tensor, weight: Tensor) -> Tensor:
        return functional.drive(source.tanh(), weight, (1, 1), (1, 1), "max")[0].square().sum()

    new = Maker(torch.float64)
    source, weight = new(2, 3, 7, 5).requires_grad_(), new(4, 3, 3, 3).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(source, weight), (source, weight))
    assert_same(found, torch.autograd.grad(loss(source, weight), (source, weight)), 1e-12)


def test_the_backend_is_that_of_the_trace() -> None:
    def pooled(source: Tensor, weight: Tensor) -> Tensor:
        return functional.drive(source, weight, (1, 1), (1, 1), "max")[0]

    new = Maker(torch.float64)
    source, weight = new(2, 3, 7, 5), new(4, 3, 3, 3)
    graphs = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph

    with backend("reference"):
        expected = torch.compile(pooled, fullgraph=True, backend=look)(source, weight)
    torch.compiler.reset()
    got = torch.compile(pooled, fullgraph=True, backend=look)(source, weight)
    assert ["ep_kernels.drive" in graph for graph in graphs] == [False, True]
    assert_same([got], [expected], 1e-12)


def test_errors_of_arguments_are_raised_while_tracing() -> None:
    compiled = torch.compile(functional.drive, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="argument 'source': expected 3 channels"):
        compiled(torch.zeros(2, 4, 7, 5), torch.zeros(4, 3, 3, 3))


@pytest.mark.parametrize("phase", [0, 1], ids=["free", "nudged"])
def test_relax(phase: int) -> None:
    params, x, targets = problem(SKIP, 2, torch.float32)
    calls = capture("relax", lambda: ep_gradients(SKIP, params, x, targets, RelaxConfig(), backend="cpu"))
    lists, rest = calls[phase][: len(TENSOR_LISTS)], calls[phase][len(TENSOR_LISTS) :]

    def run(*lists: Any) -> tuple[Tensor, ...]:
        states, _, drives, winners, residual = torch.ops.ep_kernels.relax(*lists, *rest)
        return *(s * 2 for s in states), *drives, *winners, residual

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*lists), run(*lists), 1e-6)


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_inductor() -> None:
    """Generated code around the ops agrees with the strides that the fake implementations promise."""
    compiled = torch.compile(two_layers, fullgraph=True)
    assert_same(compiled(*arguments()), two_layers(*arguments()), 1e-5)
