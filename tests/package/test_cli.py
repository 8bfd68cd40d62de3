"""``ep-kernels``: what it prints without a GPU, what it refuses, and a whole tuning run on a pretended device."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ep_kernels import Network, cli, info
from ep_kernels.architectures import ARCHITECTURES
from ep_train.models import build_network

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def test_it_is_installed_as_a_command() -> None:
    assert 'ep-kernels = "ep_kernels.cli:main"' in (ROOT / "pyproject.toml").read_text()


def test_alone_it_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert "tune" in out
    assert "info" in out


def test_it_starts_without_triton_being_imported() -> None:
    code = "import sys, ep_kernels.cli as cli; cli.main([]); sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"] == info.collect()["versions"]
    assert cli.main(["info"]) == 0
    assert "backend reference" in capsys.readouterr().out


def test_the_readme_shows_command_lines_that_parse() -> None:
    lines = re.findall(r"^ep-kernels (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        asked = cli._parser().parse_args(shlex.split(line, comments=True))
        if asked.command == "tune":
            cli.network_of(asked.network, asked.input)


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_are_those_of_the_trainer(name: str) -> None:
    shape = (1, 8, 8) if name == "digits" else (3, 32, 32)
    assert cli.network_of(name, shape) == build_network(name, shape, 10)


def test_widths() -> None:
    expected = Network.chain((3, 16, 16), [64, 32, 8], ["max", "none", "max"], classes=10)
    assert cli.network_of("64p-32-8p", [3, 16, 16]) == expected


@pytest.mark.parametrize("spec", ["", "vgg12", "64q", "64p-", "-64", "0", "64 32"])
def test_a_spec_that_is_none_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"argument --network: expected one of .*vgg11.*, or widths"):
        cli.network_of(spec, [3, 32, 32])


# --- what it refuses --------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "no CUDA device"),
        (["--arch", "sm_80"], "--arch: only with --dry-run"),
        (["--dry-run", "--network", "vgg99"], "argument --network"),
        (["--dry-run", "--batch", "0"], "argument --batch: expected a number >= 1, got 0"),
        (["--dry-run", "--input", "3", "0", "32"], "argument --input"),
        (["--dry-run", "--input", "3", "8", "8"], "a map of at least 1x1"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    arguments: list[str], why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert why in printed.err
    assert re.fullmatch(r"ep-kernels tune: .+\n", printed.err)


@needs_triton
def test_the_interpreter_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["tune"]) == 2
    assert "unset it" in capsys.readouterr().err


def test_without_triton_it_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["tune", "--dry-run"]) == 2
    assert "pip install" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["tun"], ["tune", "--precision", "float8"], ["tune", "--input", "3"]])
def test_arguments_that_cannot_be_read(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: ep-kernels" in capsys.readouterr().err


# --- dry run ----------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("arch", cli.GPUS)
@pytest.mark.parametrize("precision", cli.OPERANDS)
def test_dry_run(arch: str, precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--network", "16p-32", "--input", "3", "8", "8", "--batch", "4", "--precision", precision]
    assert cli.main(["tune", "--dry-run", "--arch", arch, *options]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"16p-32, input 3x8x8, batch 4, {precision} operands, on {arch}: ")
    problems = [line for line in lines if "the estimate takes" in line]
    assert first.endswith(f" {len(problems)} problems")
    assert {line.split()[0] for line in problems} == {"step", "drive", "contrast"}
    listed = [line for line in lines if line.startswith("tiles for operands of ")]
    assert len(listed) == (1 if precision in ("tf32", "float32") else 2)
    assert all(any(line.split("the estimate takes ")[1] in tiles for tiles in listed) for line in problems)
    size = 4 if precision in ("tf32", "float32") else 2
    assert any(re.match(rf"drive pooled +4x8x8x16 +K 144 +{size} bytes", line) for line in problems)
    assert any(re.match(rf"step +8x4x4x16 +K 288 +{size} bytes", line) for line in problems)  # both phases


@needs_triton
def test_dry_run_of_vgg11_takes_no_memory_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EP_KERNELS_CACHE", str(tmp_path))
    assert cli.main(["tune", "--dry-run", "--batch", "65536"]) == 0
    assert "vgg11" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@needs_triton
def test_the_architectures_are_those_of_the_table() -> None:
    from ep_kernels.triton.arch import KNOWN

    assert tuple(arch.name for arch in KNOWN.values()) == cli.GPUS


@needs_triton
def test_the_precisions_are_those_that_are_measured() -> None:
    from ep_kernels.triton.measure import PRECISIONS

    for name, operands in cli.OPERANDS.items():
        dtype = operands if isinstance(operands, torch.dtype) else torch.float32
        assert PRECISIONS[name] == (dtype, "tf32" if operands == "tf32" else "ieee")


# --- a run on a pretended device --------------------------------------------------------------------------------------


class Bench:
    """Every tile gives the same result; the smallest but one is ten times faster, the first does not fit."""

    def __init__(self, problem: object, *_: object) -> None:
        self.outputs = [torch.zeros(3)]

    def launch(self, tile: object) -> Callable[[], None]:
        from ep_kernels.triton.tiling import TABLE

        tiles = next(tiles for (arch, _), tiles in TABLE.items() if arch == "sm_90" and tile in tiles)
        if tile == tiles[0]:
            raise RuntimeError("out of resource: shared memory")

        def run() -> None:
            self.outputs[0].fill_(1.0)

        run.seconds = 1e-5 if tile == tiles[-2] else 1e-4  # type: ignore[attr-defined]
        return run


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from ep_kernels.triton import arch, measure

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Test 9000")
    monkeypatch.setattr(arch, "arch_of", lambda _: arch.KNOWN[90])
    monkeypatch.setattr(measure, "RandomBench", Bench)
    monkeypatch.setattr(measure, "cuda_timer", lambda launch: launch.seconds)


OPTIONS = ["tune", "--network", "16p-32", "--input", "3", "8", "8", "--batch", "4"]


@pytest.mark.usefixtures("device")
def test_a_tuning_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from ep_kernels.triton import tune
    from ep_kernels.triton.arch import KNOWN
    from ep_kernels.triton.tiling import TABLE, Problem

    monkeypatch.setenv("EP_KERNELS_CACHE", str(tmp_path / "own"))
    assert cli.main(OPTIONS) == 0
    printed = capsys.readouterr()
    first, *lines, last = printed.out.splitlines()
    (file,) = (tmp_path / "own").iterdir()
    assert last == f"kept in {file}"
    results = [line for line in lines if " us  " in line]
    assert first.endswith(f"on NVIDIA Test 9000 (sm_90): {len(results)} problems")
    pattern = (
        r"(step|drive|drive pooled|contrast) +4x\S+ +K \d+ +[24] bytes  \S+ w\d s\d +10\.0 us  (10\.00x|the table.*)"
    )
    assert all(re.fullmatch(pattern, line.replace(" 8x", " 4x")) for line in results)
    assert lines.count("    128x256x64 w8 s3 rejected: RuntimeError: out of resource: shared memory") > 0
    content = json.loads(file.read_text())
    assert len(content["tiles"]) == len(results)
    assert tune.tuned(Problem("drive", 4, 8, 8, 16, 144, 2, True), KNOWN[90]) == TABLE["sm_90", 2][-2]
    tune.forget()


@pytest.mark.usefixtures("device")
def test_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP_KERNELS_CACHE", str(tmp_path / "own"))
    assert cli.main([*OPTIONS, "--cache", str(tmp_path / "other")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"to use them: EP_KERNELS_CACHE={tmp_path / 'other'}"
    assert len(list((tmp_path / "other").iterdir())) == 1
    assert not (tmp_path / "own").exists()


@pytest.mark.usefixtures("device")
def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert cli.main([*OPTIONS, "--cache", str(tmp_path / "file")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert str(tmp_path / "file") in printed.err


@pytest.mark.usefixtures("device")
def test_a_problem_that_does_not_fit_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ep_kernels.triton import measure

    class Large(Bench):
        def __init__(self, problem: object, *_: object) -> None:
            if problem.kernel == "contrast":  # type: ignore[attr-defined]
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(problem)

    monkeypatch.setattr(measure, "RandomBench", Large)
    assert cli.main([*OPTIONS, "--cache", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.count("skipped: its operands do not fit into memory") == 2
    assert out.count(" us  ") > 4


@pytest.mark.usefixtures("device")
def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ep_kernels.triton import measure

    class Stopped(Bench):
        def __init__(self, problem: object, *_: object) -> None:
            if problem.kernel == "contrast":  # type: ignore[attr-defined]
                raise KeyboardInterrupt
            super().__init__(problem)

    monkeypatch.setattr(measure, "RandomBench", Stopped)
    assert cli.main([*OPTIONS, "--cache", str(tmp_path)]) == 130
    assert "is kept" in capsys.readouterr().err
    (file,) = tmp_path.iterdir()
    assert len(json.loads(file.read_text())["tiles"]) > 4


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*OPTIONS, "--cache", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    (file,) = tmp_path.iterdir()
    entries = json.loads(file.read_text())["tiles"].values()
    assert len(entries) == out.count(" us  ")
    assert all(entry["microseconds"] > 0 for entry in entries)
    assert "wrong" not in out
