"""The same algorithm in plain PyTorch computes what our kernels compute."""

from __future__ import annotations

import pytest
import torch

from benchmarks.baselines.plain import POOLINGS, PlainEP
from benchmarks.problem import BATCHES, largest_error, network_of, problem_of, sweep_flops
from ep_kernels import RelaxConfig, ep_gradients, free_phase

NETS = {"laborieux/32": (32, 0.1), "4-6p-5": (12, 0.1), "4p-6p-5": (12, 0.02), "3p-4-5-6p": (13, 0.3)}  # size, k


@pytest.mark.parametrize("pooling", list(POOLINGS))
@pytest.mark.parametrize("setting", list(BATCHES))
@pytest.mark.parametrize("model", list(NETS))
def test_plain_batch_is_ours(model, setting, pooling):
    p = problem_of(network_of(model, *NETS[model]), 3, "cpu").double()
    config = RelaxConfig(**BATCHES[setting])
    ours, _ = ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend="reference")
    plain = PlainEP(p.network, torch.float64, pooling)
    theirs = plain.gradients(p.parameters, p.x, p.targets[0], config, plain.scales(config)).named()
    assert (
        largest_error(list(theirs.values()), [ours.named()[name] for name in theirs]) < 1e-5
    )  # its results are float32


def test_plain_relaxation_is_ours():
    p = problem_of(network_of("4-6p-5-5p", 12, 0.3), 3, "cpu").double()
    config = RelaxConfig(free_steps=5)
    ours = free_phase(p.network, p.parameters, p.x, config, backend="reference")
    theirs, _, _ = PlainEP(p.network, torch.float64).free(p.parameters, p.x, config)
    assert largest_error(theirs[1:], ours.states[1:]) < 1e-12


def test_flops_of_a_sweep():
    """Two products a connection between nodes; one multiply-add a weight and position."""
    network = network_of("2-3p-4", 8)
    assert sweep_flops(network, 5) == 2 * (2 * 5 * 64 * 9 * 2 * 3) + 2 * (2 * 5 * 16 * 9 * 3 * 4)
