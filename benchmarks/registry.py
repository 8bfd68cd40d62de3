"""The questions by name, and the suites: what ``python -m benchmarks`` knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.case import Case, Row
from benchmarks.setting import Setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = Callable[[Sequence[Row]], list[str]]
Draw = Callable[[Sequence[Row], "Figure"], None]


@dataclass(frozen=True)
class Target:
    """What was asked for, and what was found: ``of`` says on what; a value of None was not measured."""

    measure: str
    value: float | None
    sign: str  # <= or >=
    bound: float
    of: str

    @property
    def verdict(self) -> str:
        """met, MISSED or not measured."""
        if self.value is None:
            return "not measured"
        return "met" if (self.value <= self.bound if self.sign == "<=" else self.value >= self.bound) else "MISSED"


@dataclass(frozen=True)
class Question:
    """One file of ``benchmarks/questions``.

    Args:
        name: of the file, and on the command line.
        what: one line for people.
        cases: nothing is computed until a case runs.
        table: lines of Markdown from the rows of one device.
        conditions: what every caption says beside the device: networks, batches, how it was measured.
        draw: a picture of the same rows, if there is one.
        targets: of the project (docs/performance.md) that these rows can judge.
        asked: those of a GPU, as long as no row has judged them.
        seconds: about how long it takes, by kind of device (cpu, cuda); shares of the time where that is short. A
            suite leaves out what has no entry for its device.
        wgmma: on a GPU, asked again of the backend cuda with wgmma.
    """

    name: str
    what: str
    cases: Callable[[Setting], list[Case]]
    table: Table
    conditions: str
    draw: Draw | None = None
    targets: Callable[[Sequence[Row]], list[Target]] | None = None
    asked: tuple[Target, ...] = ()
    seconds: dict[str, float] = field(default_factory=lambda: {"cpu": 60.0, "cuda": 30.0})
    wgmma: bool = False


def questions() -> dict[str, Question]:
    """Every question, in the order in which a suite asks them."""
    from benchmarks.questions import (
        batch,
        cold_start,
        contrast,
        data_pipeline,
        depth,
        drive,
        gpu_tests,
        memory_vs_steps,
        precision,
        quality_vs_time,
        relax_step,
        roofline,
        sanitizer,
        scaling,
        solver,
        sweep,
        train_batch,
    )

    modules = (
        gpu_tests,
        sanitizer,
        roofline,
        train_batch,
        sweep,
        memory_vs_steps,
        quality_vs_time,
        precision,
        solver,
        relax_step,
        drive,
        contrast,
        depth,
        batch,
        data_pipeline,
        cold_start,
        scaling,
    )
    return {module.QUESTION.name: module.QUESTION for module in modules}


SUITES = {"cpu": "cpu", "gpu": "cuda"}  # every question that this kind of device is asked


def named(names: Sequence[str]) -> list[Question]:
    """Questions of names and suites.

    Raises:
        ValueError: an unknown name, with those that there are.
    """
    known = questions()
    unknown = [name for name in names if name not in known and name not in SUITES]
    if unknown:
        raise ValueError(f"argument NAME: expected some of {', '.join((*SUITES, *known))}, got {', '.join(unknown)}")
    kinds = {SUITES[name] for name in names if name in SUITES}
    return [q for q in known.values() if q.name in names or kinds & set(q.seconds)]
