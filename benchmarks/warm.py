"""``python -m benchmarks.warm SETTING NAME`` (JSON): compile what a question will launch; Triton keeps it on disk."""

from __future__ import annotations

import sys

from benchmarks.problem import backends_of
from benchmarks.questions import precision, train_batch
from benchmarks.setting import Setting


def names(setting: Setting) -> list[str]:
    """What there is to compile: nothing, where Triton does not run."""
    if "triton" not in backends_of(setting):
        return []
    of_batches = [
        f"train_batch: {case.key}: {name}"
        for case in train_batch.cases(setting)
        for name in train_batch.makers(setting, *train_batch.parts(case.key))
        if name.startswith("ours, triton")
    ]
    return [*of_batches, *(f"precision: {case.key}" for case in precision.cases(setting))]


def compile_one(setting: Setting, name: str) -> None:
    """Run it once."""
    question, key, *rest = name.split(": ")
    if question == "precision":
        next(case for case in precision.cases(setting) if case.key == key).run()
    else:
        train_batch.makers(setting, *train_batch.parts(key))[rest[0]]().work()


if __name__ == "__main__":
    chosen = Setting.parse(sys.argv[1])
    chosen.apply()
    compile_one(chosen, sys.argv[2])
