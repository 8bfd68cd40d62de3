"""The flat form of a relaxation and its inverse: the reference, as the body of the op, returns what the op returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ep_kernels import Network, RelaxConfig, contrast_gradients, ep_gradients, free_phase, nudged_phase, ops, relax_op
from ep_kernels.relaxation import Relaxation, relax_reference
from tests.core.nets import NETWORKS, fitting, problem
from tests.ops import networks
from tests.ops.inputs import RELAX, TENSOR_LISTS, capture
from tests.ops.test_relax import CODES, close, with_codes

ALL = {**NETWORKS, **networks.NETWORKS}
CONFIGS = {
    "default": RelaxConfig(),
    "tangent": RelaxConfig("even_odd", estimator="tangent", free_steps=2, nudged_steps=1),
    "states": RelaxConfig("sync", 5, 4, 0.1, form="states", winners="live"),
    "positive": RelaxConfig("even_odd", 3, 2, 0.1, "positive", "states", linear_nudge=True, damping=0.7),
    "stop": RelaxConfig(free_steps=40, tol=1e-2),
}


def flat(network: Network, config: RelaxConfig, *, warm: bool = False) -> list[tuple[Any, ...]]:
    """Arguments of the op in the free and the nudged phase."""
    p = problem(network)
    extra = {1: torch.full((3, *network.shapes[1]), 0.1, dtype=torch.float64)}
    start = p.states() if warm else None

    def run() -> object:
        return ep_gradients(network, p.parameters, p.x, p.targets, config, states=start, extra=extra, backend="cpu")

    return capture("relax", run)


def tensors(outputs: Any) -> list[Tensor]:
    return [t for group in outputs for t in (group if isinstance(group, list) else [group])]


def relaxations(network: Network, config: RelaxConfig) -> list[Relaxation]:
    """What the flat form is made of."""
    seen: list[Relaxation] = []
    original: Callable[[Relaxation], tuple[Any, ...]] = relax_op.flat
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relax_op, "flat", lambda r: (seen.append(r), original(r))[1])
        flat(network, config)
    return seen


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ALL)
def test_the_reference_is_the_op(name: str, config: str) -> None:
    settings = CONFIGS[config]
    for arguments in flat(fitting(ALL[name], settings), settings, warm=config == "states"):
        form = arguments[RELAX["form"]]
        relaxation = relax_op.relaxation_of(*arguments)
        got = tensors(relax_op.flatten(relax_reference(relaxation), relaxation))
        expected = tensors(ops.relax(*arguments))
        assert len(got) == len(expected)
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            if b.dtype == torch.uint8:
                assert torch.equal(a, b), i
            else:
                close(f"output {i}", a, b, 1.0 if form == 0 else 0.0)
            assert a.dim() != 4 or a.is_contiguous(memory_format=torch.channels_last)
        places = [t.data_ptr() for t in got if t.numel()]
        given = {t.data_ptr() for group in arguments[: len(TENSOR_LISTS)] for t in group if t.numel()}
        assert len(set(places)) == len(places)
        assert not set(places) & given
        assert len({id(t) for t in got}) == len(got)  # absent ones, too


def same(a: Any, b: Any) -> bool:
    """Equal values; tensors are the same objects."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b if isinstance(a, Tensor) else bool(a == b)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ALL)
def test_there_and_back(name: str, config: str) -> None:
    """Every field of a relaxation, but for what is not encoded: the feedback gain, what heads are tied to, the plan's
    order, sweeps that will not run, and heads, free states and preactivations where there is no nudge or no delta."""
    for r in relaxations(fitting(ALL[name], CONFIGS[config]), CONFIGS[config]):
        again = relax_op.relaxation_of(*relax_op.flat(r))
        heads = tuple(replace(head, tied=None) for head in r.network.local_heads)
        network = replace(r.network, feedback_gain=1.0, local_heads=heads)
        lost = {"network", "plan"}
        if not r.targets:
            network = replace(network, readout=again.network.readout, local_heads=())
            lost |= {"head_weights", "head_biases"}
        if r.form == "states":
            lost |= {"free", "preactivations"}
        assert again.network == network
        assert again.plan == replace(r.plan, sweeps=r.plan.sweeps[: r.steps], order=())
        for field in fields(r):
            assert field.name in lost or same(getattr(again, field.name), getattr(r, field.name)), field.name


