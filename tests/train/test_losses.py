"""The augmented loss: heads and targets of every term, and EP's gradients of it against BPTT."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ep_kernels
from ep_kernels import Head, Network, Parameters, RelaxConfig, contrasted_states, reference
from ep_train.bptt import bptt_gradients, loss_at
from ep_train.check import true_gradients
from ep_train.distill import Distillation
from ep_train.losses import AugmentedLoss, LocalErrors, maps_seed
from ep_train.models import Model, build_network, initial_parameters
from ep_train.teachers import Teacher, build_teacher
from tests.core.nets import cosine
from tests.core.threads import one_thread  # noqa: F401  (autouse)

SHAPE, CLASSES = (3, 16, 16), 5
SPECS = {8: "4-4p-4-4p-6-6p-6-6", 11: "4-4p-4-4p-4-6p-6-6-6-6-6"}
SETTLE = 20  # sweeps to the true equilibrium


def teacher(seed: int = 0, classes: int = CLASSES) -> Teacher:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build_teacher("vgg11_bn", SHAPE, classes, 4 / 64)
        with torch.no_grad():
            module.get_submodule("classifier").weight.mul_(20)  # type: ignore[operator]  # as sure as a trained one
    return Teacher(module, image_shape=SHAPE)


def network(layers: int = 8, **options: Any) -> Network:
    return build_network(SPECS[layers], SHAPE, CLASSES, feedback_gain=0.05, **options)


def batch(seed: int = 0, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(size, *SHAPE, generator=generator, dtype=torch.float64)
    return images, torch.randint(CLASSES, (size,), generator=generator)


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_local_heads() -> None:
    net = network()
    every = LocalErrors("all", weight=(0.3,), pool=4).heads(net, CLASSES)
    assert [h.node for h in every] == list(range(1, 8))  # the readout reads the eighth
    assert [h.pool for h in every] == [4, 4, 4, 4, 4, 2, 2]
    assert {(h.weight, h.loss, h.outputs) for h in every} == {(0.3, "cross_entropy", CLASSES)}
    some = LocalErrors("2, 6", weight=(0.3, 0.1), loss="mse").heads(net, CLASSES)
    assert [(h.node, h.weight, h.loss, h.pool) for h in some] == [(2, 0.3, "mse", 2), (6, 0.1, "mse", 2)]
    assert LocalErrors("none").heads(net, CLASSES) == []
    vectors = Network.chain((2, 4, 4), [3], ["none"], classes=2, hidden=[7], readout="mse")
    assert [(h.node, h.pool) for h in LocalErrors().heads(vectors, 2)] == [(1, 2), (2, None)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "1,1"}, "argument 'layers': expected none, all, or different layers as 2,4,6, got '1,1'"),
        ({"layers": "2,02"}, "argument 'layers': expected none, all, or different layers as 2,4,6, got '2,02'"),
        ({"layers": "0"}, "argument 'layers'"),
        ({"layers": "1,,2"}, "argument 'layers'"),
        ({"layers": ""}, "argument 'layers'"),
        ({"weight": (math.nan,)}, "argument 'weight': expected finite numbers >= 0"),
        ({"weight": ()}, "argument 'weight'"),
        ({"pool": 0}, "argument 'pool': expected an integer >= 1, got 0"),
        ({"loss": "hinge"}, "argument 'loss': expected cross_entropy or mse, got 'hinge'"),
    ],
)
def test_local_errors_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"LocalErrors: {message}"):
        LocalErrors(**options)


def test_terms_that_do_not_fit() -> None:
    net = network()
    with pytest.raises(ValueError, match="argument 'layers': expected layers from 1 to 8, got '9'"):
        LocalErrors("9").heads(net, CLASSES)
    with pytest.raises(ValueError, match=r"argument 'weight': expected one number or 7 of them .*, got 2"):
        LocalErrors("all", weight=(1.0, 2.0)).heads(net, CLASSES)
    with pytest.raises(ValueError, match="argument 'network': expected one without local heads"):
        AugmentedLoss(network(local_heads=(1,)), CLASSES)
    with pytest.raises(ValueError, match="argument 'teacher': expected a teacher if there is a distillation"):
        AugmentedLoss(net, CLASSES, distillation=Distillation(logits=1.0))
    with pytest.raises(ValueError, match=r"argument 'local_logits': expected local heads \(--local-heads\)"):
        AugmentedLoss(net, CLASSES, distillation=Distillation(local_logits=1.0), teacher=teacher())
    with pytest.raises(ValueError, match="expected a teacher of 5 classes for its logits, got one of 7"):
        AugmentedLoss(net, CLASSES, distillation=Distillation(logits=1.0), teacher=teacher(classes=7))
    features = Distillation(features=("1=features.2",))
    AugmentedLoss(net, CLASSES, distillation=features, teacher=teacher(classes=7))  # features do not depend on them


def test_heads_and_targets() -> None:
    taught = teacher()
    asked = Distillation(logits=0.5, local_logits=0.25, temperature=3.0, features=("2=features.6", "8=features.24"))
    loss = AugmentedLoss(
        network(), CLASSES, local=LocalErrors("2,4", weight=(0.3, 0.2)), distillation=asked, teacher=taught
    ).double()
    heads = loss.network.heads
    assert heads[:3] == (network().readout, Head(2, 5, pool=2, weight=0.3), Head(4, 5, pool=2, weight=0.2))
    soft = {"loss": "cross_entropy", "temperature": 3.0}
    assert heads[3] == Head(8, 5, weight=0.5, tied=0, **soft)  # type: ignore[arg-type]
    assert heads[4:6] == tuple(Head(n, 5, pool=2, weight=0.25, tied=h, **soft) for n, h in ((2, 1), (4, 2)))  # type: ignore[arg-type]
    assert [(h.node, h.pointwise, h.loss) for h in heads[6:]] == [(2, True, "mse"), (8, True, "mse")]
    assert not any(t.requires_grad for t in taught.parameters())
    assert not list(loss.parameters())
    x, y = batch()
    targets = loss.targets(x, y)
    for head, target in zip(heads, targets, strict=True):
        assert target.shape == (4, *head.output_shape(loss.network.shapes[head.node]))
        assert (target.dtype, target.requires_grad) == (torch.float64, False)
    logits, features = taught.outputs(x)
    one_hot = F.one_hot(y, CLASSES).double()
    assert all(torch.equal(t, one_hot) for t in targets[:3])
    assert all(torch.equal(t, (logits / 3).softmax(1)) for t in targets[3:6])
    torch.testing.assert_close(targets[6], F.adaptive_avg_pool2d(features["features.6"], heads[6].pool or 8))
    with pytest.raises(ValueError, match="argument 'labels': expected 0 to 4"):
        loss.targets(x, y + 5)


def test_the_loss_is_the_one_that_was_asked_for() -> None:
    """Sum of its terms, written out: also of an mse readout, whose softened logits are its output units'."""
    taught = teacher()
    for readout in ("softmax", "mse"):
        asked = Distillation(
            logits=0.5,
            temperature=3.0,
            features=("2=features.0", "4=features.6"),
            feature_weight=(0.7, 0.4),
            feature_loss="cosine" if readout == "mse" else "mse",
        )
        local = LocalErrors("3", weight=(0.2,), loss="mse")
        student = network(readout=readout)
        loss = AugmentedLoss(student, CLASSES, local=local, distillation=asked, teacher=taught).double()
        tensors = Parameters.from_named(loss.network, initial_parameters(loss.network, dtype=torch.float64))
        states = [torch.rand(4, *shape, dtype=torch.float64) for shape in loss.network.shapes]
        x, y = batch()
        got = loss_at(loss.network, tensors, states, loss.targets(x, y))
        logits, features = taught.outputs(x)
        z = states[-1].flatten(1)
        if readout == "mse":
            hard = 0.5 * (z - F.one_hot(y, CLASSES)).square().sum(1)
        else:
            z = F.linear(z, tensors.head_weights[0], tensors.head_biases[0])  # type: ignore[arg-type]
            hard = F.cross_entropy(z, y, reduction="none")
        want = hard + 0.5 * 9 * F.cross_entropy(z / 3, (logits / 3).softmax(1), reduction="none")
        h = F.linear(F.adaptive_avg_pool2d(states[3], 2).flatten(1), tensors.head_weights[1])  # type: ignore[arg-type]
        want = want + 0.2 * 0.5 * (h - F.one_hot(y, CLASSES)).square().sum(1)
        for index, (node, name, weight) in enumerate(((2, "features.0", 0.7), (4, "features.6", 0.4)), 3):
            size = loss.network.shapes[node][1:]
            ours = F.conv2d(states[node], tensors.head_weights[index])  # type: ignore[arg-type]
            theirs = F.adaptive_avg_pool2d(features[name], size)
            if asked.feature_loss == "mse":
                want = want + weight * 0.5 * (ours - theirs).square().flatten(1).mean(1)
            else:
                want = want + weight * (1 - F.cosine_similarity(ours, theirs, 1)).flatten(1).mean(1)
        torch.testing.assert_close(got, want.mean(), rtol=1e-6, atol=1e-9)


