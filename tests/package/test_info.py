"""``python -m ep_kernels.info``: stable keys, and an answer also where the library is missing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ep_kernels
from ep_kernels import _library, info

ROOT = Path(__file__).parents[2]
KEYS = {
    "": {"versions", "cpu", "devices", "backends", "auto", "library", "environment", "build"},
    "versions": {"ep_kernels", "torch", "python", "triton", "os"},
    "cpu": {"model", "capability", "kernels", "threads"},
    "backends": {"reference", "cpu", "triton", "cuda"},
    "library": {"path", "error"},
    "environment": set(info.ENVIRONMENT),
}


def test_json_has_the_documented_keys() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "ep_kernels.info", "--json"], capture_output=True, text=True, check=True
    )
    found = json.loads(out.stdout)
    assert {part: set(found[part] if part else found) for part in KEYS} == KEYS
    assert all(set(state) == {"available", "reason"} for state in found["backends"].values())
    assert found["backends"]["cpu"] == {"available": True, "reason": None}
    assert found["cpu"]["kernels"] in found["build"]["isas"]


def test_text_names_every_backend_and_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    info.main([])
    lines = capsys.readouterr().out.splitlines()
    for name, state in info.collect()["backends"].items():
        line = next(line for line in lines if line.startswith(f"backend {name} "))
        assert state["available"] or state["reason"] in line
    assert sum("the choice of auto" in line for line in lines) == 1


def test_works_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "LIBRARY", tmp_path / "libep_kernels.so")
    monkeypatch.setattr(_library, "PACKAGE", tmp_path)
    monkeypatch.setattr(_library, "_loaded", False)
    found = info.collect()
    assert str(tmp_path) in found["library"]["error"]
    assert found["backends"]["cpu"]["reason"] == found["library"]["error"]
    assert found["auto"] == "reference"
    assert found["build"] == {}
    assert found["library"]["error"] in info.as_text(found)


def test_environment_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP_KERNELS_BACKEND", "reference")
    found = info.collect()
    assert found["environment"]["EP_KERNELS_BACKEND"] == "reference"
    assert re.search(r"^EP_KERNELS_BACKEND +reference$", info.as_text(found), re.MULTILINE)


def test_version_is_that_of_the_package() -> None:
    assert f'version = "{ep_kernels.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_a_wrong_instruction_set_is_reported_not_fatal():
    environment = {**os.environ, "EP_KERNELS_ISA": "sse9"}
    command = [sys.executable, "-m", "ep_kernels.info"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "EP_KERNELS_ISA" in done.stdout
    assert "sse9" in done.stdout
