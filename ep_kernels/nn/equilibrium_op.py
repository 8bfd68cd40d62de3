"""The free phase for autograd and torch.compile: :func:`equilibrium`, whose backward runs the nudged phases.

Eager code goes through a ``torch.autograd.Function``, which torch.func's transforms know too; compiled code through
``torch.ops.ep_kernels.equilibrium``, which a graph holds as one opaque node. Both compute :mod:`ep_kernels.nn.phases`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NoReturn

import torch
from torch import Tensor

from .phases import free_states, known, state_gradients


def equilibrium(
    x: Tensor,
    weights: list[Tensor],
    feedback: list[Tensor],
    biases: list[Tensor],
    key: str,
    backend: str,
    nodes: list[int],
    keep: bool,
) -> tuple[Sequence[Tensor], Tensor]:
    """States of ``nodes``, differentiable in all tensors, and the residual of every sweep; arguments and shapes are
    those of :func:`ep_kernels.nn.phases.free_states`."""
    if torch.compiler.is_compiling():
        states, _, residuals = torch.ops.ep_kernels.equilibrium(x, weights, feedback, biases, key, backend, nodes, keep)
        return states, residuals
    counts = (1, len(weights), len(feedback), len(biases))
    out = _Equilibrium.apply(key, backend, tuple(nodes), keep, counts, x, *weights, *feedback, *biases)  # type: ignore[no-untyped-call]
    return out[: len(nodes)], out[-1]


class _Equilibrium(torch.autograd.Function):
    @staticmethod
    def forward(
        key: str, backend: str, nodes: tuple[int, ...], keep: bool, counts: tuple[int, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        (x,), weights, feedback, biases = _grouped(tensors, counts)
        outputs, saved, residuals = free_states(x, weights, feedback, biases, key, backend, list(nodes), keep)
        return (*outputs, *saved, residuals)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.key, ctx.backend, ctx.nodes, keep, counts, *tensors = inputs
        *found, residuals = output
        saved = found[len(ctx.nodes) :]
        ctx.counts = (*counts, len(ctx.nodes), len(saved))
        ctx.mark_non_differentiable(*saved, residuals)
        ctx.set_materialize_grads(False)
        if keep:
            ctx.save_for_backward(*tensors, *found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        given = {i: g for i, g in zip(ctx.nodes, gradients, strict=False) if g is not None}
        needs = ctx.needs_input_grad[5:]
        if not given:
            return (None,) * (5 + len(needs))
        asked = bool(needs[0]), any(needs[1:])
        nodes = ctx.nodes, tuple(given)
        found = _Gradients.apply(  # type: ignore[no-untyped-call]
            ctx.key, ctx.backend, *nodes, *asked, (*ctx.counts, len(given)), *ctx.saved_tensors, *given.values()
        )
        return (None,) * 5 + _placed(found, needs, *asked)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        _refuse_vmap()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse_forward_mode()


class _Gradients(torch.autograd.Function):
    """The nudged phases, as a function of its own to say why it has no derivative."""

    @staticmethod
    def forward(
        key: str,
        backend: str,
        nodes: tuple[int, ...],
        nudged_nodes: tuple[int, ...],
        for_input: bool,
        for_parameters: bool,
        counts: tuple[int, ...],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        (x,), weights, feedback, biases, outputs, saved, gradients = _grouped(tensors, counts)
        groups = weights, feedback, biases, outputs, saved, gradients
        settings = key, backend, list(nodes), list(nudged_nodes), for_input, for_parameters
        return tuple(state_gradients(x, *groups, *settings))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        _refuse_second()

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        _refuse_vmap()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse_second()


def _grouped(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    rest = iter(tensors)
    return [list(islice(rest, count)) for count in counts]


def _placed(
    found: Sequence[Tensor], needs: Sequence[bool], for_input: bool, for_parameters: bool
) -> tuple[Tensor | None, ...]:
    """A gradient or None for x and each parameter."""
    of_input = found[0] if for_input else None
    rest: Sequence[Tensor | None] = found[int(for_input) :] if for_parameters else [None] * (len(needs) - 1)
    return (of_input, *(g if need else None for g, need in zip(rest, needs[1:], strict=True)))


def _refuse_vmap() -> NoReturn:
    raise RuntimeError(
        "EquilibriumNet: vmap (and jacrev, jacfwd and hessian, which use it) cannot run a relaxation. A relaxation "
        "takes a batch: call the net with [B, ...]; for gradients of each sample call it in a loop"
    )


def _refuse_forward_mode() -> NoReturn:
    raise RuntimeError(
        "EquilibriumNet: forward-mode differentiation (jvp, jacfwd) is not supported: Equilibrium Propagation gives "
        "gradients of a loss, from nudges that it sends back. Use backward(), torch.func.grad or torch.func.vjp"
    )


def _refuse_second() -> NoReturn:
    raise RuntimeError(
        "EquilibriumNet: a derivative of its gradients was asked for (a gradient penalty, a Hessian). They come from "
        "nudged phases, which have none; ep_train.bptt differentiates the relaxation itself"
    )


# --- the same as an op ------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], list[Tensor], Tensor]) -> None:
    x, *groups, ctx.key, ctx.backend, ctx.nodes, _ = inputs
    groups = [[x], *groups, *output[:2]]
    ctx.counts = [len(group) for group in groups]
    ctx.save_for_backward(*(t for group in groups for t in group))
    ctx.set_materialize_grads(False)


def _op_backward(ctx: Any, states: list[Tensor | None], *_: Any) -> tuple[Any, ...]:
    (x,), *groups = _grouped(ctx.saved_tensors, ctx.counts)
    needs = [bool(ctx.needs_input_grad[0]), *(bool(need) for group in ctx.needs_input_grad[1:4] for need in group)]
    given = {i: g for i, g in zip(ctx.nodes, states, strict=True) if g is not None}
    placed: Sequence[Tensor | None] = [None] * len(needs)
    if given:
        asked = needs[0], any(needs[1:])
        settings = ctx.key, ctx.backend, ctx.nodes, list(given), *asked
        found = torch.ops.ep_kernels.equilibrium_backward(x, *groups, list(given.values()), *settings)
        placed = _placed(found, needs, *asked)
    rest = iter(placed[1:])
    return (placed[0], *(list(islice(rest, len(group))) for group in groups[:3]), None, None, None, None)


def _fake_states(
    x: Tensor,
    weights: list[Tensor],
    feedback: list[Tensor],
    biases: list[Tensor],
    key: str,
    backend: str,
    nodes: list[int],
    keep: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    dynamics = known(key)
    net, stored = dynamics.network, dynamics.free.storage or x.dtype
    inner = range(1, len(net.shapes))
    saved: list[Tensor] = []
    if keep:
        saved += [_empty(x, net.shapes[i], stored) for i in inner if i not in nodes]
        saved += [_empty(x, net.shapes[i], x.dtype) for i in inner]
        saved += [_empty(x, net.shapes[net.connections[c].dst], torch.uint8) for c in dynamics.winners]
    outputs = [_empty(x, net.shapes[i], x.dtype) for i in nodes]
    return outputs, saved, x.new_empty(dynamics.free.free_steps, x.shape[0])


def _fake_gradients(
    x: Tensor, weights: list[Tensor], feedback: list[Tensor], biases: list[Tensor], *rest: Any
) -> list[Tensor]:
    for_input, for_parameters = rest[-2:]
    like = ([x] if for_input else []) + ([*weights, *feedback, *biases] if for_parameters else [])
    return [_empty(t, t.shape[1:], x.dtype) for t in like]


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if len(shape) == 3 else torch.contiguous_format
    return torch.empty((like.shape[0], *shape), dtype=dtype, device=like.device, memory_format=layout)


def _register() -> None:
    tensors = "Tensor x, Tensor[] weights, Tensor[] feedback, Tensor[] biases"
    torch.library.define(
        "ep_kernels::equilibrium",
        f"({tensors}, str key, str backend, int[] nodes, bool keep) -> (Tensor[], Tensor[], Tensor)",
    )
    torch.library.define(
        "ep_kernels::equilibrium_backward",
        f"({tensors}, Tensor[] outputs, Tensor[] saved, Tensor[] gradients, str key, str backend, int[] nodes, "
        "int[] nudged_nodes, bool for_input, bool for_parameters) -> Tensor[]",
    )
    torch.library.impl("ep_kernels::equilibrium", "default", free_states)
    torch.library.impl("ep_kernels::equilibrium_backward", "default", state_gradients)
    torch.library.register_fake("ep_kernels::equilibrium", _fake_states)
    torch.library.register_fake("ep_kernels::equilibrium_backward", _fake_gradients)
    torch.library.register_autograd("ep_kernels::equilibrium", _op_backward, setup_context=_setup)
    torch.library.register_autograd("ep_kernels::equilibrium_backward", lambda ctx, *_: _refuse_second())
    for name in ("equilibrium", "equilibrium_backward"):
        torch.library.register_vmap(f"ep_kernels::{name}", lambda *_: _refuse_vmap())


_register()
