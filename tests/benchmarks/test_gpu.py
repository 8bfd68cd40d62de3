"""The GPU command where there is no GPU: what it would run, and how it reads what its commands say."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import commands, gpu, warm
from benchmarks.questions import gpu_tests, sanitizer
from benchmarks.registry import named
from benchmarks.rows import limited
from benchmarks.setting import Setting
from ep_kernels import backends

CUDA = Setting("cuda", quick=True)


def test_dry_run_lists_every_question(capsys):
    assert gpu.main(["--dry-run", "--batch", "32"]) == 0
    printed = capsys.readouterr().out
    for question in named(["gpu"]):
        assert f"\n{question.name} (" in f"\n{printed}"
    for key in ("pytest -m gpu, cuda", "compute-sanitizer --tool synccheck, triton", "  vgg11, batch 32\n", "  tf32\n"):
        assert key in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys, tmp_path):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_question(capsys):
    assert gpu.main(["speed", "--dry-run"]) == 2
    assert "got speed" in capsys.readouterr().err


def test_the_whole_command_on_a_cpu(tmp_path, monkeypatch, capsys):
    """One question, its report beside it, and nothing left of the run under way."""
    monkeypatch.delenv("OUT", raising=False)
    given = ["roofline", "--device", "cpu", "--quick", "--threads", "1", "--out", str(tmp_path)]
    assert gpu.main(given) == 0
    assert "2 rows, 2 with figures" in capsys.readouterr().out
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.is_file()) == [".json", ".log", ".md"]
    assert "GFLOP/s" in (tmp_path / "report.md").read_text()


def test_outcomes_with_and_without_xdist():
    text = """
tests/gpu/test_a.py::test_one[max everywhere, odd maps] PASSED   [ 10%]
[gw1] [ 20%] FAILED tests/gpu/test_a.py::test_two[a b]
tests/gpu/test_a.py::test_three SKIPPED (needs two CUDA devices)  [ 30%]
tests/gpu/test_a.py::test_four
FAILED tests/gpu/test_a.py::test_two[a b] - assert 1 == 2
"""
    found = commands.outcomes(text)
    assert found["counts"] == {"failed": 1, "passed": 1, "skipped": 1}
    assert found["failures"] == ["tests/gpu/test_a.py::test_two[a b]"]


def test_tests_that_are_stopped_keep_what_ended(tmp_path):
    script = "echo 'tests/gpu/test_a.py::test_one PASSED [ 10%]'; sleep 50"
    began = time.time()
    with limited(1.5):
        row = commands.run_tests(["sh", "-c", script], tmp_path / "log")
    assert time.time() - began < 20
    assert row["status"] == "failed"
    assert row["counts"] == {"passed": 1}
    assert "the counts are of what ended before" in row["reason"]


def test_the_gpu_tests_of_each_backend(monkeypatch, tmp_path):
    ran = []

    def run(command, log, seconds, extra):
        ran.append(command[command.index("-k") + 1])
        log.write_text("tests/gpu/test_a.py::test_one PASSED\n")
        return 0

    monkeypatch.setenv(commands.LOGS, str(tmp_path))
    monkeypatch.setattr(commands, "run", run)
    rows = [row for case in gpu_tests.cases(CUDA) for row in case.run()]
    assert ran == ["cuda", "not cuda"]
    assert [(row["status"], row["counts"]) for row in rows] == [("ok", {"passed": 1})] * 2


@pytest.mark.parametrize(
    ("code", "said", "status"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", "ok"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed", "ok"),
        (0, "========= ERROR SUMMARY: 3 errors", "failed"),
        (0, "it said nothing", "failed"),
        (sanitizer.ERRORS, "========= ERROR SUMMARY: 3 errors", "failed"),
    ],
)
def test_the_sanitizer_is_clean_when_it_says_so(monkeypatch, tmp_path, code, said, status):
    ran = []

    def run(command, log, seconds, extra):
        ran.append((command[command.index("--tool") + 1], command[command.index("-k") + 1]))
        log.write_text(f"{said}\n")
        return code

    monkeypatch.setenv(commands.LOGS, str(tmp_path))
    monkeypatch.setattr(commands, "run", run)
    monkeypatch.setattr(sanitizer.shutil, "which", lambda _: "/bin/compute-sanitizer")
    monkeypatch.setattr(backends, "why_not", lambda name, *_: None)
    rows = [row for case in sanitizer.cases(CUDA) for row in case.run()]
    assert ran == [(tool, f"small and {name}") for name in ("cuda", "triton") for tool in sanitizer.TOOLS]
    assert {row["status"] for row in rows} == {status}


def test_the_sanitizer_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(sanitizer.shutil, "which", lambda _: None)
    (row,) = sanitizer.rows("memcheck", "cuda")
    assert row["status"] == "unavailable"
    assert "not on the PATH" in row["reason"]


def test_each_backend_where_it_can_run(monkeypatch):
    """Every question that times our kernels names the backends that can run, and the baselines."""
    from benchmarks.questions import train_batch

    for able in (("triton",), ("cuda",), ("triton", "cuda")):
        monkeypatch.setattr(backends, "why_not", lambda name, *_, able=able: None if name in able else "no")
        names = list(train_batch.makers(CUDA, "3p-4", 2))
        for name in ("triton", "cuda"):
            assert any(n.startswith(f"ours, {name}, ") for n in names) == (name in able)
        assert any(n.startswith("BPTT") for n in names)
        assert bool(warm.names(CUDA, ["train_batch"])) == ("triton" in able)
        assert not warm.names(CUDA, ["roofline"])
    names = list(train_batch.makers(Setting("cuda", quick=True, wgmma=True, backends=("cuda",)), "3p-4", 2))
    assert all(n.startswith(("ours, cuda-wgmma, ", "backprop fp16 autocast")) for n in names)
    assert len(names) > 1
