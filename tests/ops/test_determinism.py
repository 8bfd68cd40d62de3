"""The same bits over repeated calls, for any number of threads, and on every instruction set."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ep_kernels import RelaxConfig, ep_gradients, functional, ops
from tests.ops.inputs import Maker, sample_inputs
from tests.ops.networks import NETWORKS, problem

ISAS = ("baseline", "avx2", "avx512")
DTYPES = (torch.float32, torch.float64)


def passes(*, large: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Outputs of the library's own passes, on tensors with ragged ends, or only those ``large`` enough for two threads.

    Convolutions and matrix products are those of torch: here they are exact (one term to each sum).
    """
    for dtype in DTYPES:
        for sample in sample_inputs("relax_step", dtype, thorough=True):
            if sample.name.startswith("_large" if large else ("_finished", "_alone", "_large")):
                for i, out in enumerate(sample.run()):
                    assert out is not None
                    yield f"relax_step {sample.name} {i} {dtype}", out
        new = Maker(dtype)
        for channels in (17, 64) if large else (1, 3, 17, 64):
            source, one = new(2, channels, 61, 43), torch.zeros(channels, channels, 1, 1, dtype=dtype)
            one[range(channels), range(channels)] = 1.0
            for pool in ("max", "avg"):
                pooled, winners = functional.drive(source, one, pool=pool)
                yield f"drive {pool} {channels} {dtype}", pooled
                if winners is not None:
                    yield f"winners {channels} {dtype}", winners
                    gathered, _ = functional.drive(source, one, (1, 1), (0, 0), pool, new.winners(2, channels, 30, 21))
                    yield f"gather {channels} {dtype}", gathered
                neighbour = functional.Neighbour(pooled, one, pool=pool, winners=winners)
                state, _, _ = functional.relax_step(0 * source, above=[neighbour])
                yield f"unpool {pool} {channels} {dtype}", state
            target, delta = new(2, channels, 61, 43), new(4, channels, 61, 43)
            arguments = (source, new(4, channels, 61, 43), target, delta, (channels, channels, 1, 1))
            yield f"contrast bias {channels} {dtype}", functional.contrast(*arguments)[1]
        # outer products of one sample: no sum over a batch
        vectors = (new(1, 300), None, new(1, 200), new(1, 200), (200, 300))
        yield f"contrast weight {dtype}", functional.contrast(*vectors, target_gain=0.3, scale=-0.7)[0]


def digests(*, large: bool = False) -> dict[str, str]:
    return {name: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for name, t in passes(large=large)}


def assert_equal(got: dict[str, str], expected: dict[str, str]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in expected if got[name] != expected[name]] == []


def test_repeated_calls_and_threads() -> None:
    expected = digests(large=True)
    assert_equal(digests(large=True), expected)
    torch.set_num_threads(2)
    assert_equal(digests(large=True), expected)


def test_whole_gradients_over_repeated_calls() -> None:
    """Convolutions of torch included, at one number of threads."""
    for network in NETWORKS.values():
        params, x, targets = problem(network, dtype=torch.float32)
        first, again = (ep_gradients(network, params, x, targets, RelaxConfig(), backend="cpu")[0] for _ in range(2))
        for name, gradient in first.named().items():
            assert torch.equal(gradient, again.named()[name]), name


def run(code: str, isa: str) -> str:
    environment = {**os.environ, "EP_KERNELS_ISA": isa, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Wrong names first: each is an error, and the next call tries again. Then the digests on the instruction set asked for.
SCRIPT = """
import json, os, torch
from ep_kernels import functional, ops
torch.set_num_threads(1)
said = []
for name in ("sse9", "AVX2", "avx2 "):
    os.environ["EP_KERNELS_ISA"] = name
    try:
        functional.relax_step(torch.zeros(1, 1))
    except RuntimeError as error:
        said.append(str(error).splitlines()[0])
os.environ["EP_KERNELS_ISA"] = "{isa}"
chosen = ops.cpu_isa()
from tests.ops.test_determinism import digests
print(json.dumps([said, chosen, digests()]))
"""


def python(isa: str) -> list[Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = SCRIPT.replace("{isa}", isa)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out: list[Any] = json.loads(done.stdout)
    return out


@pytest.mark.parametrize("isa", ISAS[:-1])
def test_every_instruction_set(isa: str) -> None:
    """EP_KERNELS_ISA chooses it; the bits are those of the widest, which is used here."""
    if ISAS.index(isa) >= ISAS.index(ops.cpu_isa()):
        pytest.skip(f"this processor runs {ops.cpu_isa()}")
    said, chosen, found = python(isa)
    assert len(said) == 3
    for message, wrong in zip(said, ("sse9", "AVX2", "avx2 "), strict=True):
        assert message.startswith("environment: argument 'EP_KERNELS_ISA': expected one of [baseline"), message
        assert message.endswith(f"got '{wrong}'"), message
    assert chosen == isa
    assert_equal(found, digests())
