"""``ep-train predict``: classes of image files; files of all kinds of damage."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from ep_train import TrainConfig, cli, train
from ep_train.commands.predict import read_pixels
from ep_train.data import DataError
from ep_train.trained import load_trained
from tests.core.threads import one_thread  # noqa: F401  (autouse)


@pytest.fixture
def files(test_set: tuple[Tensor, Tensor], tmp_path: Path) -> list[Path]:
    paths = []
    for i, image in enumerate(test_set[0][:5]):
        paths.append(tmp_path / f"digit {i}.png")
        Image.fromarray(image[0].numpy()).save(paths[-1])
    return paths


def test_classes_and_probabilities(
    run: Path, files: list[Path], test_set: tuple[Tensor, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert cli.main(["predict", str(run), *map(str, files), "--top", "3", "--json", str(out), "--device", "cpu"]) == 0
    trained = load_trained(run, device="cpu")
    outputs, residual = trained.predict(trained.normalised(test_set[0][:5]))
    assert residual is not None
    lines = capsys.readouterr().out.splitlines()
    entries = json.loads(out.read_text())["predictions"]
    assert len(lines) == len(entries) == 5
    for i, (line, entry) in enumerate(zip(lines, entries, strict=True)):
        best = outputs[i].softmax(0).sort(descending=True)
        assert [one["label"] for one in entry["top"]] == best.indices[:3].tolist()
        assert [one["class"] for one in entry["top"]] == [str(label) for label in best.indices[:3].tolist()]
        expected = pytest.approx(best.values[:3].tolist(), rel=1e-5)
        assert [one["probability"] for one in entry["top"]] == expected
        assert entry["residual"] == pytest.approx(float(residual[i]), rel=1e-4)
        assert line.startswith(f"{files[i]}: {entry['top'][0]['class']} ({100 * entry['top'][0]['probability']:.1f} %)")
    assert cli.main(["predict", str(run), str(files[0]), "--top", "99", "--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)["predictions"][0]["top"]) == 10


def test_output_units_have_values(files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig(
        model="4p", readout="mse", train_limit=40, test_limit=10, batch_size=20, epochs=1, device="cpu", quiet=True,
        out=tmp_path / "run",
    )  # fmt: skip
    train(config)
    assert cli.main(["predict", str(tmp_path / "run"), str(files[0]), "--json", "-", "--device", "cpu"]) == 0
    (best,) = json.loads(capsys.readouterr().out)["predictions"][0]["top"]
    assert set(best) == {"class", "label", "value"}


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Image.new("L", (8, 9)), "8x9 pixels, but the size must be 8x8"),
        (Image.new("RGB", (8, 8)), "expected a grey image, as the run's are, got a colour one"),
        (Image.new("I;16", (8, 8)), "not 8 bits per channel"),
        (None, "cannot decode this image (FileNotFoundError"),
    ],
)
def test_one_bad_file_and_nothing_is_written(
    picture: Image.Image | None, message: str, run: Path, files: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bad, out = tmp_path / "bad.png", tmp_path / "out.json"
    if picture is not None:
        picture.save(bad)
    assert cli.main(["predict", str(run), str(files[0]), str(bad), "--json", str(out)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert str(bad) in shown.err
    assert message in shown.err
    assert not out.exists()


def test_grey_files_for_a_network_of_colours(files: list[Path]) -> None:
    pixels = read_pixels(files[0], (3, 8, 8))
    assert pixels.shape == (3, 8, 8)
    assert torch.equal(pixels[0], pixels[2])


def encoded(kind: str, mode: str) -> bytes:
    file = io.BytesIO()
    Image.radial_gradient("L").resize((8, 8)).convert(mode).save(file, kind)
    return file.getvalue()


WHOLE = [encoded(kind, mode) for kind, mode in (("PNG", "L"), ("PNG", "RGB"), ("PNG", "P"), ("JPEG", "L"))]


@settings(max_examples=150, deadline=None)
@given(
    whole=st.sampled_from(WHOLE),
    cut=st.integers(0, 400),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=6),
    junk=st.binary(max_size=64),
    channels=st.sampled_from([1, 3]),
)
def test_broken_files_are_data_errors(
    whole: bytes, cut: int, changes: list[tuple[int, int]], junk: bytes, channels: int
) -> None:
    """Cut off, bytes replaced, or no image at all: an image of the right shape, or the documented error."""
    data = bytearray(whole[: len(whole) - cut] if cut < len(whole) else junk)
    for at, value in changes:
        if data:
            data[at % len(data)] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"
        path.write_bytes(bytes(data) + junk)
        try:
            pixels = read_pixels(path, (channels, 8, 8))
        except DataError:
            return
        assert pixels.shape == (channels, 8, 8)
        assert pixels.dtype == torch.uint8
