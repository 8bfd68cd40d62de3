"""The compiled CUDA kernels, read back from the library without a GPU: no spills, and tensor cores where they belong.

``pytest -s tests/cuda/test_codegen.py`` prints the registers and the static shared memory of every kernel.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

from ep_kernels import _library

# ---- which kernels are meant, by their demangled names ---------------------------------------------------------------
PRODUCTS = re.compile(r"\bep::cuda::(?:\w+::)*(step|drive|contrast)_kernel\b")  # those with matrix products
TENSOR_CORES = re.compile(r"\(ep::cuda::Products\)[123]\b")  # tf32, half, bfloat; 0 multiplies in float32
WGMMA = re.compile(r"\bWarpgroupGemm<")  # of sm_90a; on other architectures never launched, and empty
# The tensor cores' instructions: HMMA is mma.sync on every architecture, HGMMA wgmma of sm_90a.
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(HMMA|HGMMA)\b")
INFO = _library.build_info()


def cuobjdump() -> str | None:
    """NVIDIA's reader of cubins: on PATH, or the one that triton brings along (with nvdisasm beside it)."""
    triton = importlib.util.find_spec("triton")
    folders = [
        Path(folder, "backends", "nvidia", "bin") for folder in (triton and triton.submodule_search_locations) or ()
    ]
    found = (shutil.which("cuobjdump", path=path) for path in (None, *map(str, folders)))
    return next((path for path in found if path), None)


TOOL = cuobjdump()
pytestmark = [
    pytest.mark.skipif(not INFO, reason=f"no library in {_library.PACKAGE}: python setup.py build_ext --inplace"),
    pytest.mark.skipif(INFO.get("build") != "cuda", reason="the library was built without CUDA"),
    pytest.mark.skipif(TOOL is None, reason="needs cuobjdump: of a CUDA toolkit, or pip install triton"),
]


class Usage(NamedTuple):
    """What a kernel takes on one architecture; sizes in bytes, shared memory without what a launch adds."""

    registers: int
    stack: int
    shared: int
    local: int


def cubins() -> list[str]:
    """The architectures of the library as cuobjdump names them: sm_80, sm_90a."""
    return ["sm_" + arch.removesuffix("+PTX").replace(".", "") for arch in INFO.get("cuda_archs", [])]


@pytest.fixture(scope="module")
def usage() -> dict[str, dict[str, Usage]]:
    """Architecture -> kernel (mangled) -> what it takes."""
    found: dict[str, dict[str, Usage]] = defaultdict(dict)
    arch = name = ""
    text = subprocess.run(
        [str(TOOL), "-res-usage", _library.LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r" *Function (\w+):", line):
            name = match[1]
        elif match := re.match(r" *REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            found[arch][name] = Usage(*map(int, match.groups()))
    return found


@pytest.fixture(scope="module")
def instructions() -> dict[str, dict[str, set[str]]]:
    """Architecture -> kernel (mangled) -> the tensor cores' instructions in it. Read line by line: the text is long."""
    found: dict[str, dict[str, set[str]]] = defaultdict(dict)
    kernel: set[str] = set()
    arch = ""
    with subprocess.Popen([str(TOOL), "-sass", _library.LIBRARY], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := INSTRUCTION.match(line):
                kernel.add(match[1])
            elif match := re.match(r"\s+Function : (\w+)", line):
                kernel = found[arch].setdefault(match[1], set())
            elif match := re.match(r"\s+code for (\w+)", line):
                arch = match[1]
    assert process.returncode == 0
    return found


@pytest.fixture(scope="module")
def names(usage: dict[str, dict[str, Usage]]) -> dict[str, str]:
    """Mangled -> demangled names (as they are where there is no c++filt)."""
    mangled = sorted({name for kernels in usage.values() for name in kernels})
    if not shutil.which("c++filt"):
        pytest.skip("needs c++filt")
    text = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    return dict(zip(mangled, text.splitlines(), strict=True))


def short(name: str) -> str:
    """A demangled name without result, arguments and namespaces."""
    return re.sub(r"\bep::cuda::|^void |\([^()]*\)$", "", name)


def test_every_architecture_is_in_it(usage: dict[str, dict[str, Usage]]) -> None:
    assert sorted(usage) == sorted(set(cubins()))
    kernels = [set(found) for found in usage.values()]
    assert kernels[0]
    assert all(found == kernels[0] for found in kernels)


def test_ptx_is_in_it_where_it_was_asked_for() -> None:
    text = subprocess.run([str(TOOL), "-lptx", _library.LIBRARY], capture_output=True, text=True).stdout
    with_ptx = {"sm_" + arch[:-4].replace(".", "") for arch in INFO["cuda_archs"] if arch.endswith("+PTX")}
    assert set(re.findall(r"\.(sm_\w+)\.ptx", text)) == with_ptx


@pytest.mark.parametrize("arch", cubins())
def test_nothing_spills(arch: str, usage: dict[str, dict[str, Usage]], names: dict[str, str]) -> None:
    rows = sorted((short(names[name]), taken) for name, taken in usage[arch].items())
    print(f"\n{arch}: registers, static shared memory in bytes")
    for name, taken in rows:
        print(f"{taken.registers:>5} {taken.shared:>7}  {name}")
    assert [(name, taken) for name, taken in rows if taken.stack or taken.local] == []


@pytest.mark.parametrize("arch", cubins())
def test_shared_memory_is_what_the_launch_adds(
    arch: str, usage: dict[str, dict[str, Usage]], names: dict[str, str]
) -> None:
    """Static shared memory beside it would break the sums of 48 KiB; the host run does not model any. From 9.0 on the
    system keeps 1,024 bytes of each block."""
    reserved = 0 if arch.startswith("sm_8") else 1024
    assert {short(names[name]): taken.shared for name, taken in usage[arch].items() if taken.shared > reserved} == {}


@pytest.mark.parametrize("arch", cubins())
def test_products_are_made_by_tensor_cores(
    arch: str, instructions: dict[str, dict[str, set[str]]], names: dict[str, str]
) -> None:
    products = {name: found for name, found in instructions[arch].items() if PRODUCTS.search(names[name])}
    if arch != "sm_90a":
        products = {name: found for name, found in products.items() if not WGMMA.search(names[name])}
    on_cores = {name: found for name, found in products.items() if TENSOR_CORES.search(names[name])}
    assert on_cores, "no such kernel: do the patterns above still fit the names?"
    assert [short(names[name]) for name, found in on_cores.items() if not found] == []
    others = {name: found for name, found in products.items() if name not in on_cores}
    assert [short(names[name]) for name, found in others.items() if found] == []
    wgmma = {name for name, found in products.items() if "HGMMA" in found}
    assert wgmma == {name for name in products if WGMMA.search(names[name])}
