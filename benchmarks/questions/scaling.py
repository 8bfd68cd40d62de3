"""scaling: data-parallel EP on several processes, and a cost model of more (``python -m benchmarks.scaling``)."""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.case import Case, Row
from benchmarks.commands import DAY, log_file
from benchmarks.registry import Question
from benchmarks.runner import load, run
from benchmarks.scaling import report
from benchmarks.setting import Setting


def cases(setting: Setting) -> list[Case]:
    """One: all numbers of processes are needed for the prediction, and for its check."""
    model = setting.choose(setting.models, ("laborieux/2",), ("vgg11",), ("3p-4",))[0]
    batch = setting.choose(setting.batches, (32,), (256,), (4,))[0]
    return [Case(f"{model}, batch {batch}", partial(rows, setting, model, batch), 600.0)]


def rows(setting: Setting, model: str, batch: int) -> list[Row]:
    """Of the command, in processes of its own; its cases are finer than this one."""
    most = torch.cuda.device_count() if setting.cuda else 2
    counts = [str(n) for n in (1, 2, 4, 8) if n <= max(1, most)]
    log = log_file("scaling")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.scaling", "--processes", *counts, "--model", model]
        command += ["--batch", str(batch), "--device", "cuda" if setting.cuda else "cpu", "--json", str(out)]
        code = run([*command, *(["--quick"] if setting.quick else [])], log, DAY)
        if code != 0:
            tail = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            raise RuntimeError(f"benchmarks.scaling ended with exit code {code}: {tail}")
        found = load(out)
    return [{k: v for k, v in row.items() if k not in ("question", "environment")} for row in found]


QUESTION = Question(
    report.QUESTION,
    "strong and weak scaling over processes, and a cost model's predictions up to 64 nodes",
    cases,
    report.lines,
    conditions=(
        "gradients of a local batch, their mean over processes, an optimizer step; gloo on a CPU, NCCL on GPUs; "
        "cores shared out evenly; assumptions of the predictions are in the row of that name"
    ),
    seconds={"cpu": 60.0, "cuda": 20.0},
)
