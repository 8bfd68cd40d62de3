"""The op-level questions: drive, relax_step and contrast of each layer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import layers
from benchmarks.case import Row, Timed
from benchmarks.layers import ALONE, EAGER, REFERENCE, Layer, makers
from benchmarks.problem import connection_flops, problem_at
from benchmarks.questions import contrast, drive, relax_step, sweep
from benchmarks.setting import Setting
from benchmarks.timing import Times
from ep_kernels import backends

ROOT = Path(__file__).resolve().parents[2]
QUICK = Setting(quick=True, threads=1)
MODULES = {"drive": drive, "relax_step": relax_step, "contrast": contrast}
names = pytest.mark.parametrize("name", MODULES)


class OnGPU(Setting):
    """What a GPU is asked, with the tensors on this CPU."""

    @property
    def cuda(self) -> bool:
        return True


def rows_of(name: str, setting: Setting) -> list[Row]:
    question = MODULES[name].QUESTION
    return [{"case": case.key, **row} for case in question.cases(setting) for row in case.run()]


@names
def test_rows(name: str) -> None:
    rows = rows_of(name, QUICK)
    assert [row["case"] for row in rows[::4]] == ["3p-4, layer 1, batch 2", "3p-4, layer 2, batch 2"]
    assert [row["name"] for row in rows] == 2 * ["ours, cpu, fp32", REFERENCE, EAGER, ALONE]
    for row in rows:
        assert row["status"] == "ok", row
        assert row["error"] <= row["limit"]
        assert {"ms", "rounds", "gflop", "shape", "moved", "rate"} <= set(row)
        assert row["tflops"] == pytest.approx(row["gflop"] / row["ms"]["0.5"])
        assert row["roof_percent"] > 0
        assert row["bound"] in ("compute", "memory")
        assert ("ratio" in row) == (row["name"] != EAGER)


@names
def test_the_table_and_the_picture_hold_the_rows(name: str) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    question, rows = MODULES[name].QUESTION, rows_of(name, QUICK)
    rows += [{**rows[0], "name": "slow", "status": "failed", "reason": "why"}]
    rows += [{**row, "case": "again", "repeated": True} for row in rows if row["name"] == EAGER]
    text = "\n".join(question.table(rows))
    assert text.startswith("3p-4, batch 2:\n")
    for cells in ("| 1 | 3x4x4 | ours, cpu, fp32 |", "| 2 | 4x4x4 | ours, cpu, fp32 |"):
        assert text.count(cells) == 1
    assert text.count(f"| {EAGER} | ") == 2  # a repeated row is not shown
    assert "3p-4, layer 1, batch 2: slow: failed: why" in text
    question.draw(rows, figure)
    (axes,) = figure.axes
    shown = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert shown["ours, cpu, fp32"] == [row["roof_percent"] for row in rows[:-3] if row["name"] == "ours, cpu, fp32"]
    assert "slow" not in shown


def off_by_a_little(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Our op, but for one number."""

    def change(found: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        first = found[0].clone()
        first[(0,) * first.dim()] += 1e-2
        return (first, *found[1:])

    if name == "contrast":
        right = backends.contrasts
        wrong = lambda jobs, on: [change(g) if on == "cpu" else g for g in right(jobs, on)]  # noqa: E731
        monkeypatch.setattr(backends, "contrasts", wrong)
        return
    op = getattr(drive.functional, name)
    spoilt = lambda *a, **k: change(op(*a, **k)) if backends.requested() == "cpu" else op(*a, **k)  # noqa: E731
    monkeypatch.setattr(drive.functional, name, spoilt)


@names
def test_what_computes_something_else_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    off_by_a_little(monkeypatch, name)
    rows = {row["name"]: row for row in rows_of(name, QUICK)[:4]}
    assert rows["ours, cpu, fp32"]["status"] == "wrong"
    assert "relative error" in rows["ours, cpu, fp32"]["reason"]
    assert "ms" not in rows["ours, cpu, fp32"]
    assert rows[REFERENCE]["status"] == rows[EAGER]["status"] == "ok"


def test_wrong_winners_are_seen() -> None:
    layer = Layer(QUICK, "3p-4", 2, 1)
    source, weight = drive.inputs(layer, torch.float32)
    pooled, positions = F.max_pool2d(F.conv2d(source, weight, padding=1), 2, return_indices=True)
    assert drive.error(layer, (pooled, positions)) < 1e-6
    assert drive.error(layer, (pooled, positions.flip(0))) > 1e-2


@names
def test_what_a_gpu_is_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every input set of what is captured goes into the graph, PyTorch computes in float16, and all of it compiles."""
    captured = []

    def capture(works, verify, limit):
        captured.append(works)
        assert all(0 <= verify(work()) <= limit for work in works)
        return lambda: [work() for work in works], len(works)

    monkeypatch.setattr(layers, "captured", capture)
    asked = OnGPU(quick=True, threads=1, backends=("cpu",), precisions=("fp32",))
    rows = rows_of(name, asked)
    assert [row["status"] for row in rows] == ["ok"] * 8
    assert [row["name"] for row in rows[1:4]] == [f"{name}, fp16" for name in (REFERENCE, EAGER, ALONE)]
    assert rows[0]["ratio"]["to"] == rows[2]["name"]
    assert [row["rate"] for row in rows[:4]] == ["fp32", "fp16", "fp16", "fp16"]
    assert all(row["sets"] == 2 for row in rows)
    assert [len(works) for works in captured] == [2] * 8
    listed = MODULES[name].QUESTION.cases(replace(asked, quick=False, models=("3p-4",), batches=(2,)))
    assert [case.key.endswith("torch.compile") for case in listed] == [False, False, True, True]
    only = makers(MODULES[name].OP, Layer(replace(asked, wgmma=True, backends=("cuda",)), "3p-4", 2, 2))
    assert list(only) == ["ours, cuda-wgmma, fp32", f"{EAGER}, fp16"]


@names
def test_what_is_compiled_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form for a compiler (winners by comparisons), run as it is, and the rows of its case."""
    modes = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: modes.append(options["mode"]) or function)
    rows = layers.compiled_rows(MODULES[name].OP, Layer(QUICK, "3p-4", 2, 1))
    assert modes == ["default"]
    assert [(row["name"], row["status"]) for row in rows] == [(EAGER, "ok"), ("torch.compile (default)", "ok")]
    assert rows[0]["repeated"]
    assert "repeated" not in rows[1]


