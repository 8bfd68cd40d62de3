"""What ``ep-train`` does with finished runs: one file per command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .evaluate import EvalConfig, run_eval
from .export import ExportConfig, run_export
from .plot import PlotConfig, run_plot
from .predict import PredictConfig, run_predict

# By name: its options, and what runs it and returns the exit code.
TOOLS: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
    "eval": (EvalConfig, run_eval),
    "predict": (PredictConfig, run_predict),
    "export": (ExportConfig, run_export),
    "plot": (PlotConfig, run_plot),
}

__all__ = ["TOOLS", "EvalConfig", "ExportConfig", "PlotConfig", "PredictConfig"]
