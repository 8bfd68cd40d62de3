"""What RelaxConfig, Network, Head, Connection, Parameters and the solver refuse, and how they say it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch

import ep_kernels
from ep_kernels import Connection, Head, Network, Parameters, RelaxConfig, contrasts, free_phase, nudged_phase
from tests.core.nets import NETWORKS, problem

NAN, INF = float("nan"), float("inf")
NET = NETWORKS["max"]


@pytest.mark.parametrize(
    ("change", "expected", "got"),
    [
        ({"schedule": "random"}, "one of sync, even_odd, sweep", "'random'"),
        (
            {"estimator": "random_sign"},
            "one of symmetric, positive, negative, tangent, five_phase, contrastive, coupled",
            "'random_sign'",
        ),
        ({"form": "tangent"}, "one of states, delta", "'tangent'"),
        ({"winners": "thawed"}, "one of live, frozen", "'thawed'"),
        ({"operands": torch.float64}, "one of None, tf32, torch.float16, torch.bfloat16", "torch.float64"),
        ({"operands": "float16"}, "one of None, tf32, torch.float16, torch.bfloat16", "'float16'"),
        ({"storage": torch.bfloat16}, "one of None, torch.float16", "torch.bfloat16"),
        ({"storage": "float16"}, "one of None, torch.float16", "'float16'"),
        ({"free_steps": 0}, "an integer >= 1", "0"),
        ({"free_steps": 2.5}, "an integer >= 1", "2.5"),
        ({"nudged_steps": -1}, "an integer >= 1", "-1"),
        ({"nudged_steps": 1.0}, "an integer >= 1", "1.0"),
        ({"beta": 0.0}, "a finite number > 0", "0.0"),
        ({"beta": -0.1}, "a finite number > 0", "-0.1"),
        ({"beta": NAN}, "a finite number > 0", "nan"),
        ({"damping": 0.0}, "a number in (0, 1]", "0.0"),
        ({"damping": 1.1}, "a number in (0, 1]", "1.1"),
        ({"damping": NAN}, "a number in (0, 1]", "nan"),
        ({"over_relaxation": 0.9}, "a number in [1, 2)", "0.9"),
        ({"over_relaxation": 2.0}, "a number in [1, 2)", "2.0"),
        ({"over_relaxation": NAN}, "a number in [1, 2)", "nan"),
        ({"tol": -1e-3}, "a finite number >= 0", "-0.001"),
        ({"tol": INF}, "a finite number >= 0", "inf"),
        ({"tol": 10**400}, "a finite number >= 0", str(10**400)),
        ({"beta": "0.1"}, "a finite number > 0", "'0.1'"),
        ({"beta": True}, "a finite number > 0", "True"),
        ({"free_steps": True}, "an integer >= 1", "True"),
        ({"linear_nudge": 1}, "one of True, False", "1"),
        ({"on_fail": "stop"}, "one of raise, warn, ignore", "'stop'"),
        ({"start": "random"}, "one of zero, feedforward", "'random'"),
        ({"early_operands": "bf16"}, "one of None, tf32, torch.float16, torch.bfloat16", "'bf16'"),
        ({"early_steps": -1}, "an integer >= 0", "-1"),
        ({"early_steps": 2}, "early_operands and early_steps > 0 together", "None and 2"),
        (
            {"on_fail": "raise"},
            "a tol > 0 with 'raise' (with tol 0 convergence is not tested)",
            "tol 0.0",
        ),
    ],
)
def test_relax_config(change: dict[str, Any], expected: str, got: str) -> None:
    (name,) = change
    message = f"RelaxConfig: argument '{name}': expected {expected}, got {got}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RelaxConfig(**change)


@pytest.mark.parametrize("change", [{"form": "delta"}, {"form": "states", "estimator": "tangent"}])
def test_deltas_need_frozen_winners(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"argument 'winners': expected 'frozen' with .*, got 'live'"):
        RelaxConfig(winners="live", **change)
    assert RelaxConfig(winners="live", form="states").nudge_form == "states"


def test_numbers_of_other_libraries() -> None:
    numpy = pytest.importorskip("numpy")
    config = RelaxConfig(free_steps=numpy.int64(3), beta=numpy.float32(0.5), tol=numpy.float64(0.25))
    assert config == RelaxConfig(free_steps=3, beta=0.5, tol=0.25)
    assert [type(v) for v in (config.free_steps, config.beta, config.tol)] == [int, float, float]


def test_defaults_and_classical_settings() -> None:
    default = RelaxConfig()
    assert (default.schedule, default.form, default.winners) == ("sweep", "delta", "frozen")
    assert (default.estimator, default.nudge_form) == ("symmetric", "delta")
    assert replace(default, estimator="tangent").nudge_form == "tangent"
    classical = RelaxConfig.classical(beta=0.3)
    assert (classical.schedule, classical.form, classical.winners) == ("sync", "states", "live")
    assert (classical.free_steps, classical.nudged_steps, classical.beta) == (250, 30, 0.3)
    with pytest.raises(FrozenInstanceError):
        default.beta = 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Connection(1, 1), "Connection: argument 'src, dst': expected 0 <= src < dst, got 1, 1"),
        (lambda: Connection(-1, 1), "argument 'src, dst': expected 0 <= src < dst, got -1, 1"),
        (lambda: Connection(0, 1, pool="mean"), "argument 'pool': expected one of none, max, avg, got 'mean'"),
        (lambda: Connection(0, 1, None, pool="max"), "argument 'pool': expected 'none' for a linear connection"),
        (lambda: Connection(0, 1, (0, 3)), "argument 'kernel_size': expected two integers >= 1, got (0, 3)"),
        (lambda: Connection(0, 1, (3,)), "argument 'kernel_size': expected two integers >= 1, got (3,)"),
        (lambda: Connection(0, 1, stride=(1, 0)), "argument 'stride': expected two integers >= 1, got (1, 0)"),
        (lambda: Connection(0, 1, padding=(-1, 1)), "argument 'padding': expected two integers >= 0, got (-1, 1)"),
        (lambda: Connection(0, 1, padding=(0.5, 1)), "argument 'padding': expected two integers >= 0, got (0.5, 1)"),
        (
            lambda: Head(1, 3, loss="hinge"),
            "Head: argument 'loss': expected one of cross_entropy, mse, cosine, got 'hinge'",
        ),
        (lambda: Head(1, 0), "Head: argument 'outputs': expected None or > 0, got 0"),
        (lambda: Head(1, 3, pool=0), "Head: argument 'pool': expected None or > 0, got 0"),
        (lambda: Head(1, 3, weight=NAN), "Head: argument 'weight': expected a finite number, got nan"),
        (lambda: Head(1, 3, temperature=0.0), "Head: argument 'temperature': expected a finite number > 0, got 0.0"),
        (lambda: Head(1, 3, tied="0"), "Head: argument 'tied': expected None or the index of a head, got '0'"),
        (lambda: replace(NET, linear_nodes=3), "Network: argument 'linear_nodes': expected a tuple, got 3"),
        (lambda: Head(1, None, pointwise=True), "Head: argument 'outputs': expected a number of channels (pointwise)"),
        (
            lambda: replace(NET, shapes=NET.shapes[:1]),
            "Network: argument 'shapes': expected the input and at least one",
        ),
        (lambda: replace(NET, shapes=((2, 8), *NET.shapes[1:])), "argument 'shapes[0]': expected (C, H, W) or (F,) of"),
        (lambda: replace(NET, feedback_gain=0.0), "argument 'feedback_gain': expected a number in (0, 1], got 0.0"),
        (lambda: replace(NET, feedback_gain=1.5), "argument 'feedback_gain': expected a number in (0, 1], got 1.5"),
        (lambda: replace(NET, feedback_gain=NAN), "argument 'feedback_gain': expected a number in (0, 1], got nan"),
        (lambda: replace(NET, slope=0.0), "argument 'slope': expected a finite number > 0, got 0.0"),
        (lambda: replace(NET, lo=1.0), "argument 'lo, hi': expected finite, lo < hi, got 1.0, 1.0"),
        (
            lambda: replace(NET, connections=(*NET.connections, Connection(3, 9))),
            "argument 'connections[4].dst': expected a node index, got 9",
        ),
        (
            lambda: replace(NET, connections=NET.connections[:-1]),
            "argument 'connections': expected one into every node; node 4 has, got none",
        ),
        (
            lambda: replace(NET, shapes=(*NET.shapes[:-1], (4, 5, 2))),
            "argument 'shapes[4]': expected a 2x2 map (connection 3), got (4, 5, 2)",
        ),
        (
            lambda: Network(((2, 4, 4), (3,)), (Connection(0, 1),), Head(1, 2)),
            "argument 'connections[0]': expected (C, H, W) nodes at both ends of a convolution, got (2, 4, 4), (3,)",
        ),
        (
            lambda: Network(((2, 4, 4), (3, 4, 4)), (Connection(0, 1, None),), Head(1, 2)),
            "argument 'connections[0]': expected a vector node as dst of a linear one, got (3, 4, 4)",
        ),
        (lambda: replace(NET, readout=Head(5, 3)), "argument 'heads[0].node': expected 1 to 4, got 5"),
        (lambda: replace(NET, readout=Head(0, 3)), "argument 'heads[0].node': expected 1 to 4, got 0"),
        (
            lambda: replace(NETWORKS["skips, max"], local_heads=(Head(5, 3, pool=1),)),
            "argument 'heads[1]': expected no pool and no pointwise map on a vector node, got Head(node=5",
        ),
        (
            lambda: Network.chain((1, 4, 4), [], [], classes=2),
            "Network.chain: argument 'channels': expected at least one width, got []",
        ),
        (
            lambda: Network.chain((64,), [2], ["none"], classes=2),  # type: ignore[arg-type]
            "Network.chain: argument 'input_shape': expected (channels, height, width), each at least 1 (",
        ),
        (
            lambda: Network.chain(64, [2], ["none"], classes=2),  # type: ignore[arg-type]
            "(vectors are (n, 1, 1)), got 64",
        ),
        (
            lambda: Network.chain((1, 4, 4), [2, 2], ["max"], classes=2),
            "Network.chain: argument 'pools': expected 2 entries, one per width, got 1",
        ),
        (
            lambda: Network.chain((1, 4, 4), [2, 2], ["max"] * 2, padding=[1], classes=2),
            "Network.chain: argument 'padding': expected one number or 2 of them, got 1",
        ),
        (
            lambda: Network.chain((1, 4, 4), [2] * 3, ["max"] * 3, classes=2),
            "expected a map of at least 1x1 at node 3, got 0x0 (from an input of 4x4)",
        ),
        (
            lambda: Network.chain((1, 4, 4), [2], ["max"], classes=2, readout="svm"),
            "argument 'readout': expected 'softmax' or 'mse', got 'svm'",
        ),
        (
            lambda: Network.chain((1, 4, 4), [2], ["max"], classes=2, local_heads=[2]),
            "argument 'local_heads': expected nodes from 1 to 1, got 2",
        ),
    ],
)
def test_networks(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=r"^(Connection|Head|Network(\.chain)?): argument '") as caught:
        make()
    assert message in str(caught.value)


def test_shapes_of_a_chain() -> None:
    net = NETWORKS["slope 1/2, local heads"]
    assert net.shapes == ((2, 8, 8), (3, 4, 4), (4, 4, 4), (4, 2, 2), (5,))
    assert Parameters.shapes(net) == {
        "connections.0.weight": (3, 2, 3, 3),
        "connections.1.weight": (4, 3, 3, 3),
        "connections.2.weight": (4, 4, 3, 3),
        "connections.3.weight": (5, 16),
        "nodes.1.bias": (3,),
        "nodes.2.bias": (4,),
        "nodes.3.bias": (4,),
        "nodes.4.bias": (5,),
        "heads.0.weight": (3, 5),
        "heads.0.bias": (3,),
        "heads.1.weight": (3, 12),
        "heads.1.bias": (3,),
        "heads.2.weight": (3, 16),
        "heads.2.bias": (3,),
    }
    top = NETWORKS["no pooling, mse"]
    assert top.shapes[-2:] == ((6,), (3,))
    assert top.readout == Head(4, None, loss="mse")
    assert not any(name.startswith("heads") for name in Parameters.shapes(top))


def test_parameters_by_name() -> None:
    p = problem(NET)
    named = p.parameters.named()
    again = Parameters.from_named(NET, named)
    assert list(again.named()) == list(named) == list(Parameters.shapes(NET))
    assert all(again.named()[name] is tensor for name, tensor in named.items())
    assert again.biases[0] is None
    with pytest.raises(ValueError, match=r"Parameters: expected a tensor 'nodes\.2\.bias' of shape \[4\], got none"):
        Parameters.from_named(NET, {n: t for n, t in named.items() if n != "nodes.2.bias"})
    wrong = {**named, "connections.1.weight": torch.zeros(4, 3, 3, 2)}
    with pytest.raises(
        ValueError, match=r"'connections\.1\.weight': expected shape \[4, 3, 3, 3\], got \[4, 3, 3, 2\]"
    ):
        Parameters.from_named(NET, wrong)


def test_arguments_of_the_phases() -> None:
    p = problem(NET)
    found = free_phase(NET, p.parameters, p.x, keep=True)
    bare = free_phase(NET, p.parameters, p.x)
    states = found.states
    half = Parameters.from_named(NET, {n: t.float() for n, t in p.parameters.named().items()})

    def free(**options: Any) -> Callable[[], object]:
        arguments = {"parameters": p.parameters, "x": p.x} | options
        return lambda: free_phase(NET, **arguments)

    def nudged(**options: Any) -> Callable[[], object]:
        arguments = {"equilibrium": found, "targets": p.targets} | options
        return lambda: nudged_phase(NET, p.parameters, **arguments)

    table: list[tuple[Callable[[], object], str]] = [
        (free(x=p.x[:, :1]), "free_phase: argument 'x': expected shape [B, 2, 8, 8], got [3, 1, 8, 8]"),
        (free(x=p.x[0]), "free_phase: argument 'x': expected shape [B, 2, 8, 8], got [2, 8, 8]"),
        (free(x=p.x.long()), "free_phase: argument 'x': expected a floating-point dtype, got torch.int64"),
        (
            free(parameters=half),
            "argument 'parameters: connections.0.weight': expected torch.float64 on cpu (as 'x'), got torch.float32",
        ),
        (free(states=states[:-1]), "argument 'states': expected 5 entries, got 4"),
        (free(states=[p.x, None, *states[2:]]), "argument 'states[1]': expected shape [3, 3, 8, 8], got None"),
        (
            free(states=[p.x, *states[1:4], states[4][:2]]),
            "argument 'states[4]': expected shape [3, 4, 2, 2], got [2, 4, 2, 2]",
        ),
        (nudged(equilibrium=bare), "argument 'equilibrium': expected one found with keep=True, got one without"),
        (nudged(targets=[]), "argument 'targets': expected 1 (one per head), got 0"),
        (nudged(targets=[p.targets[0][:, :2]]), "argument 'targets[0]': expected shape [3, 3], got [3, 2]"),
        (nudged(extra={2: p.x}), "argument 'extra[2]': expected shape [3, 4, 4, 4], got [3, 2, 8, 8]"),
        (nudged(extra={9: p.x}), "argument 'extra': expected nodes 1 to 4, got 9"),
    ]
    for call, message in table:
        with pytest.raises(ValueError, match=r"(free|nudged)_phase: ") as caught:
            call()
        assert message in str(caught.value)


def test_weights_of_a_tied_head_are_those_that_it_is_tied_to() -> None:
    net = replace(NET, local_heads=(Head(4, 3, weight=0.5, temperature=2.0, tied=0),))
    p = problem(net)
    assert p.parameters.head_weights[0] is p.parameters.head_weights[1]
    weight, bias = p.parameters.head_weights[0], p.parameters.head_biases[0]
    assert weight is not None
    for group, tensors in (
        ("head_weights", [weight, None]),
        ("head_weights", [weight, weight.clone()]),
        ("head_biases", [bias, None]),
    ):
        message = f"free_phase: argument 'parameters': expected {group}[1] to be the very tensor {group}[0]"
        with pytest.raises(ValueError, match=rf"^{re.escape(message)}.*Parameters\.from_named"):
            free_phase(net, replace(p.parameters, **{group: tensors}), p.x)


def test_contrasted_states_of_the_clamped_input() -> None:
    p = problem(NET)
    found = free_phase(NET, p.parameters, p.x, keep=True)
    nudged = nudged_phase(NET, p.parameters, found, p.targets)
    for node in (0, 5):
        with pytest.raises(ValueError, match=f"contrasted_states: argument 'node': expected 1 to 4, got {node}"):
            contrasts.contrasted_states(found, nudged, node)


def test_targets_for_every_head() -> None:
    net = NETWORKS["slope 1/2, local heads"]
    targets = ep_kernels.targets_for(net, torch.tensor([2, 0]), 3, torch.float64)
    assert len(targets) == 3
    assert all(t.tolist() == [[0, 0, 1], [1, 0, 0]] and t.dtype == torch.float64 for t in targets)
