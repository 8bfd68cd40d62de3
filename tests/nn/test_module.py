"""EquilibriumNet as any other module: what training loops do with one, and what is refused with a reason."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import ep_kernels
from ep_kernels import ConvergenceError, EquilibriumNet, Head, Network, RelaxConfig, backend, ep_gradients, targets_for
from ep_kernels.nn import initial_parameters, phases
from ep_train.models import Model

NETWORK = Network.chain((1, 8, 8), [4, 6], ["max", "none"], classes=3)
TANGENT = RelaxConfig(estimator="tangent")


def make(config: RelaxConfig = TANGENT, **options: Any) -> EquilibriumNet:
    return EquilibriumNet(NETWORK, config, **{"seed": 0, **options})


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 1, 8, 8, generator=generator), torch.arange(count) % 3


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def of_loss(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    return gradients(net)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, g in theirs.items():
        torch.testing.assert_close(ours[name], g, rtol=rtol, atol=1e-8, msg=name)


# --- construction, state, copies --------------------------------------------------------------------------------------


def test_ordinary_parameters() -> None:
    net = make(seed=4, weight_gain=1.3)
    want = initial_parameters(NETWORK, seed=4, weight_gain=1.3)
    assert set(net.state_dict()) == set(dict(net.named_parameters())) == set(want)
    assert all(torch.equal(p, want[name]) and p.is_leaf for name, p in net.named_parameters())
    model = Model(NETWORK, seed=1)  # the trainer's holder has the same names
    net.load_state_dict(model.state_dict())
    assert torch.equal(net(batch()[0]), EquilibriumNet(NETWORK, TANGENT, seed=1)(batch()[0]))
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict({})
    assert "1x8x8 -> 4x4x4 -> 6x4x4, feedback_gain=0.1, config=RelaxConfig(" in repr(net)


def test_seed_of_the_global_generator_dtype_and_device() -> None:
    nets = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        nets.append(EquilibriumNet(NETWORK))
    first, again, other = (net.get_parameter("connections.0.weight") for net in nets)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert EquilibriumNet(NETWORK).config == RelaxConfig()
    assert next(make(dtype=torch.float64).parameters()).dtype == torch.float64
    assert next(make(device="meta").parameters()).device.type == "meta"
    moved = make().to(torch.float64)
    assert moved(batch()[0].double()).dtype == torch.float64


def test_deepcopy_pickle_and_torch_save() -> None:
    net, (x, y) = make(), batch()
    want = of_loss(net, x, y)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)]
    for twin in copies:
        assert twin.residual is None  # what a batch left is no part of a copy
        same(of_loss(twin, x, y), want, 0)
        with torch.no_grad():
            twin.get_parameter("connections.0.weight").zero_()
    same(of_loss(net, x, y), want, 0)


def test_a_pickle_runs_in_another_process(tmp_path: Any) -> None:
    """Its network is made known to the ops of that process too."""
    import subprocess
    import sys

    net, (x, _) = make(), batch()
    torch.save([net, x, net(x).detach()], tmp_path / "net.pt")
    script = (
        "import sys, torch; net, x, z = torch.load(sys.argv[1], weights_only=False); out = net(x); "
        "out.sum().backward(); assert torch.equal(out, z) and net.get_parameter('nodes.1.bias').grad.any()"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "net.pt")], check=True, timeout=100)


def test_settings_may_change_between_batches() -> None:
    net, (x, _) = make(), batch()
    before = net(x)
    assert net.last is not None
    assert net.last.steps == 4
    net.config = replace(TANGENT, free_steps=9)
    after = net(x)
    assert net.last is not None
    assert net.last.steps == 9
    assert not torch.equal(before, after)
    after.sum().backward()
    with pytest.raises(ValueError, match="argument 'config': expected a RelaxConfig, got dict"):
        net.config = {}  # type: ignore[assignment]


def test_settings_that_are_gone_are_not_kept() -> None:
    """However often they change; what has gone forward with earlier ones still goes backward with those."""
    net, (x, y) = make(), batch()
    want = of_loss(net, x, y)
    net.zero_grad()
    first = F.cross_entropy(net(x), y)
    for step in range(1, 400):
        net.config = replace(TANGENT, beta=1e-3 + 1e-6 * step, free_steps=1)
        with torch.no_grad():
            net(x[:1])
    gc.collect()
    assert sum(type(found) is phases.Dynamics for found in gc.get_objects()) < 300
    first.backward()
    same(gradients(net), want, 0)


# --- training loops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True),
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
    ],
)
def test_the_loss_falls(optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
    net, (x, y) = make(), batch(24)
    opt = optimizer(net.parameters())

    def closure() -> float:
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return float(loss.detach())

    losses = [float(opt.step(closure)) for _ in range(20)]  # type: ignore[arg-type]
    assert losses[-1] < 0.9 * losses[0]


def test_accumulation_clipping_and_retained_graphs() -> None:
    net, (x, y) = make(), batch()
    whole = of_loss(net, x, y)
    net.zero_grad()
    for part in (slice(0, 2), slice(2, 6)):
        loss = F.cross_entropy(net(x[part]), y[part], reduction="sum") / 6
        loss.backward()
    same(gradients(net), whole, 1e-4)
    norm = torch.sqrt(sum((g.square().sum() for g in whole.values()), torch.zeros(())))
    torch.testing.assert_close(nn.utils.clip_grad_norm_(net.parameters(), 1e-3), norm, rtol=1e-4, atol=0)
    net.zero_grad()
    loss = F.cross_entropy(net(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    same(gradients(net), {name: 2 * g for name, g in whole.items()})
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_changed_in_place_before_backward() -> None:
    net, (x, y) = make(), batch()
    loss = F.cross_entropy(net(x), y)
    with torch.no_grad():
        net.get_parameter("connections.0.weight").add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_grad_scaler() -> None:
    net, (x, y) = make(), batch()
    want = of_loss(net, x, y)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(net(x), y)).backward()
    scaler.unscale_(optimizer)
    same(gradients(net), want, 1e-6)
    before = copy.deepcopy(net.state_dict())
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(before["nodes.1.bias"], net.get_parameter("nodes.1.bias"))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_overflow_is_seen_by_grad_scaler(bad: float) -> None:
    net, (x, _) = make(), batch()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = copy.deepcopy(net.state_dict())
    z = net(x)
    scaler.scale(torch.where(torch.arange(3) == 1, bad * z, z).sum()).backward()
    assert not any(bool(g.isfinite().all()) for g in gradients(net).values())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_leaves_the_relaxation_alone(inside: bool) -> None:
    """Modules around the net are cast; its own precision is RelaxConfig.operands."""
    x, y = batch()
    torch.manual_seed(0)
    below = nn.Conv2d(1, 1, 3, padding=1)
    net = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = below(x)
        z = net(narrow)
        loss = F.cross_entropy(z, y)
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert (narrow.dtype, z.dtype) == (torch.bfloat16, torch.bfloat16)
    assert below.weight.grad is not None
    found = gradients(net)
    net.zero_grad()
    states = net.states(narrow.float().detach())
    logits = F.linear(
        states[-1].flatten(1).bfloat16(), *(p.bfloat16() for p in net.heads.get_submodule("0").parameters())
    )
    F.cross_entropy(logits.float(), y).backward()
    same(found, gradients(net), 1e-2)
    with pytest.raises(
        ValueError, match=r"argument 'x': expected torch.float32 on cpu \(as the parameters\), got torch"
    ):
        net(x.bfloat16())


def test_half_parameters() -> None:
    net, (x, y) = make(dtype=torch.bfloat16), batch()
    F.cross_entropy(net(x.bfloat16()), y).backward()
    assert all(g.dtype == torch.bfloat16 and bool(g.any()) for g in gradients(net).values())


def test_hooks() -> None:
    net, (x, y) = make(), batch()
    seen: list[str] = []
    net.register_forward_pre_hook(lambda *_: seen.append("pre"))
    net.register_forward_hook(lambda *_: seen.append("forward"))
    net.register_full_backward_hook(lambda *_: seen.append("backward"))
    weight, bias = net.get_parameter("connections.1.weight"), net.get_parameter("nodes.1.bias")
    weight.register_hook(lambda g: 2 * g)
    bias.register_post_accumulate_grad_hook(lambda _: seen.append("accumulated"))
    found = of_loss(net, x.requires_grad_(), y)
    assert seen == ["pre", "forward", "accumulated", "backward"] or seen == [
        "pre",
        "forward",
        "backward",
        "accumulated",
    ]
    torch.testing.assert_close(found["connections.1.weight"], 2 * of_loss(make(), x, y)["connections.1.weight"])


def test_functional_call_and_torch_func() -> None:
    net, (x, y) = make(), batch()
    want = of_loss(net, x, y)
    given = {name: p.detach() * 1 for name, p in net.named_parameters()}

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, tensors, (x,)), y)

    same(torch.func.grad(loss)(given), want)
    out, back = torch.func.vjp(lambda t: torch.func.functional_call(net, t, (x,)), given)
    same(back(torch.autograd.grad(F.cross_entropy(z := out.detach().requires_grad_(), y), z)[0])[0], want)
    own = {name: t.requires_grad_() for name, t in given.items()}
    loss(own).backward()
    same({name: t.grad for name, t in own.items() if t.grad is not None}, want)


def test_parametrizations_and_saved_tensor_hooks() -> None:
    net, (x, y) = make(), batch()
    want = of_loss(net, x, y)
    net.zero_grad()
    F.cross_entropy(checkpoint(net, x, use_reentrant=False), y).backward()
    same(gradients(net), want)
    with torch.autograd.graph.save_on_cpu():
        same(of_loss(net, x, y), want)
    nn.utils.parametrizations.weight_norm(net.get_submodule("connections.0"))
    found = of_loss(net, x, y)
    assert {name.rsplit(".", 1)[-1] for name in found if name.startswith("connections.0")} == {"original0", "original1"}


def test_backend_in_force_at_forward_is_that_of_backward() -> None:
    net, (x, y) = make(dtype=torch.float64), batch()
    x = x.double()
    with backend("reference"):
        loss = F.cross_entropy(net(x), y)
    with ep_kernels.backends.recorded() as jobs, backend("cpu"):
        loss.backward()
    assert len(jobs) == 2
    assert loss.grad_fn is not None


# --- train_step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["symmetric", "tangent"])
def test_train_step_is_ep_gradients(estimator: Any) -> None:
    network = Network.chain((1, 8, 8), [4, 6], ["max", "none"], classes=3, local_heads=[1])
    net, (x, y) = EquilibriumNet(network, RelaxConfig(estimator=estimator), seed=0), batch()
    targets = targets_for(network, y, 3, torch.float32)
    want, free = ep_gradients(network, net.tensors(), x, targets, net.config)
    loss, outputs = net.train_step(x, y)
    same(gradients(net), want.named(), 0)
    assert all(p.grad is not None and p.grad.stride() == p.stride() for p in net.parameters())
    with torch.no_grad():
        z = net(x, heads=True)
    torch.testing.assert_close(outputs, z[0])
    torch.testing.assert_close(loss, F.cross_entropy(z[0], y) + 0.2 * F.cross_entropy(z[1], y))
    net.train_step(x, list(targets))
    same(gradients(net), {name: 2 * g for name, g in want.named().items()})
    assert net.residual is not None
    assert torch.equal(net.residual, free.residual)
    assert not outputs.requires_grad


def test_train_step_of_clamped_outputs_and_of_values() -> None:
    network = Network.chain((1, 8, 8), [4], ["max"], classes=3, readout="mse")
    net, (x, y) = EquilibriumNet(network, RelaxConfig(estimator="coupled", beta=0.5), seed=0), batch()
    loss, outputs = net.train_step(x, F.one_hot(y, 3).float())
    torch.testing.assert_close(loss, 0.5 * (outputs - F.one_hot(y, 3)).square().sum(1).mean())
    assert all(bool(g.any()) for g in gradients(net).values())
    with pytest.raises(ValueError, match="'coupled', which clamps the output units at a target"):
        net(x)
    with torch.no_grad():
        assert torch.equal(net(x), outputs)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 1, 3, 0, 0, 0]), "expected 0 to 2"),
        (
            torch.zeros(5, dtype=torch.long),
            r"expected labels \[6\] \(integers\) or targets \[6, 3\], got torch.int64 \[5\]",
        ),
        (torch.zeros(6, dtype=torch.bool), r"got torch.bool \[6\]"),
        (torch.zeros(6, 2), r"argument 'targets\[0\]': expected shape \[6, 3\], got \[6, 2\]"),
        ([], r"argument 'targets': expected 1 \(one per head\), got 0"),
    ],
)
def test_targets_that_do_not_fit(y: Any, message: str) -> None:
    net, (x, _) = make(), batch()
    with pytest.raises(ValueError, match=message):
        net.train_step(x, y)
    assert gradients(net) == {}


def test_train_step_leaves_frozen_parameters_alone() -> None:
    net, (x, y) = make(), batch()
    net.get_parameter("connections.0.weight").requires_grad_(False)
    net.train_step(x, y)
    assert set(gradients(net)) == {name for name, _ in net.named_parameters()} - {"connections.0.weight"}


# --- what it tells ----------------------------------------------------------------------------------------------------


def test_statistics_of_the_last_free_phase() -> None:
    net, (x, _) = make(), batch()
    assert (net.residual, net.last) == (None, None)
    net(x)
    assert net.residual is not None
    assert net.last is not None
    assert (net.residual.shape, net.last.trace.shape, net.last.converged) == ((6,), (4, 6), None)
    assert not net.residual.requires_grad
    net.config = replace(TANGENT, free_steps=50, tol=1e-3)
    assert net.last is None
    with torch.no_grad():
        net(x)
    assert net.last is not None
    assert 2 < net.last.steps < 50
    assert net.last.converged
    assert float(net.last.residual.max()) <= 1e-3 < float(net.last.trace[-2].max())
    assert net.last.message.startswith("converged: residual")
    net.config = replace(TANGENT, free_steps=2, tol=1e-9, on_fail="raise")
    for call in (net, lambda x: net.train_step(x, torch.zeros(6, dtype=torch.long))):
        with pytest.raises(ConvergenceError, match=r"the free phase has not converged: .* raise free_steps"):
            call(x)


def test_memory_does_not_grow() -> None:
    """One step's states and gradients are about 2 MB."""
    net, (x, y) = make(), batch(512)

    def resident(steps: int) -> float:
        for _ in range(steps):
            of_loss(net, x, y)
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    before = resident(20)
    assert resident(60) - before < 20


