"""Equilibrium Propagation on a network: the free phase, the nudged phases, and the gradients from their contrast."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from . import backends, reference
from .config import RelaxConfig
from .contrasts import Nudged, Ready, contrast_gradients, tile
from .equilibrium import Equilibrium, tested
from .network import Network, Shape
from .parameters import Parameters
from .plan import Form, Plan, Step, compile_plan
from .relaxation import Relaxation
from .stages import run_stages, stored

log = logging.getLogger("ep_kernels")
# The states form subtracts states that differ by about beta k^(levels - 1) in the lowest layer. How many eps of their
# dtype that has to be, with phases of both signs (cosine of that layer 0.89 at 8 eps, 0.999 at 84) and with one phase,
# compared with a free state that was relaxed otherwise (0.26 at 84 eps, 0.986 at 1,700).
LEAST_EPS = {2: 32, 1: 512}


@torch.no_grad()
def free_phase(
    network: Network,
    parameters: Parameters,
    x: Tensor,
    config: RelaxConfig | None = None,
    *,
    states: Sequence[Tensor | None] | None = None,
    keep: bool = False,
    backend: str | None = None,
) -> Equilibrium:
    """Relax with beta = 0 from zero states, or from ``states``, for ``free_steps`` sweeps.

    A sweep updates every node once, in the order of the schedule (docs/concepts.md; Scellier & Bengio 2017, with the
    feedback gain k):

        a^l  = b^l + sum_{c into l} drive_c + sum_{c out of l} k^(level(dst) - level(l)) W_c^T * P_c^-1(s^dst)
        s^l <- (1 - eta) s^l + eta clip(gamma a^l, lo, hi)

    Sweeps after the first move a state omega times as far, within the box (``over_relaxation``).

    Args:
        network: what is relaxed.
        parameters: its tensors.
        x: the clamped input, [B, C, H, W] or [B, F], in the dtype and on the device of the parameters.
        config: how; default: ``RelaxConfig()``.
        states: warm start, per node [B, ...] (index 0 is not read), in x's dtype or float16; the config's ``start`` is
            then not read.
        keep: keep what the nudged phases need (preactivations, up-to-date winners).
        backend: name; None is the current one (:func:`ep_kernels.backend`).

    Returns:
        The equilibrium, with states [B, ...] per node, the residual [B] of every sample, and (when asked for) steps,
        ``converged`` and a ``message`` that says what to change.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device.
        ConvergenceError: a residual is above ``tol`` at the end, with ``on_fail="raise"``.
        BackendError: a backend asked for by name cannot run, with the reason.
    """
    config = config or RelaxConfig()
    _check_input("free_phase", network, parameters, x)
    if states is not None:
        _check_states(network, states, x)
    relaxed = run_stages(network, parameters, x, config, states, keep=keep, backend=backend)
    return tested(
        Equilibrium(
            [s for s in relaxed.states if s is not None],
            relaxed.preactivations,
            relaxed.drives,
            relaxed.winners,
            relaxed.residual,
            network,
            config,
        )
    )


@torch.no_grad()
def nudged_phase(
    network: Network,
    parameters: Parameters,
    equilibrium: Equilibrium,
    targets: Sequence[Tensor],
    config: RelaxConfig | None = None,
    *,
    extra: Mapping[int, Tensor] | None = None,
    backend: str | None = None,
) -> Nudged:
    """Relax with ±beta for ``nudged_steps`` sweeps from a free equilibrium found with ``keep=True``.

    The steps of :func:`free_phase` with one more term, the nudge of all heads' losses L (Scellier & Bengio 2017; both
    signs: Laborieux et al. 2021):

        a^l = (as there) - beta k^(N - level(l)) dL/ds^l

    In the delta form (docs/concepts.md) the unknown is ``d^l = s^l - s_free^l``, times a power of two per node; with
    ``estimator="tangent"`` it is the derivative of the states by beta. ``coupled`` and ``contrastive`` clamp the output
    units in place of their nudge.

    Args:
        network: what was relaxed.
        parameters: the tensors that the free phase used.
        equilibrium: of :func:`free_phase` with ``keep=True``, of B samples.
        targets: per head (readout, then local heads), [B, ...] in the shape of its output: probabilities (one-hot
            labels) or values.
        config: as of the free phase; default: ``RelaxConfig()``.
        extra: by node, dL/ds of further losses per sample, [B, ...], held constant through the phase.
        backend: name; None is the current one (:func:`ep_kernels.backend`).

    Returns:
        Deltas per node, [2B, ...] (+beta first) or, of one phase, [B, ...]; their scales, and the residual of every
        sweep.

    Raises:
        ValueError: an equilibrium without ``keep``; targets or extra of the wrong shape, dtype or device; an estimator
            that does not fit the readout or the feedback weights.
        BackendError: a backend asked for by name cannot run, with the reason.
    """
    config = config or RelaxConfig()
    extra = dict(extra or {})
    if not equilibrium.preactivations:
        raise ValueError("nudged_phase: argument 'equilibrium': expected one found with keep=True, got one without")
    x = equilibrium.states[0]
    _check_targets("nudged_phase", network, targets, extra, equilibrium.states)
    _check_estimator("nudged_phase", network, config, extra)
    free = [x, *stored(equilibrium.states[1:], x, config)]
    form = config.nudge_form
    clamped, phases = config.clamped_nodes(network), config.phases
    beta = _signed_beta(config)
    scales = delta_scales(network, beta) if form != "states" else [1.0] * len(network.shapes)
    plan = compile_plan(
        network,
        config.schedule,
        "nudged",
        form=form,
        winners=config.winners,
        linear_nudge=config.linear_nudge,
        warm=form == "states",
        kept=frozenset(c for c in equilibrium.drives if network.connections[c].src not in clamped and form == "states"),
        extra=frozenset(extra),
        clamped=clamped,
        steps=config.nudged_steps,
    )
    if form != "states":
        _warn_unreached(network, plan, config.schedule, config.nudged_steps, clamped)
    else:
        dtype = config.storage or x.dtype
        least = least_nudge(network, dtype, LEAST_EPS[phases])
        if abs(beta) < least:
            _warn_small_beta(network.feedback_gain, network.top, config.estimator, dtype, least)
    batch = phases * x.shape[0]
    count = len(network.connections)
    top = network.readout.node
    if form == "states":
        start: list[Tensor | None] = [tile(s, phases) for s in free]
    else:
        start = [None] * len(network.shapes)
    if config.clamps:
        start[top] = _clamped(free[top], targets[0], beta, form, scales[top])
    ratio = [scales[conn.dst] / scales[conn.src] if conn.src else 1.0 for conn in network.connections]
    relaxed = backends.relax(
        Relaxation(
            network,
            plan,
            config.nudged_steps,
            parameters.weights,
            parameters.biases,
            start,
            batch,
            drive_gains=ratio,
            feedback_gains=[network.feedback_coefficient(c) / ratio[c] for c in range(count)],
            nudge_gains=[
                -beta * network.nudge_coefficient(i) * scales[i] if i else 0.0 for i in range(len(network.shapes))
            ],
            scales=scales,
            free=free,
            preactivations=[t if t is not None else x for t in equilibrium.preactivations],
            drives=equilibrium.drives if form == "states" else {},
            winners=equilibrium.winners,
            head_weights=parameters.head_weights,
            head_biases=parameters.head_biases,
            targets=targets,
            extra=extra,
            damping=config.damping,
            form=form,
            frozen=config.winners == "frozen",
            phases=phases,
            operands=config.operands,
            storage=config.storage,
            keep=config.winners == "live",
            feedback_weights=parameters.feedback_weights,
        ),
        backend,
    )
    deltas: list[Tensor | None] = [None]
    for before, state in zip(free[1:], relaxed.states[1:], strict=True):
        assert state is not None
        deltas.append(state.to(x.dtype) - tile(before.to(x.dtype), phases) if form == "states" else state)
    centre = 0.0 if form == "tangent" else 0.5
    return Nudged(deltas, scales, phases, beta, centre, relaxed.residual, relaxed.winners)


def ep_gradients(
    network: Network,
    parameters: Parameters,
    x: Tensor,
    targets: Sequence[Tensor],
    config: RelaxConfig | None = None,
    *,
    states: Sequence[Tensor | None] | None = None,
    extra: Mapping[int, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Parameters, Equilibrium]:
    """One EP step: :func:`free_phase`, :func:`nudged_phase` and :func:`contrast_gradients` in a row.

        dL/dW_c = -k^(level(dst) - N) ( d<s^dst, drive_c>/dW at s(+beta) - the same at s(-beta) ) / (2 beta)

    averaged over the batch (Scellier & Bengio 2017; the symmetric estimator: Laborieux et al. 2021; others:
    ``RelaxConfig.estimator``). L is the loss of all heads, each times its weight.

    Args:
        network: what is trained.
        parameters: its tensors.
        x: the clamped input, [B, C, H, W] or [B, F], in the dtype and on the device of the parameters.
        targets: per head (readout, then local heads), [B, ...] in the shape of its output: probabilities (one-hot
            labels, as of :func:`targets_for`) or values.
        config: of both phases; default: ``RelaxConfig()``.
        states: warm start of the free phase, per node [B, ...] (index 0 is not read).
        extra: by node, dL/ds of further losses per sample, [B, ...], held constant through the nudged phases.
        backend: name; None is the current one (:func:`ep_kernels.backend`).

    Returns:
        The gradients of the batch-mean loss, in the structure and shapes of ``parameters``, and the free equilibrium.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device; an estimator that does not fit the network.
        ConvergenceError: the free phase ended above ``tol``, with ``on_fail="raise"``.
        BackendError: a backend asked for by name cannot run, with the reason.
    """
    config = config or RelaxConfig()
    _check_estimator("ep_gradients", network, config, extra or {})
    equilibrium = free_phase(network, parameters, x, config, states=states, keep=True, backend=backend)
    gradients, _ = nudged_gradients(network, parameters, equilibrium, targets, config, extra=extra, backend=backend)
    return gradients, equilibrium


@torch.no_grad()
def nudged_gradients(
    network: Network,
    parameters: Parameters,
    equilibrium: Equilibrium,
    targets: Sequence[Tensor],
    config: RelaxConfig | None = None,
    *,
    extra: Mapping[int, Tensor] | None = None,
    backend: str | None = None,
    ready: Ready | None = None,
) -> tuple[Parameters, Nudged]:
    """Nudged phases from a free equilibrium found with ``keep=True``, and the gradients from their contrast.

    :func:`nudged_phase`, then :func:`contrast_gradients`. With ``five_phase`` both are done at beta and at 2 beta, and
    extrapolated as Richardson does, which leaves an error of beta^4 where one symmetric pair leaves beta^2:

        g = 4/3 g(beta) - 1/3 g(2 beta)

    Args:
        network: what was relaxed.
        parameters: the tensors that the free phase used.
        equilibrium: of :func:`free_phase` with ``keep=True``, of B samples.
        targets: per head (readout, then local heads), [B, ...] in the shape of its output.
        config: as of the free phase; default: ``RelaxConfig()``.
        extra: by node, dL/ds of further losses per sample, [B, ...], held constant through the phases.
        backend: name; None is the current one (:func:`ep_kernels.backend`).
        ready: called with each gradient as soon as it is computed: see :func:`contrast_gradients`.

    Returns:
        The gradients of the batch-mean loss, in the structure and shapes of ``parameters``, and the nudged phases (of
        ``five_phase`` those at +-beta).

    Raises:
        ValueError: see :func:`nudged_phase`.
        BackendError: a backend asked for by name cannot run, with the reason.
    """
    config = config or RelaxConfig()

    def at(chosen: RelaxConfig, ready: Ready | None) -> tuple[Parameters, Nudged]:
        nudged = nudged_phase(network, parameters, equilibrium, targets, chosen, extra=extra, backend=backend)
        operands = chosen.operands
        found = contrast_gradients(
            network, parameters, equilibrium, nudged, targets, operands=operands, backend=backend, ready=ready
        )
        return found, nudged

    if config.estimator != "five_phase":
        return at(config, ready)
    near, nudged = at(config, None)
    named = near.named()

    def extrapolate(name: str, gradient: Tensor) -> None:
        gradient.copy_(4 / 3 * named[name] - 1 / 3 * gradient)
        if ready is not None:
            ready(name, gradient)

    return at(replace(config, beta=2 * config.beta), extrapolate)[0], nudged


def readout(network: Network, parameters: Parameters, equilibrium: Equilibrium, head: int = 0) -> Tensor:
    """Outputs of a head at the equilibrium: ``z = V pool(s) + c``, or ``z = s`` of an identity head.

    Args:
        network: what was relaxed.
        parameters: its tensors.
        equilibrium: of :func:`free_phase`, of B samples.
        head: its index in ``network.heads``; 0 is the readout.

    Returns:
        Logits, or values for ``mse``, [B, outputs] (of a head on a map that is pointwise or the identity, [B, C, H, W])
        in the parameters' dtype.

    Raises:
        IndexError: no such head.
    """
    spec = network.heads[head]
    state = equilibrium.states[spec.node].to(parameters.weights[0].dtype)
    return reference.head_output(spec, state, parameters.head_weights[head], parameters.head_biases[head])


def targets_for(network: Network, labels: Tensor, classes: int, dtype: torch.dtype) -> list[Tensor]:
    """One-hot targets of every head from integer labels.

    Args:
        network: for its number of heads.
        labels: int64 [B], in 0 .. classes - 1.
        classes: outputs of every head.
        dtype: of the targets: the parameters'.

    Returns:
        Per head the same tensor, [B, classes].

    Raises:
        ValueError: a label out of range. On CUDA, which is not waited for, a RuntimeError instead, from a later call.
    """
    expected = f"targets_for: argument 'labels': expected 0 to {classes - 1} (classes)"
    if labels.device.type == "cuda":
        torch._assert_async(((labels >= 0) & (labels < classes)).all(), expected)
    elif labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"{expected}, got {int(labels.min())} to {int(labels.max())}")
    one_hot = torch.nn.functional.one_hot(labels, classes).to(dtype)
    return [one_hot] * len(network.heads)


def delta_scales(network: Network, beta: float) -> list[float]:
    """Power-of-two scale of each node's delta: about 1 / (beta k^(N-l)), so that a scaled delta is of order 1."""
    scales = [1.0]
    for i in range(1, len(network.shapes)):
        depth = network.top - network.levels[i]
        exponent = round(-math.log2(abs(beta)) - depth * math.log2(network.feedback_gain))
        scales.append(math.ldexp(1.0, min(max(exponent, -100), 100)))
    return scales


