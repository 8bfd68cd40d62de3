"""The kernels compiled ahead of time for architectures that are not here: instructions, spills, shared memory.

Every tile of the table with the heaviest launch of each kernel, and every other launch and precision with one tile.
``python -m benchmarks.aot --all`` compiles the full product.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

from ep_kernels.backends import interpreting

if interpreting():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from ep_kernels.triton import aot
from ep_kernels.triton.aot import KINDS, PRECISIONS, Case, Compiled, arch_named, compile_case, heaviest
from ep_kernels.triton.arch import KNOWN
from ep_kernels.triton.launch import MAX, NONE, add_up_call, difference_call
from ep_kernels.triton.tiling import TABLE, Tile

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
NEWEST = ("sm_80", "sm_90", "sm_100")  # every tile; of the others the largest
WITH_PRODUCTS = ("step", "drive", "contrast")


def cases() -> Iterator[Case]:
    """What is compiled here."""
    for arch in (known.name for known in KNOWN.values()):
        for precision in PRECISIONS:
            tiles = TABLE[arch, PRECISIONS[precision].operand.itemsize]
            for kind in KINDS:
                fitting = [case for tile in tiles if (case := Case(arch, kind, precision, tile)).fits()]
                heavy = kind in heaviest() and kind.split()[0] in WITH_PRODUCTS
                if heavy and arch in NEWEST and precision in ("fp16", "tf32"):
                    yield from fitting
                elif (arch in NEWEST and (heavy or precision == "fp16")) or (heavy and precision == "fp16"):
                    yield fitting[0]
        yield Case(arch, "difference max live", "tf32", TABLE[arch, 4][0])
    for arch in NEWEST:  # tiles of many samples
        yield Case(arch, "step everything", "fp16", Tile(64, 64, 64, 4, 3), size=2)


def name(case: Case) -> str:
    t = case.tile
    return f"{case.arch}-{case.kind}-{case.precision}-{t.rows}x{t.columns}-{case.size}".replace(" ", "_")


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[Callable[[Case], Compiled]]:
    """Results by case. All that was selected is compiled by a process for each core while the tests wait in turn."""
    mine = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    wanted = [item.callspec.params["case"] for item in mine if "case" in getattr(item, "fixturenames", ())]
    workers = max(1, min(os.cpu_count() or 1, len(wanted)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        futures: dict[Case, Future[Compiled]] = {case: pool.submit(compile_case, case) for case in wanted}
        yield lambda case: futures[case].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", dict.fromkeys(cases()), ids=name)
def test_compiles(case: Case, compiled: Callable[[Case], Compiled]) -> None:
    found, arch = compiled(case), arch_named(case.arch)
    print(f"{found.registers} registers, {found.shared_memory} B shared, {found.instructions}")
    # older ones compile, and may spill; 3.6 keeps 8 bytes of stack on sm_120 that nothing ever reads
    if VERSION >= (3, 7) or (VERSION == (3, 6) and case.arch in NEWEST):
        assert found.stack == 0, "registers were spilled"
    assert 0 < found.registers <= 255
    assert found.registers * 32 * case.call().warps <= 65536, "more than a multiprocessor has"
    assert found.shared_memory <= arch.shared_memory
    kernel = case.kind.split()[0]
    if kernel not in WITH_PRODUCTS:
        assert not found.tensor_cores
        return
    assert (found.instructions["TMA"] > 0) == arch.tma
    assert (found.instructions["cp.async"] > 0) == (not arch.tma)
    used = {unit for unit in aot.TENSOR_CORES if found.instructions[unit]}
    assert used == (set() if case.precision == "ieee" else {tensor_core(case)})


def tensor_core(case: Case) -> str:
    """What multiplies: the newest instruction that the architecture has, which takes 64 rows (channels) or more."""
    rows = case.tile.rows if case.kind.startswith("contrast") else case.tile.columns
    newest = {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(case.arch, "mma.sync")
    return newest if rows >= 64 else "mma.sync"


@pytest.mark.parametrize("pool", [NONE, MAX])
def test_one_position_compiles(pool: int) -> None:
    """Batch 1, both phases, a 1x1 map: a size of 1 is a constant to the compiler, which has no ``.to``."""
    one, up = torch.empty(1, 1, 1, 16, device="meta"), torch.empty(1, 1 + pool, 1 + pool, 16, device="meta")
    won = torch.empty(2, 1, 1, 16, dtype=torch.uint8, device="meta") if pool else None
    call = difference_call(
        KNOWN[90], one, torch.empty(2, 1, 1, 16, device="meta"), won, up, up, torch.empty(1, 16, device="meta"),
        channels=1, phases=2, pool=pool, live=pool == MAX, mean_gain=0.5, gain=0.5,
    )  # fmt: skip
    assert aot.compile_call(call, KNOWN[90]).stack == 0


def test_table_holds_no_configuration_twice() -> None:
    for tiles in TABLE.values():
        assert len(set(tiles)) == len(tiles)


def test_arguments_are_specialised_as_the_jit_does() -> None:
    call = Case("sm_90", "step states", "fp16", Tile(128, 64, 64, 4, 4)).call()
    call.arguments["H"], call.arguments["W"] = 1, 17
    source = aot.source(call, GPUTarget("cuda", 90, 32))
    place = {param.name: (param.num,) for param in call.kernel.params}
    kinds = source.signature
    assert kinds["a0"] == "tensordesc<fp16[1, 16, 8, 64]>"
    assert kinds["new"] == "*fp32"
    assert kinds["winners"] == kinds["a3"] == kinds["TAPS0"] == kinds["H"] == "constexpr"
    assert source.constants[place["winners"]] is None
    assert source.constants[place["TAPS0"]] == 9
    assert source.constants[place["H"]] == 1
    assert (kinds["W"], kinds["OH0"], kinds["N"], kinds["m0"]) == ("i32", "i32", "i32", "fp32")
    sixteen = [["tt.divisibility", 16]]
    assert source.attrs[place["new"]] == source.attrs[place["N"]] == sixteen
    assert not source.attrs.get(place["W"])
    assert not source.attrs.get(place["OH0"])


def test_missing_cuobjdump_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(triton, "__file__", f"{tmp_path}/triton/__init__.py")
    with pytest.raises(RuntimeError, match=r"expected cuobjdump as part of triton .*, not found at .*tmp|test_missing"):
        aot.resources(b"")


def test_nonsense_is_refused() -> None:
    with pytest.raises(RuntimeError, match="printed no"):
        aot.resources(b"no cubin")


def test_the_interpreter_is_refused() -> None:
    call = add_up_call(torch.empty(2, 16, device="meta"), torch.empty(16, device="meta"), 16, 16, 1.0)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.compile_call(type(call)(print, call.programs, call.arguments, call.warps, call.stages), KNOWN[90])