@names
def test_a_layer_without_padding(name: str) -> None:
    """The connection into the highest layer of laborieux has none; it is the drive of one, the feedback of another."""
    for node in (3, 4):
        layer = Layer(Setting(threads=1), "laborieux/32", 2, node)
        for make in makers(MODULES[name].OP, layer).values():
            timed: Timed = make()
            assert timed.verify() <= timed.limit


def test_operations_and_bytes() -> None:
    """Two products where the source moves; every tensor once, in its own width."""
    layer = Layer(QUICK, "3p-4", 2, 2)  # 3x4x4 -> 4x4x4, no pooling
    one = 2 * 2 * 16 * 9 * 3 * 4
    assert connection_flops(layer.network, 1, 2) == one
    assert (drive.OP.flops(layer), contrast.OP.flops(layer)) == (one, 2 * one)
    assert contrast.OP.flops(replace(layer, node=1)) == drive.OP.flops(replace(layer, node=1))
    assert drive.OP.eager(layer, None).values["moved"] == 4 * (2 * 48 + 2 * 64 + 9 * 12)
    below = replace(layer, node=1)  # 3x8x8 -> 3x4x4 with pooling: a winner a unit
    assert drive.OP.eager(below, None).values["moved"] == 4 * (2 * 192 + 2 * 48 + 9 * 9) + 2 * 48
    # the first layer's drive is finished: read that, the state, the layer above with its weight; write the state
    assert relax_step.OP.eager(below, None).values["moved"] == 4 * (2 * 3 * 48 + 2 * 64 + 9 * 12)


def test_only_chains() -> None:
    with pytest.raises(ValueError, match="expected a chain"):
        drive.QUESTION.cases(replace(QUICK, models=("hopfield_resnet13",)))


def test_an_op_without_a_precision_says_so() -> None:
    rows = relax_step.QUESTION.cases(replace(QUICK, precisions=("bf16",)))[0].run()
    assert rows[0]["status"] == "unavailable"
    assert "float32 and float64" in rows[0]["reason"]


INTERPRETED = """
import json, sys
from benchmarks.questions import relax_step
from benchmarks.setting import Setting
from benchmarks.timing import Times
setting = Setting(quick=True, threads=1, backends=("triton",), precisions=("fp16",))
print(json.dumps(relax_step.QUESTION.cases(setting)[0].run()))
"""


