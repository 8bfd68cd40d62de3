"""Dropout: the thinned network's states, and its gradients against finite differences of the whole one's parameters."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ep_kernels import Head, Network, Parameters, RelaxConfig, contrasted_states, ep_gradients, free_phase
from ep_kernels.solver import nudged_gradients
from ep_train.bptt import bptt_gradients, loss_at
from ep_train.dropout import Dropout, Masks
from tests.core.nets import NETWORKS, Problem, cosine, problem
from tests.core.threads import one_thread  # noqa: F401  (autouse)

CONVERGED = RelaxConfig(free_steps=200, nudged_steps=200, tol=1e-13, over_relaxation=1.0, estimator="tangent")
WIDE = Network(
    ((2, 8, 8), (6, 4, 4), (8, 4, 4), (12,)),
    (
        *NETWORKS["slope 1/2, local heads"].connections[:2],
        replace(NETWORKS["slope 1/2, local heads"].connections[3], src=2, dst=3),
    ),
    Head(3, 3),
    (Head(1, 3, pool=2, weight=0.3), Head(3, 3, temperature=2.0, weight=0.5, tied=0),
     Head(2, 4, loss="mse", pointwise=True, weight=0.1)),
    feedback_gain=0.5,
)  # fmt: skip
NETS = {
    "max, heads": WIDE,
    "average, heads": replace(WIDE, connections=tuple(replace(c, pool="avg" if c.pool == "max" else c.pool)
                                                      for c in WIDE.connections)),
    "separate": replace(WIDE, feedback="separate"),
    "mse, skips": replace(NETWORKS["skips, average"], local_heads=()),
}  # fmt: skip


def drawn(p: Problem, rates: tuple[float, ...] = (0.4,)) -> Masks:
    """Masks that leave something out of the network, and no layer without units."""
    dropout, generator = Dropout(p.network, rates), torch.Generator().manual_seed(0)
    while True:
        masks = dropout.draw(generator, dtype=torch.float64)
        kept = [k for k in masks.kept if k is not None]
        if all(bool(k.any()) for k in kept) and sum(int((k == 0).sum()) for k in kept) > 2:
            return masks


def left_out(masks: Masks, node: int, state: Tensor) -> Tensor:
    """A node's units that are left out, of a state [n, ...]."""
    kept = masks.kept[node]
    assert kept is not None
    return state[:, kept == 0]


@pytest.mark.parametrize("form", ["delta", "states", "tangent"])
@pytest.mark.parametrize("name", NETS)
def test_units_that_are_left_out_stay_zero_in_every_phase(name: str, form: Any) -> None:
    p = problem(NETS[name], seed=2, bias=0.3)
    masks = drawn(p)
    thinned = masks.apply(p.parameters)
    change: dict[str, Any] = {"estimator": "tangent"} if form == "tangent" else {"form": form, "beta": 0.3}
    config = RelaxConfig(free_steps=5, nudged_steps=5, **change)
    _, equilibrium = ep_gradients(p.network, thinned, p.x, p.targets, config)
    _, nudged = nudged_gradients(p.network, thinned, equilibrium_of(p, thinned, config), p.targets, config)
    for node in range(1, len(p.network.shapes)):
        if masks.kept[node] is None:
            continue
        delta = nudged.deltas[node]
        assert delta is not None
        assert not bool(left_out(masks, node, equilibrium.states[node]).any())
        assert not bool(left_out(masks, node, delta).any())
        assert not bool(left_out(masks, node, contrasted_states(equilibrium, nudged, node)).any())
    whole = free_phase(p.network, p.parameters, p.x, config)
    assert any(bool(left_out(masks, i, s).any()) for i, s in enumerate(whole.states) if masks.kept[i] is not None)


def equilibrium_of(p: Problem, parameters: Parameters, config: RelaxConfig) -> Any:
    return free_phase(p.network, parameters, p.x, config, keep=True)


