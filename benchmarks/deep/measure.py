"""One run: train, then look at the gradient that reaches each layer, before and after."""

from __future__ import annotations

import json
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.deep.tables import Run, Values
from benchmarks.machine import cpu_name, revision
from ep_kernels import Parameters, RelaxConfig, free_phase, nudged_gradients
from ep_train.check import compare, true_gradients
from ep_train.config import TrainConfig
from ep_train.feedforward import backprop_gradients
from ep_train.learners import NetworkLearner
from ep_train.run_folder import read_metrics, to_json
from ep_train.trainer import Trainer, new_folder

PROBE = {"classical": 16, "cifar": 8}  # training images for the look at the gradient; else 50, a batch
# Sweeps to the equilibrium of the true gradient, and again as many through which BPTT goes; else 60. k 0.02 needs few.
CONVERGE = {"cifar": 20}
RESULT = "result.json"


def run(chosen: Run, folder: Path) -> None:
    """Train in ``folder`` and write its result.json, atomically: what is there is finished."""
    names = {field.name for field in fields(TrainConfig)}
    unknown = set(chosen.values) - names
    if unknown:
        raise ValueError(f"run: no options of ep-train: {', '.join(sorted(unknown))}")
    config = TrainConfig(**chosen.values, out=folder / "run", overwrite=True, quiet=True)
    trainer = Trainer(config)
    look = partial(probe, trainer, PROBE.get(chosen.table, 50), CONVERGE.get(chosen.table, 60))
    before = look()
    made = new_folder(config)
    summary = trainer.run(made)
    if summary["status"] != "finished":  # a signal ended it
        raise SystemExit(f"{chosen.name}: {summary['status']}")
    result = {
        "table": chosen.table,
        "row": chosen.row,
        "column": chosen.column,
        "seed": chosen.seed,
        "values": without_places(chosen.values),
        "summary": summary,
        "epochs": read_metrics(made.path),
        "gradient": {"before": before, "after": look(), "images": PROBE.get(chosen.table, 50)},
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads()},
        "revision": revision(),
    }
    text = json.dumps(to_json(result), allow_nan=False)
    part = folder / f"{RESULT}.part"
    part.write_text(text)
    part.rename(folder / RESULT)


def without_places(values: Values) -> dict[str, Any]:
    """A configuration without the folders of the teacher and of the images."""
    places = {"teacher": "TEACHER"} if values.get("teacher") else {}
    if str(values.get("dataset", "")).startswith("folder:"):
        places["dataset"] = "folder:PATH"
    return {**values, **places}


def probe(trainer: Trainer, count: int, steps: int) -> dict[str, Any]:
    """Norm of the gradient of every connection on ``count`` images, and its cosine to the true one of the same loss.

    The true gradient is BPTT through ``steps`` sweeps, after as many more from the free phase's own end (of backprop,
    that of backprop itself).
    """
    learner, config = trainer.learner, trainer.config
    assert isinstance(learner, NetworkLearner)
    network, model = learner.network, learner.model
    parameters = model.tensors()
    images, labels, indices = next(trainer.train.indexed(0))
    images, labels, indices = images[:count], labels[:count], indices[:count]
    targets = learner.loss.targets(images, labels, indices)
    if config.method == "backprop":
        found, _, _ = backprop_gradients(network, parameters, images, targets)
        return {"norms": norms(found)}
    relax = config.relax_config()
    equilibrium = free_phase(network, parameters, images, relax, keep=True)
    found, _ = nudged_gradients(network, parameters, equilibrium, targets, relax)
    exact = Parameters.from_named(network, {name: t.double() for name, t in parameters.named().items()})
    states = [t.double() for t in equilibrium.states]
    true, settled = true_gradients(
        network, exact, states, [t.double() for t in targets], steps=steps, schedule=schedule_of(relax)
    )
    cosines = {row.name: row.cosine for row in compare(found, true) if row.name.startswith("connections")}
    return {
        "norms": norms(found),
        "true_norms": norms(true),
        "cosines": cosines,
        "residual": float(equilibrium.residual.mean()),
        "true_residual": settled,
    }


def schedule_of(relax: RelaxConfig) -> Any:
    """That of the run, but for gain 1 in sync, which may oscillate: the same equilibrium is reached in turn."""
    return "even_odd" if relax.schedule == "sync" else relax.schedule


def norms(gradients: Parameters) -> list[float]:
    """Per connection, bottom to top."""
    return [float(w.norm()) for w in gradients.weights]
