"""Launches compiled ahead of time for an architecture, and what the compiler made of them. Needs no GPU.

Arguments may be meta tensors: only their dtypes and shapes are looked at. :data:`KINDS` are the launches that
relaxations and contrasts make; the tests compile them with every tile of the table.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from .arch import KNOWN, Arch
from .launch import (
    AVG,
    DELTA,
    MAX,
    NONE,
    STATES,
    TANGENT,
    Addend,
    Call,
    Dynamics,
    Loop,
    add_up_call,
    contrast_calls,
    difference_call,
    difference_programs,
    drive_call,
    drive_loop,
    feedback_loop,
    head_call,
    step_call,
)
from .tiling import TABLE, Problem, Tile, candidates

# what a kernel's PTX is searched for
INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async",
    "mma.sync": r"\bmma\.sync",
    "tcgen05": r"\btcgen05\.mma",
    "TMA": r"\bcp\.async\.bulk\.tensor",
    "cp.async": r"\bcp\.async\.c[ag]",
}
TENSOR_CORES = ("wgmma", "mma.sync", "tcgen05")


@dataclass(frozen=True)
class Compiled:
    """A kernel as compiled for one architecture.

    Attributes:
        kernel: its name.
        registers: of one thread. stack: its bytes of local memory; 0 when nothing was spilled.
        shared_memory: bytes of one program.
        instructions: how many of each of ``INSTRUCTIONS`` the PTX holds.
    """

    kernel: str
    registers: int
    stack: int
    shared_memory: int
    instructions: dict[str, int]

    @property
    def tensor_cores(self) -> bool:
        """Whether products are made by tensor cores."""
        return any(self.instructions[name] for name in TENSOR_CORES)


def compile_call(call: Call, arch: Arch) -> Compiled:
    """Compile a launch as the JIT would at its first call on ``arch``.

    Raises:
        RuntimeError: in the interpreter; or cuobjdump, which comes with triton, is missing or says nothing.
    """
    if not isinstance(call.kernel, triton.JITFunction):
        raise RuntimeError("compile_call: expected compiled kernels, got the interpreter's (unset TRITON_INTERPRET)")
    target = GPUTarget("cuda", arch.capability, 32)
    binary = triton.compile(source(call, target), target=target, options=call.options)
    usage = resources(binary.asm["cubin"])
    ptx = binary.asm["ptx"]
    return Compiled(
        call.kernel.__name__,
        usage["REG"],
        usage["STACK"],
        binary.metadata.shared,
        {name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()},
    )


def source(call: Call, target: GPUTarget) -> ASTSource:
    """What the JIT would compile: its own binder says which arguments are constants or multiples of 16."""
    kernel, backend = call.kernel, make_backend(target)
    bound, special, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(**call.arguments)
    signature = {param.name: kind for param, (kind, _) in zip(kernel.params, special, strict=True)}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, ((kind, key), value) in enumerate(zip(special, bound.values(), strict=True)):
        if kind == "constexpr":
            constants[i,] = value
        elif isinstance(key, str):
            attributes[i,] = backend.parse_attr(key)
    return ASTSource(kernel, signature, constants, attributes)


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK and so on, as cuobjdump prints them for the one kernel of ``cubin``.

    Raises:
        RuntimeError: cuobjdump is missing or its answer lacks one of these two.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        raise RuntimeError(f"resources: expected cuobjdump as part of triton {triton.__version__}, not found at {tool}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=False)
    usage = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", done.stdout + done.stderr)}
    missing = {"REG", "STACK"} - usage.keys()
    if missing:
        raise RuntimeError(f"resources: cuobjdump -res-usage printed no {missing}: {done.stdout}{done.stderr}")
    return usage


# --- what relaxations launch ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """Dtypes of the products' operands and of the stored states, and how float32 is multiplied."""

    operand: torch.dtype
    storage: torch.dtype = torch.float32
    products: str = "ieee"


PRECISIONS = {
    "fp16": Precision(torch.float16),
    "fp16 stored": Precision(torch.float16, torch.float16),
    "bf16": Precision(torch.bfloat16),
    "tf32": Precision(torch.float32, products="tf32"),
    "ieee": Precision(torch.float32),
}


