"""roofline: what the device reaches on large products and copies; the op-level questions measure themselves by it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from benchmarks.case import Case, Competitor, Row, Timed, compete
from benchmarks.markdown import good, ms, number, table, without_figures
from benchmarks.problem import on_cpu, relative_error, tf32
from benchmarks.registry import Question
from benchmarks.setting import Setting

# name: dtype, tf32 allowed, largest relative error
PRODUCTS = {
    "fp16": (torch.float16, False, 2e-3),
    "bf16": (torch.bfloat16, False, 1e-2),
    "tf32": (torch.float32, True, 2e-3),
    "fp32": (torch.float32, False, 1e-5),
}
COPY = "copy"


def cases(setting: Setting) -> list[Case]:
    """One product a precision, and a copy."""
    names = [name for name in precisions(setting) if name in PRODUCTS]
    return [Case(name, lambda name=name: [rate(setting, name)]) for name in (*names, COPY)]  # type: ignore[misc]


def precisions(setting: Setting) -> tuple[str, ...]:
    """Operands that this device multiplies."""
    return tuple(setting.choose(setting.precisions, on_cpu(), tuple(PRODUCTS), ("fp32",)))


def rate(setting: Setting, name: str) -> Row:
    """FLOP/s of a product ``tflops``, or bytes/s of a copy ``tb_per_s``, read and write counted."""
    make = (lambda: copy(setting)) if name == COPY else lambda: product(setting, name)
    (row,) = compete(setting, [Competitor(name, make)], against="", least=0.2, warmup=2)
    if row["status"] == "ok":
        seconds = row["ms"]["0.5"] / 1e3
        key, work = ("tb_per_s", row["bytes"]) if name == COPY else ("tflops", row["flops"])
        row[key] = work / seconds / 1e12
    return row


def product(setting: Setting, name: str) -> Timed:
    """n x n x n random numbers, into a result that exists."""
    dtype, allowed, limit = PRODUCTS[name]
    n = 256 if setting.quick else 8192 if setting.cuda else 2048
    a, b = (torch.randn(n, n, device=setting.device).to(dtype) for _ in range(2))
    out = torch.full((n, n), float("nan"), dtype=dtype, device=setting.device)

    def work() -> None:
        with tf32(allowed):
            torch.mm(a, b, out=out)

    def verify() -> float:
        work()
        return relative_error(out[:64], a[:64].double() @ b.double())

    return Timed(work, verify, limit, values={"size": n, "flops": 2 * n**3})


def copy(setting: Setting) -> Timed:
    """Within the device's memory, far more than its caches hold."""
    count = 1 << (16 if setting.quick else 30 if setting.cuda else 28)
    source = torch.randint(0, 256, (count,), dtype=torch.uint8, device=setting.device)
    out = torch.zeros_like(source)

    def work() -> None:
        out.copy_(source)

    def verify() -> float:
        work()
        return 0.0 if torch.equal(out, source) else float("nan")

    return Timed(work, verify, 0.0, values={"bytes": 2 * count})


@lru_cache(maxsize=8)
def measured(setting: Setting, name: str) -> float:
    """FLOP/s of products with such operands, or bytes/s of ``copy``, measured in this very process (once)."""
    row = rate(setting, name)
    if row["status"] != "ok":
        return float("nan")
    return float(1e12 * row["tb_per_s" if name == COPY else "tflops"])


def against_roof(setting: Setting, seconds: float, flops: float, moved: float, name: str) -> Row:
    """FLOP/s, and the part of the roofline that they are.

    Args:
        flops, moved: operations, and the bytes that have to be read and written at least once.
        name: of the operands.

    Returns:
        ``tflops``; ``roof_percent``: the time that the roofline needs, ``max(flops / rate, moved / bandwidth)``, over
        ``seconds``, in percent; ``bound``: which of both it is.
    """
    compute, memory = flops / measured(setting, name), moved / measured(setting, COPY)
    roof = max(compute, memory)
    return {
        "tflops": flops / seconds / 1e12,
        "roof_percent": 100 * roof / seconds,
        "bound": "compute" if compute >= memory else "memory",
    }


def lines(rows: Sequence[Row]) -> list[str]:
    """A line a rate."""
    cells = []
    for row in good(rows):
        text = f"{row['tb_per_s'] * 1e3:.1f} GB/s" if "tb_per_s" in row else f"{row['tflops'] * 1e3:.0f} GFLOP/s"
        cells.append([row["name"], text, ms(row), number(row.get("error"), 1)])
    return [*table(("what", "rate", "ms (quantiles 0.2 to 0.8)", "error"), cells), *without_figures(rows)]


QUESTION = Question(
    "roofline",
    "matmul rate of each precision and copy rate",
    cases,
    lines,
    conditions="large square products (2048 on a CPU, 8192 on a GPU) and one large copy, read and write counted",
    seconds={"cpu": 10.0, "cuda": 8.0},
)
