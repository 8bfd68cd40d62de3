"""The runs behind docs/results.md: valid configurations, results that the report reads, medians that are medians."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from benchmarks.deep import __main__ as command
from benchmarks.deep.measure import RESULT, run
from benchmarks.deep.report import report
from benchmarks.deep.tables import SEEDS, TABLES, Run, Table
from ep_train import TrainConfig
from ep_train.models import build_network
from tests.core.threads import one_thread  # noqa: F401  (autouse)

TINY = {
    "dataset": "digits",
    "model": "4p-4p",
    "train_limit": 80,
    "test_limit": 20,
    "batch_size": 20,
    "epochs": 1,
    "threads": 1,
    "device": "cpu",
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_run_is_a_valid_configuration(table: Table) -> None:
    runs = table.runs("a/teacher")
    assert len({r.name for r in runs}) == len(runs)
    assert {r.seed for r in runs} == set(SEEDS)
    for r in runs:
        config = TrainConfig(**{"dataset": "folder:x", **r.values})
        assert (config.epochs, config.evaluate_every, config.seed) == (table.epochs, table.epochs, r.seed)
        side = 28 if config.dataset == "fashion-mnist" else 32
        build_network(config.model_name, (1, side, side), 10, width=config.width)


@pytest.mark.parametrize("method", ["ep", "backprop"])
def test_a_run_and_its_report(method: str, tmp_path: Path) -> None:
    values = {**TINY, "method": method, "local_heads": "1"}
    for seed in SEEDS:
        chosen = Run("depth", "(b) row", "2", seed, {**values, "seed": seed})
        (tmp_path / chosen.name).mkdir()
        run(chosen, tmp_path / chosen.name)
    results = [json.loads(path.read_text()) for path in tmp_path.glob(f"*/{RESULT}")]
    assert len(results) == 3
    for r in results:
        found = r["gradient"]["after"]
        assert len(found["norms"]) == 2
        assert min(found["norms"]) > 0
        if method == "ep":
            assert min(found["cosines"].values()) > 0.9
    text = report(tmp_path, tmp_path / "kept.json", tmp_path / "plots")
    accuracy = median(100 * r["summary"]["test_accuracy"] for r in results)
    assert f"| (b) row | {accuracy:.1f} |" in text
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {
        "deep-accuracy.png",
        "deep-loss.png",
        "deep-gradient.png",
    }
    (tmp_path / chosen.name / RESULT).unlink()  # what was kept comes back: runs of another day
    assert report(tmp_path, tmp_path / "kept.json", None) == text


def test_missing_runs_are_made_and_finished_ones_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def pretend(arguments: list[str], **_: Any) -> Any:
        name = arguments[arguments.index("one") + 2]
        made.append(name)
        if "sync" not in name:
            done = next(r for r in TABLES["stability"].runs("") if r.name == name)
            place = {"table": done.table, "row": done.row, "column": done.column, "seed": done.seed}
            result = {**place, "values": dict(done.values)}
            (tmp_path / name / RESULT).write_text(json.dumps(result))
        return type("Done", (), {"returncode": int("sync" in name)})

    monkeypatch.setattr(command.subprocess, "run", pretend)
    options = ["run", "stability", "--work", str(tmp_path), "--seeds", "0", "--only", "k 0.5"]
    failed = command.main(options)
    assert len(made) == 5
    assert failed == 2
    made.clear()
    assert command.main(options) == 2
    assert len(made) == 2


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no options of ep-train: colour"):
        run(replace(TABLES["depth"].runs("t")[0], values={"colour": 1}), tmp_path)