def test_states_that_nothing_moves_are_copied() -> None:
    free, _ = flat(NETWORKS["max"], RelaxConfig(free_steps=1), warm=True)
    at = RELAX["program"]
    idle = (*free[:at], [0, 1, 0, 0], *free[at + 1 :])  # a program without launches
    relaxation = relax_op.relaxation_of(*idle)
    for outputs in (ops.relax(*idle), relax_op.flatten(relax_reference(relaxation), relaxation)):
        for state, start in zip(outputs[0], free[0][1:], strict=True):
            assert torch.equal(state, start)
            assert state.data_ptr() != start.data_ptr()


def test_equal_arguments_give_the_same_network_and_plan() -> None:
    """Executors may keep what they prepare by these."""
    (free, nudged), (free_, nudged_) = (flat(NETWORKS["skips, max"], RelaxConfig()) for _ in range(2))
    for one, other in ((free, free_), (nudged, nudged_)):
        a, b = relax_op.relaxation_of(*one), relax_op.relaxation_of(*other)
        assert a.network is b.network
        assert a.plan is b.plan


def test_precisions() -> None:
    (free, nudged) = flat(NETWORKS["skips, max"], RelaxConfig())
    for arguments in (free, nudged):
        assert arguments[CODES] == (0, 0)
        for code, operands in enumerate((None, "tf32", torch.float16, torch.bfloat16)):
            for stored, storage in enumerate((None, torch.float16)):
                relaxation = relax_op.relaxation_of(*with_codes(arguments, code, stored))
                assert (relaxation.operands, relaxation.storage) == (operands, storage)
                assert relax_op.flat(relaxation)[CODES] == (code, stored)
        states, _, drives, _, residual = relax_op.flatten(relax_reference(relaxation), relaxation)
        assert {t.dtype for t in states} == {torch.float16}
        assert {t.dtype for t in (*drives, residual)} == {torch.float64}


@pytest.mark.parametrize(
    ("operands", "storage", "message"),
    [
        (4, 0, r"'operands': expected one of 0 \(None\), 1 \(tf32\), 2 \(torch.float16\), 3 \(torch.bfloat16\), got 4"),
        (-1, 0, r"'operands': expected one of 0 \(None\), .*, got -1"),
        (0, 2, r"'storage': expected one of 0 \(None\), 1 \(torch.float16\), got 2"),
    ],
)
def test_unknown_codes(operands: int, storage: int, message: str) -> None:
    (free, _) = flat(NETWORKS["max"], RelaxConfig())
    with pytest.raises(ValueError, match=f"^relax: argument {message}$"):
        relax_op.relaxation_of(*with_codes(free, operands, storage))


def test_the_op_of_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients with the reference in the op's place: what a backend that takes the flat form does."""
    net = NETWORKS["slope 1/2, local heads"]
    p = problem(net)
    config = RelaxConfig(operands=torch.float16)

    def gradients() -> dict[str, Tensor]:
        free = free_phase(net, p.parameters, p.x, config, keep=True)
        nudged = nudged_phase(net, p.parameters, free, p.targets, config)
        return contrast_gradients(net, p.parameters, free, nudged, p.targets).named()

    expected = gradients()

    def op(*arguments: Any) -> relax_op.Outputs:
        relaxation = relax_op.relaxation_of(*arguments)
        return relax_op.flatten(relax_reference(relaxation), relaxation)

    monkeypatch.setattr(ops, "relax", op)
    for key, tensor in gradients().items():
        close(key, tensor, expected[key], tolerance=1e-2)