def least_nudge(network: Network, dtype: torch.dtype, eps: float) -> float:
    """Strength of a nudge that moves the lowest layer by ``eps`` times the rounding of states in ``dtype``."""
    return eps * torch.finfo(dtype).eps / network.feedback_gain ** (network.top - 1)


@lru_cache(maxsize=64)  # once for each setting, whatever beta is: five phases have two
def _warn_small_beta(gain: float, levels: int, estimator: str, dtype: torch.dtype, least: float) -> None:
    """Say so when the states form subtracts states that hardly differ."""
    log.warning(
        "nudged_phase: form 'states' in %s, with feedback gain %g, %d levels and estimator '%s': beta is so small that "
        "the phases differ by little more than rounding, and lower layers get noise for gradients. Use form='delta'%s",
        dtype,
        gain,
        levels,
        estimator,
        f", or beta of {least:.1g} and more" if least <= 1 else "",
    )


@lru_cache(maxsize=64)  # once for each network and setting
def _warn_unreached(network: Network, plan: Plan, schedule: str, nudged_steps: int, clamped: frozenset[int]) -> None:
    """Say so when the nudge has not reached every node after K sweeps: those get zero gradients."""
    launches = [launch for t in range(nudged_steps) for launch in plan.sweep(t)]
    stepped = {launch.node for launch in launches if isinstance(launch, Step)}
    missing = sorted(set(range(1, len(network.shapes))) - stepped - clamped)
    if missing:
        log.warning(
            "nudged_phase: %d sweeps of schedule '%s' do not carry the nudge to nodes %s: their gradients are zero. "
            "Raise nudged_steps (sync needs one sweep for each layer, even_odd half as many), or use schedule 'sweep'",
            nudged_steps,
            schedule,
            missing,
        )


