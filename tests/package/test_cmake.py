"""The library for C++ programs: what ``cmake --install`` writes, and a program that uses it through ``<ep/ops.h>``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ep_kernels import _library

CONSUMER = Path(__file__).parent / "consumer"
TORCH = Path(torch.__file__).parent
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])  # as setup.py looks
CMAKE, NINJA = (shutil.which(name, path=TOOLS) or "" for name in ("cmake", "ninja"))

pytestmark = pytest.mark.skipif(not (CMAKE and NINJA), reason="needs cmake and ninja")


def run(*command: str | Path) -> str:
    """Standard output of a command that must succeed; its output is the message when it does not."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def prefix(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the library is installed, out of the build folder of this tree."""
    where = tmp_path_factory.mktemp("prefix")
    run(CMAKE, "--install", built, "--prefix", where)
    return where


def test_what_is_installed(prefix: Path) -> None:
    names = {path.name for path in prefix.rglob("*") if path.is_file()}
    configs = {"ep_kernelsConfig.cmake", "ep_kernelsConfig-release.cmake", "ep_kernelsConfigVersion.cmake"}
    assert names == {_library.LIBRARY.name, "ops.h"} | configs
    for file in prefix.rglob("*.cmake"):
        for path in (TORCH, Path(__file__).parents[2], prefix):
            assert str(path) not in file.read_text(), "the installation cannot be moved"


def test_a_program_finds_it_and_calls_the_ops(prefix: Path, tmp_path: Path) -> None:
    options = (f"-DCMAKE_MAKE_PROGRAM={NINJA}", f"-DCMAKE_PREFIX_PATH={prefix}", f"-DTORCH_ROOT={TORCH}")
    run(CMAKE, "-G", "Ninja", "-S", CONSUMER, "-B", tmp_path, *options)
    run(CMAKE, "--build", tmp_path)
    assert run(tmp_path / "consumer").splitlines() == [
        "drive 18 winner 3",
        "state 0.75 residual 0.25",
        "a weight of one dimension is refused",
    ]


def test_another_version_is_not_taken(prefix: Path, tmp_path: Path) -> None:
    project = tmp_path / "CMakeLists.txt"
    project.write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(other LANGUAGES NONE)\nfind_package(ep_kernels 99 REQUIRED)\n"
    )
    options = (f"-DCMAKE_MAKE_PROGRAM={NINJA}", f"-DCMAKE_PREFIX_PATH={prefix}")
    command = [CMAKE, "-G", "Ninja", "-S", tmp_path, "-B", tmp_path / "build", *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode != 0
    assert "99" in done.stderr
