"""What does not fit is an error that names the argument, what was expected and what came; never a crash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ep_kernels import RelaxConfig, backend, ep_gradients, functional, ops
from ep_kernels.functional import Neighbour
from tests.ops.inputs import Maker, capture
from tests.ops.networks import HEADS, SKIP, problem

new = Maker(torch.float32)
inf, nan = float("inf"), float("nan")
Change = dict[str, Any]
Row = tuple[Change, str, str, str]  # changed arguments; the one that is named, what is expected, what came


def u8(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def row_ids(rows: list[tuple[Any, ...]]) -> list[str]:
    return [f"{i}-{op}-{argument}" for i, (op, _, argument, *_) in enumerate(rows)]


def assert_message(error: BaseException, op: str, argument: str, expected: str, got: str) -> None:
    message = str(error).splitlines()[0]
    assert message.startswith(f"{op}"), message
    assert f": argument '{argument}': expected " in message, message
    wanted, _, came = message.partition(": expected ")[2].partition(", got ")
    assert expected in wanted, message
    assert got in came, message


# --- functional: ValueError, on every backend -------------------------------------------------------------------------

DRIVE = {"source": new(2, 3, 7, 5), "weight": new(4, 3, 3, 3), "padding": (1, 1), "pool": "max"}
DRIVE_ROWS: list[Row] = [
    ({"source": new(3, 7, 5)}, "source", "[B, C, H, W]", "[3, 7, 5]"),
    ({"source": new(2, 4, 7, 5)}, "source", "3 channels", "4"),
    ({"source": new(2, 3, 1, 5), "padding": (0, 0)}, "source", "at least 2x2", "[2, 3, 1, 5]"),
    ({"source": new(2, 3, 3, 5), "padding": (0, 0)}, "source", "at least 2x2", "[2, 3, 3, 5]"),
    ({"source": new(2, 3, 1, 1), "padding": (0, 0), "pool": "none"}, "source", "at least 1x1", "[2, 3, 1, 1]"),
    ({"source": new(2, 3, 0, 5), "padding": (3, 3)}, "source", "at least 2x2", "[2, 3, 0, 5]"),
    ({"source": torch.zeros(2, 3, 7, 5, dtype=torch.int64)}, "source", "floating-point", "torch.int64"),
    ({"weight": new(4, 3, 3)}, "weight", "[C_dst, C_src, kh, kw]", "[4, 3, 3]"),
    ({"weight": new(4, 3, 0, 3)}, "weight", "positive", "[4, 3, 0, 3]"),
    ({"weight": new(4, 3, 3, 3).double()}, "weight", "dtype torch.float32", "torch.float64"),
    ({"weight": new(4, 3, 3, 3).to("meta")}, "weight", "device cpu", "meta"),
    ({"weight": new(4, 104), "pool": "none"}, "source", "104 features", "[2, 3, 7, 5]"),
    ({"weight": new(4, 105)}, "pool", "'none' for a matrix weight", "'max'"),
    ({"weight": new(4, 35), "source": new(2, 7, 5), "pool": "none"}, "source", "[B, F]", "[2, 7, 5]"),
    ({"stride": (0, 1)}, "stride", "two integers >= 1", "(0, 1)"),
    ({"stride": (1,)}, "stride", "two integers >= 1", "(1,)"),
    ({"padding": (1, -1)}, "padding", "two integers >= 0", "(1, -1)"),
    ({"pool": "min"}, "pool", "one of none, max, avg", "'min'"),
    ({"winners": u8(2, 4, 3, 3)}, "winners", "shape [2, 4, 3, 2]", "[2, 4, 3, 3]"),
    ({"winners": u8(3, 4, 3, 2)}, "winners", "a batch that divides 2", "[3, 4, 3, 2]"),
    ({"winners": u8(2, 4, 3, 2).long()}, "winners", "torch.uint8", "torch.int64"),
    ({"winners": u8(2, 4, 3, 2).to("meta")}, "winners", "device cpu", "meta"),
]

ABOVE, BELOW = "above[0].", "below[0]."
STEP = {
    "state": new(4, 3, 7, 5),
    "bias": new(3),
    "drives": [new(4, 3, 7, 5)],
    "below": [Neighbour(new(2, 2, 7, 5), new(3, 2, 3, 3), padding=(1, 1))],
    "above": [Neighbour(new(4, 6, 3, 2), new(6, 3, 3, 3), (1, 1), (1, 1), "max", u8(2, 6, 3, 2))],
    "nudge": new(4, 3, 7, 5),
}


def below(**changes: Any) -> Change:
    base = {"state": new(2, 2, 7, 5), "weight": new(3, 2, 3, 3), "padding": (1, 1)}
    return {"below": [Neighbour(**{**base, **changes})]}


def above(**changes: Any) -> Change:
    base = {"state": new(4, 6, 3, 2), "weight": new(6, 3, 3, 3), "padding": (1, 1), "pool": "max"}
    return {"above": [Neighbour(**{**base, "winners": u8(2, 6, 3, 2), **changes})]}


STEP_ROWS: list[Row] = [
    ({"state": new(4, 3, 7)}, "state", "[B, C, H, W] or [B, F]", "[4, 3, 7]"),
    ({"bias": new(4)}, "bias", "shape [3]", "[4]"),
    ({"bias": new(3).double()}, "bias", "dtype torch.float32", "torch.float64"),
    ({"bias": new(3).to("meta")}, "bias", "device cpu", "meta"),
    ({"drives": [new(4, 3, 7, 4)]}, "drives[0]", "shape [4, 3, 7, 5]", "[4, 3, 7, 4]"),
    ({"drives": [new(3, 3, 7, 5)]}, "drives[0]", "a batch that divides 4", "[3, 3, 7, 5]"),
    ({"drives": [new(0, 3, 7, 5)]}, "drives[0]", "a batch that divides 4", "[0, 3, 7, 5]"),
    ({"drives": [new(4, 3, 7, 5).half()]}, "drives[0]", "dtype torch.float32", "torch.float16"),
    ({"drives": [new(4, 3, 7, 5).to("meta")]}, "drives[0]", "device cpu", "meta"),
    ({"nudge": new(4, 3, 5, 7)}, "nudge", "shape [4, 3, 7, 5]", "[4, 3, 5, 7]"),
    ({"nudge": new(4, 3, 7, 5).double()}, "nudge", "dtype torch.float32", "torch.float64"),
    ({"form": "delta"}, "preactivation", "a tensor (form 'delta')", "None"),
    ({"form": "delta", "preactivation": new(2, 3)}, "preactivation", "shape [4, 3, 7, 5]", "[2, 3]"),
    ({"form": "other"}, "form", "one of states, delta, tangent", "other"),
    ({"phases": 3}, "phases", "1, or 2", "3"),
    ({"phases": 2, "state": new(3, 3, 7, 5)}, "phases", "an even batch", "2"),
    ({"damping": 0.0}, "damping", "a finite number", "0.0"),
    ({"damping": nan}, "damping", "a finite number", "nan"),
    ({"damping": 2.0}, "damping", "a finite number", "2.0"),
    ({"slope": inf}, "slope", "a finite number", "inf"),
    ({"slope": -1.0}, "slope", "a finite number", "-1.0"),
    ({"scale": 0.0}, "scale", "a finite number", "0.0"),
    ({"nudge_gain": nan}, "nudge_gain", "a finite number", "nan"),
    ({"lo": 1.0, "hi": 1.0}, "lo, hi", "lo < hi", "(1.0, 1.0)"),
    ({"hi": inf}, "lo, hi", "finite", "inf"),
    (below(pool="max"), f"{BELOW}pool", "'none' or 'avg'", "max"),
    (below(gain=inf), f"{BELOW}gain", "a finite number", "inf"),
    (below(state=new(2, 2, 7, 6)), f"{BELOW}state", "its drive: shape [4, 3, 7, 5]", "[2, 3, 7, 6]"),
    (below(state=new(3, 2, 7, 5)), f"{BELOW}state", "a batch that divides 4", "[3, 3, 7, 5]"),
    (below(state=new(2, 1, 7, 5)), f"{BELOW}state", "2 channels", "1"),
    (below(stride=(1, 0)), f"{BELOW}stride", "two integers >= 1", "(1, 0)"),
    (below(weight=new(3, 2, 3, 3).double()), f"{BELOW}weight", "dtype torch.float32", "torch.float64"),
    (above(state=new(2, 6, 3, 2)), f"{ABOVE}state", "shape [4, 6, 3, 2]", "[2, 6, 3, 2]"),
    (above(state=new(4, 6, 3, 2).double()), f"{ABOVE}state", "dtype torch.float32", "torch.float64"),
    (above(weight=new(6, 4, 3, 3)), "state", "4 channels", "3"),
    (above(padding=(0, -1)), f"{ABOVE}padding", "two integers >= 0", "(0, -1)"),
    (above(winners=None), f"{ABOVE}winners", "those of the drive", "None"),
    (above(winners=u8(4, 6, 3, 3)), f"{ABOVE}winners", "shape [4, 6, 3, 2]", "[4, 6, 3, 3]"),
    (above(winners=u8(4, 6, 3, 2).int()), f"{ABOVE}winners", "torch.uint8", "torch.int32"),
    (above(gain=nan), f"{ABOVE}gain", "a finite number", "nan"),
]

CONTRAST = {
    "source": new(2, 3, 7, 5),
    "source_delta": new(4, 3, 7, 5),
    "target": new(2, 6, 3, 2),
    "target_delta": new(4, 6, 3, 2),
    "weight_shape": (6, 3, 3, 3),
    "padding": (1, 1),
    "pool": "max",
    "winners": u8(2, 6, 3, 2),
}
CONTRAST_ROWS: list[Row] = [
    ({"weight_shape": (6, 3, 3)}, "weight_shape", "2 or 4 positive sizes", "[6, 3, 3]"),
    ({"weight_shape": (6, 3, 0, 3)}, "weight_shape", "2 or 4 positive sizes", "[6, 3, 0, 3]"),
    ({"weight_shape": (6, 4, 3, 3)}, "source", "4 channels", "3"),
    ({"target": new(2, 6, 3, 3)}, "target", "shape [2, 6, 3, 2]", "[2, 6, 3, 3]"),
    ({"target": new(2, 6, 3, 2).double()}, "target", "dtype torch.float32", "torch.float64"),
    ({"target_delta": new(3, 6, 3, 2)}, "target_delta", "or twice its batch", "[3, 6, 3, 2]"),
    ({"target_delta": new(4, 6, 2, 3)}, "target_delta", "shape [2, 6, 3, 2]", "[4, 6, 2, 3]"),
    ({"target_delta": new(4, 6, 3, 2).double()}, "target_delta", "dtype torch.float32", "torch.float64"),
    ({"source_delta": new(4, 3, 7, 4)}, "source_delta", "shape [2, 3, 7, 5]", "[4, 3, 7, 4]"),
    ({"source_delta": new(4, 3, 7, 5).to("meta")}, "source_delta", "device cpu", "meta"),
    ({"winners": None}, "winners", "those of the drive", "None"),
    ({"winners": u8(2, 6, 4, 2)}, "winners", "shape [2, 6, 3, 2]", "[2, 6, 4, 2]"),
    ({"winners": u8(2, 6, 3, 2).bool()}, "winners", "torch.uint8", "torch.bool"),
    ({"winners": u8(4, 6, 3, 2), "centre": 0.0}, "centre", "0.5 with winners of both phases", "0.0"),
    ({"scale": inf}, "scale", "a finite number", "inf"),
    ({"centre": nan}, "centre", "a finite number", "nan"),
    ({"source_gain": nan}, "source_gain", "a finite number", "nan"),
    ({"target_gain": inf}, "target_gain", "a finite number", "inf"),
    ({"operands": torch.float64}, "operands", "one of None, tf32, torch.float16, torch.bfloat16", "torch.float64"),
    ({"operands": "half"}, "operands", "one of None, tf32, torch.float16, torch.bfloat16", "'half'"),
    ({"stride": (0, 0)}, "stride", "two integers >= 1", "(0, 0)"),
]

FEEDBACK = {
    "above": new(2, 6, 3, 2),
    "weight": new(6, 3, 3, 3),
    "shape": (3, 7, 5),
    "padding": (1, 1),
    "pool": "max",
    "winners": u8(2, 6, 3, 2),
}
FEEDBACK_ROWS: list[Row] = [
    ({"above": new(2, 6, 2, 2)}, "above", "shape [2, 6, 3, 2]", "[2, 6, 2, 2]"),
    ({"above": new(2, 6, 3, 2).double()}, "weight", "dtype torch.float64", "torch.float32"),
    ({"shape": (4, 7, 5)}, "source", "3 channels", "4"),
    ({"winners": None}, "winners", "those of the drive", "None"),
    ({"winners": u8(2, 6, 2, 2)}, "winners", "shape [2, 6, 3, 2]", "[2, 6, 2, 2]"),
]

FUNCTIONAL: dict[str, tuple[Change, list[Row]]] = {
    "drive": (DRIVE, DRIVE_ROWS),
    "relax_step": (STEP, STEP_ROWS),
    "contrast": (CONTRAST, CONTRAST_ROWS),
    "feedback": (FEEDBACK, FEEDBACK_ROWS),
}
FUNCTIONAL_ROWS = [(op, *row) for op, (_, rows) in FUNCTIONAL.items() for row in rows]


@pytest.mark.parametrize("on", ["cpu", "reference"])
@pytest.mark.parametrize("op", FUNCTIONAL)
def test_what_the_functional_rows_change_is_valid(op: str, on: str) -> None:
    with backend(on):
        getattr(functional, op)(**FUNCTIONAL[op][0])


@pytest.mark.parametrize(("op", "change", "argument", "expected", "got"), FUNCTIONAL_ROWS, ids=row_ids(FUNCTIONAL_ROWS))
def test_functional(op: str, change: Change, argument: str, expected: str, got: str) -> None:
    for on in ("cpu", "reference"):
        with backend(on), pytest.raises(ValueError, match=op) as raised:
            getattr(functional, op)(**{**FUNCTIONAL[op][0], **change})
        assert_message(raised.value, op, argument, expected, got)


# --- the ops themselves: RuntimeError ---------------------------------------------------------------------------------


def named(op: str, arguments: tuple[Any, ...]) -> Change:
    ops.ensure()
    schema = getattr(torch.ops.ep_kernels, op).default._schema
    return {a.name: value for a, value in zip(schema.arguments, arguments, strict=True)}


def relax_calls(network: Any, **config: Any) -> list[Change]:
    params, x, targets = problem(network, 2, torch.float32)
    calls = capture("relax", lambda: ep_gradients(network, params, x, targets, RelaxConfig(**config), backend="cpu"))
    return [named("relax", arguments) for arguments in calls]


FREE, NUDGED = relax_calls(HEADS)
SKIP_FREE, _ = relax_calls(SKIP)


def at(values: list[Any], index: int, value: Any) -> list[Any]:
    return [*values[:index], value, *values[index + 1 :]]


def free(**changes: Callable[[Any], Any]) -> Change:
    return {name: change(FREE[name]) for name, change in changes.items()}


def nudged(**changes: Callable[[Any], Any]) -> Change:
    return {**NUDGED, **{name: change(NUDGED[name]) for name, change in changes.items()}}


def program(*integers: int) -> Change:
    return {"program": list(integers)}


def own_feedback(weight: Tensor) -> list[Tensor]:
    """Of connection 1 alone."""
    return [new(0), weight, new(0)]


COUNTED = ("biases", "drives", "winners", "extra", "shapes", "connections", "drive_gains", "feedback_gains", "scales")
RAW_DRIVE = {**DRIVE, "stride": [1, 1], "padding": [1, 1], "pool": 1, "winners": None}
RAW_STEP = named("relax_step", capture("relax_step", lambda: functional.relax_step(**STEP))[0])
RAW_CONTRAST = named("contrast", capture("contrast", lambda: functional.contrast(**CONTRAST))[0])
RAW: dict[str, tuple[Change, list[Row]]] = {
    "drive": (
        RAW_DRIVE,
        [
            ({"weight": new(4, 3, 3)}, "weight", "4 dimensions [C_dst, C_src, kh, kw]", "3 dimensions"),
            ({"source": new(3, 7, 5)}, "source", "[B, C, H, W]", "[3, 7, 5]"),
            ({"source": new(2, 4, 7, 5)}, "source", "3 channels", "4"),
            ({"source": new(2, 3, 7, 5).half()}, "source", "float32 or float64", "Half"),
            ({"source": new(2, 3, 0, 5), "padding": [2, 2]}, "source", "the kernel's size 3x3", "[2, 3, 0, 5]"),
            ({"source": new(2, 3, 1, 5)}, "source", "at least 2x2", "[2, 3, 1, 5]"),
            ({"source": new(2, 3, 2, 5), "padding": [0, 0]}, "source", "the kernel's size 3x3", "[2, 3, 2, 5]"),
            ({"weight": new(4, 3, 0, 3)}, "weight", "positive", "[4, 3, 0, 3]"),
            ({"weight": new(4, 3, 3, 3).to("meta")}, "weight", "device cpu", "meta"),
            ({"weight": new(4, 104), "pool": 0}, "source", "104 features", "[2, 3, 7, 5]"),
            ({"weight": new(4, 105)}, "pool", "none", "1"),
            ({"weight": new(4, 3, 3, 3).double()}, "weight", "dtype Float", "Double"),
            ({"stride": [1, 0]}, "stride", ">= 1", "[1, 0]"),
            ({"stride": [1, 2**40]}, "stride", "31 bits", "[1, 1099511627776]"),
            ({"stride": [1]}, "stride", "2 integers", "1"),
            ({"padding": [-1, 0]}, "padding", ">= 0", "[-1, 0]"),
            ({"padding": [2**62, 0]}, "padding", "31 bits", "[4611686018427387904, 0]"),
            ({"padding": [1, 1, 1]}, "padding", "2 integers", "3"),
            ({"pool": 3}, "pool", "0 (none), 1 (max) or 2 (avg)", "3"),
            ({"winners": u8(2, 4, 3, 3)}, "winners", "shape [2, 4, 3, 2]", "[2, 4, 3, 3]"),
            ({"winners": u8(3, 4, 3, 2)}, "winners", "a batch that divides 2", "3"),
            ({"winners": u8()}, "winners", "shape [2, 4, 3, 2]", "[]"),
            ({"winners": new(2, 4, 3, 2)}, "winners", "uint8", "Float"),
            ({"winners": u8(2, 4, 3, 2).to("meta")}, "winners", "device cpu", "meta"),
        ],
    ),
    "relax_step": (
        RAW_STEP,
        [
            ({"state": new(4, 3, 7)}, "state", "[B, C, H, W] or [B, F]", "[4, 3, 7]"),
            ({"state": torch.zeros(4, 3, 7, 5).long()}, "state", "float32 or float64", "Long"),
            ({"bias": new(3, 1)}, "bias", "shape [3]", "[3, 1]"),
            ({"bias": new(3).to("meta")}, "bias", "device cpu", "meta"),
            ({"drives": [new(4, 3, 7, 4)]}, "drives", "shape [4, 3, 7, 5]", "[4, 3, 7, 4]"),
            ({"drives": [new(3, 3, 7, 5)]}, "drives", "shape [4, 3, 7, 5]", "[3, 3, 7, 5]"),
            ({"drives": [torch.tensor(1.0)]}, "drives", "shape [4, 3, 7, 5]", "[]"),
            ({"drives": [new(4, 3, 7, 5).double()]}, "drives", "dtype Float", "Double"),
            ({"drives": []}, "drive_gains", "0 (one per drive)", "1"),
            ({"drive_gains": [nan]}, "drive_gains", "finite", "nan"),
            ({"below": []}, "below", "0 weights, 0 geometry integers and 0 gains", "1, 5 and 1"),
            ({"below_geometry": [1, 1, 1, 1]}, "below", "5 geometry integers", "4"),
            ({"below_geometry": [1, 1, 1, 1, 1]}, "below", "without max pooling", "pool 1"),
            ({"below_geometry": [1, 0, 1, 1, 0]}, "stride", ">= 1", "[1, 0]"),
            ({"below_geometry": [1, 1, 0, 0, 0]}, "below", "shape [2, 3, 7, 5]", "[2, 3, 5, 3]"),
            ({"below_gains": [inf]}, "below_gains", "finite", "inf"),
            ({"below": [new(2, 2, 7, 5).double()]}, "below", "dtype Float", "Double"),
            ({"above": []}, "above", "0 weights", "1"),
            ({"above": [new(2, 6, 3, 2)]}, "above", "shape [4, 6, 3, 2]", "[2, 6, 3, 2]"),
            ({"above_weights": [new(6, 4, 3, 3)]}, "source", "4 channels", "3"),
            ({"above_winners": []}, "above_winners", "1 (one per above)", "0"),
            ({"above_winners": [u8(0)]}, "winners", "shape [4, 6, 3, 2]", "[0]"),
            ({"above_winners": [u8(3, 6, 3, 2)]}, "winners", "a batch that divides 4", "3"),
            ({"above_winners": [new(4, 6, 3, 2)]}, "winners", "uint8", "Float"),
            ({"above_geometry": [1, 1, 1, 1, 7]}, "pool", "0 (none), 1 (max) or 2 (avg)", "7"),
            ({"nudge": new(4, 3)}, "nudge", "shape [4, 3, 7, 5]", "[4, 3]"),
            ({"nudge_gain": nan}, "nudge_gain", "finite", "nan"),
            ({"form": 1}, "preactivation", "free equilibrium's", "none"),
            ({"form": 1, "preactivation": new(3)}, "preactivation", "shape [4, 3, 7, 5]", "[3]"),
            ({"form": 3}, "form", "0 (states), 1 (delta) or 2 (tangent)", "3"),
            ({"form": 2, "damping": 1.2, "preactivation": new(4, 3, 7, 5)}, "damping", "(0, 1]", "1.2"),
            ({"phases": 0}, "phases", "1 or 2", "0"),
            ({"phases": 2, "state": new(3, 3, 7, 5)}, "phases", "a divisor of the batch 3", "2"),
            ({"damping": 0.0}, "damping", "(0, 1]", "0"),
            ({"damping": nan}, "damping", "(0, 1]", "nan"),
            ({"slope": 0.0}, "slope", "> 0", "0"),
            ({"lo": inf}, "lo, hi", "finite", "inf"),
            ({"scale": -1.0}, "scale", "> 0", "-1"),
        ],
    ),
    "contrast": (
        RAW_CONTRAST,
        [
            ({"source": new(2, 4, 7, 5)}, "source", "3 channels", "4"),
            ({"source": new(2, 3, 7, 5).half()}, "source", "float32 or float64", "Half"),
            ({"weight_shape": [6, 3, 3]}, "weight_shape", "2 or 4 sizes", "[6, 3, 3]"),
            ({"weight_shape": [6, 3, -3, 3]}, "weight_shape", "positive", "[6, 3, -3, 3]"),
            ({"weight_shape": [6, 3, 9, 9]}, "source", "the kernel's size 9x9", "[2, 3, 7, 5]"),
            ({"target": new(2, 6, 3, 3)}, "target", "shape [2, 6, 3, 2]", "[2, 6, 3, 3]"),
            ({"target_delta": new(3, 6, 3, 2)}, "target_delta", "shape [2, 6, 3, 2]", "[3, 6, 3, 2]"),
            ({"target_delta": torch.tensor(1.0)}, "target_delta", "shape [2, 6, 3, 2]", "[]"),
            ({"source_delta": new(4, 3, 7, 5).double()}, "source_delta", "dtype Float", "Double"),
            ({"source_delta": new(4, 3, 7, 5).to("meta")}, "source_delta", "device cpu", "meta"),
            ({"winners": None}, "winners", "max pooling", "none"),
            ({"winners": u8(2, 6, 3, 3)}, "winners", "shape [2, 6, 3, 2]", "[2, 6, 3, 3]"),
            ({"winners": new(2, 6, 3, 2)}, "winners", "uint8", "Float"),
            ({"winners": u8(4, 6, 3, 2), "centre": 0.0}, "centre", "0.5 with winners of both phases", "0"),
            ({"padding": [-1, 1]}, "padding", ">= 0", "[-1, 1]"),
            ({"stride": []}, "stride", "2 integers", "0"),
            ({"scale": nan}, "scale", "a finite number", "nan"),
            ({"centre": inf}, "centre", "a finite number", "inf"),
            ({"source_gain": nan}, "source_gain", "a finite number", "nan"),
            ({"target_gain": inf}, "target_gain", "a finite number", "inf"),
            ({"operands": 4}, "operands", "0 (own dtype), 1 (tf32), 2 (float16) or 3 (bfloat16)", "4"),
        ],
    ),
    "relax": (
        FREE,
        [
            ({"states": FREE["states"][:1]}, "states", "at least one node", "1"),
            ({"weights": []}, "weights", "at least one", "0"),
            *((free(**{name: lambda v: v[:-1]}), name, "entries", str(len(FREE[name]) - 1)) for name in COUNTED),
            *(
                (nudged(**{name: lambda v: v[:-1]}), name, "entries", str(len(NUDGED[name]) - 1))
                for name in ("free", "preactivations", "head_scalars")
            ),
            (nudged(heads=lambda v: v[:-1]), "head_spec", "32 entries", "36"),
            (nudged(head_spec=lambda v: v[:-1]), "head_spec", "36 entries", "35"),
            ({"batch": -1}, "batch", ">= 0", "-1"),
            ({"batch": 3}, "states", "shape [3, 2, 9, 7]", "[2, 2, 9, 7]"),
            ({"phases": 3}, "phases", "1 or 2", "3"),
            ({"steps": 0}, "steps", "1 to", "0"),
            ({"steps": 1 << 62}, "steps", "1 to", "4611686018427387904"),
            ({"form": 5, "damping": 1.0}, "form", "0 (states)", "5"),
            ({"damping": 2.0}, "damping", "(0, 1]", "2"),
            ({"slope": nan}, "slope", "> 0", "nan"),
            ({"lo": 2.0}, "lo, hi", "lo < hi", "2, 0.9"),
            ({"tol": nan}, "tol", ">= 0", "nan"),
            ({"tol": -1.0}, "tol", ">= 0", "-1"),
            ({"operands": -1}, "operands", "0 (own dtype), 1 (tf32), 2 (float16) or 3 (bfloat16)", "-1"),
            ({"storage": 1}, "storage", "0 (states in their own dtype: this backend stores no other)", "1"),
            (free(scales=lambda v: at(v, 1, 0.0)), "scales", "> 0", "0"),
            (free(drive_gains=lambda v: at(v, 0, inf)), "drive_gains", "finite", "inf"),
            (free(feedback_gains=lambda v: at(v, 0, nan)), "feedback_gains", "finite", "nan"),
            (free(nudge_gains=lambda v: at(v, 0, nan)), "nudge_gains", "finite", "nan"),
            (free(shapes=lambda v: at(v, 3, -3)), "shapes", "for node 1", "-3, 4, 3"),
            (free(shapes=lambda v: at(v, 4, 0)), "shapes", "for node 1", "3, 0, 3"),
            (free(shapes=lambda v: at(v, 4, 5)), "shapes", "[2, 3, 4, 3] for node 1", "[2, 3, 5, 3]"),
            (free(shapes=lambda v: at(v, 3, 1 << 62)), "shapes", "for node 1", "4611686018427387904"),
            (free(connections=lambda v: at(v, 0, 9)), "connections", "0 <= src < dst < 4 (connection 0)", "9, 1"),
            (free(connections=lambda v: at(v, 1, 4)), "connections", "0 <= src < dst < 4 (connection 0)", "0, 4"),
            (free(connections=lambda v: at(v, 0, -1)), "connections", "0 <= src < dst < 4 (connection 0)", "-1, 1"),
            (free(connections=lambda v: at(v, 9, 0)), "stride", ">= 1", "[0, 1]"),
            (free(connections=lambda v: at(v, 11, -2)), "padding", ">= 0", "[-2, 1]"),
            (free(connections=lambda v: at(v, 6, 4)), "pool", "0 (none), 1 (max) or 2 (avg)", "4"),
            (free(weights=lambda v: at(v, 0, new(3, 4, 3, 3))), "source", "4 channels", "2"),
            (free(weights=lambda v: at(v, 1, new(4, 3, 3, 3).double())), "weight", "dtype Float", "Double"),
            (free(weights=lambda v: at(v, 0, v[0].half())), "weights", "float32 or float64", "Half"),
            ({"feedback_weights": FREE["weights"][:2]}, "feedback_weights", "3 entries", "2"),
            ({"feedback_weights": own_feedback(new(4, 3, 3, 1))}, "feedback_weights", "[4, 3, 3, 3]", "[4, 3, 3, 1]"),
            ({"feedback_weights": own_feedback(new(4, 3, 3, 3).double())}, "feedback_weights", "dtype Float", "Double"),
            ({"linear_nodes": [0]}, "linear_nodes", "nodes from 1 to 3", "0"),
            ({"linear_nodes": [1, 4]}, "linear_nodes", "nodes from 1 to 3", "4"),
            (free(states=lambda v: at(v, 0, new(2, 2, 9, 6))), "states", "shape [2, 2, 9, 7]", "[2, 2, 9, 6]"),
            (free(states=lambda v: at(v, 0, v[0].double())), "states", "dtype Float", "Double"),
            (free(states=lambda v: at(v, 0, v[0].to("meta"))), "states", "device cpu", "meta"),
            (free(states=lambda v: at(v, 0, new(0))), "states", "a state of node 0", "none"),
            (free(biases=lambda v: at(v, 1, new(4))), "biases", "shape [3]", "[4]"),
            (free(drives=lambda v: at(v, 0, new(2, 3, 4, 4))), "drives", "shape [2, 3, 4, 3]", "[2, 3, 4, 4]"),
            (free(winners=lambda v: at(v, 0, u8(2, 3, 4, 4))), "winners", "shape [2, 3, 4, 3]", "[2, 3, 4, 4]"),
            (free(winners=lambda v: at(v, 0, new(2, 3, 4, 3))), "winners", "uint8", "Float"),
            (free(extra=lambda v: at(v, 1, new(2, 3, 4, 4))), "extra", "shape [2, 3, 4, 3]", "[2, 3, 4, 4]"),
            ({"frozen": True}, "winners", "those of connection 0 (frozen)", "none"),
            (nudged(free=lambda v: at(v, 1, new(1, 3, 4, 3))), "free", "shape [2, 3, 4, 3]", "[1, 3, 4, 3]"),
            (
                nudged(preactivations=lambda v: at(v, 2, v[2].double())),
                "preactivations",
                "dtype Float",
                "Double",
            ),
            (free(program=lambda v: v[:-1]), "program", "more integers", str(len(FREE["program"]) - 1)),
            (free(program=lambda v: [*v, 0]), "program", "no integers after it", str(len(FREE["program"]) + 1)),
            (program(), "program", "more integers", "0"),
            (program(0, 0, 0), "program", "at least one sweep", "3 integers"),
            (program(-1), "program", "a count within", "-1"),
            (program(1 << 60), "program", "a count within", "1152921504606846976"),
            (program(1, 7, 0, 0, 0), "program", "an op index", "7"),
            (program(1, 0, 3, 0, 0), "program", "a connection index from 0 to 2", "3"),
            (program(1, 1, 0, 0, 0), "program", "a node index from 1 to 3", "0"),
            (program(1, 2, 1, 0, 0, 0, 0, 1, 0, 0), "program", "an op index from 0 to 1", "2"),
            (program(0, 1, 0, 1, 1, 1), "program", "an op index from 0 to 0", "1"),
            (program(0, 1, 1, 2, 1, 0, 0, 1, 1, 0, 0), "program", "a connection into node 1", "into node 2"),
            (program(0, 1, 1, 2, 1, 0, 0, 0, 1, 2, 0), "program", "a connection out of node 1", "out of node 2"),
            (program(0, 1, 1, 2, 1, 0, 1, 0, 0, 0, 0), "drives", "that of connection 0", "none"),
            (program(0, 1, 1, 2, 2, 0, 0, 1, 1, 0, 0), "states", "a state of node 1", "none"),
            (program(0, 1, 1, 2, 1, 0, 0, 0, 1, 1, 0), "states", "a state of node 2", "none"),
            (program(0, 1, 1, 2, 1, 1, 0, 0, 0, 0), "program", "a nudge of node 1 before its step", "none"),
            (nudged(head_spec=lambda v: at(v, 0, 0)), "head_spec", "a node from 1 to 3", "0"),
            (nudged(head_spec=lambda v: at(v, 0, 4)), "head_spec", "a node from 1 to 3", "4"),
            (nudged(head_spec=lambda v: at(v, 1, 3)), "head_spec", "1 (mse) or 2 (cosine)", "3"),
            (nudged(head_spec=lambda v: at(v, 6, -1)), "head_spec", "a pool from 0", "-1"),
            (nudged(head_spec=lambda v: at(v, 6, 1 << 40)), "head_spec", "a pool from 0", "1099511627776"),
            (nudged(head_spec=lambda v: at(v, 2, 2)), "head_spec", "no pool", "[4, 6]"),
            (nudged(head_spec=lambda v: at(v, 3, 2)), "head_spec", "pointwise 0 or 1", "2"),
            (nudged(head_spec=lambda v: at(v, 6, 2)), "heads", "shape [3, 12]", "[3, 3]"),
            (nudged(head_scalars=lambda v: at(v, 1, 0.0)), "head_scalars", "a temperature > 0", "0"),
            (nudged(head_scalars=lambda v: at(v, 0, nan)), "head_scalars", "finite", "nan"),
            (nudged(heads=lambda v: at(v, 0, new(3, 5))), "heads", "shape [3, 6]", "[3, 5]"),
            (nudged(heads=lambda v: at(v, 1, new(2))), "heads", "shape [3]", "[2]"),
            (nudged(heads=lambda v: at(v, 2, new(2, 4))), "heads", "shape [2, 3]", "[2, 4]"),
            (nudged(heads=lambda v: at(v, 2, new(4, 3))), "heads", "shape [2, 3]", "[4, 3]"),
            (nudged(heads=lambda v: at(v, 2, new(2, 3).double())), "heads", "dtype Float", "Double"),
        ],
    ),
}
RAW_ROWS = [(op, *row) for op, (_, rows) in RAW.items() for row in rows]


@pytest.mark.parametrize("op", RAW)
def test_what_the_raw_rows_change_is_valid(op: str) -> None:
    getattr(torch.ops.ep_kernels, op)(**RAW[op][0])
    torch.ops.ep_kernels.relax(**NUDGED)


@pytest.mark.parametrize(("op", "change", "argument", "expected", "got"), RAW_ROWS, ids=row_ids(RAW_ROWS))
def test_raw(op: str, change: Change, argument: str, expected: str, got: str) -> None:
    with pytest.raises(RuntimeError) as raised:
        getattr(torch.ops.ep_kernels, op)(**{**RAW[op][0], **change})
    assert_message(raised.value, op, argument, expected, got)


def test_errors_of_a_connection_name_it() -> None:
    weights = at(SKIP_FREE["weights"], 4, new(5, 4, 3, 3))
    with pytest.raises(RuntimeError, match=r"relax \(connection 4\): argument 'source': expected 4 channels"):
        torch.ops.ep_kernels.relax(**{**SKIP_FREE, "weights": weights})


@pytest.mark.parametrize("op", RAW)
def test_other_kinds_of_tensors_are_refused(op: str) -> None:
    """Sparse ones have no kernel; nothing reads them as if they were dense."""
    first, value = next((k, v) for k, v in RAW[op][0].items() if isinstance(v, (Tensor, list)))
    value = value.to_sparse() if isinstance(value, Tensor) else [value[0].to_sparse(), *value[1:]]
    with pytest.raises(RuntimeError, match="SparseCPU"):
        getattr(torch.ops.ep_kernels, op)(**{**RAW[op][0], first: value})
