"""The host run bites: each fault put into a kernel fails the check that the kernel passes."""

from __future__ import annotations

import pytest

from tests.host.build import build, missing
from tests.host.mutant import caught, mutant

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
SOURCES = "csrc/cuda"
CHECKS = (
    "drive_half",
    "drive_float",
    "drive_warpgroup",
    "contrast_half",
    "contrast_tf32",
    "contrast_odd",
    "step_residual",
    "relax_separate",
)

FAULTS = {
    "main loop without its barrier": ("kernels/mainloop.cuh", "      __syncthreads();", "", "drive_half"),
    "main loop without its wait": ("kernels/mainloop.cuh", "      ptx::copy_wait<kStages - 2>();", "", "drive_half"),
    "main loop that waits for one stage too few": (
        "kernels/mainloop.cuh",
        "<kStages - 2>",
        "<kStages - 1>",
        "drive_half",
    ),
    "accumulators staged over stages that are still read": (
        "kernels/mainloop.cuh",
        "  __syncthreads();  // the stages have been read",
        "  //",
        "drive_half",
    ),
    "fragments of the right operand swapped": (
        "kernels/products.cuh",
        "left[m], right[0], right[1])",
        "left[m], right[1], right[0])",
        "drive_half",
    ),
    "contrast without its barrier": (
        "kernels/contrast.cuh",
        "    __syncthreads();\n    fetch",
        "    fetch",
        "contrast_half",
    ),
    "contrast without its wait": ("kernels/contrast.cuh", "    ptx::copy_wait<kStages - 2>();\n", "", "contrast_tf32"),
    "contrast with two fragments swapped": (
        "kernels/contrast.cuh",
        "right[2], right[3]",
        "right[3], right[2]",
        "contrast_half",
    ),
    "sums of differences without their barrier": (
        "kernels/difference.cu",
        "  __syncthreads();\n  if (group != 0 || channel",
        "  if (group != 0 || channel",
        "contrast_half",
    ),
    "an edge that no launch writes, not cleared": (
        "contrast.cpp",
        "odd ? Start::kZero : Start::kAny",
        "odd ? Start::kAny : Start::kAny",
        "contrast_odd",
    ),
    "feedback through the forward weight": (
        "buffers.cpp",
        "r.connections[c].feedback_weight(), source, to",
        "r.connections[c].weight, source, to",
        "relax_separate",
    ),
    "a linear node cut at the box of the others": (
        "bind.cpp",
        "static_cast<float>(node.hi)",
        "static_cast<float>(dynamics.hi)",
        "relax_separate",
    ),
    "wgmma of shared memory that is not published": (
        "kernels/wgmma.cuh",
        "      ptx::publish_shared();\n",
        "",
        "drive_warpgroup",
    ),
    "wgmma whose products are not waited for": (
        "kernels/wgmma.cuh",
        "      ptx::warpgroup_wait<1>();\n",
        "",
        "drive_warpgroup",
    ),
}


@pytest.fixture(autouse=True)
def with_warpgroups(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the checks' own processes."""
    monkeypatch.setenv("EP_KERNELS_WGMMA", "1")


@pytest.mark.parametrize("check", CHECKS)
def test_unchanged_passes(check: str) -> None:
    assert caught(f"tests.cuda.checks:{check}", build("ep_host")) == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_caught(fault: str) -> None:
    path, old, new, check = FAULTS[fault]
    with mutant(f"{SOURCES}/{path}", old, new) as module:
        assert caught(f"tests.cuda.checks:{check}", module) != "", "the fault went unnoticed"
