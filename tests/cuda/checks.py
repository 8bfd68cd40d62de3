"""What the kernels must do, for their mutants (tests/host/mutant.py): each gets the module that holds the ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ep_kernels import Connection, Head, Network, Parameters, RelaxConfig, backends, free_phase, reference, relax_op
from ep_kernels.relaxation import Relaxation, relax_reference

ORDERS: tuple[str | int, ...] = ("forward", "reverse", 1)
PAIR = [1, 1]


def _numbers(*shape: int) -> Tensor:
    """Small integers: products and sums of them are exact in every precision."""
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    return torch.randint(-2, 3, shape, generator=generator).float()


def _equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def _drive(module: Any, dtype: torch.dtype, **device: int) -> None:
    source, weight = _numbers(2, 40, 8, 8), _numbers(72, 40, 3, 3)
    expected, winners = reference.drive(source, weight, PAIR, PAIR, "max")
    assert winners is not None
    module.set_device(**device)
    for order in ORDERS:
        module.set_order(order)
        out, won = torch.ops.ep_kernels_host.drive(source.to(dtype), weight.to(dtype), PAIR, PAIR, 1)
        _equal(out.float(), expected.to(dtype).float())
        assert torch.equal(won, winners)


def drive_half(module: Any) -> None:
    """mma.sync of float16."""
    _drive(module, torch.float16)


def drive_float(module: Any) -> None:
    """The products in float32."""
    _drive(module, torch.float32)


def drive_warpgroup(module: Any) -> None:
    """wgmma of float16; needs EP_KERNELS_WGMMA=1."""
    module.reset_statistics()
    _drive(module, torch.float16, major=9, processors=1)
    assert any("Warpgroup" in name for name in module.statistics()["kernels"])


def _contrast(module: Any, operands: int) -> None:
    source, target = _numbers(2, 24, 6, 6), _numbers(2, 40, 6, 6)
    deltas = _numbers(4, 24, 6, 6), _numbers(4, 40, 6, 6)
    shape = [40, 24, 3, 3]
    expected = reference.contrast(source, deltas[0], target, deltas[1], shape, PAIR, PAIR)
    for order in ORDERS:
        module.set_order(order)
        found = torch.ops.ep_kernels_host.contrast(
            source, deltas[0], target, deltas[1], shape, PAIR, PAIR, 0, None, 1.0, 1.0, 0.5, 1.0, operands
        )
        for a, b in zip(found, expected, strict=True):
            _equal(a, b)


def contrast_half(module: Any) -> None:
    _contrast(module, 2)


def contrast_tf32(module: Any) -> None:
    _contrast(module, 1)


def step_residual(module: Any) -> None:
    """The largest change of each sample, over tiles that several samples share."""
    state, drive = _numbers(5, 80, 5, 3), _numbers(5, 80, 5, 3)
    expected = (drive - state).abs().flatten(1).amax(1)
    for order in ORDERS:
        module.set_order(order)
        _, found, _ = torch.ops.ep_kernels_host.relax_step(
            state, None, [drive], [1.0], [], [], [], [], [], [], [], [], [], None, 0.0, None, 0, 1, 1.0, 1.0, -9.0, 9.0,
            1.0, False,
        )  # fmt: skip
        _equal(found, expected)


def contrast_odd(_: Any) -> None:
    """Maps with a last row and column in no window, in fresh memory that holds NaN."""
    torch.use_deterministic_algorithms(True)
    source, target, delta = _numbers(2, 3, 7, 5), _numbers(2, 17, 3, 2), _numbers(4, 17, 3, 2)
    shape = [17, 3, 3, 3]
    expected = reference.contrast(source, None, target, delta, shape, PAIR, PAIR, "avg")
    found = torch.ops.ep_kernels_host.contrast(
        source, None, target, delta, shape, PAIR, PAIR, 2, None, 1.0, 1.0, 0.5, 1.0, 0
    )
    for a, b in zip(found, expected, strict=True):
        _equal(a, b)


def relax_separate(_: Any) -> None:
    """Feedback weights of their own, into a linear node that leaves the box of the others."""
    network = Network(
        ((2, 4, 4), (3, 4, 4), (3, 4, 4), (5,)),
        (Connection(0, 1), Connection(1, 2), Connection(2, 3, None)),
        Head(3, None, loss="mse"),
        linear_nodes=(3,),
        feedback="separate",
    )
    tensors = {name: _numbers(*shape) / 4 for name, shape in Parameters.shapes(network).items()}
    for c in (1, 2):
        tensors[f"connections.{c}.feedback"] = -tensors[f"connections.{c}.weight"]
    parameters = Parameters.from_named(network, tensors)
    with backends.recorded() as jobs:
        free_phase(network, parameters, _numbers(2, 2, 4, 4), RelaxConfig(free_steps=3), backend="reference")
    (job,) = (job for job in jobs if isinstance(job, Relaxation))
    expected = relax_reference(job)
    assert float(expected.states[3].abs().max()) > 1  # type: ignore[union-attr]
    found = torch.ops.ep_kernels_host.relax(*relax_op.flat(job))[0]
    for a, b in zip(found, expected.states[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
