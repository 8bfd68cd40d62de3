"""``ep-train export``: what is written computes what the network does, and wrong things are not written."""

from __future__ import annotations

import ast
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ep_kernels
from ep_kernels import Network, RelaxConfig
from ep_train import TrainConfig, cli, extras, train
from ep_train.commands import export as exporting
from ep_train.commands.export import load_onnx, load_source, replacing_together, spec_of
from ep_train.commands.free_phase import FreePhase
from ep_train.models import Model, build_network
from ep_train.step import predict_feedforward
from ep_train.teachers import Normalisation
from ep_train.trained import load_trained
from tests.core.threads import one_thread  # noqa: F401  (autouse)

NETWORKS: dict[str, Callable[[], Network]] = {
    "max": lambda: build_network("6p-8p-8", (3, 9, 11), 5),
    "avg, separate feedback": lambda: build_network("6p-8-fc12", (2, 8, 8), 4, pool="avg", feedback="separate"),
    "mse, linear output": lambda: build_network("6p-8p", (1, 8, 8), 5, readout="mse", linear_output=True),
    "slope, box, gain 1": lambda: build_network("6p-8p", (1, 8, 8), 5, slope=0.5, box=(-1.0, 1.0), feedback_gain=1.0),
    "skips, strides": lambda: build_network("hopfield_resnet13", (3, 32, 32), 4, width=0.05),
}
CONFIGS = {
    "sweep": RelaxConfig(free_steps=4),
    "even_odd": RelaxConfig(schedule="even_odd", free_steps=3, over_relaxation=1.5),
    "sync, damped": RelaxConfig(schedule="sync", free_steps=5, damping=0.7),
    "sync, feed-forward start": RelaxConfig(schedule="sync", free_steps=2, start="feedforward"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_the_unrolled_free_phase_is_the_free_phase(make: Callable[[], Network], config: RelaxConfig) -> None:
    network = make()
    model = Model(network, weight_gain=1.2, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.2, 0.3)
    images = Normalisation((0.4,) * network.shapes[0][0], (0.3,) * network.shapes[0][0])
    pixels = torch.rand(3, *network.shapes[0])
    x = (pixels - 0.4) / 0.3
    plain = FreePhase(spec_of(network, config, images), model.state_dict()).eval()
    with torch.no_grad():
        found = ep_kernels.free_phase(network, model.tensors(), x, config, backend="reference")
        expected = ep_kernels.readout(network, model.tensors(), found)
        torch.testing.assert_close(plain(pixels), expected, rtol=1e-4, atol=1e-5)
        first = FreePhase(spec_of(network, None, images), model.state_dict())
        torch.testing.assert_close(first(pixels), predict_feedforward(model, x), rtol=1e-4, atol=1e-5)
        sooner = FreePhase(spec_of(network, replace(config, free_steps=config.free_steps - 1), images))
        sooner.load_state_dict(model.state_dict())
        assert (sooner(pixels) - expected).abs().max() > 1e-4  # the number of sweeps can be told


def outputs(run: Path, pixels: Tensor, free_steps: int | None = None) -> Tensor:
    trained = load_trained(run, device="cpu", free_steps=free_steps)
    return trained.predict(pixels)[0]  # digits are not normalised


def test_a_module_needs_torch_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "net.py"
    assert cli.main(["export", str(run), "--to", "module", "--out", str(out), "--free-steps", "5"]) == 0
    shown = capsys.readouterr().out
    assert f"{out} and {out.with_suffix('.pt')}: pixels in [0, 1] of shape [batch, 1, 8, 8]" in shown
    assert "5 sweeps of the free phase, in float32\n" in shown
    assert "loaded and run: outputs within " in shown
    assert sorted(p.name for p in out.parent.iterdir()) == ["net.pt", "net.py"]
    tree = ast.walk(ast.parse(out.read_text()))
    imported = {n.module for n in tree if isinstance(n, ast.ImportFrom)}
    tree = ast.walk(ast.parse(out.read_text()))
    imported |= {alias.name for n in tree if isinstance(n, ast.Import) for alias in n.names}
    own = {"__future__", "collections.abc", "pathlib", "typing"}
    assert imported == own | {"torch", "torch.nn.functional"}
    pixels = torch.rand(4, 1, 8, 8)
    load: Any = load_source(out)
    with torch.no_grad():
        torch.testing.assert_close(load()(pixels), outputs(run, pixels, 5), rtol=1e-4, atol=1e-5)
    assert cli.main(["export", str(run), "--to", "module", "--out", str(out)]) == 1
    assert "is there already" in capsys.readouterr().err


def test_a_program_of_torch_export(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "net.pt2"
    assert cli.main(["export", str(run), "--to", "torch-export", "--out", str(out)]) == 0
    more = {"about.json": ""}
    program = torch.export.load(out, extra_files=more)
    assert json.loads(more["about.json"])["classes"] == [str(i) for i in range(10)]
    for count in (1, 7):
        pixels = torch.rand(count, 1, 8, 8)
        torch.testing.assert_close(program.module()(pixels), outputs(run, pixels), rtol=1e-4, atol=1e-5)


def test_onnx(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnx

    out = tmp_path / "net.onnx"
    assert cli.main(["export", str(run), "--to", "onnx", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "loaded and run" in shown.out
    assert shown.err == ""
    model = onnx.load(out)
    onnx.checker.check_model(model)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param  # a batch of any size
    assert json.loads({p.key: p.value for p in model.metadata_props}["classes"])[3] == "3"
    load = load_onnx(out)
    assert load is not None
    for count in (1, 7):
        pixels = torch.rand(count, 1, 8, 8)
        torch.testing.assert_close(load(pixels), outputs(run, pixels), rtol=1e-4, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


def test_what_computes_something_else_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "net.py"
    arguments = ["export", str(run), "--to", "module", "--out", str(out), "--overwrite"]
    assert cli.main(arguments) == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    original = exporting.spec_of

    def wrong(*given: Any) -> dict[str, Any]:
        spec = original(*given)
        spec["connections"][1]["feedback_gain"] *= 1.1
        return spec

    monkeypatch.setattr(exporting, "spec_of", wrong)
    assert cli.main(arguments) == 1
    assert "the outputs read back differ by " in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["net.py", "net.pt", ".net.py-old", ".net.pt-old"])
@pytest.mark.parametrize("before", [True, False])
def test_files_that_cannot_be_replaced_leave_both_as_they_were(
    name: str, before: bool, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "net.py"
    arguments = ["export", str(run), "--to", "module", "--out", str(out), "--overwrite"]
    if before:
        assert cli.main([*arguments, "--free-steps", "2"]) == 0
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    original, refused = os.replace, []

    def replace(source: Path, target: Path) -> None:
        if Path(target).name == name and not refused:
            refused.append(source)
            raise OSError(28, "No space left on device")
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    if before or not name.startswith("."):
        assert cli.main(arguments) == 1
        assert "No space left on device" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old
    assert cli.main(arguments) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.pt", "net.py"]
    assert out.read_bytes() != old.get("net.py")


def renamed_until(end: Callable[[], object], number: int, folder: Path) -> None:
    """Replace a program and its weights; ``end`` comes right after that many files have got another name."""
    original, count = os.replace, 0

    def replace(source: Path, target: Path) -> None:
        nonlocal count
        original(source, target)
        count += 1
        if count == number:
            end()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with replacing_together(folder / "net.py", folder / "net.pt") as (program, weights):
            program.write_text("new program")
            weights.write_text("new weights")


def killed_after(number: int, folder: Path) -> None:
    """In a process of its own."""
    renamed_until(lambda: os.kill(os.getpid(), signal.SIGKILL), number, folder)


def interrupt() -> None:
    raise KeyboardInterrupt


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


OLD = {"net.py": "old program", "net.pt": "old weights"}
NEW = {"net.py": "new program", "net.pt": "new weights"}
BEFORE = [OLD, {"net.py": "old program"}, {"net.pt": "old weights"}, {}]


def ways(before: dict[str, str]) -> range:
    """Of that many renamed files: the old ones aside, the new weights, the new program."""
    return range(1, len(before) + 3)


@pytest.mark.parametrize(("before", "number"), [(before, n) for before in BEFORE for n in ways(before)])
def test_an_interrupt_between_two_names(before: dict[str, str], number: int, tmp_path: Path) -> None:
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(KeyboardInterrupt):
        renamed_until(interrupt, number, tmp_path)
    assert texts(tmp_path) == (NEW if number == len(before) + 2 else before)


def test_what_a_killed_export_has_left_is_put_back(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ep_train.commands.export"])
    for before in BEFORE[:3]:
        for number in ways(before):
            folder = tmp_path / f"{len(before)}{'net.py' in before}{number}"
            folder.mkdir()
            for name, text in before.items():
                (folder / name).write_text(text)
            process = context.Process(target=killed_after, args=(number, folder))
            process.start()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            assert set(before.values()) <= set(texts(folder).values())
            whole = {name: text for name, text in texts(folder).items() if not name.startswith(".")}
            assert whole != {"net.py": "old program", "net.pt": "new weights"}
            # the next one, which then finds it there
            assert cli.main(["export", str(run), "--to", "module", "--out", str(folder / "net.py")]) == 1
            assert "is there already" in capsys.readouterr().err
            found = {name: text for name, text in texts(folder).items() if name in NEW or name.endswith("-old")}
            assert found == (NEW if number == len(before) + 2 else before)


@pytest.mark.parametrize("name", ["net.py", "net.pt"])
def test_what_is_no_regular_file_is_refused_before_anything_moves(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).mkdir()
    other = tmp_path / ("net.pt" if name == "net.py" else "net.py")
    other.write_text("old")
    arguments = ["export", str(run), "--to", "module", "--out", str(tmp_path / "net.py"), "--overwrite"]
    assert cli.main(arguments) == 1
    assert f"expected a regular file or none, got {tmp_path / name}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pt", "net.py"]
    assert other.read_text() == "old"


def test_what_torch_cannot_export_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*given: Any, **options: Any) -> None:
        raise RuntimeError("no such op")

    monkeypatch.setattr(torch.export, "export", fail)
    assert cli.main(["export", str(run), "--to", "torch-export", "--out", str(tmp_path / "net.pt2")]) == 1
    error = capsys.readouterr().err
    assert "torch cannot export this network (RuntimeError: no such op)" in error
    assert list(tmp_path.iterdir()) == []


def test_packages_that_are_missing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(module: str, *, extra: str, what: str) -> Any:
        raise extras.MissingExtra(f"{what} needs its extra: pip install 'ep-kernels[{extra}]' ({module})")

    monkeypatch.setattr(extras, "require", absent)
    out = tmp_path / "net.onnx"
    assert cli.main(["export", str(run), "--to", "onnx", "--out", str(out)]) == 1
    assert "--to onnx needs its extra: pip install 'ep-kernels[export]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert load_onnx(out) is None


def test_names_that_do_not_fit(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", str(run), "--to", "onnx", "--out", "net.pt2"])
    assert caught.value.code == 2
    assert "ends in .onnx" in " ".join(capsys.readouterr().err.split())


def test_a_teacher_is_a_module_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig(
        model="resnet18", width=0.05, method="backprop", epochs=1, train_limit=20, test_limit=10, batch_size=10,
        device="cpu", quiet=True, out=tmp_path / "run",
    )  # fmt: skip
    train(config)
    assert cli.main(["export", str(tmp_path / "run"), "--to", "module", "--out", str(tmp_path / "net.py")]) == 1
    assert "which is an ordinary PyTorch module" in capsys.readouterr().err
    assert not (tmp_path / "net.py").exists()
    trained = load_trained(tmp_path / "run", device="cpu")
    pixels = torch.rand(3, 1, 8, 8)
    expected, _ = trained.predict(pixels)  # digits are not normalised
    torch.testing.assert_close(exporting.as_module(trained)(pixels), expected)
