"""The wheel: what is in it, what it links to, and that it runs where there is neither compiler nor source tree."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

LIBRARY = "ep_kernels/lib/libep_kernels.so"
# One library of torch, found by soname. The C++ runtime is torch's own too: exceptions cross between the two.
# CUDA's runtime is inside; what it calls is in libc, on older systems in libdl, librt and libpthread.
MAY_NEED = re.compile(
    r"libtorch_cpu\.so|libstdc\+\+\.so\.6|libgcc_s\.so\.1|lib(c|m)\.so\.6|lib(dl\.so\.2|rt\.so\.1|pthread\.so\.0)|ld-linux.*"
)
MAY_CALL = re.compile(r"(aoti_torch|torch)_\w+|\w+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")
NOT_STABLE = re.compile(r"aoti_torch_.*cuda_stream.*|torch_.*cuda.*")  # in libtorch_cuda.so only: looked up at run time
SIZE_MIB = {"cpu": 5, "cuda": 60}
ROOT = Path(__file__).parents[2]
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
def info(wheel: Path) -> dict:
    """The build info out of the wheel."""
    return json.loads(zipfile.ZipFile(wheel).read("ep_kernels/lib/build_info.json"))


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


def test_tag_and_contents(wheel: Path, info: dict) -> None:
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
    assert wheel.stat().st_size < SIZE_MIB[info["build"]] * 2**20


def test_only_torch_is_required(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
    text = archive.read(metadata).decode()
    required = re.findall(r"^Requires-Dist: (.*)$", text, re.MULTILINE)
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.10"]
    assert "License-Expression: Apache-2.0" in text


def test_build_info(info: dict) -> None:
    assert info["isas"][-1] == "baseline"
    assert info["torch"] == torch.__version__.split("+")[0]
    assert info["torch_target_version"] == "0x020a000000000000"
    assert {"version", "compiler", "commit", "date", "summary"} < set(info)
    assert not re.search(r'"/', json.dumps(info)), "an absolute path"
    assert f": built {info['build']} (" in info["summary"]
    if info["build"] == "cpu":
        assert (info["cuda"], info["cuda_archs"]) == (None, [])
    else:
        assert info["note"] is None
        assert re.fullmatch(r"\d+\.\d+", info["cuda"])
        assert f"nvcc {info['cuda']}" in info["summary"]
        assert f"({' '.join(info['cuda_archs'])}; cpu " in info["summary"]
        assert all(re.fullmatch(r"\d+\.\da?(\+PTX)?", arch) for arch in info["cuda_archs"])


def test_the_sdist_is_complete(sources: Path) -> None:
    def files(root: Path) -> Iterator[tuple[str, bytes]]:
        for folder in (".", "csrc", "cmake", "ep_kernels", "python"):
            for path in (root / folder).glob("*" if folder == "." else "**/*"):
                name = path.relative_to(root).as_posix()
                if path.is_file() and not re.match(r"\.git|ep_kernels/lib/|(.*/)?__pycache__/|.*\.egg-info/", name):
                    yield name, path.read_bytes()

    packed = dict(files(sources))
    tree = {name: content for name, content in files(ROOT) if name in packed or "/" in name}
    assert [name for name, content in tree.items() if packed.get(name) != content] == []
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "Makefile", "LICENSE", "README.md", "constraints.txt"):
        assert name in tree


@needs_nm
def test_calls_stable_shims_and_the_c_runtime_only(library: Path) -> None:
    undefined = [line.split() for line in run("nm", "-D", "--undefined-only", library).splitlines()]
    called = [name for kind, name in undefined if kind == "U"]
    assert [name for name in called if not MAY_CALL.fullmatch(name) or NOT_STABLE.fullmatch(name)] == []


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
    for path in (ROOT, Path(torch.__file__).parent, sys.prefix, "/usr/local/cuda"):
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


# ---- builds that are refused; all of them end before anything is compiled --------------------------------------------


def words(text: str) -> str:
    """The text in one line: CMake wraps."""
    return " ".join(text.split())


def configure(sources: Path, build: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """CMake's first half, in a new folder."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    cmake, ninja = shutil.which("cmake", path=tools), shutil.which("ninja", path=tools)
    assert cmake is not None
    given = (f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DEP_PYTHON={sys.executable}", *options)
    command = [cmake, "-G", "Ninja", "-S", sources, "-B", build, *given]
    ours = {"CUDACXX", "CUDAHOSTCXX", "TORCH_CUDA_ARCH_LIST"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True)


def nvcc(folder: Path, script: str) -> str:
    """Path of a program that passes for nvcc."""
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


VERSION = 'case "$1" in --version) echo "Cuda compilation tools, release {}, V{}.76";; {} esac'
ARCHS = "--list-gpu-arch) echo compute_75 compute_80 compute_86 compute_90 compute_100 compute_120;;"
WORKS = VERSION.format("13.0", "13.0", ARCHS)


def broken(folder: Path) -> dict[str, tuple[str, str]]:
    """What is wrong -> CUDACXX, and what the build says about it."""
    names = ("old", "failing", "silent")
    for name in names:
        (folder / name).mkdir()
    failing = VERSION.format("13.0", "13.0", '*) echo "unsupported GNU version" >&2; exit 1;;')
    return {
        "missing": (str(folder / "nowhere"), f"CUDACXX is '{folder / 'nowhere'}', and there is no such program"),
        "old": (nvcc(folder / "old", VERSION.format("11.8", "11.8", "")), "nvcc: expected CUDA >= 12.0; "),
        "failing": (nvcc(folder / "failing", failing), "unsupported GNU version"),
        "silent": (nvcc(folder / "silent", "exit 1"), "--version' fails"),
    }


@pytest.mark.parametrize("wrong", ["missing", "old", "failing", "silent"])
def test_without_a_working_nvcc_cuda_is_an_error_and_auto_says_why(sources: Path, tmp_path: Path, wrong: str) -> None:
    compiler, message = broken(tmp_path)[wrong]
    refused = configure(sources, tmp_path / "cuda", "-DEP_KERNELS_BUILD=cuda", CUDACXX=compiler)
    assert refused.returncode != 0
    assert "EP_KERNELS_BUILD=cuda: " in words(refused.stderr)
    assert message in words(refused.stderr)
    taken = configure(sources, tmp_path / "auto", CUDACXX=compiler)
    assert taken.returncode == 0, taken.stderr
    assert "CMake Warning" in taken.stderr
    assert message in words(taken.stderr)
    info = json.loads((tmp_path / "auto" / "build.json").read_text())
    assert (info["build"], info["cuda"], info["cuda_archs"]) == ("cpu", None, [])
    assert message in info["note"]


def test_cpu_does_not_look_for_nvcc(sources: Path, tmp_path: Path) -> None:
    done = configure(sources, tmp_path, "-DEP_KERNELS_BUILD=cpu", CUDACXX="/nowhere", TORCH_CUDA_ARCH_LIST="nonsense")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads((tmp_path / "build.json").read_text())["note"] is None


@pytest.mark.parametrize(
    ("archs", "got", "reason"),
    [
        ("8.0 9.9", "9.9", "expected some of 8.0 8.6 9.0 10.0 12.0"),
        ("8.0,8.0a", "8.0a", "expected some of"),
        ("sm_80", "sm_80", "expected some of"),
        ("8.0+ptx", "8.0+ptx", "expected some of"),
        ("Volta", "Volta", "or Ampere, Ada, Hopper, Blackwell"),
        ("Ada", "8.9", "expected some of"),  # not of this toolkit
    ],
)
def test_architectures_that_cannot_be_are_refused(
    sources: Path, tmp_path: Path, archs: str, got: str, reason: str
) -> None:
    done = configure(sources, tmp_path / "b", CUDACXX=nvcc(tmp_path, WORKS), TORCH_CUDA_ARCH_LIST=archs)
    assert done.returncode != 0
    for part in ("TORCH_CUDA_ARCH_LIST: ", reason, f"got '{got}'"):
        assert part in words(done.stderr)


def test_architectures_that_are_too_old_are_left_out(sources: Path, tmp_path: Path) -> None:
    """Containers set the variable for all of torch's devices. With EP_KERNELS_BUILD=cuda it is an error."""
    compiler = nvcc(tmp_path, WORKS)
    message = "expected 8.0 or newer (the kernels copy with cp.async, which older devices lack); got '7.5'"
    asked = configure(
        sources, tmp_path / "a", "-DEP_KERNELS_BUILD=cuda", CUDACXX=compiler, TORCH_CUDA_ARCH_LIST="7.5 8.0"
    )
    assert asked.returncode != 0
    assert f"TORCH_CUDA_ARCH_LIST: {message}" in words(asked.stderr)
    none = configure(sources, tmp_path / "b", CUDACXX=compiler, TORCH_CUDA_ARCH_LIST="7.5")
    assert none.returncode == 0, none.stderr
    assert message in words(none.stderr)
    info = json.loads((tmp_path / "b" / "build.json").read_text())
    assert (info["build"], info["cuda"], info["cuda_archs"]) == ("cpu", None, [])
    assert info["note"] == "TORCH_CUDA_ARCH_LIST names nothing of 8.0 or newer: '7.5'"


@pytest.mark.parametrize(
    ("known", "asked", "names", "archs"),
    [
        ("75 80 86 90 100 120", "", "8.0 9.0a 10.0 12.0+PTX", "80-real 90a-real 100-real 120"),
        ("50 75 80 86 90", "", "8.0+PTX 9.0a", "80 90a-real"),
        ("75 80 86 90", "7.5 8.0;9.0a", "8.0 9.0a", "80-real 90a-real"),
        ("75 80 86 90", "8.0;8.6 9.0a,9.0+PTX", "8.0 8.6 9.0a 9.0+PTX", "80-real 86-real 90a-real 90"),
        (
            "80 86 90 100 120",
            "Ampere Hopper;Blackwell",
            "8.0 8.6 9.0a 10.0 12.0",
            "80-real 86-real 90a-real 100-real 120-real",
        ),
    ],
)
def test_architectures(sources: Path, tmp_path: Path, known: str, asked: str, names: str, archs: str) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        f"cmake_minimum_required(VERSION 3.18)\nproject(archs LANGUAGES NONE)\ninclude({sources}/cmake/cuda.cmake)\n"
        f'ep_cuda_architectures("$ENV{{CUDACXX}}" "{asked}" names archs)\nmessage(STATUS "${{names}}|${{archs}}")\n'
    )
    listed = " ".join(f"compute_{number}" for number in known.split())
    done = configure(tmp_path, tmp_path / "b", CUDACXX=nvcc(tmp_path, f"echo {listed}"))
    assert done.returncode == 0, done.stderr
    assert f"-- {names.replace(' ', ';')}|{archs.replace(' ', ';')}\n" in done.stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"EP_KERNELS_BUILD": "nonsense"}, "EP_KERNELS_BUILD: expected one of auto, cpu, cuda; got 'nonsense'"),
        ({"EP_KERNELS_BUILD": "cuda", "CUDACXX": "/nowhere"}, "EP_KERNELS_BUILD=cuda: CUDACXX is '/nowhere'"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS: expected an integer >= 1; got 'many'"),
    ],
)
def test_setup_refuses(sources: Path, variables: dict[str, str], message: str) -> None:
    command = [sys.executable, "setup.py", "build_ext"]
    done = subprocess.run(command, cwd=sources, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode != 0
    assert message in words(done.stdout + done.stderr)
