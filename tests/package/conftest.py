"""An sdist of the tree, and a wheel that is built where the tree was built: compiling the kernels again takes minutes.

The tree's library in ep_kernels/lib stays as it is; build/cmake is brought up to date, which is no work after
``pip install --no-build-isolation -e .`` or ``python setup.py build_ext --inplace``.
"""

import fcntl
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from ep_kernels import _library

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "cmake"


def run_setup(*arguments: str | Path, **environment: str) -> None:
    """Run setup.py in the tree, when no other process of the tests does: setuptools puts its files together there."""
    command = [sys.executable, "setup.py", "-q", *map(str, arguments)]
    merged = os.environ | environment
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD.parent / "tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            command, cwd=ROOT, env=merged, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked: a tree in which nothing was built."""
    out = tmp_path_factory.mktemp("sdist")
    run_setup("egg_info", "--egg-base", out, "sdist", "--dist-dir", out)
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(out, filter="data")
    return out / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, of the kind and for the architectures that the library of this environment was built for."""
    out = tmp_path_factory.mktemp("wheel")
    info = _library.build_info()
    like = {"EP_KERNELS_BUILD": info["build"], "TORCH_CUDA_ARCH_LIST": " ".join(info["cuda_archs"])} if info else {}
    run_setup(
        *("egg_info", "--egg-base", out, "build", "--build-base", out / "build"),
        *("bdist_wheel", "--bdist-dir", out / "content", "--dist-dir", out),
        **like,
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def built(wheel: Path) -> Path:
    """CMake's build folder, up to date: the wheel was made from it."""
    return BUILD
