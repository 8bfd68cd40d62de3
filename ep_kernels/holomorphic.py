"""Holomorphic Equilibrium Propagation (Laborieux & Zenke 2022): the exact gradient from nudges of a finite size.

With an activation that is complex differentiable the equilibrium s(beta) is a holomorphic function of the nudging
strength, and its derivative at 0 is a mean over a circle (Cauchy's formula). N points on that circle give it with an
error of order ``radius^N``: two points are the symmetric estimator, each two more remove two more orders.

The same compiled plan runs as for every other estimator. A complex state is two real ones side by side in the batch,
all real parts before all imaginary ones: drives, feedbacks, pooling and their adjoints are linear with real weights,
and only activation and nudge see the two together.
"""

from __future__ import annotations

import cmath
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from . import reference
from .config import RelaxConfig
from .contrasts import add_tied, map_gradient, tile
from .equilibrium import Equilibrium, tested
from .network import Head, Network
from .parameters import Parameters
from .plan import Step, compile_plan
from .relaxation import Relaxation, Relaxed, _Run
from .solver import _check_input, _check_targets, least_nudge

log = logging.getLogger("ep_kernels")
LEAST_EPS = (
    4096  # rounding of states that a nudge must be worth in the lowest layer: cosine 0.975 at 1,700, 0.88 at 210
)
SETTLED = 0.1  # of the largest change by the nudge: what its last sweep may still move

Activation = Literal["sigmoid", "tanh"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}


@torch.no_grad()
def holomorphic_gradients(
    network: Network,
    parameters: Parameters,
    x: Tensor,
    targets: Sequence[Tensor],
    config: RelaxConfig | None = None,
    *,
    points: int = 4,
    radius: float = 0.2,
    activation: Activation = "sigmoid",
) -> tuple[Parameters, Equilibrium]:
    """Gradients of the batch-mean loss at the free equilibrium of a smooth network, from N complex nudges.

    ``s^l <- (1 - eta) s^l + eta activation(gamma a^l)`` with the ``a^l`` of docs/concepts.md (linear nodes: gamma a^l
    itself), and

        dL/dW_c = -k^(level(dst)-N) Re[ 1/(n r) sum_j exp(-i t_j) d<s^dst, drive_c>/dW at beta_j ]

    with beta_j = r exp(i t_j) and t_j = 2 pi j / n; heads get the mean over the points of their ordinary gradients.
    Winners of max pooling are those of the free equilibrium. Runs in plain PyTorch (the reference backend's run), on
    2 n copies of the batch: for small networks.

    Args:
        network: without separate feedback weights.
        parameters: its tensors, real.
        x: the clamped input, [B, ...], real.
        targets: per head, as for :func:`ep_kernels.nudged_phase`, real.
        config: of it ``schedule``, ``free_steps``, ``nudged_steps``, ``linear_nudge``, ``damping``, ``tol`` and
            ``on_fail`` are read. The free phase is not over-relaxed. ``beta``, ``estimator``, ``form`` and ``winners``
            are what this estimator replaces.
        points: n >= 2; 2 is the symmetric estimator at beta = ``radius``.
        radius: r > 0. It must be smaller than the distance to the nearest singularity of s(beta); beyond it the
            gradients are finite and wrong, and where the relaxation with complex nudges does not converge, a warning
            says so. The nudge moves the lowest layer by about ``r k^(levels - 1)``: a warning asks for float64 where
            that is within 4096 times the rounding of the states (the slope of the sigmoid takes its part too).
        activation: ``sigmoid`` (logistic) or ``tanh``, in place of the clip to the box.

    Returns:
        The gradients, and the free equilibrium.

    Raises:
        ValueError: an argument out of its range, or of the wrong shape, dtype or device; separate feedback weights; a
            cosine head, whose loss is not holomorphic; operands (early ones too) or storage of a lower precision; a
            feed-forward start.
        ConvergenceError: see :func:`ep_kernels.free_phase`.
    """
    config = config or RelaxConfig()
    _check(network, config, points, radius, activation)
    _check_input("holomorphic_gradients", network, parameters, x)
    _check_targets("holomorphic_gradients", network, targets, {}, [x])
    if radius < least_nudge(network, x.dtype, LEAST_EPS):
        _warn_rounding(network, x.dtype, radius)
    free = _relax(network, parameters, [x, *[None] * (len(network.shapes) - 1)], config, activation)
    real = [s[: len(x)] for s in free.states if s is not None]
    winners = {c: won[: len(x)] for c, won in free.winners.items()}
    circle = [cmath.rect(1.0, 2 * math.pi * j / points) for j in range(points)]
    start: list[Tensor | None] = [tile(s, points) for s in real]
    nudged = _relax(network, parameters, start, config, activation, circle, radius, targets, winners)
    preactivations = [a if a is None else a[: len(x)] for a in free.preactivations]
    residuals = free.residual[:, : len(x)]
    equilibrium = tested(Equilibrium(real, preactivations, {}, winners, residuals, network, config))
    states = [s for s in nudged.states if s is not None]
    copies = [torch.cat([tile(s, points), torch.zeros_like(tile(s, points))]) for s in real]
    moved = [s - before for s, before in zip(states, copies, strict=True)]
    if len(x):
        largest = max(float(_joined(d).abs().max()) for d in moved[1:])
        if not float(nudged.residual[-1].max()) <= SETTLED * largest:
            _warn_unsettled(network, config, points, radius, activation)
    return _gradients(network, parameters, real, states, moved, targets, winners, circle, radius), equilibrium


