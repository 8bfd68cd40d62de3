"""What the device reaches on large products and copies, in the same run as everything that is compared with it."""

from __future__ import annotations

import torch

from benchmarks.gpu.problem import Options, relative_error, tf32
from benchmarks.gpu.rows import Job, Row, Wrong, read
from benchmarks.gpu.timing import called

# name: dtype, tf32 allowed, largest relative error
PRODUCTS = {
    "fp16": (torch.float16, False, 2e-3),
    "bf16": (torch.bfloat16, False, 1e-2),
    "tf32": (torch.float32, True, 2e-3),
    "fp32": (torch.float32, False, 1e-5),
}


def jobs(options: Options) -> list[Job]:
    """One matmul a precision, and a copy."""
    found = [Job(f"matmul {name}", lambda name=name: matmul(options, name)) for name in PRODUCTS]  # type: ignore[misc]
    return [*found, Job("copy", lambda: copy(options))]


def matmul(options: Options, name: str) -> Row:
    """8192 x 8192 x 8192 on random numbers, out of place in a result that exists."""
    dtype, allowed, limit = PRODUCTS[name]
    n = 8192 if options.device == "cuda" else 256
    a, b = (torch.randn(n, n, device=options.device).to(dtype) for _ in range(2))
    out = torch.full((n, n), float("nan"), dtype=dtype, device=options.device)
    with tf32(allowed):
        torch.mm(a, b, out=out)
        error = relative_error(out[:64], a[:64].double() @ b.double())
        if not error <= limit:
            raise Wrong(f"relative error {error:.1e}, expected at most {limit:.0e}")
        times = called(f"matmul {name}", lambda: torch.mm(a, b, out=out), rounds=8 if options.quick else 30, most=1.5)
    tflops = 2 * n**3 / times.median / 1e12
    return {"size": n, **times.row(), "tflops": tflops, "error": error}


def copy(options: Options) -> Row:
    """A device-to-device copy: bytes read and written."""
    count = 1 << (30 if options.device == "cuda" else 16)
    source = torch.randint(0, 256, (count,), dtype=torch.uint8, device=options.device)
    out = torch.zeros_like(source)
    times = called("copy", lambda: out.copy_(source), rounds=8 if options.quick else 30, most=1.5)
    if not torch.equal(out, source):
        raise Wrong("the copy differs from its source")
    return {"bytes": 2 * count, **times.row(), "tb_per_s": 2 * count / times.median / 1e12}


def measured(options: Options) -> dict[str, float]:
    """TFLOP/s by name, of the rates section of this run (empty when it did not run)."""
    rows = [row for row in read(options.rows) if row["section"] == "rates" and row["status"] == "ok"]
    return {row["key"].removeprefix("matmul "): row["tflops"] for row in rows if "tflops" in row}


def speed(options: Options, flops: int, seconds: float, rate: str) -> Row:
    """TFLOP/s, and percent of the matmul rate if that was measured."""
    tflops = flops / seconds / 1e12
    found = measured(options).get(rate)
    return {"gflop": flops / 1e9, "tflops": tflops, "percent": None if found is None else 100 * tflops / found}
