"""The questions about gradients' quality: precision and quality_vs_time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.baselines.published import FeedForward
from benchmarks.problem import network_of, problem_of
from benchmarks.questions import precision, quality_vs_time
from benchmarks.questions.precision import FORMS, Subject, Truth, form_cosine
from benchmarks.questions.quality_vs_time import Point, fastest, front, headline, pareto
from benchmarks.setting import Setting
from ep_kernels import RelaxConfig, ep_gradients
from ep_train.check import compare, smallest_cosine, true_gradients

QUICK = Setting(threads=1, quick=True)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def asked(question, setting=QUICK, only=""):
    """Rows of the question's cases as a result file has them."""
    cases = [case for case in question.cases(setting) if only in case.key]
    return [
        {"question": question.name, "case": case.key, "status": "ok", **row} for case in cases for row in case.run()
    ]


def row(name, cost, cosine, *, method="EP", model="net", group="sweeps", residual=1e-7):
    times, ratio = (dict.fromkeys(("0.2", "0.5", "0.8"), factor * cost) for factor in (10, 1))
    return {
        "case": f"{model}, batch 4: {group}", "name": name, "status": "ok", "method": method, "model": model,
        "batch": 4, "group": group, "ms": times, "ratio": {"to": "backprop", **ratio}, "cosine": cosine,
        "cosine_least": cosine, "cosine_backprop": 0.5, "true_residual": residual,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], []),
        ([(1.0, 0.5)], [0]),
        ([(2.0, 0.9), (1.0, 0.5)], [1, 0]),  # both, cheapest first
        ([(1.0, 0.5), (2.0, 0.4)], [0]),  # dearer and worse
        ([(1.0, 0.5), (2.0, 0.5)], [0]),  # as good, dearer
        ([(1.0, 0.5), (1.0, 0.6)], [1]),  # as dear, worse
        ([(1.0, 0.5), (1.0, 0.5), (3.0, 0.1)], [0, 1]),  # equal ones do not dominate each other
        ([(1.0, math.nan), (2.0, 0.5), (math.nan, 0.9)], [1]),
        ([(3.0, 0.7), (1.0, 0.2), (2.0, 0.8), (4.0, 0.9)], [1, 2, 3]),
    ],
)
def test_pareto(points, expected):
    assert pareto(points) == expected


def test_headline_picks_the_fastest_that_is_good_enough():
    rows = [
        row("poor", 1.0, 0.9899), row("good", 2.0, 0.9901), row("better", 3.0, 0.999),
        row("BPTT", 0.5, 1.0, method="BPTT"),
    ]  # fmt: skip
    assert fastest(rows, 0.99)["name"] == "good"
    text = headline(rows, "here")
    assert "good" in text
    assert "20 ms" in text
    assert "2 backprop batches" in text


def test_headline_says_when_none_reaches_it():
    rows = [
        row("nan", 0.1, math.nan),
        row("near", 2.0, 0.98),
        row("far", 1.0, 0.5),
        row("BPTT", 0.5, 1.0, method="BPTT"),
    ]
    text = headline(rows, "here")
    assert fastest(rows, 0.99) is None
    assert "no setting reaches cosine 0.99; the nearest is near (cosine 0.9800)" in text
    assert "no setting of EP" in headline(rows[-1:], "here")


def test_where_nothing_settles_a_cosine_does_not_count():
    rows = [row("lucky", 1.0, 0.999, residual=0.3), row("good", 2.0, 0.995)]
    assert fastest(rows, 0.99)["name"] == "good"
    assert [r["name"] for r in front(rows)] == ["good"]
    assert any("lucky" in line and "(moves)" in line for line in quality_vs_time.lines(rows))
    assert "an equilibrium" in headline(rows[:1], "here")


def test_the_front_is_of_ep_and_blind_to_rounding():
    rows = [
        row("a", 1.0, 0.5), row("b", 2.0, 0.999991), row("c", 3.0, 0.999992), row("BPTT", 0.1, 1.0, method="BPTT"),
    ]  # fmt: skip
    assert [r["name"] for r in front(rows)] == ["a", "b"]


def test_table_of_quality_vs_time():
    """Fronts are of one network; in the order of cost; rows without figures keep their reason."""
    rows = [
        row("dear", 5.0, 0.995), row("cheap", 1.0, 0.5), row("worse", 6.0, 0.4),
        row("other", 9.0, 0.3, model="deep"),
        {"case": "deep, batch 4: gain", "name": "lost", "status": "wrong", "reason": "relative error"},
    ]  # fmt: skip
    lines = quality_vs_time.lines(rows)
    marks = {cells[1].strip(): cells[2].strip() for cells in (line.split("|") for line in lines) if len(cells) > 3}
    assert {name: marks[name] for name in ("cheap", "dear", "worse", "other")} == {
        "cheap": "*", "dear": "*", "worse": "", "other": "*"
    }  # fmt: skip
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert names.index("cheap") < names.index("dear") < names.index("worse")
    assert lines[-1] == "* deep, batch 4: gain: lost: wrong: relative error"


