"""Programs that are kept: reused buffers, pieces of a run, signatures, the least recently used one forgotten."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ep_kernels import Connection, Head, Network, RelaxConfig, backends, ep_gradients, free_phase, nudged_phase
from ep_kernels.gradients import Contrasts, signature, tensors_of
from ep_kernels.plan import SCHEDULES, compile_plan
from ep_kernels.relaxation import Contrast, Relaxation, Relaxed, relax_reference
from ep_kernels.triton import clear, gradients, layout, relax, runner
from ep_kernels.triton.lower import Lowered, lower
from ep_kernels.triton.tiling import Tile
from tests.core.nets import NETWORKS
from tests.core.nets import problem as problem_in_float64
from tests.triton.interpreted.tools import close, use_tiles

NET = Network(
    shapes=((2, 5, 4), (16, 5, 4), (4, 2, 2), (5,)),  # 16 channels: results need no padding removed
    connections=(Connection(0, 1), Connection(1, 2, pool="max"), Connection(2, 3, None)),
    readout=Head(3, 3),
    local_heads=(Head(1, 2, pool=1, weight=0.5),),
    feedback_gain=0.5,
)
CONFIG = RelaxConfig(free_steps=2, nudged_steps=2, beta=0.1)


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, Tile(128, 16, 128, 4, 1))


def relaxations(
    config: RelaxConfig = CONFIG, seed: int = 0, *, batch: int = 2, keep: bool = True, network: Network = NET
) -> tuple[Relaxation, Relaxation]:
    """Those of the free and the nudged phase, as the solver makes them."""
    p = problem_in_float64(network, seed, batch=batch)
    parameters = type(p.parameters).from_named(network, {k: t.float() for k, t in p.parameters.named().items()})
    found: list[Relaxation] = []

    def record(r: Relaxation, name: str | None = None) -> Relaxed:
        found.append(r)
        return relax_reference(r)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "relax", record)
        free = free_phase(network, parameters, p.x.float(), config, keep=keep)
        if keep:
            extra = {1: torch.full((batch, *network.shapes[1]), 0.1)}
            nudged_phase(network, parameters, free, [t.float() for t in p.targets], config, extra=extra)
    return found[0], found[-1]


def programs() -> Mapping[Hashable, runner.Runner]:
    """Those that are kept."""
    return runner._runners.items


def tensors(out: Relaxed) -> list[Tensor]:
    groups = (out.states[1:], out.preactivations, out.drives.values(), out.winners.values(), [out.residual])
    return [t for group in groups for t in group if t is not None]


def same(got: Relaxed, expected: Relaxed, tolerance: float = 1e-5) -> None:
    pairs = list(zip(tensors(got), tensors(expected), strict=True))
    for i, (a, b) in enumerate(pairs):
        close(f"tensor {i}", a, b, tolerance if b.dtype.is_floating_point else 0)


# --- programs and their buffers -----------------------------------------------------------------------------------

KINDS = {
    "delta": CONFIG,
    "states": replace(CONFIG, form="states", winners="live", schedule="sync"),
    "even_odd": replace(CONFIG, schedule="even_odd"),  # feedback through winners that no drive has found yet
    "float16": replace(CONFIG, operands=torch.float16, storage=torch.float16),
    "stops": replace(CONFIG, tol=1e-3, schedule="sync", free_steps=4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_with_other_tensors(kind: str) -> None:
    """It equals a fresh program's, whatever the first left in the buffers; the first's results are copies."""
    for first, second in zip(relaxations(KINDS[kind], 0), relaxations(KINDS[kind], 1), strict=True):
        clear()
        fresh = relax(second)
        clear()
        before = relax(first)
        kept = [t.clone() for t in tensors(before)]
        (runner_,) = programs().values()
        poison_buffers(runner_.program.buffers)
        assert all(torch.equal(a, b) for a, b in zip(tensors(before), kept, strict=True))
        after = relax(second)
        assert list(programs().values()) == [runner_]
        assert len(tensors(after)) == len(tensors(fresh))
        assert all(torch.equal(a, b) for a, b in zip(tensors(after), tensors(fresh), strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(tensors(after), kept, strict=True))


def poison_buffers(buffers: Any) -> None:
    """Everything that the last run left or was given, but for the zeros that no launch writes: padding channels, odd
    rows and columns of unpooled maps."""
    for name, shelf in buffers.shelves.items():
        shapes = buffers.driven if name in ("drives", "winners") else buffers.nodes
        for i, shape in shapes.items():
            piece = layout.as_tensor(buffers.piece(shelf, i, shapes), shape)
            piece.fill_(float("nan") if piece.dtype.is_floating_point else 255)
    for (name, i), t in buffers.tensors.items():
        shape = buffers.nodes.get(i)
        if name in ("operand 0", "operand 1", "nudge", "sum", "free", "preactivation", "extra") and shape is not None:
            layout.as_tensor(t, shape).fill_(float("nan"))
        elif name == "unpooled":
            conn = buffers.r.network.connections[i]
            c, h, w = buffers.r.network.shapes[conn.dst]
            t[:, : 2 * h, : 2 * w, :c].fill_(float("nan"))  # an odd last row or column stays zero
        elif name in ("bias", "target", "head bias", "head shift"):
            t[..., : t.shape[-1] if name != "bias" else buffers.r.network.shapes[i][0]].fill_(float("nan"))


def test_more_sweeps_need_a_larger_program() -> None:
    """Capacities are powers of two from 64 on: another number of sweeps below shares the program."""
    vectors = Network(((6,), (5,)), (Connection(0, 1, None),), Head(1, 3))
    capacities = []
    for steps in (5, 3, 65, 5):
        free, _ = relaxations(replace(CONFIG, free_steps=steps, schedule="even_odd"), keep=False, network=vectors)
        same(relax(free), relax_reference(free))
        capacities.append([r.program.residual.shape[0] for r in programs().values()])
    assert capacities == [[64], [64], [64, 128], [128, 64]]


def test_phases_and_batches_have_programs_of_their_own() -> None:
    for batch in (1, 2):
        for r in relaxations(batch=batch):
            same(relax(r), relax_reference(r))
            same(relax(r), relax_reference(r))
    assert len(programs()) == 4
    clear()
    assert not programs()


def test_the_least_recently_used_program_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner._runners, "most", 2)
    one, two, three = (relaxations(batch=b, keep=False)[0] for b in (1, 2, 3))
    relax(one)
    relax(two)
    keys = list(programs())
    relax(one)
    assert list(programs()) == keys[::-1]
    relax(three)
    assert next(iter(programs())) == keys[0]
    assert len(programs()) == 2
    first = programs()[keys[0]]
    relax(two)
    assert programs()[keys[1]] is not first
    same(relax(one), relax_reference(one))


def test_the_caller_s_modes_do_not_matter() -> None:
    """Buffers that are made in inference mode are written outside it; autocast rounds nothing."""
    free, nudged = relaxations()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        relax(free)
        inside = relax(nudged)
    assert len(programs()) == 2
    same(inside, relax_reference(nudged))
    same(relax(free), relax_reference(free))


def test_nothing_to_launch_goes_to_the_reference() -> None:
    """An empty batch; a delta phase with a sweep that updates no node."""
    _, empty = relaxations(batch=0)
    _, nudged = relaxations()
    quiet = replace(nudged, plan=replace(nudged.plan, prologue=(), sweeps=((),)))
    for r in (empty, quiet):
        same(relax(r), relax_reference(r))
    assert not runner.runs_every_sweep(quiet.plan, quiet.steps)
    assert not programs()


# --- contrasts of all connections ------------------------------------------------------------------------------------


def jobs_of(config: RelaxConfig = CONFIG, seed: int = 0) -> list[Contrast]:
    """Those of a network, as the solver makes them."""
    p = problem_in_float64(NET, seed, batch=2)
    parameters = type(p.parameters).from_named(NET, {k: t.float() for k, t in p.parameters.named().items()})
    found: list[Contrast] = []

    def record(jobs: Sequence[Contrast], name: str | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        found.extend(jobs)
        return iter([gradients.contrast(job) for job in jobs])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "each_contrast", record)
        ep_gradients(NET, parameters, p.x.float(), [t.float() for t in p.targets], config, backend="reference")
    return found


def test_contrasts_on_copies_are_those_of_the_tensors() -> None:
    """What a graph replays reads copies, one for each tensor, and its results are copied out."""
    first, second = jobs_of(seed=0), jobs_of(seed=1)
    assert signature(first) == signature(second)
    contrasts = Contrasts(first, gradients.contrast)
    assert len(contrasts.copies) == len({id(t) for t in tensors_of(first)}) < len(tensors_of(first))
    before = contrasts.run(first)
    kept = [t.clone() for pair in before for t in pair]
    for copy in contrasts.copies:
        copy.fill_(float("nan") if copy.dtype.is_floating_point else 255)
    after = contrasts.run(second)
    for jobs, found in ((first, before), (second, after)):
        for job, pair in zip(jobs, found, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(pair, gradients.contrast(job), strict=True))
    assert all(torch.equal(a, b) for a, b in zip([t for pair in before for t in pair], kept, strict=True))


def test_signatures_of_contrasts_differ() -> None:
    jobs = jobs_of()[::-1]  # from the bottom: the last one is the linear connection
    last = jobs[-1]
    changes: list[dict[str, Any]] = [
        {"source_gain": 2.0},
        {"target_gain": 2.0},
        {"centre": 0.0},
        {"scale": 3.0},
        {"operands": torch.float16},
        {"operands": "tf32"},
        {"source_delta": None},
        {"source": last.source.half()},
        {"source": last.source.clone()},  # no longer the tensor of another connection
        {"target_delta": last.target_delta[:2]},
        {"target": last.target.t().contiguous().t()},
        {"winners": torch.zeros(2, 5, dtype=torch.uint8)},
        {"connection": replace(last.connection, src=1)},
        {"weight": last.weight.half()},
    ]
    own = signature(jobs)
    found = [signature([*jobs[:-1], replace(last, **change)]) for change in changes]
    assert len({own, *found}) == len(changes) + 1
    assert signature(jobs) == own


# --- pieces -------------------------------------------------------------------------------------------------------


def lowered(network: Network, schedule: str, steps: int, *, every: bool = False) -> Lowered:
    plan = compile_plan(network, schedule, "free", steps=steps)  # type: ignore[arg-type]
    return lower(network, plan, steps, "states", frozen=False, keep=True, every=every)


@pytest.mark.parametrize("steps", [1, 2, 3, 15, 16, 17, 18, 19, 20, 34, 35, 36, 100])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pieces_are_the_whole_run_in_order(schedule: str, steps: int) -> None:
    run = lowered(NET, schedule, steps)
    pieces = runner.chunks(run)
    assert list(itertools.chain(*pieces)) == [run.prologue, *run.sweeps, run.refresh]
    assert len(pieces) == (1 if steps <= runner.BLOCK else 2 + (steps - 3) // runner.BLOCK)
    if len(pieces) > 1:
        head, *blocks, tail = pieces
        assert len(tail) == 2
        assert all(len(block) == runner.BLOCK for block in blocks)
        assert 3 <= len(head) <= runner.BLOCK + 2


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_other_numbers_of_sweeps_reuse_the_pieces(schedule: str, name: str, every: bool) -> None:
    """One block is all that 100 sweeps repeat, and 16 sweeps more add no piece."""
    some, more = (runner.chunks(lowered(NETWORKS[name], schedule, steps, every=every)) for steps in (100, 116))
    assert len(more) == len(some) + 1
    assert set(more) == set(some)
    assert len(set(some)) <= 4  # deep networks: in the first block some states are still zero
    assert runner.BLOCK % 2 == 0


# --- signatures ---------------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Relaxation], dict[str, Any]]] = {
    "network": lambda r: {"network": replace(r.network, hi=2.0)},
    "plan": lambda r: {"plan": replace(r.plan, deferred=not r.plan.deferred)},
    "batch": lambda r: {"batch": r.batch * 2},
    "phases": lambda r: {"phases": 1},
    "form": lambda r: {"form": "tangent"},
    "frozen": lambda r: {"frozen": not r.frozen},
    "keep": lambda r: {"keep": not r.keep},
    "operands": lambda r: {"operands": torch.float16},
    "tf32": lambda r: {"operands": "tf32"},
    "storage": lambda r: {"storage": torch.float16},
    "damping": lambda r: {"damping": 0.5},
    "tol": lambda r: {"tol": 0.1},
    "drive_gains": lambda r: {"drive_gains": [g + 1 for g in r.drive_gains]},
    "feedback_gains": lambda r: {"feedback_gains": [g + 1 for g in r.feedback_gains]},
    "nudge_gains": lambda r: {"nudge_gains": [g + 1 for g in r.nudge_gains]},
    "scales": lambda r: {"scales": [2 * s for s in r.scales]},
    "states": lambda r: {"states": [torch.zeros(r.batch, *shape) for shape in r.network.shapes]},
    "biases": lambda r: {"biases": [None] * len(r.biases)},
    "drives": lambda r: {"drives": {**r.drives, 0: torch.zeros(2, 16, 5, 4)}},
    "winners": lambda r: {"winners": {}},
    "samples of winners": lambda r: {"winners": {c: t[:1] for c, t in r.winners.items()}},
    "head_biases": lambda r: {"head_biases": [None] * len(r.head_biases)},
    "extra": lambda r: {"extra": {}},
    "more extra": lambda r: {"extra": {**r.extra, 2: torch.zeros(2, 4, 2, 2)}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_signatures_differ(change: str) -> None:
    _, nudged = relaxations()
    other = replace(nudged, **CHANGES[change](nudged))
    assert runner.signature(other, 64) != runner.signature(nudged, 64)
    hash(runner.signature(other, 64))


def test_signatures_of_other_tensors_are_the_same() -> None:
    for one, two in zip(relaxations(seed=0), relaxations(seed=1), strict=True):
        assert runner.signature(one, 64) == runner.signature(two, 64)
        assert runner.signature(replace(one, steps=9), 64) == runner.signature(two, 64)
        assert runner.signature(one, 128) != runner.signature(one, 64)
