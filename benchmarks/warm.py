"""``python -m benchmarks.warm SETTING NAME`` (JSON): compile what a question will launch; Triton keeps it on disk."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.case import Unavailable, Wrong
from benchmarks.layers import Op, layers_of, makers, precisions_of
from benchmarks.problem import PRECISIONS, backends_of
from benchmarks.questions import contrast, drive, precision, relax_step, train_batch
from benchmarks.setting import Setting

OPS = {op.name: op for op in (drive.OP, relax_step.OP, contrast.OP)}


def names(setting: Setting, asked: Sequence[str]) -> list[str]:
    """What there is to compile for these questions: nothing, where Triton does not run. A name is a process."""
    if "triton" not in backends_of(setting):
        return []
    found: list[str] = []
    if "train_batch" in asked:
        pairs = dict.fromkeys(train_batch.parts(case.key) for case in train_batch.cases(setting))
        found += [
            f"train_batch: {model}, batch {batch}: {name}"
            for model, batch in pairs
            for name in train_batch.makers(setting, model, batch)
            if name.startswith("ours, triton")
        ]
    if "precision" in asked:
        found += [
            f"precision: {subject.name}: {name}"
            for subject in precision.subjects(setting)
            for name, on in precision.variants(setting)
            if on == "triton"
        ]
    for op in OPS.values():
        if op.name in asked:
            networks = dict.fromkeys(f"{layer.model}, batch {layer.batch}" for layer in layers_of(setting))
            found += [f"{op.name}: {of}: {q.name}" for of in networks for q in precisions_of(op, setting)]
    return found


def compile_one(setting: Setting, name: str) -> None:
    """Run it once; nothing is checked, so no truth is computed."""
    question, key, what = name.split(": ")
    if question in OPS:
        run_layers(OPS[question], setting, key, what)
    elif question == "precision":
        (subject,) = (s for s in precision.subjects(setting) if s.name == key)
        precision.estimate(setting, subject, what, "triton")
    else:
        train_batch.makers(setting, *train_batch.parts(key))[what]().work()


def run_layers(op: Op, setting: Setting, of: str, what: str) -> None:
    """Every layer of a network in one precision, as its question makes it (and checks it: a layer's truth is short)."""
    wanted = {f"{who}, triton, {PRECISIONS[what].name}" for who in ("ours", "our launches")}
    for layer in layers_of(setting):
        if f"{layer.model}, batch {layer.batch}" != of:
            continue
        for name, make in makers(op, layer).items():
            if name in wanted:
                try:
                    make()
                except (Unavailable, Wrong) as why:  # the question will say so, too
                    print(f"{layer.key}: {name}: {why}")
        op.forget()


if __name__ == "__main__":
    chosen = Setting.parse(sys.argv[1])
    chosen.apply()
    compile_one(chosen, sys.argv[2])
