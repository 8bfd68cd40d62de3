"""How competitors are timed, checked and compared."""

from __future__ import annotations

import math

import pytest

from benchmarks.case import Competitor, Timed, Unavailable, Wrong, check, compete
from benchmarks.setting import Setting
from benchmarks.timing import Times, interleave, ratio

SETTING = Setting(threads=1, rounds=3)


def test_interleave_runs_in_turn():
    order = []
    times = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]  # each round begins with another one
    assert [len(t.seconds) for t in times.values()] == [3, 3]


def test_a_slow_one_takes_part_in_the_first_rounds():
    order = []
    works = {"a": lambda: order.append("a"), "slow": lambda: order.append("slow")}
    times = interleave(works, rounds=3, warmup=2, most={"slow": 1})
    assert order == ["a", "a", "a", "slow", "a", "a"]
    assert times["a"].row()["samples"] == [1e3 * s for s in times["a"].seconds]
    assert len(times["slow"].seconds) == 1
    assert len(ratio(times["a"], times["slow"]).seconds) == 1


def test_short_work_is_repeated_and_shared():
    calls = []
    times = interleave({"a": lambda: calls.append(1)}, rounds=2, least=5e-3, share={"a": 4})
    assert len(calls) > 100
    assert times["a"].median < 5e-3 / 4


def test_quantiles_and_ratios():
    slow, fast = Times("slow", [2.0, 6.0, 4.0]), Times("fast", [1.0, 2.0, 1.0])
    assert slow.median == 4.0
    assert slow.quantile(0.25) == 3.0
    assert slow.quantiles(10.0)["0.5"] == 40.0
    assert list(ratio(slow, fast).seconds) == [2.0, 3.0, 4.0]


def test_competitors_become_rows():
    """Who computes something else, fails or cannot run has a reason and no time; the others go on."""
    ran = []

    def timed(name, error=0.0, calls=1):
        return Timed(lambda: ran.append(name), lambda: error, 1e-3, calls, {"column": name})

    def broken():
        raise ZeroDivisionError("no\nsecond line")

    def absent():
        raise Unavailable("backend cuda: no CUDA device is available")

    competitors = [
        Competitor("good", lambda: timed("good")),
        Competitor("base", lambda: timed("base")),
        Competitor("wrong", lambda: timed("wrong", 0.1)),
        Competitor("not a number", lambda: timed("not a number", math.nan)),
        Competitor("broken", broken),
        Competitor("absent", absent),
    ]
    rows = {row["name"]: row for row in compete(SETTING, competitors, against="base")}
    statuses = {name: row["status"] for name, row in rows.items()}
    assert statuses == {
        "good": "ok", "base": "ok", "wrong": "wrong", "not a number": "wrong", "broken": "failed",
        "absent": "unavailable",
    }  # fmt: skip
    assert set(ran) == {"good", "base"}
    assert rows["wrong"]["reason"].endswith("relative error 1.0e-01, expected at most 1e-03")
    assert rows["broken"]["reason"] == "ZeroDivisionError: no"
    assert "no CUDA device" in rows["absent"]["reason"]
    assert rows["good"]["column"] == "good"
    assert rows["good"]["ratio"]["to"] == "base"
    assert list(rows["good"]["ms"]) == ["0.2", "0.5", "0.8"]
    assert "ratio" not in rows["base"]
    assert rows["good"]["rounds"] == 3


def test_one_that_breaks_while_it_is_timed_loses_no_other():
    calls = []

    def breaks():
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no room")

    competitors = [
        Competitor("a", lambda: Timed(int, lambda: 0.0, 0.0)),
        Competitor("breaks", lambda: Timed(breaks, lambda: 0.0, 0.0)),
    ]
    rows = {row["name"]: row for row in compete(SETTING, competitors, against="a")}
    assert rows["a"]["rounds"] == 3
    assert rows["breaks"]["status"] == "failed"
    assert rows["breaks"]["reason"] == "MemoryError: no room"
    assert len(calls) == 3
    with pytest.raises(MemoryError):
        interleave({"b": lambda: (_ for _ in ()).throw(MemoryError())}, rounds=1)


def test_columns_that_verifying_finds():
    values = {}

    def verify():
        values["cosine"] = 0.99
        return 0.0

    (row,) = compete(SETTING, [Competitor("a", lambda: Timed(int, verify, 1.0, values=values))], against="")
    assert row["cosine"] == 0.99


def test_columns_from_times():
    work = Competitor("a", lambda: Timed(int, lambda: 0.0, 0.0))
    (row,) = compete(SETTING, [work], against="", after=lambda name, times: {"seen": (name, len(times.seconds))})
    assert row["seen"] == ("a", 3)


def test_check_refuses_what_is_not_a_number():
    assert check(0.5, 0.5) == 0.5
    with pytest.raises(Wrong):
        check(math.nan, 1e9)
