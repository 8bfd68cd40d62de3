"""Mutated integer lists: the op that executes programs either runs or raises RuntimeError; it never crashes or hangs.

Each example runs in this process: a crash is a failure of the whole run, and seen as such.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ep_kernels import RelaxConfig, ep_gradients, ops
from tests.core.nets import VARIANTS
from tests.ops.inputs import RELAX, TENSOR_LISTS, capture
from tests.ops.networks import HEADS, SKIP, problem

INTEGER_LISTS = ("shapes", "connections", "head_spec", "program", "linear_nodes")
CONFIGS = (
    RelaxConfig(),
    RelaxConfig("sync", 3, 2, form="states"),
    RelaxConfig("even_odd", estimator="tangent"),
)
# Small enough that whatever fits together by chance also fits into memory, or far too large.
INTEGERS = st.integers(-2, 12) | st.sampled_from([-(2**63), -(2**31), 100, 2**31, 2**32 + 1, 2**62, 2**63 - 1])


def record() -> list[tuple[Any, ...]]:
    calls = []
    for network in (HEADS, SKIP, VARIANTS["separate, linear top"]):
        params, x, targets = problem(network, 2, torch.float32)
        for config in CONFIGS:
            calls += capture("relax", lambda n=network, p=params, a=x, t=targets, c=config: ep_gradients(n, p, a, t, c))
    return calls


CALLS = record()


@st.composite
def mutated(draw: st.DrawFn, values: list[int]) -> list[int]:
    """One to three edits: a value replaced, inserted or deleted, the tail cut off, two values swapped."""
    out = list(values)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(out) - 1, 0)))
        edit = draw(st.sampled_from(["replace", "replace", "replace", "insert", "delete", "cut", "swap"]))
        if edit == "insert" or not out:
            out.insert(at, draw(INTEGERS))
        elif edit == "replace":
            out[at] = draw(INTEGERS)
        elif edit == "delete":
            del out[at]
        elif edit == "cut":
            del out[at:]
        else:
            other = draw(st.integers(0, len(out) - 1))
            out[at], out[other] = out[other], out[at]
    return out


def run(arguments: list[Any]) -> None:
    """Only RuntimeError comes out, and what runs keeps the shapes of its states."""
    try:
        states, *_ = ops.relax(*arguments)
    except RuntimeError:
        return
    assert len(states) == len(arguments[0]) - 1
    for state, channels in zip(states, arguments[RELAX["shapes"]][3::3], strict=True):
        assert state.shape[:2] == (arguments[RELAX["batch"]], channels)


QUICK = settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("name", INTEGER_LISTS)
@QUICK
@given(data=st.data())
def test_integer_lists(name: str, data: st.DataObject) -> None:
    arguments = list(data.draw(st.sampled_from(CALLS)))
    arguments[RELAX[name]] = data.draw(mutated(arguments[RELAX[name]]))
    run(arguments)


@QUICK
@given(data=st.data())
def test_programs_from_nothing(data: st.DataObject) -> None:
    """Well-formed sections of any launches, mostly of nodes and connections that exist."""
    arguments = list(data.draw(st.sampled_from(CALLS)))
    index = st.integers(0, len(arguments[1]))
    group = st.lists(index, max_size=2).map(lambda cs: [len(cs), *cs])
    drive = index.map(lambda c: [0, c])
    nudge = index.map(lambda i: [1, i])
    step = st.builds(lambda i, n, f, b, a: [2, i, n, *f, *b, *a], index, st.integers(0, 1), group, group, group)

    def section(*launches: st.SearchStrategy[list[int]]) -> st.SearchStrategy[list[int]]:
        many = st.lists(st.one_of(*launches), max_size=4)
        return many.map(lambda found: [len(found), *(v for launch in found for v in launch)])

    sweeps = st.lists(section(drive, nudge, step), min_size=1, max_size=2)
    program = st.builds(
        lambda first, middle, last: [*first, len(middle), *(v for sweep in middle for v in sweep), *last],
        section(drive, nudge),
        sweeps,
        section(drive),
    )
    arguments[RELAX["program"]] = data.draw(program)
    run(arguments)


@QUICK
@given(data=st.data())
def test_tensor_lists(data: st.DataObject) -> None:
    """Tensors that are absent, of another call, of another dtype, transposed, empty or cut."""
    arguments = list(data.draw(st.sampled_from(CALLS)))
    for _ in range(data.draw(st.integers(1, 3))):
        index = RELAX[data.draw(st.sampled_from(TENSOR_LISTS))]
        group = arguments[index]
        if not group:
            continue
        at = data.draw(st.integers(0, len(group) - 1))
        t = group[at] if group[at].dim() else group[at].view(1)
        changed = [t.new_empty(0), t.double(), t.to(torch.uint8), t[:1], t[:0], t.T if t.dim() == 2 else t.flatten()]
        changed += [t.unsqueeze(0), t.sum(), torch.full_like(t, 255)]
        changed += [other for group in arguments[: len(TENSOR_LISTS)] for other in group]
        arguments[index] = [*group[:at], data.draw(st.sampled_from(changed)), *group[at + 1 :]]
    run(arguments)
