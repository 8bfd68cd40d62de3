"""What a run is estimated to cost, against what the reference backend really computes and holds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ep_kernels import Network, Parameters, RelaxConfig, backend
from ep_train.models import Model, build_network
from ep_train.recipes import PEAKS, RECIPES, WORKSPACE, estimate, multiply_adds, write_recipe
from ep_train.step import ep_step, predict

BATCH = 3
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "tangent": {"estimator": "tangent", "free_steps": 2, "nudged_steps": 1},
    "one-sided": {"estimator": "positive"},
    "five phases": {"estimator": "five_phase"},
    "even_odd": {"schedule": "even_odd", "free_steps": 5, "nudged_steps": 4},
    "sync": {"schedule": "sync", "free_steps": 6, "nudged_steps": 5},
    "linear nudge": {"linear_nudge": True},
    "classical": {
        "schedule": "sync", "free_steps": 6, "nudged_steps": 4, "form": "states", "winners": "live", "beta": 0.5,
        "over_relaxation": 1.0,
    },
    "classical even_odd": {
        "schedule": "even_odd", "free_steps": 4, "nudged_steps": 3, "form": "states", "winners": "live", "beta": 0.5,
        "over_relaxation": 1.0,
    },
}  # fmt: skip
NETWORKS = {
    "pooled": lambda: build_network("4p-6-8p", (2, 8, 8), 5),
    "mse, linear layer": lambda: build_network("4-6p-fc7", (2, 8, 8), 5, readout="mse", linear_output=True),
    "local heads": lambda: build_network("4p-6", (2, 8, 8), 5, local_heads=(1, 2)),
    "skips": lambda: build_network("hopfield_resnet13", (3, 16, 16), 5, width=1 / 32),
}


def problem(network: Network) -> tuple[Model, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, *network.shapes[0], generator=generator)
    return Model(network), images, torch.arange(BATCH) % 5


def count(run: Any) -> int:
    """Multiply-adds that ran."""
    with FlopCounterMode(display=False) as counter, backend("reference"):
        run()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("chosen", CONFIGS)
def test_multiply_adds_are_those_that_run(name: str, chosen: str) -> None:
    network, config = NETWORKS[name](), RelaxConfig(**CONFIGS[chosen])
    model, images, labels = problem(network)
    cost = estimate(network, config, BATCH)
    assert cost.multiply_adds == count(lambda: ep_step(model, images, labels, config)) / BATCH
    assert cost.evaluation_multiply_adds == count(lambda: predict(model, images, config)) / BATCH


def test_convolutions_of_a_chain_in_sweeps() -> None:
    """DESIGN.md, fact 6."""
    network = build_network("4p-6-8p", (2, 8, 8), 5)
    cost = estimate(network, RelaxConfig(estimator="tangent", free_steps=2, nudged_steps=1), BATCH)
    assert (cost.convolutions, cost.products) == ((1 + 2 + 2 * 2) + 2, 2 * 2 + 1)
    both = estimate(network, RelaxConfig(free_steps=2, nudged_steps=1), BATCH)
    assert both.convolutions == cost.convolutions + 2


def test_multiply_adds_of_connections() -> None:
    network = build_network("hopfield_resnet13", (3, 32, 32), 10, readout="mse")
    assert multiply_adds(network, 0) == 32 * 32 * 128 * 3 * 9
    assert multiply_adds(network, 1) == 16 * 16 * 128 * 128 * 9
    assert multiply_adds(network, 2) == 16 * 16 * 128 * 3
    assert multiply_adds(network, 12) == 10 * 512 * 2 * 2


@pytest.mark.parametrize("chosen", ["default", "tangent", "classical"])
def test_memory_is_of_the_right_size(chosen: str) -> None:
    """Live bytes of a batch on the CPU, from torch's own record. The reference keeps more than a fused kernel (maps
    before pooling and unpooled ones), so: at least what is computed from shapes, and not several times that."""
    network, config = build_network("32p-32-64p", (3, 32, 32), 10), RelaxConfig(**CONFIGS[chosen])
    model = Model(network)
    images, labels = torch.randn(64, 3, 32, 32), torch.arange(64) % 10
    with backend("reference"):
        ep_step(model, images, labels, config)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            ep_step(model, images, labels, config)
    live = peak = 0
    kineto = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in kineto if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    cost = estimate(network, config, 64)
    outside = ("weights", "gradients", "optimizer", "input", "teacher")  # there before, or not in a step
    computed = sum(size for name, size in cost.memory.items() if name not in outside)
    assert 0.5 * computed < peak < 3 * computed


def test_memory_by_part() -> None:
    network = build_network("8p-8", (3, 16, 16), 10)
    parameters = 8 * 27 + 8 + 8 * 72 + 8 + 10 * 512 + 10
    units = 2 * 8 * 8 * 8
    memory = estimate(network, RelaxConfig(storage=torch.float16), 5, optimizer="sgd", teacher_bytes=7).memory
    assert memory["weights"] == memory["gradients"] == memory["optimizer"] == 4 * parameters
    assert memory["free states"] == 2 * 5 * units
    assert memory["nudged states"] == 2 * 2 * 5 * units
    assert memory["preactivations"] == 4 * 5 * units
    assert memory["winners"] == 5 * 8 * 8 * 8
    assert memory[WORKSPACE] == 2 * 5 * 8 * 16 * 16 * 4
    assert memory["teacher"] == 7
    assert estimate(network, RelaxConfig(), 5, optimizer="adam").memory["optimizer"] == 8 * parameters
    more = estimate(network, RelaxConfig(free_steps=60, nudged_steps=20), 5)
    assert more.peak_bytes == estimate(network, RelaxConfig(), 5).peak_bytes  # flat in T


def test_a_teacher_costs_its_forward_pass() -> None:
    network = build_network("8p-8", (3, 16, 16), 10)
    alone, taught = (estimate(network, RelaxConfig(), 5, teacher_multiply_adds=n) for n in (0, 1000))
    assert taught.multiply_adds == alone.multiply_adds + 1000
    assert alone.seconds(10, 1e6) == 20 * alone.multiply_adds / 1e6
    with pytest.raises(ValueError, match="argument 'optimizer': expected one of adam, adamw, sgd, got 'lion'"):
        estimate(network, RelaxConfig(), 5, optimizer="lion")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_complete_configuration(name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    recipe = write_recipe(name, path)
    values = json.loads(path.read_text())
    assert set(values) == set(type(recipe.config()).__dataclass_fields__)
    assert (values["model"], values["dataset"]) == tuple(name.split("-"))
    assert values["operands"] == "float16"
    parameters = sum(math.prod(shape) for shape in Parameters.shapes(recipe.network()).values())
    assert parameters == recipe.estimate().parameters == 9_220_480 + 513 * recipe.classes
    text = recipe.summary()
    assert "ASSUMING" in text
    assert "40% to 10% of the 989 TFLOP/s" in text
    assert "No device has confirmed it" in text
    with pytest.raises(FileExistsError):
        write_recipe(name, path)


def test_what_a_recipe_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one of vgg11-cifar10, vgg11-cifar100, got 'vgg12'"):
        write_recipe("vgg12", tmp_path / "x.json")
    recipe = RECIPES["vgg11-cifar10"]
    with pytest.raises(ValueError, match=f"argument 'gpu': expected one of {', '.join(PEAKS)}, got 'H1'"):
        recipe.summary(gpu="H1")
    with pytest.raises(ValueError, match="argument 'efficiency': expected a number"):
        recipe.summary(efficiency=1.5)
