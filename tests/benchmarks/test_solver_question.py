"""The question solver: its quick cases, and the table of what each way needs."""

from __future__ import annotations

import pytest

from benchmarks.problem import network_of
from benchmarks.questions import solver
from benchmarks.setting import Setting
from ep_kernels import RelaxConfig
from tests.core.threads import one_thread  # noqa: F401  (autouse)

QUICK = Setting(threads=1, quick=True, rounds=1)


@pytest.mark.parametrize("group", ["start", "early stop", "low precision first"])
def test_quick_cases(group: str) -> None:
    (case,) = [case for case in solver.cases(QUICK) if case.key.endswith(f": {group}")]
    rows = [{"case": case.key, **row} for case in [case] for row in case.run()]
    assert [(row["name"], row.get("reason")) for row in rows if row["status"] != "ok"] == []
    assert all(-1.001 <= row["cosine"] <= 1.001 and 1 <= row["sweeps"] <= row["free_steps"] for row in rows)
    assert len(solver.lines(rows)) > len(rows)


def test_what_each_way_needs() -> None:
    rows = [
        {"way": way, "free_steps": t, "sweeps": t, "convolutions": 2 * t - 1, "cosine": cosine}
        for way, t, cosine in (("a", 2, 0.96), ("a", 4, 0.985), ("b", 3, 0.5), ("a", 3, 0.97))
    ]
    assert solver.needed(rows)[2:] == ["| a | 2 (3) | 4 (7) | - |", "| b | - | - | - |"]


def test_convolutions_are_those_of_every_stage() -> None:
    network = network_of("3p-4-5", 8, 0.1)
    plain, staged = RelaxConfig("sync", 4), RelaxConfig("sync", 4, start="feedforward")
    zero, fed = (solver.convolutions(network, config, warm=False) for config in (plain, staged))
    assert fed > zero  # a pass more, and feedback from the first sweep on
    early = RelaxConfig(free_steps=4, early_operands="tf32", early_steps=2)
    assert solver.convolutions(network, early, warm=False) > solver.convolutions(
        network, RelaxConfig(free_steps=4), warm=False
    )
