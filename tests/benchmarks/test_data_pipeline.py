"""The data pipeline against training, on images that take moments: figures, the check, the target."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.questions import data_pipeline
from benchmarks.rows import flat
from benchmarks.setting import Setting

QUICK = Setting(threads=1, quick=True)


def test_every_competitor_has_figures():
    (case,) = data_pipeline.cases(QUICK)
    record = {"question": "data_pipeline", "case": case.key, "status": "ok", "rows": case.run()}
    rows = json.loads(json.dumps(flat([record])))
    assert [row["name"].split(", ")[0] for row in rows] == ["EP training", "pipeline", "pipeline", "pipeline"]
    assert {row["status"] for row in rows} == {"ok"}
    assert all(row["images_per_s"] == pytest.approx(4e3 / row["ms"]["0.5"]) for row in rows)
    assert all(row["error"] < 1e-6 for row in rows[1:])
    text = data_pipeline.lines(rows)
    assert len(text) == 2 + 4
    assert "pipeline, augmented, memory-mapped" in text[4]
    found = data_pipeline.targets(rows)
    assert len(found) == 2
    assert found[0].value == pytest.approx(1 / rows[1]["ratio"]["0.5"])


def test_the_check_notices_other_pixels(monkeypatch):
    good = data_pipeline.pipeline(QUICK, 4, data_pipeline.AUGMENTED, {})
    assert good.verify() < 1e-6
    assert len(good.work()) == data_pipeline.IN_A_ROW
    monkeypatch.setattr("ep_train.data.loader.cut_out", lambda pixels, side, centres: pixels)
    assert data_pipeline.pipeline(QUICK, 4, data_pipeline.AUGMENTED, {}).verify() > 1e-2


def test_targets_say_what_the_rows_say():
    shared = {"model": "net", "batch": 4, "status": "ok"}
    rows = [
        {**shared, "name": "EP training"},
        {**shared, "name": "pipeline, augmented", "augmented": True, "ratio": {"to": "EP training", "0.5": 0.05}},
        {**shared, "name": "slow", "augmented": True, "ratio": {"to": "EP training", "0.5": 0.2}},
        {**shared, "name": "pipeline, not augmented", "augmented": False, "ratio": {"to": "EP training", "0.5": 0.01}},
        {**shared, "name": "failed", "augmented": True, "status": "failed"},
    ]
    found = data_pipeline.targets(rows)
    assert [(t.of, t.value, t.verdict) for t in found] == [
        ("net, batch 4, pipeline, augmented", pytest.approx(20), "met"),
        ("net, batch 4, slow", pytest.approx(5), "MISSED"),
    ]
    assert data_pipeline.QUESTION.asked[0].verdict == "not measured"


def test_mapped_images_are_the_same():
    here, there = (data_pipeline.images_of(QUICK, mapped=mapped) for mapped in (False, True))
    assert torch.equal(here.train_images, there.train_images)
    assert (here.mean, here.std) == (there.mean, there.std)
