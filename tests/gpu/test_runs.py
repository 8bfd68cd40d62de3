"""Repetition, streams, CUDA graphs, devices and training: what kept buffers and captured launches could get wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ep_kernels
from ep_kernels import Equilibrium, Network, Parameters, RelaxConfig, backend, ep_gradients, free_phase
from tests.core.nets import NETWORKS
from tests.gpu.device import (
    CUDA,
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
KINDS = ("max", "skips, max", "slope 1/2, local heads")


def gradients(p: Problem, config: RelaxConfig = CONFIG) -> list[torch.Tensor]:
    found, equilibrium = ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend="triton")
    return [*found.named().values(), *equilibrium.states[1:], equilibrium.residual]


def expected(p: Problem, config: RelaxConfig = CONFIG) -> list[torch.Tensor]:
    plain = replace(config, operands=None, storage=None)
    found, equilibrium = ep_gradients(p.network, p.parameters, p.x, p.targets, plain, backend="reference")
    return [*found.named().values(), *equilibrium.states[1:], equilibrium.residual]


def test_the_compiled_library_is_not_needed() -> None:
    """auto takes triton on a GPU."""
    if CUDA:
        assert ep_kernels.backends.choose("cuda", torch.float32) == "triton"


@pytest.mark.parametrize("name", KINDS)
def test_repeats_are_equal_bit_for_bit(name: str) -> None:
    """The first call launches, the second captures, the third replays."""
    here = on_device(random_problem(NETWORKS[name]))
    first = gradients(here)
    for _ in range(1 if INTERPRETED else 6):
        assert_equal(gradients(here), first)


def test_results_are_not_overwritten_by_later_calls() -> None:
    network = NETWORKS["max"]
    problems = [on_device(random_problem(network, seed)) for seed in range(2 if INTERPRETED else 4)]
    found = [gradients(p) for p in problems]
    copies = [[t.clone() for t in tensors] for tensors in found]
    for p in reversed(problems):
        gradients(p)
    for tensors, before in zip(found, copies, strict=True):
        assert_equal(tensors, before)
    for seed, tensors in enumerate(found):
        assert_close(tensors, expected(on_device(random_problem(network, seed), torch.float64)), 1e-3)


def test_inputs_are_not_written() -> None:
    here = on_device(random_problem(NETWORKS["max"]))
    tensors = [here.x, *here.targets, *here.parameters.named().values()]
    before = [t.clone() for t in tensors]
    gradients(here)
    gradients(here)
    assert_equal(tensors, before)


def test_weights_changed_in_place_are_seen() -> None:
    """As an optimizer changes them, between two calls of the same signature."""
    p = random_problem(NETWORKS["max"])
    here = on_device(p)
    for step in range(3):
        for tensor, exact in zip(here.parameters.named().values(), p.parameters.named().values(), strict=True):
            tensor.mul_(0.9)
            exact.mul_(0.9)
        assert_close(gradients(here), expected(on_device(p, torch.float64)), 1e-3, f"step {step}, output")


def test_alternating_batch_sizes() -> None:
    problems = [random_problem(NETWORKS["max"], seed, batch) for seed, batch in enumerate((3, 1, 3, 2))]
    for p in problems if INTERPRETED else problems * 3:
        assert_close(gradients(on_device(p)), expected(on_device(p, torch.float64)), 1e-3)


def test_more_signatures_than_are_kept() -> None:
    if INTERPRETED:
        pytest.skip("takes minutes in the interpreter")
    network = NETWORKS["max"]
    for _ in range(2):
        for batch in range(1, 22):
            p = random_problem(network, batch, batch)
            config = RelaxConfig(free_steps=2)
            found = free_phase(network, on_device(p).parameters, on_device(p).x, config, backend="triton")
            true = free_phase(network, p.parameters, p.x, config, backend="reference")
            assert_close(found.states, true.states, 1e-5)


def test_on_another_stream(cuda: torch.device) -> None:
    """Work is queued on the current stream: behind what fills its input, before what reads its results."""
    p = random_problem(NETWORKS["max"])
    true = expected(on_device(p, torch.float64))
    here = on_device(p)
    gradients(here)
    torch.cuda.synchronize()
    for _ in range(5):
        stream = torch.cuda.Stream()
        x = torch.full_like(here.x, float("nan"))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            x.copy_(here.x)
            found = [t.clone() for t in gradients(replace(here, x=x))]
        stream.synchronize()
        assert_close(found, true, 1e-3)


def test_two_streams(cuda: torch.device) -> None:
    """The same signature on two streams at once: they share a program."""
    network = NETWORKS["max"]
    problems = [on_device(random_problem(network, seed)) for seed in range(2)]
    true = [gradients(p) for p in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    found: list[list[list[torch.Tensor]]] = [[], []]
    for _ in range(10):
        for i, (stream, p) in enumerate(zip(streams, problems, strict=True)):
            with torch.cuda.stream(stream):
                found[i].append(gradients(p))
    torch.cuda.synchronize()
    for results, same in zip(found, true, strict=True):
        for tensors in results:
            assert_equal(tensors, same)


@pytest.mark.parametrize("name", KINDS)
def test_inside_a_graph_of_the_user(name: str, cuda: torch.device) -> None:
    """Captured once, replayed with other numbers in the same memory."""
    network = NETWORKS[name]
    first, second = (on_device(random_problem(network, seed)) for seed in (0, 1))
    static = on_device(random_problem(network, 0))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(static)
    for p in (second, first, second):
        static.x.copy_(p.x)
        for tensor, target in zip(static.targets, p.targets, strict=True):
            tensor.copy_(target)
        for tensor, parameter in zip(static.parameters.named().values(), p.parameters.named().values(), strict=True):
            tensor.copy_(parameter)
        graph.replay()
        torch.cuda.synchronize()
        assert_close(found, gradients(p), 1e-6)


def test_second_device(cuda: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    p = random_problem(NETWORKS["max"])
    here, there = on_device(p, device="cuda:0"), on_device(p, device="cuda:1")
    for _ in range(3):  # launched one by one, captured, replayed
        first, second = gradients(here), gradients(there)
        assert all(t.device == torch.device("cuda:1") for t in second)
        assert_close(second, first, 1e-5)


def test_float64_is_left_to_the_reference() -> None:
    exact = on_device(random_problem(NETWORKS["max"]), torch.float64)
    assert_equal(gradients(exact), expected(exact))


def test_large_maps_past_32_bits(cuda: torch.device) -> None:
    """Element offsets beyond 2^31: the last samples are as right as the first."""
    network = Network.chain((3, 64, 64), [64, 64], ["none", "none"], classes=2, feedback_gain=0.1)
    batch = 8256  # 8256 x 64 x 64 x 64 elements
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free memory")
    p = random_problem(network, batch=2)
    here = on_device(p)
    x = here.x.repeat(batch // 2, 1, 1, 1)
    config = RelaxConfig(free_steps=1, operands=torch.float16, storage=torch.float16)
    found = free_phase(network, here.parameters, x, config, backend="triton")
    first = free_phase(network, here.parameters, here.x, config, backend="triton")
    for a, b in zip(found.states[1:], first.states[1:], strict=True):
        assert_equal([a[-2:], a[:2]], [b, b])


def test_adam_lowers_the_loss(precision: str) -> None:
    """A few steps of training on one batch, with what the user would write."""
    network = Network.chain((3, 8, 8), (16, 16), ["max", "max"], classes=4, feedback_gain=0.1)
    p = on_device(random_problem(network, batch=8))
    named = {name: t.clone().requires_grad_() for name, t in p.parameters.named().items()}
    optimizer = torch.optim.Adam(named.values(), lr=0.01)
    config = PRECISIONS[precision].config(free_steps=2, nudged_steps=1, estimator="tangent")
    losses = []
    with backend("triton"):
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
