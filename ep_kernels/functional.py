"""The ops on tensors, for code of your own: ``drive``, ``feedback``, ``relax_step``, ``contrast``.

Each runs on the current backend (:func:`ep_kernels.backend`), except ``feedback``, which is plain PyTorch on all; what
they must compute is ep_kernels/reference.py. Whole networks are relaxed by :func:`ep_kernels.free_phase` and
:func:`ep_kernels.nudged_phase`.

Shapes: B samples, maps [B, C, H, W] (channels_last memory is fastest), vectors [B, F]. Every function raises ValueError
for an argument that does not fit, naming it, what was expected and what came. Under torch.compile the backend is chosen
when the code is traced, and stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _library, ops, reference
from .backends import choose
from .network import POOLS, Pool
from .plan import FORMS, Form
from .precision import OPERANDS, Operands


@dataclass(frozen=True)
class Neighbour:
    """A state at the other end of a connection, to be convolved into a relaxation step.

    Args:
        state: [B, ...]: the source's state (as ``below``) or the destination's (as ``above``).
        weight: [C_dst, C_src, kh, kw] or [F_dst, F_src].
        stride, padding, pool: of the connection.
        winners: of max pooling, uint8 0..3 (row-major in the 2x2 window), [B, C_dst, H'/2, W'/2]; needed as ``above``.
        gain: factor of the drive, or of the feedback (k^(level difference)).
    """

    state: Tensor
    weight: Tensor
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    pool: Pool = "none"
    winners: Tensor | None = None
    gain: float = 1.0


def drive(
    source: Tensor,
    weight: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    pool: Pool = "none",
    winners: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Drive of a connection: convolution, then 2x2 pooling. Equivalent to ``max_pool2d(conv2d(source, weight))``.

    Args:
        source: [B, C_src, H, W]; for a matrix weight also [B, F_src].
        weight: [C_dst, C_src, kh, kw] or [F_dst, F_src].
        stride, padding: of the convolution, (height, width).
        pool: 2x2 pooling with stride 2, floor: ``none``, ``max`` or ``avg``.
        winners: frozen ones, uint8 0..3, in the drive's shape: gathered at instead of compared.

    Returns:
        The drive, [B, C_dst, H', W'] or [B, F_dst], and the winners of max pooling (those given, or found; else None).
        Differentiable in source and weight at fixed winners.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    _check_connection("drive", source, weight, stride, padding, pool)
    shape = ops.drive_shape(source, weight, list(stride), list(padding), POOLS.index(pool))
    _check_winners("drive", winners, shape, source, pool)
    where = _where(source.device, source.dtype)
    if where == "reference":
        return reference.drive(source, weight, stride, padding, pool, winners)
    pooled, won = _op(where, "drive")(source, weight, list(stride), list(padding), POOLS.index(pool), winners)
    if pool != "max":
        return pooled, None
    return pooled, won if winners is None else winners


def feedback(
    above: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    pool: Pool = "none",
    winners: Tensor | None = None,
) -> Tensor:
    """Feedback of a connection: the exact adjoint of :func:`drive` at fixed winners, in the source's ``shape``.

    Args:
        above: the destination's state, [B, C_dst, H', W'] or [B, F_dst].
        weight: [C_dst, C_src, kh, kw] or [F_dst, F_src].
        shape: (C, H, W) or (F,) of the source.
        stride, padding, pool: of the connection.
        winners: those of the drive, uint8 0..3, in the shape of ``above``; needed with max pooling.

    Returns:
        ``W^T * P^-1(above)``, [B, *shape].

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    source = above.new_empty((0, *shape))
    _check_connection("feedback", source, weight, stride, padding, pool)
    expected = [above.shape[0], *ops.drive_shape(source, weight, list(stride), list(padding), POOLS.index(pool))[1:]]
    _check_like("feedback", "above", above, expected, weight)
    _require(pool != "max" or winners is not None, "feedback", "winners", "those of the drive (max pooling)", None)
    _check_winners("feedback", winners, expected, weight, pool)
    return reference.feedback(above, weight, shape, stride, padding, pool, winners)


