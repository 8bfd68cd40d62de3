"""The baselines compute what we compute: a slow wrong competitor would prove nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ep_kernels
from benchmarks.baselines.published import AutogradLoop, Convolutions, FeedForward, backprop
from benchmarks.baselines.unrolled import bptt, checkpointed
from benchmarks.problem import sweep_flops
from ep_kernels import Network, Parameters, RelaxConfig
from ep_train.models import initial_parameters


@pytest.fixture(scope="module")
def problem():
    network = Network.chain((3, 16, 16), [6, 7, 5], ["max", "none", "max"], classes=4, feedback_gain=1.0)
    parameters = Parameters.from_named(network, initial_parameters(network, weight_gain=0.7, dtype=torch.float64))
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(5, 3, 16, 16, generator=generator, dtype=torch.float64)
    return network, parameters, x, torch.randint(0, 4, (5,), generator=generator)


def test_autograd_loop_takes_our_classical_steps(problem):
    network, parameters, x, _ = problem
    ours = ep_kernels.free_phase(network, parameters, x, RelaxConfig.classical(free_steps=7))
    theirs = AutogradLoop(network, parameters).relax(x, 7)
    for a, b in zip(ours.states[1:], theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert ours.residual.max() > 1e-6  # still moving: equal trajectories, not just one fixed point


def test_autograd_batch_gives_our_classical_gradient(problem):
    network, parameters, x, labels = problem
    config = RelaxConfig.classical(free_steps=9, nudged_steps=5, beta=0.3)
    targets = ep_kernels.targets_for(network, labels, 4, x.dtype)
    ours, _ = ep_kernels.ep_gradients(network, parameters, x, targets, config)
    theirs = AutogradLoop(network, parameters).batch(x, labels, 9, 5, 0.3)
    named = ours.named()
    expected = [named[f"connections.{c}.weight"] for c in range(3)] + [named[f"nodes.{i}.bias"] for i in (1, 2, 3)]
    for a, b in zip(expected, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


def test_feed_forward_is_the_first_free_sweep(problem):
    network, parameters, x, labels = problem
    first = ep_kernels.free_phase(network, parameters, x, RelaxConfig(free_steps=1))
    model = FeedForward(network, parameters).double()
    torch.testing.assert_close(ep_kernels.readout(network, parameters, first), model(x))
    backprop(model, x, labels)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_weak_feedback_approaches_backprop(problem):
    """As k falls, the EP gradient becomes that of the feed-forward net."""
    network, parameters, x, labels = problem
    targets = ep_kernels.targets_for(network, labels, 4, x.dtype)
    model = FeedForward(network, parameters).double()
    backprop(model, x, labels)
    cosines = []
    for gain in (0.3, 0.03, 0.003):
        config = RelaxConfig(free_steps=20, nudged_steps=10, estimator="tangent")
        gradients, _ = ep_kernels.ep_gradients(replace(network, feedback_gain=gain), parameters, x, targets, config)
        cosines.append(
            min(
                torch.nn.functional.cosine_similarity(w.flatten(), conv.weight.grad.flatten(), 0).item()
                for w, conv in zip(gradients.weights, model.convs, strict=True)
            )
        )
    assert cosines == sorted(cosines)
    assert cosines[-1] > 0.999


def test_convolutions_are_those_of_a_sweep(problem):
    """As many as the plan emits for a steady free sweep, with as many operations as are counted for ours."""
    network, parameters, _, _ = problem
    plan = ep_kernels.compile_plan(network, "sweep", "free")
    per_sweep = plan.convolutions(9) - plan.convolutions(8)
    alone = Convolutions(network, parameters, 2)
    assert 2 * len(alone.jobs) == per_sweep == 4
    assert alone.flops() == sweep_flops(network, 2)


@pytest.mark.parametrize("local", [False, True])
def test_the_loop_in_turn_is_our_sweep(problem, local):
    """With our gain and order it goes through our states; the two terms that hold a layer are enough for it."""
    network, parameters, x, labels = problem
    network = replace(network, feedback_gain=0.3)
    loop = AutogradLoop(network, parameters, gain=0.3, in_turn=True, local=local)
    config = RelaxConfig(free_steps=4, over_relaxation=1.0)
    ours = ep_kernels.free_phase(network, parameters, x, config)
    theirs = loop.relax(x, 4)
    for a, b in zip(ours.states[1:], theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    config = replace(config, nudged_steps=2, beta=0.1, form="states", winners="live")
    targets = ep_kernels.targets_for(network, labels, 4, x.dtype)
    gradients, _ = ep_kernels.ep_gradients(network, parameters, x, targets, config)
    for a, b in zip(gradients.weights, loop.batch(x, labels, 4, 2, 0.1), strict=False):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_checkpointing_changes_no_gradient(problem, steps):
    network, parameters, x, labels = problem
    network = replace(network, feedback_gain=0.3)
    targets = ep_kernels.targets_for(network, labels, 4, x.dtype)
    config = RelaxConfig(free_steps=steps)
    expected = bptt(network, parameters, x, targets, config, steps).named()
    for name, found in checkpointed(network, parameters, x, targets, config).named().items():
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-12)
