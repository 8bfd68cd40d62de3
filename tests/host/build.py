"""Builds the modules of the host run (CMakeLists.txt) and imports them."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))
JOBS = str(min(os.cpu_count() or 1, int(os.environ.get("MAX_JOBS", "2"))))


class BuildError(RuntimeError):
    """The compiler's words."""


def tool(name: str) -> str | None:
    """A program of this Python's environment, or of PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


@cache
def missing() -> str | None:
    """Why nothing can be built here, or None."""
    for name in ("cmake", "ninja", os.environ.get("CXX", "g++")):
        if tool(name) is None:
            return f"the host run needs {name}"
    if importlib.util.find_spec("pybind11") is None:
        return "the host run needs pybind11: pip install pybind11"
    return None


@cache
def folder() -> Path:
    """Where the build is: build/host, or a folder of this user where the repository cannot be written."""
    wanted = Path(os.environ.get("EP_HOST_BUILD", ROOT / "build" / "host"))
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        (wanted / ".lock").touch()
    except OSError:
        wanted = Path(os.environ.get("TMPDIR", "/tmp")) / f"ep-host-{os.getuid()}"
        wanted.mkdir(parents=True, exist_ok=True)
    return wanted


def call(*command: str) -> str:
    """A program's output."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


@cache
def failures() -> dict[str, BuildError]:
    """Of the builds of this process."""
    return {}


@cache
def build(target: str) -> Path:
    """The module `target`, up to date: ep_selftest, or ep_host with all of csrc/cuda. Raises BuildError, without trying
    again in the same process."""
    if target in failures():
        raise failures()[target]
    try:
        return compile_module(target)
    except BuildError as error:
        failures()[target] = error
        raise


def compile_module(target: str) -> Path:
    """As `build`, every time."""
    cmake, ninja = str(tool("cmake")), str(tool("ninja"))
    where = folder()
    with (where / ".lock").open("w") as lock:  # sessions take turns
        fcntl.flock(lock, fcntl.LOCK_EX)
        arguments = [f"-DEP_PYTHON={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        call(cmake, "-G", "Ninja", "-S", str(ROOT / "tests" / "host"), "-B", str(where), *arguments)
        call(ninja, "-C", str(where), "-j", JOBS, target)
    return where / (target + SUFFIX)


def load(path: Path) -> ModuleType:
    """The module of a file; its name is what the file's begins with."""
    import torch  # noqa: F401  (its libraries, which ep_host is linked to)

    name = path.name.removesuffix(SUFFIX)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def host_module(target: str) -> Any:
    """The module, built and imported once per process. Raises BuildError; asks nothing of `missing()`."""
    return load(build(target))
