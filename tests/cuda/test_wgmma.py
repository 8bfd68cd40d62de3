"""The wgmma main loop, which EP_KERNELS_WGMMA=1 selects on compute capability 9.0, run on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ep_kernels import RelaxConfig, functional
from ep_kernels.solver import ep_gradients
from tests.cuda.host import cuda_on_cpu
from tests.cuda.test_ops import check
from tests.gpu.device import assert_close, moved
from tests.ops.inputs import Maker, Sample, sample_inputs
from tests.ops.networks import NETWORKS, problem


@pytest.fixture(autouse=True)
def hopper(device: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device of compute capability 9.0, with few multiprocessors: small problems take large tiles."""
    monkeypatch.setenv("EP_KERNELS_WGMMA", "1")
    device.set_device(major=9, processors=1, shared_memory=232448)
    device.reset_statistics()
    return device


def used(device: Any) -> set[str]:
    return {name for name in device.statistics()["kernels"] if "Warpgroup" in name}


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("op", ["drive", "relax_step"])
def test_every_sample(op: str, dtype: str, hopper: Any) -> None:
    for sample in sample_inputs(op, thorough=True):
        check(sample, dtype)
    assert used(hopper)


@pytest.mark.parametrize("rows", [128, 256])
def test_every_tile(rows: int, hopper: Any) -> None:
    """Two neighbours: accumulators are scaled between their loops, and there are more stages than in the pipeline."""
    new = Maker(torch.float32, rows)
    batch = rows // 128
    below = functional.Neighbour(new(batch, 72, 8, 16), new(128, 72, 3, 3) / 25, (1, 1), (1, 1), gain=0.7)
    above = functional.Neighbour(new(batch, 40, 8, 16), new(40, 128, 3, 3) / 34, (1, 1), (1, 1), gain=0.1)
    sample = Sample("relax_step", "both", (new(batch, 128, 8, 16), new(128)), {"below": [below], "above": [above]})
    for dtype in ("fp16", "bf16"):
        check(sample, dtype)
    assert any(f", {rows}," in name for name in used(hopper)), hopper.statistics()["kernels"]


@pytest.mark.parametrize("network", NETWORKS)
def test_relaxations(network: str, hopper: Any) -> None:
    """The same operands, so the same numbers but for the order of sums: a winner near a tie may flip."""
    net = NETWORKS[network]
    params, x, targets = moved(problem(net, batch=5), torch.float32, "cpu")
    config = RelaxConfig(operands=torch.float16)
    with cuda_on_cpu():
        found, free = ep_gradients(net, params, x, targets, config)
    expected, free_ = ep_gradients(net, params, x, targets, config, backend="reference")
    assert used(hopper)
    assert_close(free.states, free_.states, 2e-3, "states")
    assert_close(found.weights, expected.weights, 2e-2, "weights")