def test_masked_units_are_those_of_the_smaller_network() -> None:
    """A chain whose left-out channels are cut away has the same states, with the drives scaled by 1 / (1 - rate)."""
    net = Network.chain((2, 6, 6), [5, 4], ["none", "avg"], classes=3, hidden=[6], feedback_gain=0.5)
    p = problem(net, seed=3, bias=0.2)
    masks = drawn(p, (0.4, 0.5, 0.25))
    keep = [torch.ones(2), *(k for k in masks.kept[1:] if k is not None)]
    index = [k.nonzero()[:, 0] for k in keep]
    small = Network.chain(
        (2, 6, 6), [len(index[1]), len(index[2])], ["none", "avg"], classes=3, hidden=[len(index[3])], feedback_gain=0.5
    )
    rates = (0.0, 0.4, 0.5, 0.25)
    named = p.parameters.named()
    cut: dict[str, Tensor] = {}
    for c in range(3):
        weight = named[f"connections.{c}.weight"][index[c + 1]]
        if weight.dim() == 2:
            weight = weight.view(len(weight), 4, 9)[:, index[c]].flatten(1)
        else:
            weight = weight[:, index[c]]
        cut[f"connections.{c}.weight"] = weight / (1 - rates[c])
        cut[f"nodes.{c + 1}.bias"] = named[f"nodes.{c + 1}.bias"][index[c + 1]]
    cut["heads.0.weight"] = named["heads.0.weight"][:, index[3]] / 0.75
    cut["heads.0.bias"] = named["heads.0.bias"]
    config = RelaxConfig(free_steps=5, nudged_steps=4)
    want, states = ep_gradients(small, Parameters.from_named(small, cut), p.x, p.targets, config)
    got, equilibrium = ep_gradients(net, masks.apply(p.parameters), p.x, p.targets, config)
    for i in range(1, 4):
        torch.testing.assert_close(equilibrium.states[i][:, index[i]], states.states[i])
    gradients = masks.gradients(got)
    bias = gradients.biases[2]
    assert bias is not None
    torch.testing.assert_close(bias[index[2]], want.biases[2])
    row = gradients.weights[1][index[2]][:, index[1]]
    torch.testing.assert_close(row, want.weights[1] / 0.6)
    assert float(gradients.weights[1].abs().sum()) == pytest.approx(float(row.abs().sum()))  # and nothing elsewhere


@pytest.mark.parametrize("name", ["average, heads", "mse, skips"])
def test_gradients_are_those_of_the_whole_networks_parameters(name: str) -> None:
    """Finite differences of the thinned network's loss at equilibrium, by the parameters before they are masked."""
    p = problem(NETS[name], seed=5, batch=2, gain=0.5, bias=0.3)
    masks = drawn(p)
    got, _ = ep_gradients(p.network, masks.apply(p.parameters), p.x, p.targets, CONVERGED)
    gradients = masks.gradients(got).named()
    named = p.parameters.named()
    assert gradients.keys() == named.keys()

    def loss(tensors: dict[str, Tensor]) -> float:
        thinned = masks.apply(Parameters.from_named(p.network, tensors))
        found = free_phase(p.network, thinned, p.x, CONVERGED)
        assert found.converged
        return float(loss_at(p.network, thinned, found.states, p.targets))

    generator = torch.Generator().manual_seed(1)
    reached = 0  # a layer may be saturated
    for key, tensor in named.items():
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        up, down = (loss({**named, key: tensor + sign * 1e-5 * direction}) for sign in (1, -1))
        size = float(gradients[key].norm() * direction.norm()) / math.sqrt(tensor.numel())
        reached += size > 1e-4
        along = float((gradients[key] * direction).sum())
        assert along == pytest.approx((up - down) / 2e-5, abs=2e-5 * max(size, abs(along), 1e-3)), key
    assert reached > len(named) / 2


def test_gradients_with_max_pooling_are_bptts() -> None:
    p = problem(NETS["max, heads"], seed=5, batch=2, gain=0.6, bias=0.3)
    masks = drawn(p)
    named = {key: t.clone().requires_grad_() for key, t in p.parameters.named().items()}
    thinned = masks.apply(Parameters.from_named(p.network, named))
    plain = Parameters.from_named(p.network, {key: t.detach() for key, t in thinned.named().items()})
    true, _, _ = bptt_gradients(p.network, plain, p.x, p.targets, CONVERGED, steps=100, free_steps=100)
    # the chain rule by autograd, through the masks
    wanted = torch.autograd.grad(
        list(thinned.named().values()), list(named.values()), list(true.named().values()), allow_unused=True
    )
    got, _ = ep_gradients(p.network, plain, p.x, p.targets, CONVERGED)
    for key, ours, theirs in zip(named, masks.gradients(got).named().values(), wanted, strict=True):
        assert theirs is not None
        assert cosine(ours, theirs) > 0.999999, key
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8 * float(theirs.abs().max()))


def test_draws_depend_on_the_seed_alone() -> None:
    dropout = Dropout(WIDE, [0.3])

    def kept(seed: int) -> list[float]:
        masks = dropout.draw(torch.Generator().manual_seed(seed))
        return torch.cat([k for k in masks.kept if k is not None]).tolist()

    assert kept(1) == kept(1)
    assert kept(1) != kept(2)


