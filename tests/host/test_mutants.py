"""The harness bites: each fault put into a self-test kernel fails the check that the kernel passes."""

from __future__ import annotations

import pytest

from tests.host.build import BuildError, build, missing
from tests.host.mutant import caught, mutant, replace

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
SOURCE = "tests/host/selftest.cu"


@pytest.mark.parametrize(
    ("path", "old", "new", "index", "check", "message"),
    [
        (SOURCE, "__syncthreads();\n    sum +=", "sum +=", None, "neighbours", "not equal"),
        (SOURCE, "];\n    __syncthreads();\n  }", "];\n  }", None, "neighbours", "not equal"),
        (SOURCE, "ptx::copy_wait<1>();", "", 1, "tile", "not equal"),
        (SOURCE, "ptx::copy_wait<1>();", "ptx::copy_wait<2>();", 1, "tile", "not equal"),
        (SOURCE, "__syncthreads();\n    if (threadIdx.x >=", "if (threadIdx.x >=", None, "tile", "not equal"),
        (SOURCE, "    }\n    __syncthreads();\n  }\n  if", "    }\n  }\n  if", None, "tile", "not equal"),
        (SOURCE, "multiply_half(acc, a, b[0], b[1])", "multiply_half(acc, a, b[1], b[0])", None, "tile", "not equal"),
        (SOURCE, "ptx::publish_shared();", "", None, "warpgroup", "not published"),
        (SOURCE, "ptx::warpgroup_arrive();", "", None, "warpgroup", "after the last warpgroup_arrive"),
        (SOURCE, "  ptx::warpgroup_wait<0>();", "", None, "warpgroup", "not equal"),
        (SOURCE, "step % 3 * kStage + row", "step % 1 * kStage + row", None, "warpgroup", "written before its wait"),
        (SOURCE, "(at ^ row % 8)", "at", None, "warpgroup", "not equal"),
        ("tests/host/include/host_ptx.h", "k + i / 2 * 8 + 1", "k + i / 2 * 8", None, "product", "not equal"),
    ],
)
def test_caught(path: str, old: str, new: str, index: int | None, check: str, message: str) -> None:
    with mutant(path, old, new, index=index, target="ep_selftest") as module:
        assert message in caught(f"tests.host.checks:{check}", module)


def test_unchanged_survives() -> None:
    with mutant(SOURCE, "float sum = 0.0f;", "float sum = 0.0f + 0.0f;", target="ep_selftest") as module:
        assert caught("tests.host.checks:neighbours", module) == ""


def test_errors_of_a_test_are_not_catches() -> None:
    with pytest.raises(RuntimeError, match="no_such_check"):
        caught("tests.host.checks:no_such_check", build("ep_selftest"))
    with (
        pytest.raises(BuildError, match="no_such_name"),
        mutant(SOURCE, "0.0f;", "no_such_name;", index=0, target="ep_selftest"),
    ):
        pass
    with pytest.raises(ValueError, match="once, found it 0 times"):
        replace("a b a", "c", "d")
    with pytest.raises(ValueError, match="once, found it 2 times: give its index"):
        replace("a b a", "a", "d")
    assert replace("a b a", "a", "d", 1) == "a b d"
