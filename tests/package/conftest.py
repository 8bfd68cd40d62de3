"""A wheel, built once from a copy of the sources: the tree under test and its library stay as they are."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, without anything that was built in the tree."""
    tree = tmp_path_factory.mktemp("sources") / "tree"
    tree.mkdir()
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy2(file, tree)
    for folder in ("csrc", "ep_kernels", "python"):
        skip = shutil.ignore_patterns("lib", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT / folder, tree / folder, ignore=skip)
    return tree


@pytest.fixture(scope="session")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by way of an sdist, so that the sdist is known to be complete."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(sources)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    (built,) = out.glob("*.whl")
    return built