def test_masks_are_one_tensor() -> None:
    """One copy takes them all to a GPU, and what they are used as are views of it."""
    dropout = Dropout(WIDE, (0.3, 0.0, 0.6))
    on_cpu, on_meta = (dropout.draw(torch.Generator().manual_seed(1), device) for device in (None, "meta"))
    for masks in (on_cpu, on_meta):
        parts = [t for t in (*masks.kept, *masks.scaled) if t is not None]
        assert len(parts) == 4
        assert len({t.untyped_storage()._cdata for t in parts}) == 1
        assert {t.dtype for t in parts} == {torch.float32}
    assert on_meta.kept[1].device.type == "meta"
    torch.testing.assert_close(on_cpu.scaled[3], on_cpu.kept[3] / 0.4)
    weights = problem(WIDE).parameters.weights
    assert on_meta._received(1, torch.empty_like(weights[0], dtype=torch.float32, device="meta")).device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_masks_do_not_wait_for_a_gpu() -> None:
    p = problem(WIDE)
    tensors = {key: t.float().cuda() for key, t in p.parameters.named().items()}
    parameters = Parameters.from_named(WIDE, tensors)
    dropout = Dropout(WIDE, [0.3])
    dropout.draw(torch.Generator(), "cuda").apply(parameters)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks = dropout.draw(torch.Generator().manual_seed(1), "cuda")
        got = masks.gradients(masks.apply(parameters))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = dropout.draw(torch.Generator().manual_seed(1))
    on_cpu = Parameters.from_named(WIDE, {key: t.cpu() for key, t in tensors.items()})
    for key, t in want.gradients(want.apply(on_cpu)).named().items():
        torch.testing.assert_close(got.named()[key].cpu(), t)


def test_drives_keep_their_expectation() -> None:
    """Over many draws, what a node that is there receives from a state is on average what all units send."""
    p = problem(WIDE)
    dropout = Dropout(WIDE, (0.25, 0.5, 0.0))
    generator = torch.Generator().manual_seed(0)
    draws = [dropout.draw(generator, dtype=torch.float64) for _ in range(4000)]
    rates = [1 - torch.stack([k]).mean() for k in (torch.cat([d.kept[i] for d in draws]) for i in (1, 2))]
    assert [float(r) for r in rates] == pytest.approx([0.25, 0.5], abs=0.02)
    assert draws[0].kept[0] is None
    assert draws[0].kept[3] is None
    thinned = [d.apply(p.parameters) for d in draws]
    for mean, whole in (
        (torch.stack([t.weights[2] for t in thinned]).mean(0), p.parameters.weights[2]),  # into the vector node
        (torch.stack([t.head_weights[1] for t in thinned]).mean(0), p.parameters.head_weights[1]),
        (torch.stack([t.head_weights[3] for t in thinned]).mean(0), p.parameters.head_weights[3]),
        (torch.stack([t.weights[1] for t in thinned]).mean(0), 0.5 * p.parameters.weights[1]),  # half the time all
    ):
        assert float((mean - whole).norm() / whole.norm()) < 0.05


def test_tied_heads_stay_one_tensor_and_what_is_not_masked_stays_itself() -> None:
    p = problem(WIDE)
    thinned = drawn(p).apply(p.parameters)
    assert thinned.head_weights[2] is thinned.head_weights[0]
    assert thinned.named().keys() == p.parameters.named().keys()
    none = Dropout(WIDE, (0.0,)).draw(torch.Generator()).apply(p.parameters)
    assert all(none.named()[key] is t for key, t in p.parameters.named().items())
    separate = problem(NETS["separate"])
    masks = drawn(separate)
    ones = Parameters.from_named(
        separate.network, {key: torch.ones_like(t) for key, t in separate.parameters.named().items()}
    )
    got = masks.apply(ones)
    assert torch.equal(got.feedback_weights[1], got.weights[1])


def test_the_memory_layout_stays() -> None:
    p = problem(WIDE)
    weights = [w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w for w in p.parameters.weights]
    got = drawn(p).apply(replace(p.parameters, weights=weights))
    assert [w.stride() for w in got.weights] == [w.stride() for w in weights]


@pytest.mark.parametrize(
    ("network", "rates", "message"),
    [
        (WIDE, (0.1, 0.2), r"argument 'rates': expected one, or 3 \(one per hidden layer\), got 2"),
        (WIDE, (1.0,), r"expected numbers in \[0, 1\), got 1\.0"),
        (WIDE, (float("nan"),), r"expected numbers in \[0, 1\), got nan"),
        (replace(WIDE, lo=0.1), (0.5,), r"argument 'network': expected a box that holds 0, got \[0\.1, 1\.0\]"),
        (
            replace(WIDE, local_heads=(Head(2, None, loss="mse"),)),
            (0.5,),
            "expected 0 for node 2, whose states head 1 compares with a target directly, got 0.5",
        ),
    ],
)
def test_what_is_refused(network: Network, rates: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dropout(network, rates)


def test_output_units_are_always_there() -> None:
    net = NETWORKS["no pooling, mse"]
    assert Dropout(net, (0.5,)).rates == (0.0, 0.5, 0.5, 0.5, 0.0)
    assert Dropout(net, (0.1, 0.2, 0.3)).rates == (0.0, 0.1, 0.2, 0.3, 0.0)
