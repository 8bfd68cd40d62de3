"""Repetition, streams, CUDA graphs, devices and training: what kept buffers and captured launches could get wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ep_kernels
from ep_kernels import (
    Equilibrium,
    Network,
    Parameters,
    RelaxConfig,
    _library,
    backend,
    backends,
    cli,
    ep_gradients,
    free_phase,
    races,
)
from tests.core.nets import NETWORKS
from tests.gpu.device import (
    DEVICE,
    INTERPRETED,
    PRECISIONS,
    Problem,
    assert_close,
    assert_equal,
    on_device,
    random_problem,
)

CONFIG = RelaxConfig(free_steps=3, nudged_steps=2)
ROOT = Path(__file__).parents[2]
WGMMA = "small or precisions or widths or batches or channels"  # tests that run again with wgmma
KINDS = ("max", "skips, max", "slope 1/2, local heads")


def gradients(p: Problem, on: str, config: RelaxConfig = CONFIG) -> list[torch.Tensor]:
    found, equilibrium = ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend=on)
    return [*found.named().values(), *equilibrium.states[1:], equilibrium.residual]


def expected(p: Problem, config: RelaxConfig = CONFIG) -> list[torch.Tensor]:
    plain = replace(config, operands=None, storage=None)
    found, equilibrium = ep_gradients(p.network, p.parameters, p.x, p.targets, plain, backend="reference")
    return [*found.named().values(), *equilibrium.states[1:], equilibrium.residual]


def test_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: torch.device, on: str) -> None:
    """Where nothing was measured: triton from 9.0 on, cuda before; the other one where only that can run."""
    monkeypatch.setenv("EP_KERNELS_CACHE", str(tmp_path))
    races.forget()
    order = ("triton", "cuda") if torch.cuda.get_device_capability(cuda) >= (9, 0) else ("cuda", "triton")
    able = [name for name in order if backends.why_not(name, cuda) is None]
    assert backends.choose(cuda) == (able[0] if able else "reference")
    races.forget()


def test_auto_follows_a_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: torch.device) -> None:
    """``ep-kernels tune --races-only``, then a batch of the same shape."""
    if any(backends.why_not(name, cuda) is not None for name in backends.ON_GPU):
        pytest.skip("needs both backends")
    monkeypatch.setenv("EP_KERNELS_CACHE", str(tmp_path))
    races.forget()
    options = ["--network", "16p-32", "--input", "3", "8", "8", "--batch", "4", "--precision", "float16"]
    assert cli.main(["tune", "--races-only", *options]) == 0
    (file,) = tmp_path.iterdir()
    held = json.loads(file.read_text())["races"]
    assert len(held) == 3
    assert all(min(e["microseconds"], key=e["microseconds"].get) == e["winner"] for e in held.values())
    p = on_device(random_problem(cli.network_of("16p-32", [3, 8, 8]), batch=4))
    with backends.recorded() as jobs:
        ep_gradients(p.network, p.parameters, p.x, p.targets, RelaxConfig(operands=torch.float16))
    assert {races.key_of(job) for job in jobs} == set(held)
    for job in jobs:
        key = races.key_of(job)
        assert backends.choose(cuda, race=lambda key=key: key) == held[key]["winner"]  # type: ignore[misc]
    races.forget()


@pytest.mark.parametrize("name", KINDS)
def test_repeats_are_equal_bit_for_bit(name: str, on: str) -> None:
    """The first call launches, the second captures, the third replays."""
    here = on_device(random_problem(NETWORKS[name]))
    first = gradients(here, on)
    for _ in range(1 if INTERPRETED else 6):
        assert_equal(gradients(here, on), first)


def test_results_are_not_overwritten_by_later_calls(on: str) -> None:
    network = NETWORKS["max"]
    problems = [on_device(random_problem(network, seed)) for seed in range(2 if INTERPRETED else 4)]
    found = [gradients(p, on) for p in problems]
    copies = [[t.clone() for t in tensors] for tensors in found]
    for p in reversed(problems):
        gradients(p, on)
    for tensors, before in zip(found, copies, strict=True):
        assert_equal(tensors, before)
    for seed, tensors in enumerate(found):
        assert_close(tensors, expected(on_device(random_problem(network, seed), torch.float64)), 1e-3)


def test_inputs_are_not_written(on: str) -> None:
    here = on_device(random_problem(NETWORKS["max"]))
    tensors = [here.x, *here.targets, *here.parameters.named().values()]
    before = [t.clone() for t in tensors]
    gradients(here, on)
    gradients(here, on)
    assert_equal(tensors, before)


def test_weights_changed_in_place_are_seen(on: str) -> None:
    """As an optimizer changes them, between two calls of the same signature."""
    p = random_problem(NETWORKS["max"])
    here = on_device(p)
    for step in range(3):
        for tensor, exact in zip(here.parameters.named().values(), p.parameters.named().values(), strict=True):
            tensor.mul_(0.9)
            exact.mul_(0.9)
        assert_close(gradients(here, on), expected(on_device(p, torch.float64)), 1e-3, f"step {step}, output")


def test_alternating_batch_sizes(on: str) -> None:
    problems = [random_problem(NETWORKS["max"], seed, batch) for seed, batch in enumerate((3, 1, 3, 2))]
    for p in problems if INTERPRETED else problems * 3:
        assert_close(gradients(on_device(p), on), expected(on_device(p, torch.float64)), 1e-3)


def test_more_signatures_than_are_kept(on: str) -> None:
    if INTERPRETED:
        pytest.skip("takes minutes in the interpreter")
    network = NETWORKS["max"]
    for _ in range(2):
        for batch in range(1, 22):
            p = random_problem(network, batch, batch)
            config = RelaxConfig(free_steps=2)
            found = free_phase(network, on_device(p).parameters, on_device(p).x, config, backend=on)
            true = free_phase(network, p.parameters, p.x, config, backend="reference")
            assert_close(found.states, true.states, 1e-5)


def test_on_another_stream(cuda: torch.device, on: str) -> None:
    """Work is queued on the current stream: behind what fills its input, before what reads its results."""
    p = random_problem(NETWORKS["max"])
    true = expected(on_device(p, torch.float64))
    here = on_device(p)
    gradients(here, on)
    torch.cuda.synchronize()
    for _ in range(5):
        stream = torch.cuda.Stream()
        x = torch.full_like(here.x, float("nan"))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            x.copy_(here.x)
            found = [t.clone() for t in gradients(replace(here, x=x), on)]
        stream.synchronize()
        assert_close(found, true, 1e-3)


def test_two_streams(cuda: torch.device, on: str) -> None:
    """The same signature on two streams at once: they share a program."""
    network = NETWORKS["max"]
    problems = [on_device(random_problem(network, seed)) for seed in range(2)]
    true = [gradients(p, on) for p in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    found: list[list[list[torch.Tensor]]] = [[], []]
    for _ in range(10):
        for i, (stream, p) in enumerate(zip(streams, problems, strict=True)):
            with torch.cuda.stream(stream):
                found[i].append(gradients(p, on))
    torch.cuda.synchronize()
    for results, same in zip(found, true, strict=True):
        for tensors in results:
            assert_equal(tensors, same)


@pytest.mark.parametrize("name", KINDS)
def test_inside_a_graph_of_the_user(name: str, cuda: torch.device, on: str) -> None:
    """Captured once, replayed with other numbers in the same memory."""
    network = NETWORKS[name]
    first, second = (on_device(random_problem(network, seed)) for seed in (0, 1))
    static = on_device(random_problem(network, 0))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(static, on)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(static, on)
    for p in (second, first, second):
        static.x.copy_(p.x)
        for tensor, target in zip(static.targets, p.targets, strict=True):
            tensor.copy_(target)
        for tensor, parameter in zip(static.parameters.named().values(), p.parameters.named().values(), strict=True):
            tensor.copy_(parameter)
        graph.replay()
        torch.cuda.synchronize()
        assert_close(found, gradients(p, on), 1e-6)


def test_second_device(cuda: torch.device, on: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    p = random_problem(NETWORKS["max"])
    here, there = on_device(p, device="cuda:0"), on_device(p, device="cuda:1")
    for _ in range(3):  # launched one by one, captured, replayed
        first, second = gradients(here, on), gradients(there, on)
        assert all(t.device == torch.device("cuda:1") for t in second)
        assert_close(second, first, 1e-5)


def test_float64_is_left_to_the_reference(on: str) -> None:
    exact = on_device(random_problem(NETWORKS["max"]), torch.float64)
    assert_equal(gradients(exact, on), expected(exact))


def test_large_maps_past_32_bits(cuda: torch.device, on: str) -> None:
    """Element offsets beyond 2^31: the last samples are as right as the first."""
    network = Network.chain((3, 64, 64), [64, 64], ["none", "none"], classes=2, feedback_gain=0.1)
    batch = 8256  # 8256 x 64 x 64 x 64 elements
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free memory")
    p = random_problem(network, batch=2)
    here = on_device(p)
    x = here.x.repeat(batch // 2, 1, 1, 1)
    config = RelaxConfig(free_steps=1, operands=torch.float16, storage=torch.float16)
    found = free_phase(network, here.parameters, x, config, backend=on)
    first = free_phase(network, here.parameters, here.x, config, backend=on)
    for a, b in zip(found.states[1:], first.states[1:], strict=True):
        assert_equal([a[-2:], a[:2]], [b, b])


def test_free_phases_alone_inside_a_graph_of_the_user(on: str, cuda: torch.device) -> None:
    """Evaluation: no nudged phase, no contrast."""
    here, other = (on_device(random_problem(NETWORKS["max"], seed)) for seed in (0, 1))
    x = here.x.clone()

    def states() -> list[torch.Tensor]:
        return free_phase(here.network, here.parameters, x, CONFIG, backend=on).states[1:]

    states()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = states()
    x.copy_(other.x)
    graph.replay()
    torch.cuda.synchronize()
    assert_close(found, states(), 1e-6, "state")


def test_memory_does_not_grow(on: str, cuda: torch.device) -> None:
    """Of repeated calls of two signatures, once their programs exist."""
    problems = [on_device(random_problem(NETWORKS["max"], batch=batch)) for batch in (3, 5)]
    held = []
    for _ in range(8):
        for p in problems:
            gradients(p, on)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert len(set(held[3:])) == 1, held


def test_cuda_with_wgmma(cuda: torch.device) -> None:
    """The main loop with wgmma, in a process of its own: relaxations that are kept keep their main loop."""
    if backends.why_not("cuda", cuda) is not None:
        pytest.skip(f"cuda: {backends.why_not('cuda', cuda)}")
    if torch.cuda.get_device_capability(cuda) != (9, 0) or not any(
        arch.startswith("9.0a") for arch in _library.build_info().get("cuda_archs", ())
    ):
        pytest.skip("needs compute capability 9.0 and a build with 9.0a")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
        "-k",
        f"wgmma_is_used or cuda and ({WGMMA})",
    ]
    files = ["tests/gpu/test_ops.py", "tests/gpu/test_relaxation.py"]
    environment = {**os.environ, "EP_KERNELS_WGMMA": "1"}
    done = subprocess.run([*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_adam_lowers_the_loss(precision: str, on: str) -> None:
    """A few steps of training on one batch, with what the user would write."""
    network = Network.chain((3, 8, 8), (16, 16), ["max", "max"], classes=4, feedback_gain=0.1)
    p = on_device(random_problem(network, batch=8))
    named = {name: t.clone().requires_grad_() for name, t in p.parameters.named().items()}
    optimizer = torch.optim.Adam(named.values(), lr=0.01)
    config = PRECISIONS[precision].config(free_steps=2, nudged_steps=1, estimator="tangent")
    losses = []
    with backend(on):
        for _ in range(4 if INTERPRETED else 20):
            parameters = Parameters.from_named(network, {name: t.detach() for name, t in named.items()})
            found, equilibrium = ep_gradients(network, parameters, p.x, p.targets, config)
            losses.append(loss_of(network, parameters, equilibrium, p.targets[0]))
            for name, gradient in found.named().items():
                named[name].grad = gradient
            optimizer.step()
    assert losses[-1] < 0.97 * losses[0] if INTERPRETED else losses[-1] < 0.8 * losses[0], losses
    assert torch.isfinite(torch.tensor(losses)).all()
    assert all(t.device.type == DEVICE for t in named.values())


def loss_of(network: Network, parameters: Parameters, equilibrium: Equilibrium, target: torch.Tensor) -> float:
    z = ep_kernels.readout(network, parameters, equilibrium)
    return float(torch.nn.functional.cross_entropy(z, target))