def test_launches_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout.splitlines()[-1])}
    ours = rows["our launches, triton, fp16"]
    assert ours["status"] == "ok", ours
    assert 0 < ours["error"] <= 1e-2  # float16 is not exact: it was these launches that ran
    assert ours["sets"] == 2
    assert ours["tiles"]
    assert rows["ours, triton, fp16"]["status"] == "ok"


def test_without_the_plugin_it_is_skipped() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "benchmarks"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "pip install pytest-benchmark" in done.stdout
    assert "passed" not in done.stdout


# --- sweep ------------------------------------------------------------------------------------------------------------


def phases(long, short, **changes):
    """One sweep from made-up milliseconds of both phases, eight sweeps apart."""
    times = [Times(name, [1e-3 * t for t in values]) for name, values in (("ours", long), ("ours (short)", short))]
    row = {"name": "ours", "status": "ok", "error": 0.0, "ms": "of the phase", "ratio": "of the phase"}
    to = Times("alone", [1e-3, 2e-3])
    return sweep.difference(row, {"status": "ok"}, times[0], changes.get("b", times[1]), 8, to)


def test_a_sweep_is_the_difference_of_phases() -> None:
    row = phases((10.0, 18.0), (2.0, 2.0))
    assert row["ms"]["0.5"] == pytest.approx(1.5)
    assert row["samples"] == pytest.approx([1.0, 2.0])
    assert row["ratio"] == {"to": "alone", **dict.fromkeys(("0.2", "0.5", "0.8"), pytest.approx(1.0))}


def test_a_sweep_that_noise_hides_has_no_figures() -> None:
    row = phases((10.0, 1.0), (2.0, 2.0))
    assert row["status"] == "failed"
    assert row["reason"].startswith("too noisy: ")
    assert not {"ms", "ratio", "tflops"} & set(row)


def test_without_a_short_phase_there_is_no_sweep() -> None:
    row = {"name": "ours", "status": "ok", "ms": "of the phase"}
    short = {"status": "wrong", "reason": "relative error"}
    found = sweep.difference(row, short, Times("ours", [1.0]), None, 8, None)
    assert found == {"name": "ours", **short}


def test_sweep_rows_table_and_targets() -> None:
    (case,) = sweep.QUESTION.cases(QUICK)
    rows = [{"case": case.key, **row} for row in case.run()]
    names = ["ours, cpu, fp32", sweep.ALONE, "the same in eager PyTorch", sweep.AUTOGRAD]
    assert [row["name"] for row in rows] == names
    for row in rows:
        assert row["status"] == "ok" or "too noisy" in row["reason"], row
        assert ("tflops" in row) == (row["status"] == "ok" and row["name"] != sweep.AUTOGRAD)
    rows += [{"case": "cut", "name": "", "status": "skipped", "reason": "no time"}]
    text = sweep.lines(rows)
    assert f"{case.key}:" in text
    assert "cut:" not in text
    assert "* cut: skipped: no time" in text


def test_sweep_targets_are_those_of_the_project() -> None:
    def row(name: str, batch: int, **values: object) -> Row:
        return {"case": f"net, batch {batch}", "name": name, "status": "ok", "model": "net", "batch": batch, **values}

    rows = [
        row("ours, cpu, fp32", 8, backend="cpu", precision="fp32", ratio={"to": "alone", "0.5": 1.05}),
        row("ours, triton, fp16", 8, backend="triton", precision="fp16", percent=70.0),
        row("ours, triton, fp16", 4, backend="triton", precision="fp16", percent=10.0),
        row("ours, triton, bf16", 8, backend="triton", precision="bf16", percent=10.0),
        row(sweep.AUTOGRAD, 8),
        {"case": "cut", "name": "", "status": "skipped", "reason": "no time"},
    ]
    found = [(t.of, t.value, t.verdict) for t in sweep.targets(rows)]
    assert found == [
        ("net, batch 8, ours, cpu, fp32", 1.05, "met"),
        ("net, batch 8, ours, triton, fp16", 70.0, "met"),
    ]
    assert sweep.targets(rows[-1:]) == []


def test_a_gpu_names_what_baselines_compute_in() -> None:
    setting = OnGPU(quick=True, threads=1)
    problem = problem_at(setting, "3p-4", 2)
    named = [c.name for c in sweep.baselines(setting, problem, compiled=True)]
    assert named[:3] == [
        f"{sweep.ALONE}, fp16",
        "the same in eager PyTorch, fp16, CUDA graph",
        f"{sweep.AUTOGRAD}, fp32",
    ]