def test_targets_of_quality_vs_time():
    rows = [
        row("fast", 2.9, 0.981), row("fine", 3.5, 0.999), row("slow", 3.5, 0.99, model="deep"),
        row("bad", 1.0, 0.97, model="poor"),
    ]  # fmt: skip
    found = quality_vs_time.targets(rows)
    assert [t.verdict for t in found] == ["met", "MISSED", "not measured"]
    assert [t.value for t in found] == [2.9, 3.5, None]
    assert "fast" in found[0].of


def test_targets_of_precision():
    def of(name, smallest, case="a", kind="fp16"):
        return {"case": case, "name": name, "status": "ok", "precision": kind, "smallest": smallest}

    rows = [
        of("fp16, x", 0.995), of("fp16, x", 0.991, "b"), of("bf16, x", 0.999), of("bf16, x", 0.98, "b"),
        of("nan, x", math.nan), of("nan, x", 0.5, "b"), of("float64, reference", 0.5, kind="float64"),
        {"case": "b", "name": "tf32, x", "status": "failed", "reason": "no"},
    ]  # fmt: skip
    found = {t.measure: t for t in precision.targets(rows)}
    assert {measure: (t.verdict, t.of) for measure, t in found.items()} == {
        "smallest cosine, fp16, x": ("met", "b"),
        "smallest cosine, bf16, x": ("MISSED", "b"),
        "smallest cosine, nan, x": ("MISSED", "a"),
    }


def test_more_sweeps_are_nearer_to_the_true_gradient():
    """Through the question's own code, on a network whose few sweeps are not enough."""
    subjects = [
        Subject(f"{t} + {k}", "8-8p-8-8p", 8, 4, 0.2, {"free_steps": t, "nudged_steps": k, "estimator": "tangent"})
        for t, k in ((2, 1), (4, 3), (16, 12))
    ]
    found = [precision.cosines(Setting(threads=1), s, "float64", "reference")["smallest"] for s in subjects]
    assert found[0] < found[1] < found[2]
    assert found[0] < 0.97
    assert found[2] > 0.9999


def test_truth_is_that_of_check_and_is_computed_once_an_equilibrium(monkeypatch):
    p = problem_of(network_of("4p-5-5p", 8, 0.1), 2, "cpu").double()
    truth, calls = Truth(p, 20), []
    real = precision.bptt_gradients
    monkeypatch.setattr(precision, "bptt_gradients", lambda *a, **k: calls.append(1) or real(*a, **k))
    for steps in (2, 5):
        _, equilibrium = ep_gradients(p.network, p.parameters, p.x, p.targets, RelaxConfig(free_steps=steps))
        found, residual = truth.at(equilibrium.states)
        expected, _ = true_gradients(p.network, p.parameters, equilibrium.states, p.targets, steps=40)
        assert smallest_cosine(compare(found, expected)) > 1 - 1e-9
        assert residual < 1e-9
    assert len(calls) == 1
    far = [p.x, *(torch.ones_like(s) for s in equilibrium.states[1:])]
    Truth(p, 1).at(far)
    truth.steps = 1  # which does not bring it back
    truth.at(far)
    assert len(calls) == 3


