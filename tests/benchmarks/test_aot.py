"""The command that shows what the compiler makes of the Triton kernels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_says_that_triton_is_missing():
    code = "import sys; sys.modules['triton'] = None; import benchmarks.aot"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'ep-kernels[triton]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_table_and_json(capsys, tmp_path):
    pytest.importorskip("triton")
    from benchmarks import aot

    out = tmp_path / "sub" / "aot.json"
    assert aot.main(["--arch", "sm_90", "--kernel", "contrast", "--tiles", "1", "--jobs", "1", "--json", str(out)]) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert [row["precision"] for row in result["configurations"]] == ["fp16", "tf32"]
    for row in result["configurations"]:
        assert row["stack"] == 0
        assert row["instructions"]["wgmma"] > 0
        assert f"{row['registers']} registers" in printed
    rows = {row["launch"]: row for row in result["sweep"]["rows"]}
    assert len(rows) == 8 + 4  # layers, and pooled connections but the input's, whose drive never changes
    step = rows["step 3"]  # 256 channels at 8x8, from 128 below (pooled: a drive of its own) and 256 above
    assert (step["m"], step["n"], step["flops"]) == (256 * 64, 256, 2 * step["m"] * step["n"] * step["k"])
    assert step["intensity"] == step["flops"] / step["bytes"]
    assert step["microseconds"]["H200"] <= step["microseconds"]["H100"]
    assert rows["drive 1"]["k"] == 9 * 64
    assert "step 3" in printed
    assert "an estimate" in printed
