"""What EP costs: memory against T, the first call, depth and batch, on networks that run in moments."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks.case import Unavailable
from benchmarks.plots import picture
from benchmarks.questions import batch, cold_start, depth, memory_vs_steps
from benchmarks.questions.memory_vs_steps import BPTT, CHECKPOINTED, Method
from benchmarks.rows import flat
from benchmarks.setting import Setting
from ep_kernels import Parameters

MIB = 2**20
QUICK = Setting(threads=1, quick=True)
QUANTILES = {"0.2", "0.5", "0.8"}
OURS = Method("ours, cpu, fp32", "cpu", "fp32")


def asked(question, setting=QUICK):
    """Rows of all its cases, as a result file keeps them."""
    records = [
        {"question": question.name, "case": case.key, "status": "ok", "rows": case.run()}
        for case in question.cases(setting)
    ]
    return json.loads(json.dumps(flat(records)))


# --- memory_vs_steps --------------------------------------------------------------------------------------------------


def test_memory_is_flat_where_bptt_grows(monkeypatch, tmp_path):
    """Real processes: BPTT keeps about 1.7 MiB a sweep of this network; ours does not notice 35 more of them."""
    monkeypatch.setattr(memory_vs_steps, "QUICK", (5, 40))
    ours = memory_vs_steps.peaks(QUICK, "32-64p-64", 16, OURS)
    through = memory_vs_steps.peaks(QUICK, "32-64p-64", 16, Method(BPTT))
    assert [row["status"] for row in (*ours, *through)] == ["ok"] * 4
    assert [row["steps"] for row in ours] == [5, 40]
    assert all(row["error"] <= row["limit"] and row["memory"] > 0 for row in (*ours, *through))
    assert abs(ours[1]["memory"] - ours[0]["memory"]) < MIB
    assert through[1]["memory"] - through[0]["memory"] > 35 * MIB
    assert through[1]["memory"] > 10 * ours[1]["memory"]
    few = memory_vs_steps.peak(QUICK, "32-64p-64", 16, Method(CHECKPOINTED), 40)
    assert ours[1]["memory"] < few < through[1]["memory"] / 2
    picture(memory_vs_steps.draw, [*ours, *through], tmp_path / "memory.png")


def measured(method, peaks, *, precision="", model="net", status="ok"):
    """Made-up rows: MiB by T."""
    backend = "cpu" if method.startswith("ours") else ""
    return [
        {
            "name": f"{method}, T = {steps}", "case": f"{model}, batch 8, {method}", "method": method,
            "backend": backend, "precision": precision, "model": model, "batch": 8, "steps": steps, "status": status,
            "reason": "no room", **({"memory": mib * MIB} if status == "ok" else {}),
        }
        for steps, mib in peaks.items()
    ]  # fmt: skip


def test_memory_targets_say_what_the_rows_say():
    rows = [
        *measured("ours, cpu, fp32", {5: 10.0, 60: 10.0, 250: 10.4}, precision="fp32"),
        *measured("ours, cuda, fp32", {5: 10.0, 60: 11.0, 250: 10.0}, precision="fp32"),
        *measured("ours, cuda, fp16", {5: 1.0, 60: 1.0}, precision="fp16"),
        *measured(BPTT, {5: 20.0, 60: 105.0}),
        *measured(BPTT, {250: 0}, status="unavailable"),
        *measured("ours, cpu, fp32", {5: 10.0, 60: 10.0, 250: 10.0}, precision="fp32", model="other"),
        {"name": "", "case": "third", "status": "skipped", "reason": "the question's time was over"},
    ]
    found = {(t.of, "largest" in t.measure): t for t in memory_vs_steps.targets(rows)}
    verdicts = {key: t.verdict for key, t in found.items()}
    assert verdicts == {
        ("net, batch 8, ours, cpu, fp32", False): "met",
        ("net, batch 8, ours, cpu, fp32", True): "met",
        ("net, batch 8, ours, cuda, fp32", False): "MISSED",  # 11 / 105 > 1 / 10
        ("net, batch 8, ours, cuda, fp32", True): "MISSED",
        ("net, batch 8, ours, cuda, fp16", True): "not measured",  # float16 is not compared with float32
        ("other, batch 8, ours, cpu, fp32", False): "not measured",
        ("other, batch 8, ours, cpu, fp32", True): "met",
    }
    assert found["net, batch 8, ours, cpu, fp32", False].value == pytest.approx(10 / 105)
    assert found["net, batch 8, ours, cpu, fp32", True].value == pytest.approx(1.04)
    text = memory_vs_steps.lines(rows)
    assert "| peak MiB | T = 5 | T = 60 | T = 250 |" in text
    assert "| BPTT | 20.0 | 105.0 |  |" in text
    assert "| BPTT / ours, cpu, fp32 | 2.0 | 10.5 |  |" in text
    assert any("T = 250: unavailable: no room" in line for line in text)
    assert any("third" in line and "skipped" in line for line in text)


def test_long_bptt_is_left_out_with_the_reason(monkeypatch):
    slow = Setting(threads=1)
    with pytest.raises(Unavailable, match=r"its time.*T = 60"):
        memory_vs_steps.require_room(slow, "vgg8/2", 8, Method(BPTT), 120, {})
    memory_vs_steps.require_room(slow, "vgg8/2", 8, Method(BPTT), 60, {})  # the target's T is run in any case
    memory_vs_steps.require_room(slow, "vgg8/2", 8, OURS, 250, {})
    monkeypatch.setattr(memory_vs_steps, "available", lambda: 1000 * MIB)
    memory_vs_steps.require_room(slow, "vgg8/8", 8, Method(BPTT), 30, {15: 250 * MIB})
    with pytest.raises(Unavailable, match=r"1\.0 GiB by its growth to T = 15"):
        memory_vs_steps.require_room(slow, "vgg8/8", 8, Method(BPTT), 60, {15: 250 * MIB})


def test_what_runs_out_of_memory_is_not_tried_again(monkeypatch):
    tried = []

    def peak(_setting, _model, _batch, _method, steps):
        tried.append(steps)
        if steps > 5:
            raise torch.OutOfMemoryError("1 GiB wanted")
        return MIB

    monkeypatch.setattr(memory_vs_steps, "QUICK", (5, 15, 30))
    monkeypatch.setattr(memory_vs_steps, "peak", peak)
    rows = memory_vs_steps.peaks(QUICK, "3p-4", 2, Method(BPTT))
    assert [row["status"] for row in rows] == ["ok", "unavailable", "unavailable"]
    assert "1 GiB wanted" in rows[2]["reason"]
    assert tried == [5, 15]


def test_a_process_that_was_stopped_is_not_tried_with_more_sweeps(monkeypatch):
    tried = []

    def cpu_peak(_function, *arguments, timeout):
        tried.append((arguments[-1], timeout))
        raise Unavailable("stopped after 240 s")

    monkeypatch.setattr(memory_vs_steps, "cpu_peak", cpu_peak)
    rows = memory_vs_steps.peaks(QUICK, "3p-4", 2, OURS)
    assert tried == [(memory_vs_steps.QUICK[0], memory_vs_steps.SECONDS)]
    assert [row["status"] for row in rows] == ["unavailable"] * 2
    assert all("T = 2: Unavailable: stopped after 240 s" in row["reason"] for row in rows)


def test_memory_of_wrong_gradients_is_not_measured(monkeypatch):
    def fewer(self, p, steps):
        return Method(BPTT).work(p.double(), steps - 4)

    monkeypatch.setattr(Method, "exact", fewer)
    monkeypatch.setattr(memory_vs_steps, "peak", lambda *_: pytest.fail("measured"))
    rows = memory_vs_steps.peaks(QUICK, "3p-4p", 2, Method(CHECKPOINTED))
    assert {row["status"] for row in rows} == {"wrong"}


# --- batch and depth --------------------------------------------------------------------------------------------------


def test_batch_rows_and_table(tmp_path):
    rows = asked(batch.QUESTION)
    assert {(row["name"], row["batch"]) for row in rows} == {
        (name, images) for name in ("ours, cpu, fp32", "backprop") for images in (1, 4)
    }
    for row in rows:
        assert row["status"] == "ok"
        assert row["error"] <= row["limit"]
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms"]["0.5"])
        assert ("ratio" in row) == (row["name"] != "backprop")
    text = batch.lines(rows)
    for row in rows:
        assert any(line.startswith(f"| {row['batch']} | {row['name']} |") for line in text)
    picture(batch.draw, rows, tmp_path / "batch.png")


@pytest.mark.parametrize("question", [batch, depth])
def test_wrong_gradients_are_not_timed(question, monkeypatch):
    def doubled(p, name):
        true = real(p, name).named()
        return Parameters.from_named(p.network, {key: 2 * t for key, t in true.items()})

    real = question.true_batch
    monkeypatch.setattr(question, "true_batch", doubled)
    rows = {row["name"]: row for row in asked(question.QUESTION, Setting(threads=1, quick=True, models=("3p-4",)))}
    assert rows["ours, cpu, fp32"]["status"] == "wrong"
    assert "ms" not in rows["ours, cpu, fp32"]
    assert rows["backprop"]["status"] == "ok"
    assert any("wrong" in line for line in question.lines(list(rows.values())))


def test_depth_rows_and_table(tmp_path):
    rows = asked(depth.QUESTION)
    ours = [row for row in rows if row["name"].startswith("ours")]
    assert [row["depth"] for row in ours] == [2, 3]
    for row in ours:
        assert row["status"] == "ok"
        assert set(row["ratio"]) == {"to", *QUANTILES}
        assert row["cosine"] == min(layer["cosine"] for layer in row["layers"])
        assert row["cosine"] > 0.98
        assert len(row["layers"]) == row["depth"]
        for layer in row["layers"]:
            assert layer["norm"] > 0
            assert layer["relative_norm"] == pytest.approx(layer["norm"] / layer["true_norm"])
            assert layer["relative_norm"] == pytest.approx(1, abs=0.2)
    text = depth.lines(rows)
    assert sum(line.startswith("| 3p-4-4p | 3 |") for line in text) == 2
    first, last = ours[1]["layers"][0]["norm"], ours[1]["layers"][-1]["norm"]
    assert any(line.endswith(f"| {first / last:.3g} |") for line in text)
    picture(depth.draw, rows, tmp_path / "depth.png")


# --- cold_start -------------------------------------------------------------------------------------------------------


def test_first_calls_in_fresh_processes(tmp_path):
    """The library is loaded and torch is warmed up by the first call only, so later ones are faster."""
    rows = asked(cold_start.QUESTION)
    by_name = {row["name"]: row for row in rows}
    assert list(by_name) == [cold_start.TORCH, cold_start.OURS, "ours, cpu, fp32", "backprop"]
    assert {row["status"] for row in rows} == {"ok"}
    ours = by_name["ours, cpu, fp32"]
    for key in ("ms", "first_ms", "second_ms", "later_ms", "import_ms", "torch_ms", "device_ms"):
        assert set(ours[key]) == QUANTILES
        assert all(0 < value < math.inf for value in ours[key].values())
    assert ours["ms"] == ours["first_ms"]
    assert ours["error"] <= ours["limit"]
    assert ours["first_ms"]["0.5"] > ours["later_ms"]["0.5"]
    assert by_name[cold_start.TORCH]["ms"]["0.5"] > by_name[cold_start.OURS]["ms"]["0.5"]
    picture(cold_start.draw, rows, tmp_path / "cold.png")


def test_caches_are_filled_before_they_are_measured(monkeypatch):
    """Triton's two rows, with a made-up process: the empty cache is asked once, and fills it for the others."""
    filled, order = set(), []

    def fresh(_setting, _model, _batch, start, folder):
        order.append(start.name)
        slow = 8.0 if start.cache == cold_start.FILLED and folder not in filled else 1.0
        if start.cache and start.kind == "ours":
            assert start.cache == cold_start.FILLED or folder not in filled
            filled.add(folder)
        times = {"torch": 2.0, "ours": 0.5, "device": 0.1, "first": slow, "second": 0.25, "later": 0.125}
        return {**times, "error": 0.5 if start.kind == "backprop" else 0.0, "limit": 0.1}

    monkeypatch.setattr(cold_start, "fresh", fresh)
    setting = Setting(threads=1, backends=("triton",), models=("net",), rounds=4)
    rows = asked(cold_start.QUESTION, setting)
    by_name = {row["name"]: row for row in rows}
    empty, full = (by_name[f"ours, triton, fp32, {cache}"] for cache in (cold_start.EMPTY, cold_start.FILLED))
    assert (empty["rounds"], full["rounds"]) == (1, 3)
    assert set(full["ms"].values()) == {1000.0}
    assert full["ratio"]["0.5"] == 0.5
    assert by_name[cold_start.OURS]["ratio"]["0.5"] == 0.25
    assert by_name["backprop"]["status"] == "wrong"
    assert order.count("backprop") == 1
    text = cold_start.lines(rows)
    assert f"| {full['name']} | 1000.0 (1000.0 to 1000.0) | 0.5 (0.5 to 0.5) | 250 | 125 |" in text
    assert any("backprop: wrong: relative error" in line for line in text)


