"""The examples run, and learn something within two short epochs."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytest.importorskip("sklearn")


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_loop() -> None:
    assert load("plain_loop").main(epochs=2, train=480) > 0.5


def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    logging.getLogger("lightning").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders and loggers
        accuracy = load("lightning_module").main(
            epochs=2, train=480, default_root_dir=tmp_path, enable_model_summary=False, **quiet
        )
    assert accuracy > 0.3
    assert list(tmp_path.iterdir()) == []


def test_accelerate() -> None:
    pytest.importorskip("accelerate", exc_type=ImportError)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load("accelerate_loop").main(epochs=2, train=480, cpu=True) > 0.5


def test_every_example_is_tested() -> None:
    tested = {"plain_loop", "lightning_module", "accelerate_loop"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested
