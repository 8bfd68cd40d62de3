"""The kernel ``head_gradient`` against the reference: losses, forms, phases, ragged samples, features and outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from ep_kernels import Head, reference
from ep_kernels.triton import layout
from ep_kernels.triton.launch import head_call
from tests.ops.inputs import Maker
from tests.triton.interpreted.tools import close, control, filled, nan, poisoned_map


@dataclass(frozen=True)
class Case:
    """``n``: samples of a phase. ``state``, ``free``: None when absent, else the dtype that they are stored in."""

    name: str
    loss: str = "cross_entropy"
    outputs: int = 3
    shape: tuple[int, ...] = (5, 3, 2)
    n: int = 3
    phases: int = 1
    state: torch.dtype | None = torch.float32
    free: torch.dtype | None = None
    bias: bool = True
    weight: float = 1.0
    temperature: float = 1.0
    scale: float = 1.0
    add: bool = False

    def __str__(self) -> str:
        return self.name.replace(",", "").replace(" ", "-")


DELTA = {"free": torch.float32, "phases": 2, "scale": 64.0}
CASES = (
    Case("cross-entropy"),
    Case("batch 1, one output", n=1, outputs=1, loss="mse"),
    Case("one output, cross-entropy", outputs=1),
    Case("17 outputs, no bias", outputs=17, bias=False, loss="mse"),
    Case("temperature and weight", temperature=2.5, weight=0.3),
    Case("temperature of mse", loss="mse", weight=0.3),
    Case("more samples than a tile", n=19, outputs=10, shape=(7,)),
    Case("more features than a tile", shape=(3, 3, 3), n=2, outputs=10),
    Case("features of 17 channels", shape=(17, 2, 2), n=2),
    Case("deltas", **DELTA),  # type: ignore[arg-type]
    Case("deltas of 34 samples", **DELTA, n=17, shape=(6,)),  # type: ignore[arg-type]
    Case("the first nudge of deltas", free=torch.float32, state=None, phases=2),
    Case("the first nudge of states", state=None, phases=2),
    Case("states in fp16", state=torch.float16, free=torch.float16, scale=8.0, loss="mse"),
    Case("added", add=True, phases=2, loss="mse"),
)


class Launch:
    def __init__(self, case: Case):
        self.case = case
        new = Maker(torch.float64)
        total = case.phases * case.n
        self.state = None if case.state is None else new(total, *case.shape).to(case.state)
        self.free = None if case.free is None else new(case.n, *case.shape).to(case.free)
        features = torch.Size(case.shape).numel()
        self.weight = (new(case.outputs, features) / features**0.5).float()
        self.bias = new(case.outputs).float() if case.bias else None
        target = new(case.n, case.outputs)
        self.target = (target if case.loss == "mse" else target.softmax(1)).float()
        self.total = poisoned_map(total, case.shape)
        self.before = torch.zeros(total, *case.shape)
        if case.add:
            self.before = new(total, *case.shape).float()
            self.total = filled(self.before)

    def run(self, control_: Tensor | None = None, *, stop: bool = False) -> None:
        case = self.case
        head_call(
            None if self.state is None else filled(self.state),
            None if self.free is None else filled(self.free),
            layout.drive_matrix(self.weight, case.shape, torch.float32)[: case.outputs],
            self.bias,
            self.target,
            self.total,
            control() if control_ is None else control_,
            phases=case.phases,
            softmax=case.loss == "cross_entropy",
            weight_of_loss=case.weight,
            temperature=case.temperature,
            inverse_scale=1 / case.scale,
            add=case.add,
            stop=stop,
        )()

    def check(self) -> None:
        case = self.case
        head = Head(0, case.outputs, loss=case.loss, weight=case.weight, temperature=case.temperature)  # type: ignore[arg-type]
        s = torch.zeros(case.phases * case.n, *case.shape, dtype=torch.float64)
        if self.state is not None:
            s += self.state.double() / case.scale
        if self.free is not None:
            s += self.free.double().repeat(case.phases, *[1] * len(case.shape))
        bias = None if self.bias is None else self.bias.double()
        target = self.target.double().repeat(case.phases, 1)
        expected = self.before + reference.head_gradient(head, s, self.weight.double(), bias, target)
        close("total", layout.as_tensor(self.total, case.shape), expected, 1e-5, scale=0.1)
        assert not self.total.isnan().any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference(case: Case) -> None:
    launch = Launch(case)
    launch.run()
    launch.check()


def test_large_outputs_do_not_overflow() -> None:
    launch = Launch(replace(CASES[0], state=torch.float32))
    launch.weight *= 1000
    launch.run()
    launch.check()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
def test_nan_surfaces_in_its_sample() -> None:
    launch = Launch(CASES[0])
    assert launch.state is not None
    launch.state[1, 2, 1, 1] = nan
    launch.run()
    found = layout.as_tensor(launch.total, CASES[0].shape)
    assert found.isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert not found[[0, 2]].isnan().any()


def test_a_launch_after_the_stop_writes_nothing() -> None:
    launch = Launch(CASES[0])
    launch.run(control(stop=1), stop=True)
    assert launch.total.isnan().all()
    launch.run(control(stop=0, sweep=4), stop=True)
    launch.check()
