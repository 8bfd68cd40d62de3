"""``torch.ops.ep_kernels.triton_*``: what PyTorch sees of them, and that they are what the backend ``triton`` runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ep_kernels import Network, Parameters, RelaxConfig, backend, backends, ep_gradients, functional, ops, relax_op
from ep_kernels.relaxation import Relaxation
from tests.core.nets import NETWORKS, VARIANTS, problem
from tests.ops.inputs import Maker, assert_same, sample_inputs

CHECKS = ("test_schema", "test_faketensor")


def overload(name: str) -> Any:
    return getattr(torch.ops.ep_kernels, f"triton_{name}").default


@pytest.fixture(autouse=True)
def registered() -> None:
    ops.ensure()
    torch.use_deterministic_algorithms(False)  # torch.compile would warn


@pytest.mark.parametrize("op", ["drive", "relax_step", "contrast"])
def test_opcheck(op: str) -> None:
    """Fake implementations promise the shapes and strides that come; the values are those of the CPU's ops."""
    for sample in list(sample_inputs(op, torch.float32))[:4]:
        raw = sample.raw()
        torch.library.opcheck(overload(op), raw, test_utils=CHECKS)
        found, expected = overload(op)(*raw), getattr(ops, op)(*raw)
        assert [t.stride() for t in found] == [t.stride() for t in expected]
        assert_same(found, expected, 1e-4)


@pytest.mark.parametrize("network", [NETWORKS["max"], VARIANTS["separate, tied head"]], ids=["tied", "separate"])
def test_opcheck_of_relax(network: Network) -> None:
    p = problem(network, batch=2)
    named = {name: t.float() for name, t in p.parameters.named().items()}
    config = RelaxConfig(free_steps=2, nudged_steps=1)
    with backends.recorded() as jobs:
        parameters = Parameters.from_named(p.network, named)
        ep_gradients(p.network, parameters, p.x.float(), [t.float() for t in p.targets], config, backend="triton")
    for job in jobs[:2]:
        assert isinstance(job, Relaxation)
        torch.library.opcheck(overload("relax"), relax_op.flat(job), test_utils=CHECKS)
        found, expected = relax_op.relax(job, triton=True), backends.relax(job, "triton")
        assert_same(found.states[1:], expected.states[1:], 0)


def test_functional_runs_them() -> None:
    """Also under torch.compile, with the derivative of ``drive``."""

    def loss(source: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.drive(source.tanh(), weight, (1, 1), (1, 1), "max")[0].square().sum()

    new = Maker(torch.float32)
    source, weight = new(2, 3, 8, 6).requires_grad_(), new(4, 3, 3, 3).requires_grad_()
    graphs = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph

    expected = torch.autograd.grad(loss(source, weight), (source, weight))
    with backend("triton"):
        assert_same(torch.autograd.grad(loss(source, weight), (source, weight)), expected, 1e-4)
        torch.compiler.reset()
        compiled = torch.compile(loss, fullgraph=True, backend=look)(source, weight)
    assert "ep_kernels.triton_drive" in graphs[0]
    assert_same(torch.autograd.grad(compiled, (source, weight)), expected, 1e-4)


def test_under_autocast_they_compute_in_float32() -> None:
    new = Maker(torch.float32)
    source, weight = new(1, 3, 6, 6), new(4, 3, 3, 3)
    with backend("triton"):
        expected = functional.drive(source, weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = functional.drive(source, weight)
    assert found[0].dtype == torch.float32
    assert_same(found[:1], expected[:1], 0)


def test_others_refuse_to_be_differentiated() -> None:
    state = torch.zeros(2, 3, requires_grad=True)
    with backend("triton"):
        new, _, _ = functional.relax_step(state)
    with pytest.raises(RuntimeError, match="ep_kernels::triton_relax_step has no derivative"):
        new.sum().backward()
