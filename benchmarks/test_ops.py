"""The op-level questions under pytest-benchmark: ``pytest benchmarks --benchmark-only``.

Each is checked against float64 first. A group is an op and a layer; its members are the backends, PyTorch's own calls
and the convolutions alone. On a GPU a call replays a CUDA graph that does the job ``calls`` times (``extra_info``).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.case import Timed, Unavailable, check, synchronize
from benchmarks.layers import Layer, Make, Op, network_at
from benchmarks.problem import PRECISIONS
from benchmarks.questions import contrast, drive, relax_step
from benchmarks.setting import Setting

SETTING = Setting(device="cuda" if torch.cuda.is_available() else "cpu", threads=torch.get_num_threads())
MODELS, BATCH = (("vgg11", "laborieux"), 256) if SETTING.cuda else (("vgg11/4", "laborieux/4"), 32)
OPS = {op.name: op for op in (drive.OP, relax_step.OP, contrast.OP)}
LAYERS = [Layer(SETTING, model, BATCH, i) for model in MODELS for i in range(1, len(network_at(SETTING, model).shapes))]
COMPETITORS = ("cpu", "triton", "cuda", "reference", "eager", "convolutions")

try:
    brief = pytest.mark.benchmark(max_time=0.3, min_rounds=3)  # the whole file in less than two minutes
except pytest.fail.Exception:  # nobody registered the marker
    brief = pytest.mark.skip(reason="pytest-benchmark is not there: pip install pytest-benchmark")


def maker(op: Op, layer: Layer, name: str) -> Make:
    """A competitor of the questions: a backend in float32 on a CPU and in float16 on a GPU, or PyTorch."""
    if name == "eager":
        return partial(op.eager, layer, None)
    if name == "convolutions":
        return partial(op.alone, layer)
    return partial(op.ours, layer, name, PRECISIONS[layer.rate])


def made(op: Op, layer: Layer, name: str) -> Timed:
    """The competitor, checked; the test is skipped with the reason where it cannot run."""
    try:
        timed = maker(op, layer, name)()
    except Unavailable as why:
        pytest.skip(str(why))
    check(timed.verify(), timed.limit)
    return timed


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    """Buffers and graphs of one test are no other's."""
    yield
    for op in OPS.values():
        op.forget()


@brief
@pytest.mark.parametrize("competitor", COMPETITORS)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer.model}-layer{layer.node}")
@pytest.mark.parametrize("op", OPS)
def test_op(op: str, layer: Layer, competitor: str, benchmark: Any) -> None:
    timed = made(OPS[op], layer, competitor)

    def call() -> None:
        timed.work()
        synchronize()

    benchmark.group = f"{op}, {layer.key}"
    benchmark.extra_info |= {"calls": timed.calls, "gflop": OPS[op].flops(layer) / 1e9, "limit": timed.limit}
    benchmark(call)