@dataclass(frozen=True)
class Case:
    """A launch to compile: names of an architecture, a kind and a precision; ``size`` is the maps' height and width,
    which decides how many samples a tile spans."""

    arch: str
    kind: str
    precision: str
    tile: Tile
    size: int = 16

    def call(self) -> Call:
        """The launch, bound to meta tensors."""
        return KINDS[self.kind](self)

    def fits(self) -> bool:
        """Whether this kind of launch may get this tile."""
        precision, kernel = PRECISIONS[self.precision], self.kind.split()[0]
        size = precision.operand.itemsize
        if kernel not in ("step", "drive", "contrast"):
            return self.tile == TABLE[self.arch, size][0]  # once is enough: they have no tile
        problem = Problem(
            kernel,  # type: ignore[arg-type]
            SAMPLES,
            self.size,
            self.size,
            CHANNELS,
            9 * CHANNELS,
            size,
            products=precision.products,
        )
        return self.tile in candidates(problem, arch_named(self.arch))


SAMPLES, CHANNELS = 512, 512


def arch_named(name: str) -> Arch:
    """The architecture of this name."""
    return next(arch for arch in KNOWN.values() if arch.name == name)


def compile_case(case: Case) -> Compiled:
    """For pools of processes, which pickle functions by name."""
    return compile_call(case.call(), arch_named(case.arch))


def _map(dtype: torch.dtype, size: int, n: int = SAMPLES) -> Tensor:
    return torch.empty(n, size, size, CHANNELS, dtype=dtype, device="meta")


def _matrix(dtype: torch.dtype) -> Tensor:
    return torch.empty(CHANNELS, 9 * CHANNELS, dtype=dtype, device="meta")


def _control() -> Tensor:
    return torch.empty(3, dtype=torch.int32, device="meta")


def _step(
    form: int,
    loops: int,
    *,
    pooled: bool,
    phases: int = 1,
    keep: bool = False,
    nudged: bool = False,
    damping: float = 1.0,
    finished: int = 1,
) -> Callable[[Case], Call]:
    """A step from ``loops`` K loops; ``pooled``: from ``finished`` drives too, and it unpools the new state."""

    def call(case: Case) -> Call:
        p, size, half = PRECISIONS[case.precision], case.size, SAMPLES // phases

        def loop(i: int) -> Loop:
            make = drive_loop if i % 2 else feedback_loop
            return make(_map(p.operand, size), _matrix(p.operand), (3, 3), (1, 1), 0.5)

        shared = form == STATES and phases > 1
        addend = Addend(_map(torch.float32, size, half if shared else SAMPLES), 0.5, shared)
        return step_call(
            arch_named(case.arch),
            p.products,
            Dynamics(form, damping, 1.0, 0.0, 1.0, 1.0 if form == STATES else 1024.0),
            [loop(i) for i in range(loops)],
            [addend] * finished if pooled else [],
            channels=CHANNELS,
            phases=phases,
            new=_map(p.storage, size),
            residual=torch.empty(64, SAMPLES, dtype=torch.int32, device="meta"),
            control=_control(),
            old=_map(p.storage, size),
            operand=_map(p.operand, size) if p.operand != p.storage else None,
            bias=torch.empty(CHANNELS, device="meta") if form == STATES else None,
            nudge=_map(torch.float32, size) if nudged else None,
            nudge_gain=0.5,
            pre=None if form == STATES else _map(torch.float32, size, half),
            pre_out=_map(torch.float32, size) if keep else None,
            unpooled=_map(p.operand, 2 * size) if pooled else None,
            winners=_map(torch.uint8, size, half) if pooled else None,
            winners_shared=phases > 1,
            stop=True,
            finish=True,
            tol=1e-3,
            tile=case.tile,
        )

    return call