def test_maps_on_the_teachers_side_have_numbers_of_their_own() -> None:
    """Not those that the first connection of the same run starts with; a seed gives the same ones everywhere."""
    asked = Distillation(features=("1=features.2",), map="teacher")

    def weight(seed: int) -> Tensor:
        loss = AugmentedLoss(network(), CLASSES, distillation=asked, teacher=teacher(), seed=seed)
        return next(iter(loss.parameters())).detach().flatten()

    drawn, weights = weight(3), initial_parameters(network(), seed=3)["connections.0.weight"].flatten()
    assert abs(float(cosine(drawn, weights[: len(drawn)]))) < 0.9
    assert torch.equal(drawn, weight(3))
    assert not torch.equal(drawn, weight(4))
    assert (maps_seed(0), maps_seed(1)) == (2727535642803807669, 14371566222865304896)


def test_without_terms_there_are_the_labels() -> None:
    loss = AugmentedLoss(network(), CLASSES, local=LocalErrors("none"))
    assert loss.network == network()
    x, y = batch()
    (target,) = loss.targets(x, y)
    assert torch.equal(target, F.one_hot(y, CLASSES).double())
    loss.set_gradients_at([])


def test_the_teacher_moves_and_is_not_saved() -> None:
    asked = Distillation(features=("2=features.6",), map="teacher")
    loss = AugmentedLoss(network(), CLASSES, distillation=asked, teacher=teacher())
    assert list(loss.state_dict()) == ["terms.0.map.weight", "terms.0.map.bias"]
    assert loss.teacher is not None
    model = Model(loss.network).double()
    loss.double().train()
    assert {p.dtype for p in (*loss.teacher.parameters(), *loss.parameters(), *model.parameters())} == {torch.float64}
    assert not any(m.training for m in loss.teacher.modules())
    with pytest.raises(RuntimeError, match="expected a call of targets before"):
        loss.set_gradients_at([])
    again, other = (AugmentedLoss(network(), CLASSES, distillation=asked, teacher=teacher(), seed=s) for s in (0, 1))
    weights = [made.state_dict()["terms.0.map.weight"].double() for made in (loss, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# --- gradients --------------------------------------------------------------------------------------------------------

EVERYTHING = Distillation(logits=1.0, local_logits=0.5, features=("auto",))
CASES: dict[str, tuple[LocalErrors | None, Distillation | None]] = {
    "local cross-entropy": (LocalErrors("all"), None),
    "local mse, logits": (LocalErrors("2,4,6", (1.0,), 1, "mse"), Distillation(logits=1.0, local_logits=0.5)),
    "features": (None, Distillation(features=("auto",))),
    "features, cosine": (None, Distillation(features=("auto",), feature_loss="cosine")),
    "everything": (LocalErrors("all"), EVERYTHING),
    "everything, teacher's maps": (LocalErrors("all"), replace(EVERYTHING, map="teacher")),
    "everything, teacher's maps, cosine": (
        LocalErrors("all"),
        replace(EVERYTHING, map="teacher", feature_loss="cosine"),
    ),
}


@dataclass(frozen=True)
class Compared:
    """Gradients by name, of EP and of BPTT at the true equilibrium."""

    ours: dict[str, Tensor]
    true: dict[str, Tensor]

    @property
    def cosines(self) -> dict[str, float]:
        return {name: cosine(self.ours[name], true) for name, true in self.true.items()}


def compared(case: str, layers: int, seed: int, relax: RelaxConfig, backend: str, bias: float) -> Compared:
    local, distillation = CASES[case]
    taught = None if distillation is None else teacher(seed)
    loss = AugmentedLoss(
        network(layers), CLASSES, local=local, distillation=distillation, teacher=taught, seed=seed
    ).double()
    net = loss.network
    drawn = initial_parameters(net, seed=seed, dtype=torch.float64)
    tensors = Parameters.from_named(net, {n: t + bias if n.startswith("nodes") else t for n, t in drawn.items()})
    x, y = batch(seed)
    targets = loss.targets(x, y)
    equilibrium = ep_kernels.free_phase(net, tensors, x, relax, keep=True, backend=backend)
    gradients, nudged = ep_kernels.nudged_gradients(net, tensors, equilibrium, targets, relax, backend=backend)
    loss.set_gradients(equilibrium, nudged)
    ours = gradients.named() | {n: p.grad for n, p in loss.named_parameters() if p.grad is not None}
    true, settled = true_gradients(net, tensors, equilibrium.states, targets, steps=SETTLE)
    assert settled < 1e-9
    there = ep_kernels.free_phase(net, tensors, x, RelaxConfig(free_steps=SETTLE), states=equilibrium.states)
    loss.set_gradients_at(there.states)
    wanted = true.named() | {n: p.grad for n, p in loss.named_parameters() if p.grad is not None}
    assert ours.keys() == wanted.keys()
    assert ours.keys() == {*Parameters.shapes(net), *dict(loss.named_parameters())}
    return Compared(ours, wanted)


@pytest.mark.parametrize("layers", SPECS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_against_bptt(case: str, layers: int) -> None:
    """Every layer, head and map; the defaults' beta, with the nudge at every step and once per phase."""
    for seed in range(3):
        for linear in (False, True):
            relax = RelaxConfig("sweep", 6, 4, linear_nudge=linear)
            found = compared(case, layers, seed, relax, "cpu", bias=0.1).cosines
            assert min(found.values()) >= 0.98, (seed, linear, min(found, key=found.__getitem__), min(found.values()))


@pytest.mark.parametrize("case", ["everything", "everything, teacher's maps, cosine"])
def test_gradients_where_activities_are_small(case: str) -> None:
    """Without biases the states of 11 layers fall to 1e-3: beta must be smaller still, as in its limit, the tangent."""
    for seed in range(3):
        relax = RelaxConfig("sweep", 6, 4, estimator="tangent")
        found = compared(case, 11, seed, relax, "reference", bias=0.0).cosines
        assert min(found.values()) >= 0.98, (seed, min(found, key=found.__getitem__), min(found.values()))


@pytest.mark.parametrize("estimator", ["symmetric", "positive", "tangent"])
def test_maps_get_the_mean_of_their_gradients_at_both_phases(estimator: Any) -> None:
    asked = Distillation(features=("2=features.6", "8=features.24"), map="teacher", feature_weight=(0.7, 0.4))
    loss = AugmentedLoss(network(), CLASSES, distillation=asked, teacher=teacher()).double()
    net = loss.network
    tensors = Parameters.from_named(net, initial_parameters(net, dtype=torch.float64))
    x, y = batch()
    targets = loss.targets(x, y)
    relax = RelaxConfig("sweep", 6, 4, estimator=estimator)
    equilibrium = ep_kernels.free_phase(net, tensors, x, relax, keep=True)
    _, nudged = ep_kernels.nudged_gradients(net, tensors, equilibrium, targets, relax)
    loss.set_gradients(equilibrium, nudged)
    assert loss.teacher is not None
    _, features = loss.teacher.outputs(x)
    phases = 1 if estimator == "tangent" else 2
    for term, head, name in zip(loss.terms, net.local_heads, ("features.6", "features.24"), strict=True):
        weight, bias = (p.detach().clone().requires_grad_() for p in term.parameters())
        total = x.new_zeros(())
        for state in contrasted_states(equilibrium, nudged, head.node).chunk(phases):
            theirs = F.conv2d(F.adaptive_avg_pool2d(features[name], head.feature_shape(net.shapes[head.node])[1:]),
                              weight, bias)  # fmt: skip
            total = total + reference.head_loss(head, reference.head_feature(head, state), theirs).mean() / phases
        want = torch.autograd.grad(total, (weight, bias))
        for parameter, gradient in zip(term.parameters(), want, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_tied_head_adds_its_gradient_to_the_one_that_it_is_tied_to(backend: str) -> None:
    asked = Distillation(logits=0.5, local_logits=0.25, temperature=3.0)
    loss = AugmentedLoss(network(), CLASSES, local=LocalErrors("4"), distillation=asked, teacher=teacher()).double()
    net = loss.network
    drawn = initial_parameters(net, dtype=torch.float64)
    tensors = Parameters.from_named(net, drawn)
    x, y = batch()
    targets = loss.targets(x, y)
    relax = RelaxConfig("sweep", 6, 4, estimator="tangent")
    got, equilibrium = ep_kernels.ep_gradients(net, tensors, x, targets, relax, backend=backend)
    leaves = {n: t.clone().requires_grad_(n.startswith("heads")) for n, t in drawn.items()}
    total = loss_at(net, Parameters.from_named(net, leaves), equilibrium.states, targets)
    names = [n for n in leaves if n.startswith("heads")]
    assert names == ["heads.0.weight", "heads.0.bias", "heads.1.weight", "heads.1.bias"]
    for name, want in zip(names, torch.autograd.grad(total, [leaves[n] for n in names]), strict=True):
        torch.testing.assert_close(got.named()[name], want)
    bptt, _, _ = bptt_gradients(net, tensors, x, targets, replace(relax, free_steps=SETTLE), steps=SETTLE)
    assert min(cosine(got.named()[n], g) for n, g in bptt.named().items()) > 0.98