@lru_cache(maxsize=64)  # once for each setting
def _warn_rounding(network: Network, dtype: torch.dtype, radius: float) -> None:
    log.warning(
        "holomorphic_gradients: radius %g with feedback gain %g and %d levels moves the lowest layer too little "
        "for the rounding of %s, and lower layers get noise for gradients. Use float64, or a larger feedback gain",
        radius,
        network.feedback_gain,
        network.top,
        dtype,
    )


@lru_cache(maxsize=64)  # once for each setting
def _warn_unsettled(network: Network, config: RelaxConfig, points: int, radius: float, activation: str) -> None:
    log.warning(
        "holomorphic_gradients: the phases with %d nudges of radius %g had not converged: the last of %d sweeps moved "
        "states by more than a tenth of what the nudge does. Gradients may be wrong: raise nudged_steps, or lower the "
        "radius (beyond the nearest singularity of s(beta) no number of sweeps is enough)",
        points,
        radius,
        config.nudged_steps,
    )


def _relax(
    network: Network,
    parameters: Parameters,
    start: Sequence[Tensor | None],
    config: RelaxConfig,
    activation: Activation,
    circle: Sequence[complex] = (0.0,),
    radius: float = 0.0,
    targets: Sequence[Tensor] = (),
    winners: dict[int, Tensor] | None = None,
) -> Relaxed:
    """A phase with nudges ``radius * circle``; without winners the free phase, where all imaginary parts are zero."""
    free = winners is None
    x = start[0]
    assert x is not None
    plan = compile_plan(
        network,
        config.schedule,
        "free" if free else "nudged",
        winners="live" if free else "frozen",
        linear_nudge=config.linear_nudge,
        warm=not free,
        steps=config.free_steps if free else config.nudged_steps,
    )
    nodes, count = len(network.shapes), len(network.connections)
    relaxation = Relaxation(
        network,
        plan,
        config.free_steps if free else config.nudged_steps,
        parameters.weights,
        parameters.biases,
        [None if s is None else torch.cat([s, torch.zeros_like(s)]) for s in start],
        2 * len(x),
        drive_gains=[1.0] * count,
        feedback_gains=[network.feedback_coefficient(c) for c in range(count)],
        nudge_gains=[-radius * network.nudge_coefficient(i) if i else 0.0 for i in range(nodes)],
        scales=[1.0] * nodes,
        winners=winners or {},
        head_weights=parameters.head_weights,
        head_biases=parameters.head_biases,
        targets=targets,
        damping=config.damping,
        tol=config.tol if free else 0.0,
        frozen=not free,
        phases=len(circle),
        keep=free,
    )
    return _ComplexRun(relaxation, circle, _FUNCTIONS[activation]).run()