def _drive(pool: int, *, frozen: bool = False, unpool: bool = False, phases: int = 1) -> Callable[[Case], Call]:
    def call(case: Case) -> Call:
        p, size = PRECISIONS[case.precision], case.size
        wide = size if pool == NONE else 2 * size
        return drive_call(
            arch_named(case.arch),
            p.products,
            drive_loop(_map(p.operand, wide), _matrix(p.operand), (3, 3), (1, 1)),
            size=(size, size),
            pool=pool,
            phases=phases,
            drive=_map(torch.float32, size),
            control=_control(),
            winners=_map(torch.uint8, size, SAMPLES // phases) if frozen else None,
            winners_shared=phases > 1,
            winners_out=_map(torch.uint8, size) if pool == MAX and not frozen else None,
            state=_map(p.storage, size) if unpool else None,
            unpooled=_map(p.operand, wide) if unpool else None,
            stop=True,
            tile=case.tile,
        )

    return call


def _contrast(*, both: bool, ragged: bool = False) -> Callable[[Case], Call]:
    """``both`` products; over ``ragged`` maps, whose rows are no power of two."""

    def call(case: Case) -> Call:
        p = PRECISIONS[case.precision]
        a = _map(p.operand, 6 if ragged else case.size)
        out = torch.empty(CHANNELS, 9, CHANNELS, device="meta")
        more = a if both else None
        return contrast_calls(
            arch_named(case.arch), p.products, a, a, more, more, (3, 3), (1, 1), 0.5, 0.5, out, case.tile
        )[0]

    return call


def _difference(pool: int, *, live: bool = False) -> Callable[[Case], Call]:
    def call(case: Case) -> Call:
        p, size, arch = PRECISIONS[case.precision], case.size, arch_named(case.arch)
        programs = difference_programs(arch, SAMPLES * size * size)
        above = _map(p.operand, size if pool == NONE else 2 * size)
        return difference_call(
            arch,
            _map(p.storage, size),
            _map(p.storage, size, 2 * SAMPLES),
            _map(torch.uint8, size, 2 * SAMPLES if live else SAMPLES) if pool == MAX else None,
            above,
            above,
            torch.empty(programs, CHANNELS, device="meta"),
            channels=CHANNELS,
            phases=2,
            pool=pool,
            live=live,
            mean_gain=0.5,
            gain=0.5,
        )

    return call


def _head(classes: int) -> Callable[[Case], Call]:
    def call(case: Case) -> Call:
        storage = PRECISIONS[case.precision].storage
        state, free, total = (
            torch.empty(n, 1, 1, CHANNELS, dtype=dtype, device="meta")
            for n, dtype in ((2 * SAMPLES, storage), (SAMPLES, storage), (2 * SAMPLES, torch.float32))
        )
        outputs = torch.empty(SAMPLES, classes, device="meta")
        return head_call(
            state, free, torch.empty(classes, CHANNELS, device="meta"), outputs[0], outputs, total, _control(),
            phases=2, softmax=True, weight_of_loss=1.0, temperature=2.0, inverse_scale=0.5, add=True, stop=True,
        )  # fmt: skip

    return call


def _add_up(case: Case) -> Call:
    partial, out = (torch.empty(n, 9 * CHANNELS * CHANNELS, device="meta") for n in (4, 1))
    return add_up_call(partial, out, CHANNELS, CHANNELS, 0.5)


# The first of each kernel needs the most registers.
KINDS: dict[str, Callable[[Case], Call]] = {
    "step everything": _step(DELTA, 2, pooled=True, phases=2, keep=True, nudged=True, damping=1.5, finished=2),
    "step four loops": _step(STATES, 4, pooled=True, keep=True, damping=1.5, finished=2),
    "step states": _step(STATES, 2, pooled=False, keep=True),
    "step states pooled": _step(STATES, 1, pooled=True, keep=True),
    "step states nudged": _step(STATES, 2, pooled=True, phases=2, nudged=True, damping=1.5),
    "step delta": _step(DELTA, 2, pooled=False, phases=2),
    "step delta pooled": _step(DELTA, 1, pooled=True, phases=2, nudged=True),
    "step tangent pooled": _step(TANGENT, 1, pooled=True),
    "drive max live": _drive(MAX, unpool=True),
    "drive max frozen": _drive(MAX, frozen=True, phases=2),
    "drive avg": _drive(AVG),
    "drive none": _drive(NONE),
    "contrast": _contrast(both=True),
    "contrast tangent": _contrast(both=False),
    "contrast ragged": _contrast(both=True, ragged=True),
    "difference": _difference(NONE),
    "difference max": _difference(MAX),
    "difference max live": _difference(MAX, live=True),
    "difference avg": _difference(AVG),
    "head of 128": _head(128),
    "head of 10": _head(10),
    "add_up": _add_up,
}


def heaviest() -> list[str]:
    """The kinds that need the most registers of their kernel."""
    return list({kind.split()[0]: kind for kind in reversed(KINDS)}.values())[::-1]
