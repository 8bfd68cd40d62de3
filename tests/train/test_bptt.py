"""BPTT against full autograd through an unrolled loop that is written here, and against the free phase's states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ep_kernels import Network, Parameters, RelaxConfig, free_phase
from ep_kernels.plan import SCHEDULES
from ep_train.bptt import bptt_gradients, loss_at
from tests.core.nets import NETWORKS, Problem, problem
from tests.core.threads import one_thread  # noqa: F401  (autouse)

# --- the loop, in plain PyTorch ---------------------------------------------------------------------------------------


def told(net: Network, states: list[Tensor], named: dict[str, Tensor], node: int) -> Tensor:
    """``a`` of one node: the partial gradient of ``sum_l k^l <s^l, b^l + drives>``, itself differentiable."""
    here = states[node].clone() if states[node].requires_grad else states[node].detach().requires_grad_()
    states = [here if i == node else s for i, s in enumerate(states)]
    total = states[0].new_zeros(())
    for c, conn in enumerate(net.connections):
        if node not in (conn.src, conn.dst):
            continue
        weight, source = named[f"connections.{c}.weight"], states[conn.src]
        if conn.kernel_size is None:
            z = F.linear(source.flatten(1), weight)
        else:
            z = F.conv2d(source, weight, stride=conn.stride, padding=conn.padding)
            if conn.pool != "none":
                z = (F.max_pool2d if conn.pool == "max" else F.avg_pool2d)(z, 2)
        total = total + net.feedback_gain ** (net.levels[conn.dst] - net.levels[node]) * (states[conn.dst] * z).sum()
    bias = named[f"nodes.{node}.bias"].view(-1, *[1] * (here.dim() - 2))
    (rise,) = torch.autograd.grad(total + (here * bias).sum(), here, create_graph=True)
    return rise


def unrolled(p: Problem, config: RelaxConfig, differentiated: int, named: dict[str, Tensor]) -> list[Tensor]:
    """``free_steps`` sweeps from zero states, the last ones with a graph."""
    net = p.network
    states = [p.x, *(p.x.new_zeros(len(p.x), *shape) for shape in net.shapes[1:])]
    parity = {"even_odd": lambda i: (net.levels[i] % 2, net.levels[i])}.get(config.schedule, lambda i: net.levels[i])
    order = sorted(range(1, len(states)), key=parity)
    for t in range(config.free_steps):
        if t == config.free_steps - differentiated:
            states = [s.detach() for s in states]
        eta = 1.0 if t == 0 or config.schedule == "sync" else config.free_damping(net.feedback_gain)
        if config.damping < 1:
            eta = config.damping
        new = list(states)
        for node in order:
            read = states if config.schedule == "sync" else new
            target = (net.slope * told(net, read, named, node)).clamp(net.lo, net.hi)
            moved = (1 - eta) * read[node] + eta * target
            new[node] = moved.clamp(net.lo, net.hi) if eta > 1 else moved
        states = new
    return states


def expected(p: Problem, config: RelaxConfig, differentiated: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    named = {name: t.clone().requires_grad_() for name, t in p.parameters.named().items()}
    states = unrolled(p, config, differentiated, named)
    loss = loss_at(p.network, Parameters.from_named(p.network, named), states, p.targets)
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    zeros = {name: torch.zeros_like(t) for name, t in named.items()}
    return {n: zeros[n] if g is None else g for n, g in zip(named, found, strict=True)}, states


OPTIONS: list[dict[str, Any]] = [{}, {"over_relaxation": 1.0}, {"damping": 0.6}]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["max", "skips, max", "skips, average", "slope 1/2, local heads"])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_bptt_is_autograd_through_the_loop(name: str, schedule: Any, steps: int) -> None:
    p = problem(NETWORKS[name], seed=5)
    for options in OPTIONS:
        config = RelaxConfig(schedule, 5, **options)
        want, final = expected(p, config, steps)
        got, states, loss = bptt_gradients(p.network, p.parameters, p.x, p.targets, config, steps=steps)
        for ours, theirs in zip(states, final, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
        torch.testing.assert_close(loss, loss_at(p.network, p.parameters, final, p.targets))
        assert got.named().keys() == want.keys()
        for key, theirs in want.items():
            torch.testing.assert_close(got.named()[key], theirs, rtol=1e-8, atol=1e-11, msg=f"{key}, {options}")
        if steps == 5 and schedule != "sync":
            assert all(bool(g.any()) for g in want.values())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("omega", [1.0, 1.4])
@pytest.mark.parametrize(("free", "steps"), [(4, 1), (4, 4), (2, 5)])
def test_states_are_those_of_the_free_phase(schedule: Any, omega: float, free: int, steps: int) -> None:
    """Unrolled or not: the same first sweep, the same over-relaxation, the same winners."""
    p = problem(NETWORKS["skips, max"])
    config = RelaxConfig(schedule, free, over_relaxation=omega)  # never more sweeps than T
    want = free_phase(p.network, p.parameters, p.x, config).states
    _, states, _ = bptt_gradients(p.network, p.parameters, p.x, p.targets, config, steps=steps)
    for ours, theirs in zip(states, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_a_warm_start() -> None:
    p = problem(NETWORKS["skips, max"])
    config = RelaxConfig(free_steps=6, over_relaxation=1.0)
    half = free_phase(p.network, p.parameters, p.x, replace(config, free_steps=3)).states
    want, final, _ = bptt_gradients(p.network, p.parameters, p.x, p.targets, config, steps=2)
    for free_steps, config_steps in ((1, 6), (None, 3)):
        got, states, _ = bptt_gradients(
            p.network,
            p.parameters,
            p.x,
            p.targets,
            replace(config, free_steps=config_steps),
            steps=2,
            free_steps=free_steps,
            states=half,
        )
        for ours, theirs in zip(states, final, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
        for key, theirs in want.named().items():
            torch.testing.assert_close(got.named()[key], theirs, rtol=1e-9, atol=1e-12)


def test_parameters_out_of_reach_get_zeros() -> None:
    """One synchronous sweep carries the loss to the top connection only."""
    net = Network.chain((2, 8, 8), [3, 3, 3], ["max", "none", "none"], classes=3)
    p = problem(net, bias=0.3)
    got, _, _ = bptt_gradients(net, p.parameters, p.x, p.targets, RelaxConfig("sync", 5), steps=1)
    reached = {name for name, g in got.named().items() if bool(g.any())}
    assert reached == {"connections.2.weight", "nodes.3.bias", "heads.0.weight", "heads.0.bias"}


def test_the_parameters_are_left_alone() -> None:
    p = problem(NETWORKS["max"])
    before = {name: t.clone() for name, t in p.parameters.named().items()}
    with torch.no_grad():
        got, states, loss = bptt_gradients(p.network, p.parameters, p.x, p.targets, RelaxConfig(), steps=2)
    assert all(torch.equal(t, before[name]) and not t.requires_grad for name, t in p.parameters.named().items())
    assert not any(t.requires_grad for t in (*got.named().values(), *states, loss))
