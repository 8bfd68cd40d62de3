"""The memory of a relaxation: padded maps, packed weights, and copies of the tensors that come with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..graphs import copy_all
from ..network import Shape
from ..plan import Drive
from ..relaxation import Relaxation
from . import layout

Key = tuple[str, int]
ALIGNMENT = 64  # elements between the maps of a shelf: 256 bytes of float32


class Buffers:
    """Buffers of one signature, made when first asked for and kept: captured launches hold their addresses.

    What a relaxation gives is copied in by :meth:`load`. What it leaves lies on *shelves*, one allocation for the same
    thing of all nodes, so that a whole result is one copy.
    """

    def __init__(self, r: Relaxation):
        self.r = outline(r)
        self.inputs: Relaxation | None = None  # during a run
        self.device = r.weights[0].device
        self.storage = r.storage or torch.float32
        self.operand = r.operands if isinstance(r.operands, torch.dtype) else torch.float32
        self.given_states = frozenset(i for i, s in enumerate(r.states) if i and s is not None)
        self.nodes = {i: shape for i, shape in enumerate(r.network.shapes) if i}
        launches = [*r.plan.prologue, *(x for sweep in r.plan.sweeps for x in sweep), *r.plan.refresh]
        drives = {launch.connection for launch in launches if isinstance(launch, Drive)}
        self.driven = {c: r.network.shapes[r.network.connections[c].dst] for c in sorted(drives)}
        self.loaders: list[Callable[[Relaxation], layout.Pair]] = []
        self.tensors: dict[Key, Tensor] = {}
        self.shelves: dict[str, Tensor] = {}

    def load(self, r: Relaxation) -> None:
        """Copy the tensors of a relaxation into the buffers that exist so far; later ones are filled when made."""
        self.inputs = r
        copy_all([loader(r) for loader in self.loaders])

    def release(self) -> None:
        """Forget the relaxation's own tensors."""
        self.inputs = None

    def start(self) -> None:
        """Before the first launch: every live winner is the first."""
        if "winners" in self.shelves:
            self.shelves["winners"].zero_()

    def buffer(self, key: Key, make: Callable[[], Tensor]) -> Tensor:
        if key not in self.tensors:
            self.tensors[key] = make()
        return self.tensors[key]

    def loaded(
        self, key: Key, make: Callable[[], Tensor], views: Callable[[Tensor, Relaxation], layout.Pair]
    ) -> Tensor:
        """A buffer filled from the relaxation's tensors: now, and before every later run."""
        if key not in self.tensors:
            tensor = self.tensors[key] = make()
            self.loaders.append(lambda r: views(tensor, r))
            assert self.inputs is not None
            copy_all([views(tensor, self.inputs)])
        return self.tensors[key]

    def shelf(self, name: str, i: int, shapes: Mapping[int, Shape], dtype: torch.dtype) -> Tensor:
        """[n, H, W, padded C] for ``i``, beside those for the other ``shapes``."""
        if name not in self.shelves:
            self.shelves[name] = torch.zeros(self.places(shapes)[1], dtype=dtype, device=self.device)
        return self.piece(self.shelves[name], i, shapes)

    def piece(self, shelf: Tensor, i: int, shapes: Mapping[int, Shape]) -> Tensor:
        h, w, c = layout.map_shape(shapes[i])
        start = self.places(shapes)[0][i]
        size = (self.r.batch, h, w, layout.padded(c))
        return shelf[start : start + size[0] * size[1] * size[2] * size[3]].view(size)

    def places(self, shapes: Mapping[int, Shape]) -> tuple[dict[int, int], int]:
        """Where each map begins on a shelf, and the shelf's length."""
        starts, end = {}, 0
        for i, shape in shapes.items():
            h, w, c = layout.map_shape(shape)
            starts[i] = end
            end += -(-self.r.batch * h * w * layout.padded(c) // ALIGNMENT) * ALIGNMENT
        return starts, end

    def results(self, copy: Tensor, shapes: Mapping[int, Shape]) -> dict[int, Tensor]:
        """The maps of a copy of a shelf as [N, C, H, W] or [N, F], dense."""
        out = {}
        for i, shape in shapes.items():
            piece = self.piece(copy, i, shapes)
            exact = piece.shape[3] == layout.map_shape(shape)[2]
            out[i] = layout.as_tensor(piece, shape) if exact else layout.take(piece, shape)
        return out

    # --- what a relaxation has ----------------------------------------------------------------------------------------

    def given(
        self, name: str, i: int, dtype: torch.dtype, get: Callable[[Relaxation], Tensor], shape_of: int
    ) -> Tensor:
        """A map that comes with the relaxation, of as many samples as it has."""
        shape = self.r.network.shapes[shape_of]
        return self.loaded(
            (name, i),
            lambda: layout.new_map(get(self.r).shape[0], shape, dtype, self.device),
            lambda out, r: layout.fill_views(out, get(r)),
        )

    def map(self, name: str, i: int, dtype: torch.dtype) -> Tensor:
        """[n, H, W, padded C] for a node."""
        return self.buffer((name, i), lambda: layout.new_map(self.r.batch, self.nodes[i], dtype, self.device))

    def state(self, i: int, slot: int) -> Tensor:
        """The stored state of a node; slot 0 may be given."""
        state = self.shelf(f"state {slot}", i, self.nodes, self.storage)
        if slot == 0 and i in self.given_states:
            return self.loaded(
                ("state 0", i), lambda: state, lambda out, r: layout.fill_views(out, present(r.states[i]))
            )
        return state

    def operand_of(self, i: int, slot: int) -> Tensor:
        """The state as the products read it: the stored one if it has their dtype."""
        if i == 0 or (slot == 0 and i in self.given_states and self.operand != self.storage):
            return self.given("operand 0", i, self.operand, lambda r: present(r.states[i]), i)
        if self.operand == self.storage:
            return self.state(i, slot)
        return self.map(f"operand {slot}", i, self.operand)

    def unpooled(self, c: int) -> Tensor:
        """P^-1 of the destination's state; an odd last row or column stays zero."""
        conn = self.r.network.connections[c]
        shape = (self.r.network.shapes[conn.dst][0], *conn.map_size(*self.r.network.shapes[conn.src][1:]))
        return self.buffer(("unpooled", c), lambda: layout.new_map(self.r.batch, shape, self.operand, self.device))

    def pre(self, i: int) -> Tensor:
        """gamma a of a node's last update."""
        return self.shelf("pre", i, self.nodes, torch.float32)

    def drive(self, c: int) -> Tensor:
        return self.shelf("drives", c, self.driven, torch.float32)

    def winners(self, c: int) -> Tensor:
        """Winners of the relaxation's own drives; all the first before there are any."""
        return self.shelf("winners", c, self.driven, torch.uint8)

    def winners_of(self, c: int, given: bool) -> tuple[Tensor, bool]:
        """Winners that a launch reads, and whether they are shared by the phases."""
        if given and c in self.r.winners:
            dst = self.r.network.connections[c].dst
            tensor = self.given("given winners", c, torch.uint8, lambda r: r.winners[c], dst)
            return tensor, tensor.shape[0] != self.r.batch
        return self.winners(c), False

    def matrix(self, c: int, *, feedback: bool) -> Tensor:
        """The packed weight of a connection for its drive or its feedback."""
        conn = self.r.network.connections[c]
        source = self.r.network.shapes[conn.src]
        size = layout.feedback_size if feedback else layout.drive_size
        views = layout.feedback_views if feedback else layout.drive_views

        def weight(r: Relaxation) -> Tensor:
            return r.feedback_weight(c) if feedback else r.weights[c]

        return self.loaded(
            ("feedback matrix" if feedback else "drive matrix", c),
            lambda: torch.zeros(size(weight(self.r), source), dtype=self.operand, device=self.device),
            lambda out, r: views(out, weight(r), source),
        )

    def copied(self, name: str, i: int, get: Callable[[Relaxation], Tensor], dtype: torch.dtype) -> Tensor:
        """A dense copy of a tensor, as it is but for its dtype."""
        return self.loaded(
            (name, i),
            lambda: torch.empty(get(self.r).shape, dtype=dtype, device=self.device),
            lambda out, r: (out, get(r)),
        )

    def bias(self, i: int) -> Tensor | None:
        if self.r.form != "states" or self.r.biases[i] is None:
            return None
        return self.loaded(
            ("bias", i),
            lambda: torch.zeros(layout.padded(self.nodes[i][0]), dtype=torch.float32, device=self.device),
            lambda out, r: (out[: r.network.shapes[i][0]], present(r.biases[i])),
        )


def outline(r: Relaxation) -> Relaxation:
    """The relaxation without its tensors' memory: their shapes, and every constant."""

    def bare(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype, device="meta")

    def each(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [None if t is None else bare(t) for t in tensors]

    return replace(
        r,
        weights=[bare(t) for t in r.weights],
        biases=each(r.biases),
        states=each(r.states),
        free=[bare(t) for t in r.free],
        preactivations=[bare(t) for t in r.preactivations],
        drives={c: bare(t) for c, t in r.drives.items()},
        winners={c: bare(t) for c, t in r.winners.items()},
        head_weights=each(r.head_weights),
        head_biases=each(r.head_biases),
        targets=[bare(t) for t in r.targets],
        extra={i: bare(t) for i, t in r.extra.items()},
        feedback_weights=each(r.feedback_weights),
    )


def present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