class _ComplexRun(_Run):
    """The reference run, in states form, whose batch holds real parts and then imaginary parts."""

    def __init__(self, r: Relaxation, circle: Sequence[complex], activation: Callable[[Tensor], Tensor]):
        super().__init__(r)
        self.activation = activation
        weight = r.weights[0]
        dtype = torch.promote_types(weight.dtype, torch.complex64)
        points = torch.tensor(circle, dtype=dtype, device=weight.device)
        self.circle = points.repeat_interleave(r.batch // 2 // len(circle))  # of each complex sample

    def nudge(self, node: int) -> None:
        """``e^(i t_j) dL/ds`` at the complex states."""
        r, state = self.r, self.state(node)
        assert state is not None
        total = torch.zeros_like(state)
        for h, target in enumerate(r.targets):
            head, weight = r.network.heads[h], r.head_weights[h]
            if head.node == node:
                z = _output(head, state, weight, r.head_biases[h])
                error = _parts(_error(head, z, tile(target, r.phases)) * _over(self.circle, z))
                # what an mse head with this error sends back: the adjoint of the head's map
                squared = replace(head, loss="mse", weight=1.0)
                total = total + reference.head_gradient(squared, torch.zeros_like(state), weight, None, -error)
        self.nudges[node] = total

    def step(self, step: Step) -> None:
        r, node = self.r, step.node
        old = self.state(node)
        a = self.new((r.batch, *r.network.shapes[node])).zero_()
        old = a if old is None else old
        bias = r.biases[node]
        if bias is not None:
            shift = torch.zeros_like(a)
            shift[: len(a) // 2] = bias.view(-1, *[1] * (a.dim() - 2))  # of the real parts alone
            a = a + shift
        for c in step.finished:
            a = a + r.drive_gains[c] * self.drives[c]
        for c in step.below:
            a = a + r.drive_gains[c] * self.convolve(c)
        for c in step.above:
            a = a + r.feedback_gains[c] * self.feedback(c)
        if step.nudged:
            a = a + r.nudge_gains[node] * self.nudges[node]
        self.pre[node] = r.network.slope * a
        moved = _joined(r.network.slope * a)
        moved = moved if node in r.network.linear_nodes else self.activation(moved)
        new = reference.damp(_joined(old), moved, self.damping)
        change = (new - _joined(old)).abs().flatten(1).amax(1)
        self.change = torch.maximum(self.change, change.repeat(2))
        if r.plan.deferred:
            self.pending[node] = _parts(new)
        else:
            self.states[node] = _parts(new)


def _gradients(
    network: Network,
    parameters: Parameters,
    free: Sequence[Tensor],
    states: Sequence[Tensor],
    moved: Sequence[Tensor],
    targets: Sequence[Tensor],
    winners: dict[int, Tensor],
    circle: Sequence[complex],
    radius: float,
) -> Parameters:
    """``Re[1/(n r) sum_j exp(-i t_j) dF/dW]``, batch mean; ``states`` are real parts, then imaginary ones.

    The sum over the circle of what does not depend on the nudge is zero. It is left out, as rounding would leave noise
    of it: ``sum_j e_j <s^dst, s^src> = sum_j e_j <d^dst, s^src> + <s_free^dst, sum_j e_j d^src>``, with ``e_j = exp(-i
    t_j)`` and ``d`` (``moved``) the change of the states by the nudge.
    """
    n, batch = len(circle), states[0].shape[0] // 2 // len(circle)
    dtype = torch.promote_types(states[0].dtype, torch.complex64)
    back = torch.tensor(circle, dtype=dtype, device=states[0].device).conj().repeat_interleave(batch)
    weights: list[Tensor] = []
    biases: list[Tensor | None] = [None] * len(network.shapes)
    for c, conn in enumerate(network.connections):
        scale = -1 / (network.nudge_coefficient(conn.dst) * radius * n * max(batch, 1))
        turned = _joined(moved[conn.dst])
        above = _parts(turned * _over(back, turned)) * scale
        above = torch.cat([above[: n * batch], -above[n * batch :]])  # Re(a b) = Re a Re b - Im a Im b
        shape, won = parameters.weights[c].shape, winners[c] if conn.pool == "max" else None
        # one phase whose delta is all of `above`: the difference of the products is `above` times the source
        weight, _ = reference.contrast(
            states[conn.src],
            None,
            torch.zeros_like(above),
            above,
            shape,
            conn.stride,
            conn.padding,
            conn.pool,
            None if won is None else tile(won, 2 * n),
        )
        if conn.src:
            below = _joined(moved[conn.src])
            below = (below * _over(back, below)).real.unflatten(0, (n, batch)).sum(0) * scale
            above_free = free[conn.dst]
            weight = (
                weight
                + reference.contrast(
                    below, None, above_free, above_free, shape, conn.stride, conn.padding, conn.pool, won
                )[0]
            )
        weights.append(weight)
        real = above[: n * batch]
        biases[conn.dst] = real.sum((0, 2, 3)) if real.dim() == 4 else real.sum(0)
    head_weights: list[Tensor | None] = []
    head_biases: list[Tensor | None] = []
    for h, head in enumerate(network.heads):
        weight_gradient, bias_gradient = _head_gradient(
            head, states[head.node], parameters.head_weights[h], parameters.head_biases[h], tile(targets[h], n)
        )
        head_weights.append(weight_gradient)
        head_biases.append(bias_gradient)
    add_tied(network, head_weights, head_biases)
    return Parameters(weights, biases, head_weights, head_biases)


def _head_gradient(
    head: Head, state: Tensor, weight: Tensor | None, bias: Tensor | None, target: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Real part of the head's gradients, mean over points and batch."""
    if weight is None:
        return None, None
    error = _error(head, _output(head, state, weight, bias), target) / max(state.shape[0] // 2, 1)
    parts = torch.cat([error.real, -error.imag])
    found = map_gradient(head, parts, reference.head_feature(head, state)).view_as(weight)
    return found, error.real.movedim(1, -1).flatten(0, -2).sum(0)


def _output(head: Head, state: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``z``, complex, of a state in real and imaginary parts."""
    z = _joined(reference.head_output(head, state, weight, None))
    return z if bias is None else z + bias.view(-1, *[1] * (z.dim() - 2))


def _error(head: Head, z: Tensor, target: Tensor) -> Tensor:
    """dL/dz, extended to complex outputs (:func:`ep_kernels.reference.head_error`)."""
    if head.loss == "mse":
        return reference.head_error(head, z, target)
    raised = z / head.temperature
    raised = (raised - raised.real.amax(1, keepdim=True)).exp()  # the shift cancels
    return head.weight * head.temperature * (raised / raised.sum(1, keepdim=True) - target)


def _joined(parts: Tensor) -> Tensor:
    """Complex [n, ...] of [2n, ...]."""
    return torch.complex(*parts.chunk(2)) if parts.shape[0] else torch.complex(parts, parts)


def _parts(z: Tensor) -> Tensor:
    """[2n, ...] of complex [n, ...]."""
    return torch.cat([z.real, z.imag])


def _over(samples: Tensor, like: Tensor) -> Tensor:
    """One number per sample, to be multiplied with ``like``."""
    return samples.view(-1, *[1] * (like.dim() - 1))


def _check(network: Network, config: RelaxConfig, points: int, radius: float, activation: str) -> None:
    for name, ok, expected, got in (
        ("points", isinstance(points, int) and points >= 2, "an integer >= 2", points),
        ("radius", math.isfinite(radius) and radius > 0, "a finite number > 0", radius),
        ("activation", activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}", activation),
        ("network", network.feedback == "tied", "tied feedback (there is no energy otherwise)", network.feedback),
        (
            "network",
            all(head.loss != "cosine" for head in network.heads),
            "heads of cross_entropy or mse (a cosine is not holomorphic)",
            "cosine",
        ),
        ("config", config.operands is None, "operands=None (the parameters' precision)", config.operands),
        ("config", config.storage is None, "storage=None (the parameters' precision)", config.storage),
        (
            "config",
            config.early_operands is None,
            "early_operands=None (the parameters' precision)",
            config.early_operands,
        ),
        ("config", config.start == "zero", "start='zero'", config.start),
    ):
        if not ok:
            raise ValueError(f"holomorphic_gradients: argument '{name}': expected {expected}, got {got!r}")
