"""The wheel: what is in it, what it links to, and that it runs where there is neither compiler nor source tree."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch

LIBRARY = "ep_kernels/lib/libep_kernels.so"
# One library of torch, found by soname. The C++ runtime is torch's own too: exceptions cross between the two.
MAY_NEED = re.compile(r"libtorch_cpu\.so|libstdc\+\+\.so\.6|libgcc_s\.so\.1|lib(c|m)\.so\.6|ld-linux.*")
MAY_CALL = re.compile(r"(aoti_torch|torch)_\w+|\w+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")
SIZE_MIB = 5
# An identity convolution of the map 6 7 / 8 9, max-pooled to its last pixel.
DRIVE = """
import json, torch
from ep_kernels import _library
_library.load()
source = torch.tensor([[[[6.0, 7.0], [8.0, 9.0]]]])
drive, winners = torch.ops.ep_kernels.drive(source, torch.ones(1, 1, 1, 1), [1, 1], [0, 0], 1)
print(json.dumps([drive.tolist(), winners.tolist()]))
"""

needs_objdump = pytest.mark.skipif(
    not shutil.which("objdump") or platform.machine() != "x86_64", reason="needs objdump, and an x86-64 library"
)
needs_nm = pytest.mark.skipif(not (shutil.which("nm") and shutil.which("readelf")), reason="needs nm and readelf")


def run(*command: str | Path, **options: object) -> str:
    """Standard output of a command that must succeed; its output is the message when it does not."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def library(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library out of the wheel."""
    return Path(zipfile.ZipFile(wheel).extract(LIBRARY, tmp_path_factory.mktemp("library")))


@pytest.fixture(scope="module")
def bare_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new virtual environment that holds the wheel and, through a .pth file, this environment's torch."""
    venv = tmp_path_factory.mktemp("bare") / "venv"
    run(sys.executable, "-m", "venv", venv)
    python = venv / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel, env={"PATH": ""})
    # After pip, which would else see what is installed here.
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return python


def test_tag_and_contents(wheel: Path) -> None:
    assert re.fullmatch(r"ep_kernels-[\d.]+-py3-none-linux_\w+\.whl", wheel.name), wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for name in (LIBRARY, "ep_kernels/lib/build_info.json", "ep_kernels/info.py", "ep_train/cli.py"):
        assert name in names
    for package in ("ep_kernels", "ep_train"):
        assert f"{package}/__init__.py" in names
        assert f"{package}/py.typed" in names
    strays = [
        name for name in names if not re.match(r"(ep_kernels|ep_train)/.*\.(py|typed)$|ep_kernels-.*dist-info/", name)
    ]
    assert sorted(strays) == ["ep_kernels/lib/build_info.json", LIBRARY]
    assert wheel.stat().st_size < SIZE_MIB * 2**20


def test_only_torch_is_required(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
    text = archive.read(metadata).decode()
    required = re.findall(r"^Requires-Dist: (.*)$", text, re.MULTILINE)
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.10"]
    assert "License-Expression: Apache-2.0" in text


def test_build_info(wheel: Path) -> None:
    text = zipfile.ZipFile(wheel).read("ep_kernels/lib/build_info.json").decode()
    info = json.loads(text)
    assert info["build"] == "cpu"
    assert info["isas"][-1] == "baseline"
    assert info["torch"] == torch.__version__.split("+")[0]
    assert info["torch_target_version"] == "0x020a000000000000"
    assert info["cuda_archs"] == []
    assert {"version", "compiler", "commit", "date", "summary"} < set(info)
    assert not re.search(r'"/', text), "an absolute path"


@needs_nm
def test_calls_stable_shims_and_the_c_runtime_only(library: Path) -> None:
    undefined = [line.split() for line in run("nm", "-D", "--undefined-only", library).splitlines()]
    others = [name for kind, name in undefined if kind == "U" and not MAY_CALL.fullmatch(name)]
    assert others == []


@needs_nm
def test_needs_no_other_library_and_no_path(library: Path) -> None:
    dynamic = run("readelf", "--dynamic", "--wide", library)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert [name for name in needed if not MAY_NEED.fullmatch(name)] == []
    assert "PATH)" not in dynamic  # RPATH, RUNPATH


@needs_nm
def test_exports_nothing(library: Path) -> None:
    assert run("nm", "-D", "--defined-only", library) == ""


def test_holds_no_path_of_the_build_machine(library: Path) -> None:
    content = library.read_bytes()
    for path in (tempfile.gettempdir(), Path(torch.__file__).parent, sys.prefix):  # it was built in the first
        assert os.fsencode(path) not in content


def test_runs_without_compiler_and_source_tree(bare_python: Path, tmp_path: Path) -> None:
    alone = {"cwd": tmp_path, "env": {"PATH": ""}}
    info = json.loads(run(bare_python, "-m", "ep_kernels.info", "--json", **alone))
    assert info["library"]["error"] is None
    assert info["library"]["path"].startswith(str(bare_python.parents[1]))
    assert info["backends"]["cpu"] == {"available": True, "reason": None}
    assert json.loads(run(bare_python, "-c", DRIVE, **alone)) == [[[[[9.0]]]], [[[[3]]]]]


@needs_objdump
def test_shared_code_has_no_vector_instructions_of_some_machines(library: Path) -> None:
    # A function that several objects hold is kept once: not the one that was compiled with -mavx512f.
    parts = re.split(r"^[0-9a-f]+ <(.*)>:$", run("objdump", "-d", "-C", "--no-show-raw-insn", library), flags=re.M)
    wide = {
        name
        for name, code in zip(parts[1::2], parts[2::2], strict=True)
        if re.search(r"\tv[a-z]", code)  # AVX mnemonics start with v
    }
    assert any("::avx512::" in name for name in wide), "no passes found: were symbols stripped?"
    # A clone is private to one object, so it may use what that object may.
    assert [name for name in wide if not re.search(r"::avx(2|512)::|\[clone ", name)] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "EP_KERNELS_BUILD=cuda: this version of ep-kernels has no CUDA sources yet"),
        ("nonsense", "EP_KERNELS_BUILD: expected one of auto, cpu, cuda; got 'nonsense'"),
    ],
)
def test_build_that_cannot_be_is_refused(sources: Path, name: str, message: str) -> None:
    command = [sys.executable, "setup.py", "build_ext"]
    done = subprocess.run(
        command, cwd=sources, env=os.environ | {"EP_KERNELS_BUILD": name}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert message in " ".join((done.stdout + done.stderr).split())  # CMake wraps lines


def test_jobs_must_be_a_number(sources: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext"]
    done = subprocess.run(command, cwd=sources, env=os.environ | {"MAX_JOBS": "many"}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "MAX_JOBS: expected an integer >= 1; got 'many'" in done.stderr
