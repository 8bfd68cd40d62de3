"""Runs tests/triton/interpreted in a process of its own: triton reads TRITON_INTERPRET when it is imported."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ep_kernels.backends import interpreting

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "tests/triton/interpreted"
LEAST = 700  # tests that must pass: fewer means that some were not found


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(interpreting(), reason=f"{FOLDER} runs in this process: TRITON_INTERPRET is set")
def test_the_kernels_in_the_interpreter() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "EP_KERNELS_"))}
    environment |= {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    workers = ["-n", "2"] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", FOLDER, "-p", "no:cacheprovider", "-q", "--tb=short", *workers]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    tail = "\n".join((done.stdout + done.stderr).splitlines()[-60:])
    refused = re.search(r"SKIPPED .*: (the interpreter of .*)", done.stdout)
    if refused:
        pytest.skip(refused[1])
    assert done.returncode == 0, f"{' '.join(command)}\n{tail}"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, tail
    assert int(passed[1]) >= LEAST, tail
    assert "skipped" not in tail, tail
