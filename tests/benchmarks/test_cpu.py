"""The benchmark command itself, tiny."""

from __future__ import annotations

import json
import math

from benchmarks import cpu
from benchmarks.timing import Times, interleave, ratio

TINY = ["--rounds", "2", "--batch", "4", "--width", "0.05", "--loop-steps", "3", "2", "--threads", "1"]


def test_interleave_runs_in_turn():
    order = []
    times = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert [len(t.seconds) for t in times.values()] == [3, 3]


def test_quantiles_and_ratios():
    slow, fast = Times("slow", [2.0, 6.0, 4.0]), Times("fast", [1.0, 2.0, 1.0])
    assert slow.median == 4.0
    assert slow.quantile(0.25) == 3.0
    assert list(ratio(slow, fast).seconds) == [2.0, 3.0, 4.0]


def test_json_holds_every_target(capsys, tmp_path):
    out = tmp_path / "sub" / "result.json"
    assert cpu.main([*TINY, "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert [row["measure"] for row in printed["targets"]] == [name for name, _, _ in cpu.TARGETS]
    assert all(math.isfinite(row["value"]) for row in printed["targets"])
    assert printed["machine"]["threads"] == 1
    assert {row["name"] for row in printed["batch"]["rows"]} == {"EP batch", "backprop batch", "autograd batch"}


def test_table_names_every_target(capsys):
    assert cpu.main(TINY) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name, _, _ in cpu.TARGETS)
