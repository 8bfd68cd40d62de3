"""Nudges: linear heads of moderate size in one launch, every other kind and further losses through ATen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import reference
from ..network import Head, Shape
from ..relaxation import Relaxation
from . import layout
from .buffers import Buffers, present
from .launch import Call, head_call
from .lower import NudgeLaunch

Action = Callable[[], None]
MAX_HEAD_OUTPUTS = 128
MAX_HEAD_FEATURES = 8192


def bind_nudge(buffers: Buffers, launch: NudgeLaunch, control: Tensor, *, stop: bool) -> list[Action]:
    """What evaluates and sums the gradients of the heads on a node into its nudge."""
    r, i = buffers.r, launch.node
    total = buffers.map("nudge", i, torch.float32)
    heads = [(h, head) for h, head in enumerate(r.network.heads) if head.node == i]
    fused = [(h, head) for h, head in heads if head_fuses(head, r.network.shapes[i])]
    others = [(h, head) for h, head in heads if (h, head) not in fused]
    actions: list[Action] = []
    if others or i in r.extra or not fused:
        actions.append(plain_nudge(buffers, launch, others, total))
    for h, head in fused:
        actions.append(bind_head(buffers, launch, control, h, head, total, add=bool(actions), stop=stop))
    return actions


def head_fuses(head: Head, shape: Shape) -> bool:
    """A linear map of the whole state, of moderate size, whose error needs no norms."""
    h, w, c = layout.map_shape(shape)
    small = head.outputs is not None and head.outputs <= MAX_HEAD_OUTPUTS and head.loss != "cosine"
    return small and head.pool is None and not head.pointwise and h * w * layout.padded(c) <= MAX_HEAD_FEATURES


def nudged_at(buffers: Buffers, launch: NudgeLaunch) -> tuple[Tensor | None, Tensor | None, float]:
    """The state (None: zero or not read), the free state to add it to, and the factor that makes it a delta."""
    r, i = buffers.r, launch.node
    state = None if launch.slot is None or r.form == "tangent" else buffers.state(i, launch.slot)
    if r.form == "states":
        return state, None, 1.0
    return state, buffers.given("free", i, buffers.storage, lambda r: r.free[i], i), 1 / r.scales[i]


def bind_head(
    buffers: Buffers, launch: NudgeLaunch, control: Tensor, h: int, head: Head, total: Tensor, *, add: bool, stop: bool
) -> Call:
    """A linear head in one launch."""
    r = buffers.r
    state, free, inverse_scale = nudged_at(buffers, launch)
    shape = r.network.shapes[head.node]
    weight = buffers.loaded(
        ("head weight", h),
        lambda: torch.zeros(
            layout.drive_size(present(r.head_weights[h]), shape), dtype=torch.float32, device=buffers.device
        ),
        lambda out, r: layout.drive_views(out, present(r.head_weights[h]), shape),
    )
    bias = None
    if r.head_biases[h] is not None:
        bias = buffers.copied("head bias", h, lambda r: present(r.head_biases[h]), torch.float32)
    return head_call(
        state,
        free,
        weight[: head.outputs],
        bias,
        target_of(buffers, h),
        total,
        control,
        phases=r.phases,
        softmax=head.loss == "cross_entropy",
        weight_of_loss=head.weight,
        temperature=head.temperature,
        inverse_scale=inverse_scale,
        add=add,
        stop=stop,
    )


def target_of(buffers: Buffers, h: int) -> Tensor:
    return buffers.copied("target", h, lambda r: r.targets[h], torch.float32)


def plain_nudge(buffers: Buffers, launch: NudgeLaunch, heads: Sequence[tuple[int, Head]], total: Tensor) -> Action:
    """Heads of every other kind, and further losses, through ATen."""
    r, i = buffers.r, launch.node
    shape = r.network.shapes[i]
    state, free, inverse_scale = nudged_at(buffers, launch)
    copies = {
        (name, h): buffers.copied(name, h, lambda r, h=h, of=of: present(of(r)[h]), torch.float32)  # type: ignore[misc]
        for h, _ in heads
        for name, of in (("head map", _head_weights), ("head shift", _head_biases))
        if of(r)[h] is not None
    }
    targets = {h: target_of(buffers, h) for h, _ in heads}
    extra = buffers.given("extra", i, torch.float32, lambda r: r.extra[i], i) if i in r.extra else None

    def nudge() -> None:
        s = torch.zeros(r.batch, *shape, dtype=torch.float32, device=buffers.device)
        if state is not None:
            s += layout.as_tensor(state, shape).float() * inverse_scale
        if free is not None:
            s += _tile(layout.as_tensor(free, shape).float(), r.phases)
        back = torch.zeros_like(s)
        for h, head in heads:
            target = _tile(targets[h], r.phases)
            weight, bias = copies.get(("head map", h)), copies.get(("head shift", h))
            back += reference.head_gradient(head, s, weight, bias, target)
        if extra is not None:
            back += _tile(layout.as_tensor(extra, shape), r.phases)
        layout.fill(total, back)

    return nudge


def _head_weights(r: Relaxation) -> Sequence[Tensor | None]:
    return r.head_weights


def _head_biases(r: Relaxation) -> Sequence[Tensor | None]:
    return r.head_biases


def _tile(x: Tensor, times: int) -> Tensor:
    return x if times == 1 else torch.cat([x] * times)
