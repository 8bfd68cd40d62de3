"""``ep-train check``: what it compares, its table, its JSON and its plot."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ep_kernels import Network, Parameters, RelaxConfig, ep_gradients, free_phase, targets_for
from ep_train.check import CheckConfig, LayerCheck, check_network, compare, run_check, smallest_cosine, true_gradients
from ep_train.models import initial_parameters
from tests.core.threads import one_thread  # noqa: F401  (autouse)

NET = Network.chain((3, 8, 8), [4, 4], ["max", "none"], classes=5, feedback_gain=0.1)
SMALL = CheckConfig(model="4p-4", size=8, batch_size=4, seeds=3, converge_steps=12, device="cpu")


def parameters(**changes: Any) -> Parameters:
    named = initial_parameters(NET, seed=1, dtype=torch.float64)
    return Parameters.from_named(NET, {**named, **changes})


def test_compare_by_hand() -> None:
    true = parameters()
    weight, bias = true.weights[1], torch.arange(1.0, 5.0, dtype=torch.float64)
    rows = compare(
        parameters(**{"connections.1.weight": -3 * weight, "nodes.1.bias": torch.ones(4, dtype=torch.float64)}),
        parameters(**{"nodes.1.bias": bias}),
    )
    by_name = {row.name: row for row in rows}
    assert list(by_name) == list(Parameters.shapes(NET))
    assert by_name["connections.0.weight"].cosine == pytest.approx(1)
    assert by_name["connections.1.weight"].cosine == pytest.approx(-1)
    assert by_name["connections.1.weight"].relative_norm == pytest.approx(3)
    assert by_name["nodes.1.bias"].cosine == pytest.approx(10 / math.sqrt(30 * 4))
    assert by_name["nodes.2.bias"].cosine == 0  # zero against zero
    assert by_name["nodes.2.bias"].relative_norm == math.inf


def test_smallest_cosine_is_over_the_weights_of_connections() -> None:
    rows = [LayerCheck("nodes.1.bias", -1, 1), LayerCheck("connections.0.weight", 0.7, 1)]
    rows += [LayerCheck("connections.1.weight", 0.9, 1), LayerCheck("heads.0.weight", 0.1, 1)]
    assert smallest_cosine(rows) == 0.7


def test_the_truth_is_near_the_states_it_is_given() -> None:
    """A converged state is its own truth; from a rough one the relaxation goes on until nothing moves."""
    p = parameters()
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = targets_for(NET, torch.tensor([0, 1, 2]), 5, torch.float64)
    config = RelaxConfig(free_steps=60, nudged_steps=60, estimator="tangent")
    ours, equilibrium = ep_gradients(NET, p, x, targets, config)
    exact, residual = true_gradients(NET, p, equilibrium.states, targets, steps=40)
    assert residual < 1e-14
    assert min(row.cosine for row in compare(ours, exact)) > 1 - 1e-10
    rough = free_phase(NET, p, x, RelaxConfig(free_steps=1)).states
    again, residual = true_gradients(NET, p, rough, targets, steps=40)
    assert residual < 1e-14
    assert min(row.cosine for row in compare(again, exact)) > 1 - 1e-10
    _, residual = true_gradients(NET, p, rough, targets, steps=1)
    assert residual > 1e-4


def test_check_network() -> None:
    config = RelaxConfig(free_steps=4, nudged_steps=3)
    once = check_network(NET, config, batch_size=4, seed=0, converge_steps=12)
    assert [row.name for row in once.layers] == list(Parameters.shapes(NET))
    assert once.smallest == smallest_cosine(once.layers) > 0.99
    assert once.true_residual < 1e-8 < once.residual
    assert once == check_network(NET, config, batch_size=4, seed=0, converge_steps=12)
    assert once != check_network(NET, config, batch_size=4, seed=1, converge_steps=12)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    other = check_network(NET, config, batch_size=99, seed=0, converge_steps=12, images=images)
    assert other.smallest > 0.98
    assert other != once
    single = check_network(NET, config, batch_size=4, seed=0, converge_steps=12, precision=torch.float32)
    assert single != once
    assert single.smallest == pytest.approx(once.smallest, abs=1e-3)
    rough = check_network(NET, replace(config, free_steps=1, nudged_steps=1), batch_size=4, seed=0, converge_steps=12)
    assert rough.smallest < once.smallest


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check(replace(SMALL, json=True)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["model"] == "4p-4"
    assert report["config"]["out"] is None
    assert set(report["config"]) == set(SMALL.__dataclass_fields__)
    assert list(report["results"]) == ["k 0.1, sweep 4 + 3", "classical: k 1, sync 60 + 30"]
    ours = report["results"]["k 0.1, sweep 4 + 3"]
    assert set(ours) == {"smallest_cosine", "residual", "true_residual", "layers"}
    assert 0.98 < ours["smallest_cosine"]["min"] <= ours["smallest_cosine"]["median"] <= 1
    assert ours["true_residual"] < 1e-8
    assert list(ours["layers"]) == list(Parameters.shapes(NET))
    for layer in ours["layers"].values():
        assert 0.9 < layer["cosine"] <= 1 + 1e-12
        assert layer["relative_norm"] == pytest.approx(1, abs=0.2)
    classical = report["results"]["classical: k 1, sync 60 + 30"]
    assert classical["smallest_cosine"]["median"] < ours["smallest_cosine"]["median"]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check(replace(SMALL, classical=False, feedback_gain=0.05)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("EP against BPTT to convergence: 4p-4, 8x8x3, batch 4, weight gain 1, float64")
    assert "k 0.05, sweep 4 + 3" in lines[1]
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:9]}
    assert set(rows) == set(Parameters.shapes(NET))
    assert all(0.9 < float(cosine) <= 1 for name, (cosine, _) in rows.items() if name.startswith("connections"))
    smallest = next(line for line in lines if line.startswith("smallest over weights"))
    assert 0.98 < float(smallest.split()[-1]) <= 1
    assert not any("--converge-steps" in line for line in lines)
    run_check(replace(SMALL, seeds=1, converge_steps=1))
    assert "raise --converge-steps" in capsys.readouterr().out


def test_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_check(replace(SMALL, seeds=1, out=tmp_path / "check.png"))
    assert (tmp_path / "check.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "smallest over weights" in capsys.readouterr().out