def relax_step(
    state: Tensor,
    bias: Tensor | None = None,
    *,
    drives: Sequence[Tensor] = (),
    below: Sequence[Neighbour] = (),
    above: Sequence[Neighbour] = (),
    nudge: Tensor | None = None,
    nudge_gain: float = 0.0,
    preactivation: Tensor | None = None,
    form: Form = "states",
    phases: int = 1,
    damping: float = 1.0,
    slope: float = 1.0,
    lo: float = 0.0,
    hi: float = 1.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One relaxation step of one node: ``(1 - eta) s + eta clip(gamma a, lo, hi)``.

    ``a = bias + sum drives + sum gain * drive(below) + sum gain * feedback(above) + nudge_gain * nudge``.

    Args:
        state: [B, C, H, W] or [B, F]; the scaled delta in the delta forms.
        bias: [C] or [F]; not used in the delta forms.
        drives: finished ones, in the state's shape, or with a batch that divides B (then read modulo it).
        below, above: neighbours still to be convolved. ``below`` with max pooling goes through :func:`drive`.
        nudge: dL/ds in the state's shape, or with a batch that divides B.
        nudge_gain: its factor, ``-beta k^(N-l)``, times the scale in the delta forms; changes sign in the second phase.
        preactivation: gamma a of the free equilibrium, in the state's shape or with a batch that divides B (delta
            forms).
        form: ``states``, ``delta`` (clip by cases) or ``tangent``.
        phases: 2 when the batch is +beta, then -beta.
        damping: eta in (0, 1]; in the form ``states`` also up to 2 (over-relaxation).
        slope: gamma.
        lo, hi: the box of the states.
        scale: power-of-two scale of the deltas.

    Returns:
        The new state, the residual [B] (max |change| over units, unscaled) and gamma a.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    fn = "relax_step"
    _require(state.dim() in (2, 4), fn, "state", "[B, C, H, W] or [B, F]", list(state.shape))
    _require(form in FORMS, fn, "form", f"one of {', '.join(FORMS)}", form)
    for name, value, ok in (
        ("damping", damping, 0 < damping < 2 and (damping <= 1 or form == "states")),
        ("slope", slope, slope > 0),
        ("scale", scale, scale > 0),
        ("nudge_gain", nudge_gain, True),
    ):
        _require(_finite(value) and ok, fn, name, "a finite number in its range", value)
    _require(_finite(lo) and _finite(hi) and lo < hi, fn, "lo, hi", "finite, lo < hi", (lo, hi))
    _require(phases in (1, 2) and state.shape[0] % phases == 0, fn, "phases", "1, or 2 with an even batch", phases)
    _require(form == "states" or preactivation is not None, fn, "preactivation", f"a tensor (form {form!r})", None)
    shape = list(state.shape)
    if bias is not None:
        _check_like(fn, "bias", bias, shape[1:2], state)
    summands = [(f"drives[{i}]", t) for i, t in enumerate(drives)]
    summands += [(name, t) for name, t in (("nudge", nudge), ("preactivation", preactivation)) if t is not None]
    for name, t in summands:
        _check_summand(fn, name, t, list(t.shape), state)
    for i, n in enumerate(below):
        at = f"below[{i}]."
        _require(n.pool != "max", fn, f"{at}pool", "'none' or 'avg' (max pooling: use drive)", n.pool)
        _require(_finite(n.gain), fn, f"{at}gain", "a finite number", n.gain)
        _check_connection(fn, n.state, n.weight, n.stride, n.padding, n.pool, at, f"{at}state")
        driven = ops.drive_shape(n.state, n.weight, list(n.stride), list(n.padding), POOLS.index(n.pool))
        _check_summand(fn, f"{at}state", n.state, driven, state, "its drive: ")
    for i, n in enumerate(above):
        at = f"above[{i}]."
        _require(_finite(n.gain), fn, f"{at}gain", "a finite number", n.gain)
        _check_connection(fn, state, n.weight, n.stride, n.padding, n.pool, at, "state")
        driven = ops.drive_shape(state, n.weight, list(n.stride), list(n.padding), POOLS.index(n.pool))
        _check_like(fn, f"{at}state", n.state, driven, state)
        _require(n.pool != "max" or n.winners is not None, fn, f"{at}winners", "those of the drive", None)
        _check_winners(fn, n.winners, driven, state, n.pool, at)
    where = _where(state.device, state.dtype)
    if where == "reference":
        return _reference_step(
            state, bias, drives, below, above, nudge, nudge_gain, preactivation, form, phases, damping, slope, lo, hi,
            scale,
        )  # fmt: skip
    none = state.new_empty(0, dtype=torch.uint8)
    return _op(where, "relax_step")(  # type: ignore[no-any-return]
        state,
        bias if form == "states" else None,
        list(drives),
        [1.0] * len(drives),
        [n.state for n in below],
        [n.weight for n in below],
        _geometry(below),
        [n.gain for n in below],
        [n.state for n in above],
        [n.weight for n in above],
        [none if n.winners is None else n.winners for n in above],
        _geometry(above),
        [n.gain for n in above],
        nudge,
        nudge_gain,
        preactivation,
        FORMS.index(form),
        phases,
        damping,
        slope,
        lo,
        hi,
        scale,
        True,
    )


