"""Random networks, settings, inputs and modules: documented exceptions, finite numbers, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from ep_kernels import Connection, EquilibriumNet, Head, Network, RelaxConfig
from ep_kernels.config import ESTIMATORS
from ep_kernels.nn import convert
from ep_kernels.plan import SCHEDULES

QUICK = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
POOLS = st.sampled_from(["none", "max", "avg"])


@st.composite
def networks(draw: Any) -> Network:
    """Chains with skips, odd sizes, both readouts, local heads; ValueError where the numbers make none."""
    side, depth = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    channels = draw(st.lists(st.integers(1, 4), min_size=depth, max_size=depth))
    connections = [
        Connection(i, i + 1, (draw(st.integers(1, 3)),) * 2, padding=(draw(st.integers(0, 1)),) * 2, pool=draw(POOLS))
        for i in range(depth)
    ]
    if depth > 1 and draw(st.booleans()):
        connections.append(Connection(0, 2, (draw(st.integers(1, 3)),) * 2, stride=(2, 2), pool=draw(POOLS)))
    return Network.graph(
        (draw(st.integers(1, 3)), side, draw(st.integers(1, 9))),
        channels,
        connections,
        classes=draw(st.integers(1, 4)),
        hidden=draw(st.lists(st.integers(1, 5), max_size=1)),
        readout=draw(st.sampled_from(["softmax", "mse"])),
        local_heads=draw(st.lists(st.integers(1, depth), max_size=2)),
        feedback_gain=draw(st.floats(1e-3, 1.0)),
        feedback=draw(st.sampled_from(["tied", "separate"])),
    )


CONFIGS = st.builds(
    RelaxConfig,
    schedule=st.sampled_from(SCHEDULES),
    free_steps=st.integers(1, 3),
    nudged_steps=st.integers(1, 3),
    estimator=st.sampled_from(ESTIMATORS),
    form=st.sampled_from(["delta", "states"]),
    winners=st.sampled_from(["frozen", "live"]),
    damping=st.sampled_from([1.0, 0.5]),
    tol=st.sampled_from([0.0, 1e-2]),
)


def documented(error: ValueError, argument: str = "") -> None:
    assert f"argument '{argument}" in str(error)


@QUICK
@given(st.data())
def test_every_network_trains_or_says_why_not(data: Any) -> None:
    try:
        network, config = data.draw(networks()), data.draw(CONFIGS)
        net = EquilibriumNet(network, config, seed=0)
    except ValueError as error:
        documented(error)
        return
    count = data.draw(st.sampled_from([0, 1, 3]))
    scale = data.draw(st.sampled_from([1e-30, 1.0, 1e30]))
    x = torch.rand(count, *network.shapes[0], requires_grad=True)
    try:
        outputs = net(x, heads=True)
        loss = sum((z.square().sum() for z in outputs), torch.zeros(())) * scale
        loss.backward()
    except ValueError as error:  # live winners with separate feedback, clamped output units
        documented(error, "config")
        return
    assert x.grad is not None
    assert x.grad.shape == x.shape
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.isfinite().all()), name
    assert net.residual is not None
    assert net.residual.shape == (count,)
    assert [tuple(z.shape[1:]) for z in outputs] == [
        head.output_shape(network.shapes[head.node]) for head in network.heads
    ]


SHAPES = st.lists(st.integers(0, 3), max_size=5).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64])
NET = EquilibriumNet(Network.chain((1, 2, 2), [2], ["max"], classes=2), seed=0)


@QUICK
@given(shape=SHAPES, dtype=DTYPES, labels=SHAPES, of=DTYPES, cast=st.booleans())
def test_any_tensor_is_taken_or_refused(shape: Any, dtype: Any, labels: Any, of: Any, cast: bool) -> None:
    x, y = torch.zeros(shape, dtype=dtype), torch.ones(labels, dtype=of)
    for call in (NET, NET.states, lambda x: NET.train_step(x, y)):
        if taken(call, x, cast):
            assert tuple(x.shape[1:]) == (1, 2, 2)
            assert dtype == torch.float32 or (cast and dtype.is_floating_point)


def taken(call: Callable[[Tensor], Any], x: Tensor, cast: bool) -> bool:
    try:
        with torch.autocast("cpu", enabled=cast):
            call(x)
    except ValueError as error:
        documented(error)
        return False
    return True


MODULES = st.one_of(
    st.builds(nn.Conv2d, st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 2), st.integers(0, 2)),
    st.builds(nn.MaxPool2d, st.integers(1, 3), ceil_mode=st.booleans()),
    st.builds(nn.AvgPool2d, st.integers(1, 3)),
    st.builds(nn.Linear, st.sampled_from([1, 2, 4, 8, 9, 12]), st.sampled_from([1, 2, 4])),
    st.sampled_from([nn.ReLU(), nn.Tanh(), nn.Flatten(), nn.Identity(), nn.Dropout(), nn.BatchNorm2d(2), nn.GLU()]),
    st.builds(nn.AdaptiveAvgPool2d, st.sampled_from([1, 2, None, (1, None)])),
)


@settings(QUICK, max_examples=200)
@given(
    modules=st.lists(MODULES, max_size=5),
    shape=st.one_of(st.just((1, 4, 4)), st.lists(st.integers(-1, 5), max_size=4)),
    readout=st.sampled_from(["softmax", "mse", ""]),
    end=st.sampled_from([[], [nn.Flatten(), nn.Linear(4, 2)], [nn.Linear(2, 2)]]),
)
def test_any_sequential_is_converted_or_refused(modules: Any, shape: Any, readout: Any, end: Any) -> None:
    module = nn.Sequential(*modules, *end)
    try:
        net = convert(module, shape, readout=readout)
    except ValueError as error:
        documented(error)
        return
    x = torch.rand(2, *shape)
    with torch.no_grad():
        want: Tensor = module(x)  # what was converted runs, to outputs of the same shape
        assert net(x).shape == want.shape


def test_an_identity_head_on_a_map() -> None:
    network = Network(((1, 4, 4), (2, 4, 4)), (Connection(0, 1),), Head(1, None, "mse"))
    assert EquilibriumNet(network, seed=0)(torch.rand(2, 1, 4, 4)).shape == (2, 2, 4, 4)
