"""``ep-train plot``: runs in one picture, named by what they differ in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ep_train import cli
from ep_train.commands.plot import names, read_run
from ep_train.run_folder import RunFolder
from tests.core.threads import one_thread  # noqa: F401  (autouse)


def written(path: Path, rows: list[dict[str, Any]], **config: Any) -> Path:
    path.mkdir()
    folder = RunFolder(path)
    folder.write_config({"out": str(path), "lr": 0.001, "seed": 0, "layer_gain": [], **config})
    for row in rows:
        folder.append_metrics(row)
    return path


ROWS = [
    {"epoch": 1, "seconds": 1.0, "train_loss": 2.0, "train_accuracy": 0.3, "residual": 0.1},
    {"epoch": 2, "seconds": 1.5, "train_loss": float("nan"), "test_accuracy": 0.5, "residual": 0.0},
    {"epoch": 3, "seconds": 1.5, "train_loss": 1.0, "test_accuracy": 0.45, "residual": None},
]  # fmt: skip


def test_a_picture_of_a_real_run_and_an_odd_one(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = written(tmp_path / "odd", ROWS)
    out = tmp_path / "pictures" / "compared.png"
    assert cli.main(["plot", str(run), str(odd), "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.size[0] > 1000
    assert [p.name for p in out.parent.iterdir()] == ["compared.png"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("batch_size 20, device cpu, epochs 1, estimator tangent, free_steps 3, lr 0.01")
    assert "backend" not in lines[0]  # an option that one of them did not have yet is at its default
    assert lines[1].endswith("3 epochs, test accuracy 45.00%, best 50.00%")
    assert lines[2] == str(out)


def test_runs_are_named_by_what_differs(tmp_path: Path) -> None:
    a = written(tmp_path / "a", ROWS)
    b = written(tmp_path / "b", ROWS, lr=0.01)
    c = written(tmp_path / "c", ROWS, lr=0.01, seed=1, layer_gain=[1.0, 0.5], quiet=True)
    again = written(tmp_path / "again", ROWS)
    runs = [read_run(path) for path in (a, b, c, again)]
    assert names(runs[:2]) == ["lr 0.001", "lr 0.01"]
    assert names(runs[:1]) == ["a"]
    assert names([runs[0], runs[3]]) == ["a", "again"]
    assert names(runs) == [
        "layer_gain none, lr 0.001, seed 0 (a)",
        "layer_gain none, lr 0.01, seed 0",
        "layer_gain 1 0.5, lr 0.01, seed 1",
        "layer_gain none, lr 0.001, seed 0 (again)",
    ]


def test_what_cannot_be_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, torn = written(tmp_path / "empty", []), written(tmp_path / "torn", ROWS)
    (empty / "metrics.jsonl").touch()
    (torn / "config.json").write_text('{"lr": ')
    listed = written(tmp_path / "listed", ROWS)
    (listed / "config.json").write_text(json.dumps([1]))
    out = tmp_path / "out.png"
    for path, message in (
        (empty, "nothing to show yet, no epoch has finished"),
        (torn, "config.json cannot be read"),
        (listed, "expected a JSON object of options, got list"),
        (tmp_path / "nowhere", "config.json cannot be read"),
    ):
        assert cli.main(["plot", str(path), "--out", str(out)]) == 1
        assert message in capsys.readouterr().err
    assert not out.exists()
