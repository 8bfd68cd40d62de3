"""The GPU benchmark where there is no GPU: its baselines, its bookkeeping, and what it would run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import commands, report
from benchmarks.gpu import rows as row_files
from benchmarks.gpu import run as gpu
from benchmarks.gpu.baselines import POOLINGS, PlainEP, layer_update
from benchmarks.gpu.layers import flat_indices
from benchmarks.gpu.problem import (
    BACKENDS,
    BATCHES,
    SECTIONS,
    WGMMA,
    Options,
    largest_error,
    network_of,
    problem_of,
    sweep_flops,
)
from benchmarks.gpu.rows import Job, Wrong, append, close_started, read, run_jobs
from benchmarks.gpu.section import JOBS, jobs_of
from ep_kernels import RelaxConfig, backends, ep_gradients, free_phase, reference

NETS = {"4-6p-5": (12, 0.1), "4p-6p-5": (12, 0.02), "3p-4-5-6p": (13, 0.3)}  # size, k


@pytest.mark.parametrize("pooling", list(POOLINGS))
@pytest.mark.parametrize("setting", list(BATCHES))
@pytest.mark.parametrize("model", list(NETS))
def test_plain_batch_is_ours(model, setting, pooling):
    p = problem_of(network_of(model, *NETS[model]), 3, "cpu").double()
    config = RelaxConfig(**BATCHES[setting])
    ours, _ = ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend="reference")
    plain = PlainEP(p.network, torch.float64, pooling)
    theirs = plain.gradients(p.parameters, p.x, p.targets[0], config, plain.scales(config)).named()
    assert (
        largest_error(list(theirs.values()), [ours.named()[name] for name in theirs]) < 1e-5
    )  # its results are float32


def test_plain_relaxation_is_ours():
    p = problem_of(network_of("4-6p-5-5p", 12, 0.3), 3, "cpu").double()
    config = RelaxConfig(free_steps=5)
    ours = free_phase(p.network, p.parameters, p.x, config, backend="reference")
    theirs, _, _ = PlainEP(p.network, torch.float64).free(p.parameters, p.x, config)
    assert largest_error(theirs[1:], ours.states[1:]) < 1e-12


@pytest.mark.parametrize("pooling", list(POOLINGS))
def test_layer_update_is_ours(pooling):
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    below, weight, bias, state = rand(2, 3, 8, 8), rand(4, 3, 3, 3) - 0.5, rand(4), rand(2, 4, 4, 4)
    above, weight_above = rand(2, 5, 2, 2), rand(5, 4, 3, 3) - 0.5
    winners = torch.randint(0, 4, above.shape, generator=generator).to(torch.uint8)
    drive = reference.drive(below, weight, (1, 1), (1, 1), "max")[0]
    back = reference.feedback(above, weight_above, (4, 4, 4), (1, 1), (1, 1), "max", winners)
    expected = reference.update(state, drive + bias.view(-1, 1, 1) + 0.3 * back, 1.1, 1.0, 0.0, 1.0)
    given = flat_indices(winners, 4) if pooling == "indices" else winners
    tensors = (state, bias, below, weight, None, above, weight_above, given)
    found, _ = layer_update(*tensors, pooled=True, pooling=pooling, gain=0.3, damping=1.1)
    torch.testing.assert_close(found, expected)


def test_flops_of_a_sweep():
    """Two products a connection between nodes; one multiply-add a weight and position."""
    network = network_of("2-3p-4", 8)
    assert sweep_flops(network, 5) == 2 * (2 * 5 * 64 * 9 * 2 * 3) + 2 * (2 * 5 * 16 * 9 * 3 * 4)


def test_dry_run_lists_every_section(capsys):
    assert gpu.main(["--dry-run", "--batch", "32"]) == 0
    printed = capsys.readouterr().out
    for name in SECTIONS:
        assert f"\n{name} (" in printed
    for key in (
        *("matmul fp16", "32/8/ours fp16", "32/8/ours fp16 ops, cuda", "32/3/max-autotune"),
        *("32/T 2 + K 1, tangent/ours bf16, triton", "32/T 2 + K 1, tangent/ours bf16, cuda", "32/ours fp16, cuda"),
        *("synccheck", "-k small and cuda", "-k small and triton", "T 2 + K 1/fp16, cuda"),
    ):
        assert key in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys, tmp_path):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_section(capsys):
    with pytest.raises(SystemExit):
        gpu.parse(["--sections", "rates,speed"])
    assert "got speed" in capsys.readouterr().err


def test_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.folder(gpu.parse([])) == tmp_path
    assert gpu.folder(gpu.parse(["--out", "x"])) == Path("x")
    monkeypatch.delenv("OUT")
    assert gpu.folder(gpu.parse(["--device", "cpu"])).parent.name == "results"


def options(tmp_path: Path, **changes) -> Options:
    base = Options("rates", str(tmp_path), time.time() + 60, (2,), "cpu", "3p-4p", 8, True)
    return replace(base, **changes)


def test_options_survive_the_command_line(tmp_path):
    given = options(tmp_path)
    assert Options.parse(given.json()) == given
    given = replace(given, backends=("cuda",))
    assert Options.parse(given.json()) == given


def test_every_section_has_jobs(tmp_path):
    for section in JOBS:
        keys = [job.key for job in jobs_of(options(tmp_path, section=section))]
        assert keys
        assert len(keys) == len(set(keys))


def test_jobs_go_on_after_one_that_fails(tmp_path):
    def fail():
        raise ValueError("no\nsecond line")

    def wrong():
        raise Wrong("relative error 1")

    def slow():
        time.sleep(20)

    jobs = [Job("a", fail), Job("b", wrong), Job("c", slow, 0.2), Job("d", lambda: {"value": 3})]
    assert run_jobs(options(tmp_path), jobs) == 0
    rows = {row["key"]: row for row in read(tmp_path / "rows.jsonl")}
    assert [rows[key]["status"] for key in "abcd"] == ["failed", "wrong", "failed", "ok"]
    assert rows["a"]["reason"] == "ValueError: no"
    assert "stopped after" in rows["c"]["reason"]
    assert rows["d"]["value"] == 3


def test_a_second_process_goes_on_where_the_first_broke(tmp_path):
    rows = tmp_path / "rows.jsonl"
    append(rows, {"section": "rates", "key": "a", "status": "ok"})
    append(rows, {"section": "rates", "key": "b", "status": "started"})
    with rows.open("a") as file:
        file.write('{"section": "rates", "ke')  # stopped while it wrote
    rows.write_text(rows.read_text() + "\n")
    close_started(rows, "rates", "the process ended with exit code -9")
    ran = []
    run_jobs(options(tmp_path), [Job(key, lambda key=key: ran.append(key) or {}) for key in "abc"])
    assert ran == ["c"]
    assert [row["status"] for row in read(rows)] == ["ok", "failed", "ok"]


def test_jobs_are_skipped_when_the_time_is_over(tmp_path):
    assert run_jobs(options(tmp_path, deadline=time.time()), [Job("a", dict)]) == row_files.ENDED
    assert read(tmp_path / "rows.jsonl")[0]["status"] == "skipped"


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


def test_a_command_is_stopped_with_what_it_started(tmp_path):
    began = time.time()
    code, _ = commands.run(["sh", "-c", "sleep 50 & sleep 50"], tmp_path / "log", 1)
    assert code is None
    assert time.time() - began < 20


def test_a_section_that_fails_loses_no_other(tmp_path, monkeypatch):
    args = gpu.parse(["--sections", "tests,rates", "--device", "cpu", "--minutes", "0.5", "--only", "copy"])

    def broken(*_):
        raise RuntimeError("nothing works")

    monkeypatch.setattr(commands, "run_tests", broken)
    run = gpu.Run(args, tmp_path, "")
    (tmp_path / "rows.jsonl").write_text("")
    run.everything()
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["notes"]["tests"] == "RuntimeError: nothing works"
    assert [row["key"] for row in result["rows"] if row["status"] == "ok"] == ["copy"]
    assert "TB/s" in (tmp_path / "results.md").read_text()
    assert "copy: " in run.summary()


def test_targets_judge_the_largest_batch():
    def row(section, batch, variant, ms, **more):
        base = {"section": section, "key": variant, "status": "ok", "batch": batch, "variant": variant}
        return {**base, "ms": {"0.2": ms, "0.5": ms, "0.8": ms}, "error": 0.0, "memory": None, **more}

    few = "T 2 + K 1, tangent"
    rows = [
        row("relaxation", 128, "ours fp16, cuda", 9.0, backend="cuda", percent=10.0, phases={"T 4": {"percent": 5.0}}),
        row("relaxation", 256, "ours fp16, cuda", 2.0, backend="cuda", percent=61.0, phases={"T 4": {"percent": 55.0}}),
        row(
            "relaxation",
            256,
            "ours fp16, triton",
            3.0,
            backend="triton",
            percent=41.0,
            phases={"T 4": {"percent": 65.0}},
        ),
        row("relaxation", 256, "autograd step", 30.0),
        row("batch", 256, "ours fp16, cuda-wgmma", 0.5, setting=few, backend="cuda-wgmma"),
        row("batch", 256, "ours fp16, cuda", 1.0, setting=few, backend="cuda"),
        row("batch", 256, "eager in a CUDA graph", 3.0, setting=few),
        row("batch", 256, "torch.compile(default) in a CUDA graph", 1.5, setting=few),
    ]
    found = {(t["measure"], t["of"]): t for t in report.targets(rows)}
    assert found["relaxation sweep, % of matmul", "fp16, batch 256, cuda"]["verdict"] == "met"
    assert found["free phase T 4, % of matmul", "fp16, batch 256, cuda"]["verdict"] == "MISSED"
    assert found["relaxation sweep, % of matmul", "fp16, batch 256, triton"]["verdict"] == "MISSED"
    assert found["autograd step / sweep", "fp16, cuda"]["value"] == 15
    assert found["autograd step / sweep", "fp16, triton"]["value"] == 10
    assert found["best PyTorch batch / EP batch", f"{few}, cuda"]["value"] == 1.5
    assert found["best PyTorch batch / EP batch", f"{few}, cuda-wgmma"]["value"] == 3
    assert found["EP batch / best backprop", f"{few}, cuda"]["verdict"] == "not measured"


def test_each_backend_where_it_can_run(tmp_path, monkeypatch):
    def keys(section, **changes):
        return [job.key for job in jobs_of(options(tmp_path, section=section, **{"device": "cuda", **changes}))]

    for able in (("triton",), ("cuda",), ("triton", "cuda")):
        monkeypatch.setattr(backends, "why_not", lambda name, *_, able=able: None if name in able else "no")
        for section in ("layers", "relaxation", "batch", "cosine"):
            found = keys(section)
            for name in BACKENDS:
                assert any(key.endswith(f", {name}") for key in found) == (name in able)
            assert any("ours" not in key for key in found)
        assert bool(keys("warm")) == ("triton" in able)
    for section in ("layers", "relaxation", "batch"):
        found = keys(section, backends=(WGMMA,))
        assert found
        assert all(key.endswith(", cuda-wgmma") for key in found)
    monkeypatch.setattr(backends, "why_not", lambda *_: "no")
    assert any(key.endswith(", cuda") for key in keys("relaxation"))  # a dry run
    assert not any("cuda" in key for key in keys("relaxation", device="cpu"))


def test_the_sanitizer_runs_over_both_backends(tmp_path, monkeypatch):
    ran = []

    def run(command, log, seconds, extra):
        ran.append((command[command.index("--tool") + 1], command[command.index("-k") + 1]))
        log.write_text("========= ERROR SUMMARY: 0 errors\n")
        return 0, 1.0

    monkeypatch.setattr(commands.shutil, "which", lambda _: "/bin/compute-sanitizer")
    monkeypatch.setattr(commands, "run", run)
    monkeypatch.setattr(backends, "why_not", lambda name, *_: None)
    commands.run_sanitizer(tmp_path, 400)
    tools = ("memcheck", "racecheck", "synccheck")
    assert ran == [(tool, f"small and {name}") for name in ("cuda", "triton") for tool in tools]
    assert [row["status"] for row in read(tmp_path / "rows.jsonl")] == ["passed"] * 6
    monkeypatch.setattr(backends, "why_not", lambda name, *_: None if name == "cuda" else "not installed")
    commands.run_sanitizer(tmp_path, 400)
    rows = read(tmp_path / "rows.jsonl")
    assert [row["status"] for row in rows] == ["passed"] * 3 + ["skipped"] * 3
    assert rows[3]["reason"] == "backend triton cannot run: not installed"
    ran.clear()
    commands.run_sanitizer(tmp_path, 1)  # the first one in any case, and what there is no time for is not a failure
    assert ran == [("memcheck", "small and cuda")]
    assert [row["status"] for row in read(tmp_path / "rows.jsonl")] == ["passed"] + ["skipped"] * 5


@pytest.mark.slow
def test_sections_in_the_interpreter(tmp_path):
    """Code paths of those figures that take a minute on a CPU; the others run with the same command."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--model", "3p-4p", "--size", "8"]
    command += ["--batch", "2", "--quick", "--minutes", "4", "--sections", "rates,layers,cosine"]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", str(tmp_path)], cwd=root, env=environment, check=True)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    odd = [row for row in rows if row["status"] != "ok" and "bf16" not in row["key"]]
    assert not odd  # the interpreter multiplies bfloat16 as raw bits