def test_no_grad_and_inference_mode_keep_nothing() -> None:
    net, (x, _) = make(), batch()
    want = net(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            z = net(x)
        assert torch.equal(z, want)
        assert not z.requires_grad
        assert net.residual is not None
    copy.deepcopy(net)(x).sum().backward()


def test_an_empty_batch() -> None:
    net = make()
    z = net(torch.zeros(0, 1, 8, 8))
    z.sum().backward()
    assert z.shape == (0, 3)
    assert net.residual is not None
    assert net.residual.shape == (0,)
    assert all(not bool(g.any()) for g in gradients(net).values())


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 8, 8), r"argument 'x': expected shape \[B, 1, 8, 8\], got \[2, 8, 8\]"),
        (torch.zeros(1, 8, 8), r"expected shape \[B, 1, 8, 8\], got \[1, 8, 8\]"),
        (torch.zeros(2, 1, 8, 8).double(), "expected torch.float32 on cpu .* got torch.float64 on cpu"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "got torch.uint8"),
        (torch.zeros(2, 1, 8, 8, device="meta"), "got torch.float32 on meta"),
        ([[1.0]], "expected a tensor, got list"),
    ],
)
def test_inputs_that_do_not_fit(x: Any, message: str) -> None:
    net = make()
    for call in (net, net.states, lambda x: net.train_step(x, torch.zeros(2, dtype=torch.long))):
        with pytest.raises(ValueError, match=message):
            call(x)


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="argument 'network': expected a Network, got int"):
        EquilibriumNet(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"argument 'weight_gain': expected 2 \(one per connection\) or 3"):
        make(weight_gain=[1.0])
    net, (x, _) = make(), batch()
    wrong = {name: p[:1] for name, p in net.named_parameters()}
    with pytest.raises(ValueError, match=r"connections.0.weight': expected shape \[4, 1, 3, 3\]"):
        torch.func.functional_call(net, wrong, (x,))