def test_an_empty_cache_that_fails_fills_none(monkeypatch):
    def fresh(_setting, _model, _batch, start, _folder):
        if start.cache == cold_start.EMPTY:
            raise RuntimeError("no compiler")
        assert start.cache != cold_start.FILLED
        times = dict.fromkeys(("torch", "ours", "device", "first", "second", "later"), 1.0)
        return {**times, "error": 0.0, "limit": 0.1}

    monkeypatch.setattr(cold_start, "fresh", fresh)
    rows = asked(cold_start.QUESTION, Setting(threads=1, quick=True, backends=("triton",), models=("net",)))
    by_name = {row["name"]: row for row in rows}
    for cache in (cold_start.EMPTY, cold_start.FILLED):
        row = by_name[f"ours, triton, fp32, {cache}"]
        assert (row["status"], "no compiler" in row["reason"]) == ("failed", True)
    assert by_name["backprop"]["status"] == "ok"


def test_a_process_that_fails_is_a_row_with_the_reason(monkeypatch):
    monkeypatch.setattr(cold_start, "CHILD", "raise SystemExit('nothing starts')")
    rows = {row["name"]: row for row in asked(cold_start.QUESTION)}
    assert rows["ours, cpu, fp32"]["status"] == "failed"
    assert "nothing starts" in rows["ours, cpu, fp32"]["reason"]
    assert cold_start.TORCH not in rows
