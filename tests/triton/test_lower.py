"""Lowered plans: how many launches a sweep is. Symbolic: neither kernels nor a GPU are needed."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")  # the package imports its kernels

from ep_kernels import Network
from ep_kernels.architectures import ARCHITECTURES
from ep_kernels.plan import SCHEDULES, Form, Schedule, Winners, compile_plan
from ep_kernels.triton.lower import Launches, Lowered, OutsideLaunch, StepLaunch, lower
from ep_train.models import build_network

STEPS = 6
MODELS = {model: build_network(model, (3, 32, 32), 10) for model in ARCHITECTURES}
CHAINS = {
    **{model: net for model, net in MODELS.items() if all(conn.dst == conn.src + 1 for conn in net.connections)},
    "no pooling": Network.chain((3, 16, 16), [8] * 5, ["none"] * 5, classes=10),
    "average": Network.chain((3, 32, 32), [8] * 5, ["avg", "none", "avg", "avg", "none"], classes=10),
    "local heads": Network.chain((3, 16, 16), [8] * 4, ["max", "none"] * 2, classes=10, local_heads=[1, 3]),
}
NUDGED: list[tuple[Form, Winners]] = [
    ("states", "live"), ("states", "frozen"), ("delta", "frozen"), ("tangent", "frozen")
]  # fmt: skip


def most(network: Network) -> int:
    """One launch per layer and one per pooled connection."""
    return len(network.shapes) - 1 + sum(conn.pool != "none" for conn in network.connections)


def winners_of_the_start(network: Network) -> int:
    """A warm start's live winners are found before its states change, once."""
    return sum(conn.pool == "max" and conn.src != 0 for conn in network.connections)


def given(network: Network, warm: bool) -> frozenset[int]:
    return frozenset(range(1, len(network.shapes))) if warm else frozenset()


def check(lowered: Lowered, bound: int, first: int = 0) -> None:
    """``first``: launches that the first sweep may have besides."""
    for t, launches in enumerate(lowered.sweeps):
        assert len(launches) <= bound + (first if t == 0 else 0)
        assert all(len(step.unpool) <= 1 for step in steps(launches))  # a second one would be a launch of its own
        assert [step.finish for step in steps(launches)][:-1] == [False] * (len(steps(launches)) - 1)
        assert steps(launches)[-1].finish
        assert len({step.node for step in steps(launches)}) == len(steps(launches))


def steps(launches: Launches) -> list[StepLaunch]:
    return [launch for launch in launches if isinstance(launch, StepLaunch)]


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("chain", CHAINS)
def test_free_sweeps(chain: str, schedule: Schedule, warm: bool) -> None:
    network = CHAINS[chain]
    plan = compile_plan(network, schedule, "free", warm=warm, steps=STEPS)
    lowered = lower(network, plan, STEPS, "states", given=given(network, warm), frozen=False, keep=True)
    check(lowered, most(network), winners_of_the_start(network) if warm else 0)


@pytest.mark.parametrize(("form", "winners"), NUDGED)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("chain", CHAINS)
def test_nudged_sweeps(chain: str, schedule: Schedule, form: Form, winners: Winners) -> None:
    network, warm = CHAINS[chain], form == "states"
    plan = compile_plan(network, schedule, "nudged", form=form, winners=winners, warm=warm, steps=STEPS)
    lowered = lower(
        network, plan, STEPS, form, given=given(network, warm), frozen=winners == "frozen", keep=winners == "live"
    )
    extra = winners_of_the_start(network) if winners == "live" else 0
    check(lowered, most(network) + len({head.node for head in network.heads}), extra)


def test_one_launch_for_each_layer_without_pooling() -> None:
    network = CHAINS["no pooling"]
    plan = compile_plan(network, "sweep", "free", steps=STEPS)
    lowered = lower(network, plan, STEPS, "states", frozen=False, keep=False)
    assert all(len(launches) == len(network.shapes) - 1 for launches in lowered.sweeps)


def test_a_linear_feedback_to_a_map_is_a_launch_of_its_own() -> None:
    network = Network.chain((3, 8, 8), [8, 8], ["max"] * 2, classes=10, hidden=[16])
    plan = compile_plan(network, "sweep", "free", steps=STEPS)
    lowered = lower(network, plan, STEPS, "states", frozen=False, keep=False)
    check(lowered, most(network) + 1)
    assert sum(isinstance(launch, OutsideLaunch) for launch in lowered.sweeps[-1]) == 1