def test_data_parallel_is_refused() -> None:
    """What nn.DataParallel calls on every module before its first batch on several devices."""
    message = r"nn\.DataParallel is not supported: .* Use torch\.nn\.parallel\.DistributedDataParallel"
    with pytest.raises(RuntimeError, match=message):
        make()._replicate_for_data_parallel()


def second(net: EquilibriumNet, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    return slope.square().sum().backward()


def dual(net: EquilibriumNet, x: Tensor) -> Any:
    with forward_ad.dual_level(), torch.no_grad():
        return net(forward_ad.make_dual(x, torch.ones_like(x)))


def of_parameters(net: EquilibriumNet, x: Tensor) -> Any:
    given = {name: p.detach() for name, p in net.named_parameters()}
    return torch.func.jvp(lambda t: torch.func.functional_call(net, t, (x,)), (given,), (given,))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (second, "a derivative of its gradients was asked for"),
        (lambda net, x: torch.func.hessian(lambda x: net(x).sum())(x), "forward-mode differentiation"),
        (lambda net, x: torch.func.jvp(net, (x,), (x,)), "forward-mode differentiation"),
        (dual, "forward-mode differentiation"),
        (of_parameters, "forward-mode differentiation"),
        (lambda net, x: torch.func.vmap(lambda x: net(x[None]))(x), "vmap .* cannot run a relaxation"),
        (lambda net, x: torch.func.jacrev(net)(x), "vmap .* cannot run a relaxation"),
        (lambda net, x: torch.func.grad(lambda x: torch.func.grad(lambda x: net(x).sum())(x).sum())(x), "a derivative"),
    ],
)
def test_other_derivatives_are_refused(use: Callable[[EquilibriumNet, Tensor], Any], message: str) -> None:
    net, (x, _) = make(), batch()
    with pytest.raises(RuntimeError, match=f"EquilibriumNet: {message}"):
        use(net, x)


def test_identity_readout() -> None:
    """A feature extractor: the outputs are states."""
    network = Network(NETWORK.shapes, NETWORK.connections, Head(2, None, "mse"))
    net, (x, _) = EquilibriumNet(network, seed=0), batch()
    assert torch.equal(net(x), net.states(x)[2])
    assert {name.split(".")[0] for name in net.state_dict()} == {"connections", "nodes"}
