"""Builds libep_kernels.so with CMake and packs it. Everything about the library itself is in CMakeLists.txt.

Environment variables:

    EP_KERNELS_BUILD      auto (default: cuda where there is a working nvcc >= 12.0, else cpu), cpu or cuda.
    TORCH_CUDA_ARCH_LIST  architectures of a CUDA build, such as "8.0;9.0a;12.0+PTX"; default: cmake/cuda.cmake.
    MAX_JOBS              compilers run at the same time; default: one per core, and at least 2 GiB of free memory each.
                          Of nvcc there are never more at once than memory allows at 6 GB each.
    CXX                   the C++ compiler. CUDAHOSTCXX: the one that nvcc calls, if it has to be another.
    CUDACXX               nvcc; default: the one on PATH, then in CUDA_HOME, CUDA_PATH or /usr/local/cuda.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

ROOT = Path(__file__).resolve().parent
LIBRARY = "libep_kernels.so"
INFO = "build_info.json"
BYTES_PER_JOB = 2 << 30


def tool(name: str) -> str:
    """Path of a build tool: beside this Python first (a venv that is not activated), then on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        raise ExecError(f"{name} was not found: the build needs it. Run: pip install {name}")
    return found


def jobs() -> int:
    """How many compilers to run at once: MAX_JOBS, or what cores and free memory allow."""
    asked = os.environ.get("MAX_JOBS", "")
    if asked:
        if not asked.isdecimal() or int(asked) == 0:
            raise ExecError(f"MAX_JOBS: expected an integer >= 1; got {asked!r}")
        return int(asked)
    cores = len(os.sched_getaffinity(0))
    meminfo = Path("/proc/meminfo").read_text()
    free = int(meminfo.split("MemAvailable:")[1].split()[0]) << 10
    return max(1, min(cores, free // BYTES_PER_JOB))


def commit() -> "str | None":
    """Git commit of this tree ("-dirty" if changed), or None outside a checkout of exactly this tree."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cmake(build: Path) -> None:
    """Configure and build into ``build``; a failure ends the build with CMake's own message above it."""
    cache = build / "CMakeCache.txt"
    if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
        shutil.rmtree(build)  # the tree was copied or moved: CMake refuses a cache of another place
    build.mkdir(parents=True, exist_ok=True)
    configure = [
        *(tool("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
        # Always given: a cached path may lead into an isolated build environment that is gone.
        *(f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DEP_PYTHON={sys.executable}"),
        f"-DEP_KERNELS_BUILD={os.environ.get('EP_KERNELS_BUILD') or 'auto'}",
        f"-DEP_CUDA_ARCHS={os.environ.get('TORCH_CUDA_ARCH_LIST', '')}",
    ]
    for command in (configure, [tool("cmake"), "--build", str(build), "--parallel", str(jobs())]):
        if subprocess.run(command).returncode != 0:
            raise ExecError("building libep_kernels.so failed: the reason is in CMake's output above")


def summary(info: dict) -> str:
    """One line about what was built: the kind, what it runs on, and by which compilers."""
    isas = ", ".join(info["isas"])
    runs_on = f"{' '.join(info['cuda_archs'])}; cpu {isas}" if info["cuda"] else isas
    nvcc = f", nvcc {info['cuda']}" if info["cuda"] else ""
    return "ep_kernels {version}: built {build} ({}), {compiler}{}, torch headers {torch}".format(runs_on, nvcc, **info)


class BuildLibrary(build_ext):
    """``build_ext`` that runs CMake and puts the library and its build info into ``ep_kernels/lib``."""

    def run(self) -> None:
        start = time.monotonic()
        build = ROOT / "build" / "cmake"
        cmake(build)
        info = {"version": self.distribution.get_version(), **json.loads((build / "build.json").read_text())}
        now = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
        info |= {"commit": commit(), "date": time.strftime("%Y-%m-%d", time.gmtime(now))}
        info["summary"] = summary(info)
        package = (ROOT if self.inplace else Path(self.build_lib)) / "ep_kernels" / "lib"
        package.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a running process keeps the file that it has mapped.
        shutil.copy2(build / LIBRARY, package / f"{LIBRARY}.new")
        (package / f"{LIBRARY}.new").replace(package / LIBRARY)
        (package / INFO).write_text(json.dumps(info, indent=2) + "\n")
        why = f" (no CUDA: {info['note']})" if info["note"] else ""
        print(f"{info['summary']}, {time.monotonic() - start:.1f} s{why}", flush=True)

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib, "ep_kernels", "lib", name)) for name in (LIBRARY, INFO)]

    def get_output_mapping(self) -> dict[str, str]:
        """For editable installs: what a wheel would hold -> the file in this tree."""
        in_tree = ROOT / "ep_kernels" / "lib"
        return {path: str(in_tree / Path(path).name) for path in self.get_outputs()} if self.inplace else {}


class Wheel(bdist_wheel):
    """One wheel per platform: the library uses torch's stable ABI and no Python API."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("ep_kernels.lib", sources=[])],  # makes setuptools call build_ext and tag a platform
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