def test_feedforward_gradient_is_that_of_backprop():
    """``to backprop`` compares with the gradient of the feed-forward net."""
    _, plain = quality_vs_time.truth(QUICK, "3p-4", 2, 0.1, 0)
    p = problem_of(network_of("3p-4", 8, 0.1), 2, "cpu", 0)
    model = FeedForward(p.network, p.parameters)
    expected = torch.autograd.grad(F.cross_entropy(model(p.x), p.labels), [conv.weight for conv in model.convs])
    for ours, theirs in zip(plain.weights, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_weak_feedback_is_near_backprop():
    """A property of the column: at small gain the true gradient is nearly that of backprop, at large gain not."""

    def to_backprop(gain):
        config = RelaxConfig(free_steps=10, nudged_steps=8)

        def gradients(p):
            found, equilibrium = ep_gradients(p.network, p.parameters, p.x, p.targets, config)
            return found, equilibrium.states

        return quality_vs_time.quality(QUICK, "8p-8-8p", 4, gain, gradients)["cosine_backprop"]

    assert to_backprop(0.001) > 0.99 > to_backprop(0.5)


def test_a_wrong_gradient_is_caught(monkeypatch):
    """The check before the timing is against float64, not against itself."""
    real = quality_vs_time.ep_gradients

    def spoiled(*args, backend=None, **kwargs):
        gradients, equilibrium = real(*args, backend=backend, **kwargs)
        if backend == "cpu":
            gradients.weights[0].mul_(1.2)
        return gradients, equilibrium

    monkeypatch.setattr(quality_vs_time, "ep_gradients", spoiled)
    monkeypatch.setattr(quality_vs_time, "GROUPS", {**quality_vs_time.GROUPS, "sweeps": (Point(0.02, 2, 1),)})
    rows = {r["name"]: r for r in asked(quality_vs_time.QUESTION, only="sweeps")}
    assert rows["sweep, tangent, k 0.02, 2 + 1, fp32, cpu"]["status"] == "wrong"
    assert rows["backprop"]["status"] == "ok"


def test_quality_vs_time_asked_quickly():
    rows = asked(quality_vs_time.QUESTION)
    assert {r["status"] for r in rows} == {"ok"}, [r for r in rows if r["status"] != "ok"]
    settings = [r for r in rows if r["name"] != "backprop"]
    for r in settings:
        assert {"ms", "ratio", "cosine", "cosine_least", "cosine_backprop", "true_residual", "method", "group"} <= set(
            r
        )
        assert -1.001 <= r["cosine"] <= 1.001
    found = {r["name"]: r for r in settings}
    assert found["classical EP, sync, k 1, 60 + 30, fp32, cpu"]["free_steps"] == 60
    assert any(r["method"] == "BPTT" for r in settings)
    for values, key in (({"sweep", "even_odd", "sync"}, "schedule"), ({"tangent", "symmetric"}, "estimator"),
                        ({0.02, 0.05, 0.1, 0.25, 1.0}, "gain"), ({"fp32", "bf16"}, "precision")):  # fmt: skip
        assert {r[key] for r in settings if key in r} == values
    tables = quality_vs_time.lines(rows)
    assert any("| * |" in line for line in tables)
    assert "cosine 0.99" in tables[0]
    drawn(quality_vs_time.QUESTION, rows)


def test_precision_asked_quickly():
    rows = asked(precision.QUESTION)
    assert {r["status"] for r in rows} == {"ok"}, [r for r in rows if r["status"] != "ok"]
    networks = [r for r in rows if "cosines" in r]
    assert len({r["case"] for r in networks}) == 4
    for r in networks:
        assert r["smallest"] == min(v for name, v in r["cosines"].items() if name.startswith("connections"))
        assert "nodes.1.bias" in r["cosines"]
    kinds = {(r["precision"], r["backend"]) for r in networks}
    assert {("float64", "reference"), ("fp16", "reference"), ("bf16", "cpu")} <= kinds
    text = "\n".join(precision.lines(rows))
    assert f"| smallest over connections | {networks[0]['smallest']:.4f} |" in text
    assert "| fp16 | two-phase form | PyTorch |" in text
    drawn(precision.QUESTION, rows)


def test_a_named_precision_and_backend():
    setting = Setting(threads=1, quick=True, precisions=("bf16",), backends=("cpu",), models=("2p-3",))
    (case, _, forms) = precision.cases(setting)
    assert "2p-3" in case.key
    assert [r["name"] for r in case.run()] == ["float64, reference", "bf16, cpu"]
    assert forms.key == precision.CONTRAST


def test_difference_form_keeps_what_the_two_phase_form_loses():
    setting = Setting(threads=1)
    for operands in ("fp16", "bf16"):
        lost = [form_cosine(setting, operands, d, FORMS[0], "PyTorch")["cosine"] for d in (1e-3, 1e-4)]
        kept = [form_cosine(setting, operands, d, FORMS[1], "reference")["cosine"] for d in (1e-3, 1e-4)]
        assert lost[1] < lost[0] < 0.999
        assert min(kept) > 0.9999


def test_a_variant_that_cannot_run_loses_no_other():
    setting = Setting(threads=1, quick=True, backends=("cuda", "cpu"), precisions=("fp32",), models=("2p-3",))
    rows = {r["name"]: r for r in precision.cases(setting)[0].run()}
    if not torch.cuda.is_available():
        assert rows["fp32, cuda"]["status"] == "unavailable"
        assert rows["fp32, cuda"]["reason"]
    assert rows["fp32, cpu"]["status"] == "ok"


def drawn(question, rows):
    """A picture comes out, also of no rows."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    question.draw(rows, figure)
    assert sum(bool(axes.collections or axes.lines) for axes in figure.axes) == len(
        {r["case"] for r in rows if "cosines" in r} or {r["model"] for r in rows if "cosine" in r}
    )
    question.draw([], pytest.importorskip("matplotlib.figure").Figure())