def _signed_beta(config: RelaxConfig) -> float:
    if config.estimator in ("tangent", "contrastive"):
        return 1.0
    return -config.beta if config.estimator == "negative" else config.beta


def _clamped(free: Tensor, target: Tensor, beta: float, form: Form, scale: float) -> Tensor:
    """Where coupled learning holds the output units: ``beta`` of the way from the free state to the target."""
    delta = beta * (target - free.to(target.dtype))
    return (free + delta if form == "states" else scale * delta).to(free.dtype)


def _check_input(fn: str, network: Network, parameters: Parameters, x: Tensor) -> None:
    if tuple(x.shape[1:]) != network.shapes[0] or x.dim() < 2:
        raise ValueError(f"{fn}: argument 'x': expected shape [B, {_list(network.shapes[0])}], got {list(x.shape)}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"{fn}: argument 'x': expected a floating-point dtype, got {x.dtype}")
    for group in ("head_weights", "head_biases"):
        own = getattr(parameters, group)
        for h, head in enumerate(network.heads):
            if head.tied is not None and (len(own) <= h or own[h] is not own[head.tied]):
                raise ValueError(
                    f"{fn}: argument 'parameters': expected {group}[{h}] to be the very tensor {group}[{head.tied}], "
                    f"as head {h} is tied to head {head.tied}; got another or none (Parameters.from_named shares them)"
                )
    named, shapes = parameters.named(), Parameters.shapes(network)
    if named.keys() != shapes.keys():
        odd = ", ".join(sorted(named.keys() ^ shapes.keys()))
        raise ValueError(f"{fn}: argument 'parameters': expected those of the network, got a difference in {odd}")
    for name, tensor in named.items():
        _check_tensor(fn, f"parameters: {name}", tensor, shapes[name], x)


def _check_states(network: Network, states: Sequence[Tensor | None], x: Tensor) -> None:
    if len(states) != len(network.shapes):
        raise ValueError(f"free_phase: argument 'states': expected {len(network.shapes)} entries, got {len(states)}")
    for i, (state, shape) in enumerate(zip(states, network.shapes, strict=True)):
        if i:
            _check_tensor("free_phase", f"states[{i}]", state, (x.shape[0], *shape), x, torch.float16)


def _check_tensor(
    fn: str, name: str, tensor: Tensor | None, shape: Shape, like: Tensor, other: torch.dtype | None = None
) -> None:
    """Raise ValueError unless the tensor has this shape, the dtype (or ``other``) and the device of ``like``."""
    if tensor is None or tuple(tensor.shape) != tuple(shape):
        got = None if tensor is None else list(tensor.shape)
        raise ValueError(f"{fn}: argument '{name}': expected shape {list(shape)}, got {got}")
    if tensor.dtype not in (like.dtype, other) or tensor.device != like.device:
        dtypes = f"{like.dtype}" if other in (None, like.dtype) else f"{like.dtype} or {other}"
        raise ValueError(
            f"{fn}: argument '{name}': expected {dtypes} on {like.device} (as 'x'), "
            f"got {tensor.dtype} on {tensor.device}"
        )


def _check_targets(
    fn: str, network: Network, targets: Sequence[Tensor], extra: Mapping[int, Tensor], states: Sequence[Tensor]
) -> None:
    if len(targets) != len(network.heads):
        raise ValueError(f"{fn}: argument 'targets': expected {len(network.heads)} (one per head), got {len(targets)}")
    x = states[0]
    for h, (head, target) in enumerate(zip(network.heads, targets, strict=True)):
        shape = (x.shape[0], *head.output_shape(network.shapes[head.node]))
        _check_tensor(fn, f"targets[{h}]", target, shape, x)
    for node, tensor in extra.items():
        if not 1 <= node < len(states):
            raise ValueError(f"{fn}: argument 'extra': expected nodes 1 to {len(states) - 1}, got {node}")
        _check_tensor(fn, f"extra[{node}]", tensor, tuple(states[node].shape), x)


def _check_estimator(fn: str, network: Network, config: RelaxConfig, extra: Mapping[int, Tensor]) -> None:
    readout = network.readout
    if config.clamps and (readout.loss, readout.outputs) != ("mse", None):
        raise ValueError(
            f"{fn}: argument 'config': expected an mse readout (output units inside the dynamics) with "
            f"estimator '{config.estimator}', got a {readout.loss} readout"
        )
    if config.clamps and (readout.pool is not None or readout.weight != 1):
        raise ValueError(
            f"{fn}: argument 'config': expected a readout without pool and of weight 1 with estimator "
            f"'{config.estimator}', which clamps the output units themselves, got pool={readout.pool} and "
            f"weight={readout.weight:g}"
        )
    if config.clamps and (readout.node in extra or any(head.node == readout.node for head in network.local_heads)):
        raise ValueError(
            f"{fn}: argument 'config': expected no other loss on the output units (node {readout.node}), which "
            f"estimator '{config.estimator}' clamps, got a local head or an extra nudge there"
        )
    if network.feedback == "separate" and config.winners == "live":
        raise ValueError(
            f"{fn}: argument 'config': expected frozen winners with separate feedback weights, got live ones"
        )


def _list(shape: Shape) -> str:
    return ", ".join(map(str, shape))