def _reference_step(
    state: Tensor,
    bias: Tensor | None,
    drives: Sequence[Tensor],
    below: Sequence[Neighbour],
    above: Sequence[Neighbour],
    nudge: Tensor | None,
    nudge_gain: float,
    preactivation: Tensor | None,
    form: Form,
    phases: int,
    damping: float,
    slope: float,
    lo: float,
    hi: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    trailing = [1] * (state.dim() - 1)
    batch = state.shape[0]

    def tile(t: Tensor) -> Tensor:
        return t.repeat(batch // max(t.shape[0], 1), *trailing)

    a = torch.zeros_like(state)
    if bias is not None and form == "states":
        a = a + bias.view(-1, *trailing[1:])
    for finished in drives:
        a = a + tile(finished)
    for n in below:
        a = a + n.gain * tile(reference.drive(n.state, n.weight, n.stride, n.padding, n.pool)[0])
    for n in above:
        shape = list(state.shape[1:])
        a = a + n.gain * reference.feedback(n.state, n.weight, shape, n.stride, n.padding, n.pool, n.winners)
    if nudge is not None:
        sign = torch.ones(batch, dtype=state.dtype, device=state.device)
        sign[batch // phases :] = -1
        a = a + nudge_gain * sign.view(-1, *trailing) * tile(nudge)
    pre = tile(preactivation) if preactivation is not None else None
    new = reference.step(state, a, form, damping, slope, lo, hi, pre, scale)
    change = (new - state).abs().flatten(1)
    residual = change.amax(1) / scale if change.numel() else change.new_zeros(batch)
    return new, residual, slope * a


def contrast(
    source: Tensor,
    source_delta: Tensor | None,
    target: Tensor,
    target_delta: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    pool: Pool = "none",
    winners: Tensor | None = None,
    *,
    source_gain: float = 1.0,
    target_gain: float = 1.0,
    centre: float = 0.5,
    scale: float = 1.0,
    operands: Operands = None,
) -> tuple[Tensor, Tensor]:
    """Contrastive gradient of a connection's weight and bias, in the difference form.

    ``scale ( <ds^dst, W * m^src> + <m^dst, W * ds^src> )`` differentiated by W, and ``scale sum ds^dst`` for the bias,
    where for two phases ``d = d+ - d-`` and ``m = s + centre (d+ + d-)``; for one phase ``d`` is the delta itself.

    To contrast two given pairs of states (no deltas): pass those of -beta as ``source``, ``target``, their differences
    ``s+ - s-`` as the deltas, and ``scale = -1 / (2 beta B)``.

    Args:
        source, target: free states of the two ends, [B, ...].
        source_delta, target_delta: [B, ...] (one phase) or [2B, ...] (+beta, then -beta), times their gain to be in the
            states' units. ``source_delta`` is None for the clamped input.
        weight_shape: [C_dst, C_src, kh, kw] or [F_dst, F_src].
        stride, padding, pool: of the connection.
        winners: of the max pooling, uint8 0..3, in the target's shape: the same in both phases (frozen); or with twice
            its batch, those of the +beta states and then those of the -beta (or free) states (live; ``centre`` must be
            1/2).
        source_gain, target_gain: factors of the deltas.
        centre: 1/2 for finite differences (exact), 0 for the tangent.
        scale: factor of both gradients.
        operands: what the products round their operands to, accumulating in the tensors' dtype; the backend ``cpu``
            does not round, whatever it says.

    Returns:
        Gradient of the weight, in ``weight_shape``, and of the bias, [C_dst] or [F_dst]. Sums over the batch.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    shape = list(weight_shape)
    _require(len(shape) in (2, 4) and min(shape) > 0, "contrast", "weight_shape", "2 or 4 positive sizes", shape)
    weight = source.new_empty(()).expand(shape)
    _check_connection("contrast", source, weight, stride, padding, pool)
    expected = ops.drive_shape(source, weight, list(stride), list(padding), POOLS.index(pool))
    _check_like("contrast", "target", target, expected, source)
    for name, free, delta in (("source_delta", source, source_delta), ("target_delta", target, target_delta)):
        if delta is not None:
            batch = free.shape[0]
            ok = delta.shape[1:] == free.shape[1:] and (delta.shape[0] == batch or delta.shape[0] == 2 * batch)
            _require(ok, "contrast", name, ("shape ", list(free.shape), " or twice its batch"), list(delta.shape))
            _check_like("contrast", name, delta, list(delta.shape), source)
    for name, value in (
        ("centre", centre),
        ("scale", scale),
        ("source_gain", source_gain),
        ("target_gain", target_gain),
    ):
        _require(_finite(value), "contrast", name, "a finite number", value)
    _require(operands in OPERANDS, "contrast", "operands", ("one of ", ", ".join(map(str, OPERANDS))), repr(operands))
    _require(pool != "max" or winners is not None, "contrast", "winners", "those of the drive (max pooling)", None)
    twice = winners is not None and winners.shape[0] == 2 * expected[0]
    _check_winners("contrast", winners, [2 * expected[0] if twice else expected[0], *expected[1:]], source, pool)
    _require(
        not twice or centre == 0.5 or expected[0] == 0, "contrast", "centre", "0.5 with winners of both phases", centre
    )
    where = _where(source.device, source.dtype)
    if where == "reference":
        return reference.contrast(
            source, source_delta, target, target_delta, shape, stride, padding, pool, winners, source_gain=source_gain,
            target_gain=target_gain, centre=centre, scale=scale, operands=operands,
        )  # fmt: skip
    return _op(where, "contrast")(  # type: ignore[no-any-return]
        source,
        source_delta,
        target,
        target_delta,
        shape,
        list(stride),
        list(padding),
        POOLS.index(pool),
        winners,
        source_gain,
        target_gain,
        centre,
        scale,
        OPERANDS.index(operands),
    )


def _geometry(neighbours: Sequence[Neighbour]) -> list[int]:
    return [v for n in neighbours for v in (*n.stride, *n.padding, POOLS.index(n.pool))]


def _where(device: torch.device, dtype: torch.dtype) -> str:
    """What runs on such tensors: ``reference``, ``ops`` (the compiled ones, for every device) or ``triton``.

    ``kernels`` are Triton's where there is no library, from which its ops have their schemas.
    """
    chosen = choose(device, dtype)
    if chosen == "reference":
        return chosen
    if chosen == "triton" and _library.load_error() is not None:
        return "kernels"
    ops.ensure()
    return "triton" if chosen == "triton" else "ops"


# torch.compile takes its result as a constant. What torch.compiler.assume_constant_result sets, without importing
# torch._dynamo (seconds) along with this package.
_where._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _op(where: str, name: str) -> Any:
    """The function that runs an op there."""
    if where == "kernels":
        from .triton import ops as kernels

        return getattr(kernels, name)
    return getattr(ops, f"triton_{name}" if where == "triton" else name)


def _finite(value: float) -> bool:
    return -math.inf < value < math.inf  # math.isfinite takes no symbolic number of torch.compile


def _require(condition: bool, fn: str, argument: str, expected: str | tuple[object, ...], got: object) -> None:
    """``expected`` in parts is formatted on failure only: a formatted size is a constant to torch.compile."""
    if not condition:
        if isinstance(expected, tuple):
            expected = "".join(map(str, expected))
        raise ValueError(f"{fn}: argument '{argument}': expected {expected}, got {got}")


def _check_connection(
    fn: str,
    source: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    pool: str,
    at: str = "",
    name: str = "source",
) -> None:
    """``at`` comes before the names of the connection's arguments, ``name`` is that of the source."""
    _require(pool in POOLS, fn, f"{at}pool", f"one of {', '.join(POOLS)}", repr(pool))
    ok = weight.dim() in (2, 4) and min(weight.shape) > 0
    _require(ok, fn, f"{at}weight", "[C_dst, C_src, kh, kw] or [F_dst, F_src], positive", list(weight.shape))
    _require(source.dtype.is_floating_point, fn, name, "a floating-point dtype", source.dtype)
    _check_like(fn, f"{at}weight", weight, list(weight.shape), source)
    if weight.dim() == 2:
        _require(source.dim() in (2, 4), fn, name, "[B, C, H, W] or [B, F]", list(source.shape))
        features = math.prod(source.shape[1:])
        _require(features == weight.shape[1], fn, name, (weight.shape[1], " features a sample"), list(source.shape))
        _require(pool == "none", fn, f"{at}pool", "'none' for a matrix weight", repr(pool))
        return
    _require(source.dim() == 4, fn, name, "[B, C, H, W]", list(source.shape))
    channels = weight.shape[1]
    _require(source.shape[1] == channels, fn, name, (channels, f" channels (as {at}weight)"), source.shape[1])
    for argument, pair, least in (("stride", stride, 1), ("padding", padding, 0)):
        ok = len(pair) == 2 and min(pair) >= least
        _require(ok, fn, f"{at}{argument}", f"two integers >= {least}", tuple(pair))
    least = 2 if pool != "none" else 1
    size = ops.drive_shape(source, weight, list(stride), list(padding), 0)[2:]
    ok = min(source.shape[2:]) > 0 and min(size) >= least
    _require(ok, fn, name, f"a map that gives at least {least}x{least}", list(source.shape))


def _check_like(fn: str, name: str, tensor: Tensor, shape: list[int], like: Tensor) -> None:
    _require(list(tensor.shape) == shape, fn, name, ("shape ", shape), list(tensor.shape))
    _require(tensor.dtype == like.dtype, fn, name, f"dtype {like.dtype} (as the state)", tensor.dtype)
    _require(tensor.device == like.device, fn, name, f"device {like.device} (as the state)", tensor.device)


def _check_summand(fn: str, name: str, tensor: Tensor, shape: list[int], state: Tensor, what: str = "") -> None:
    """``shape``, of the tensor or of the drive that it sends, is the state's, but for a batch that divides it."""
    expected = list(state.shape)
    ok = shape[1:] == expected[1:] and _divides(shape[0], expected[0])
    _require(ok, fn, name, (what, "shape ", expected, " (or a batch that divides ", expected[0], ")"), shape)
    _check_like(fn, name, tensor, list(tensor.shape), state)


def _check_winners(fn: str, winners: Tensor | None, shape: list[int], like: Tensor, pool: str, at: str = "") -> None:
    """``shape`` is that of the drive."""
    if winners is None or pool != "max":
        return
    name = f"{at}winners"
    ok = list(winners.shape[1:]) == shape[1:] and _divides(winners.shape[0], shape[0])
    _require(ok, fn, name, ("shape ", shape, " (or a batch that divides ", shape[0], ")"), list(winners.shape))
    _require(winners.dtype == torch.uint8, fn, name, "dtype torch.uint8", winners.dtype)
    _require(winners.device == like.device, fn, name, f"device {like.device} (as the state)", winners.device)


def _divides(part: int, whole: int) -> bool:
    return part == whole or (part != 0 and whole != 0 and whole % part == 0)
