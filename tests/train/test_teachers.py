"""Teachers: networks, hooks, evaluation without gradients, normalisation, and every kind of spec."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn

import ep_train
from ep_train import checkpoint
from ep_train.data import Dataset, load_dataset
from ep_train.step import predict
from ep_train.teachers import TEACHERS, Normalisation, Teacher, build_teacher, load_teacher
from tests.core.threads import one_thread  # noqa: F401  (autouse)

SHAPE = (3, 16, 16)
UNIT = Normalisation((0.0,) * 3, (1.0,) * 3)


def images(count: int = 4, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))


def built(name: str = "vgg11_bn", **options: Any) -> nn.Module:
    """A small teacher whose running statistics are not those of a fresh one."""
    module = build_teacher(name, SHAPE, 5, 0.1, **options).train()
    with torch.no_grad():
        module(images(8))
    return module


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("side", [8, 32, 33])
def test_a_teacher_of_any_size(name: str, side: int) -> None:
    module = build_teacher(name, (1, side, side), 7, 0.05)
    assert module(torch.rand(2, 1, side, side)).shape == (2, 7)
    with torch.device("meta"):
        total = sum(p.numel() for p in build_teacher(name, (3, side, side), 10).parameters())
    want = {"vgg11_bn": 9.2e6, "vgg13_bn": 9.4e6, "vgg16_bn": 14.7e6, "resnet18": 11.2e6}[name]
    assert total == pytest.approx(want, rel=0.02)


def test_a_teacher_that_cannot_be_built() -> None:
    with pytest.raises(ValueError, match=r"argument 'name': expected one of vgg11_bn, .*, got 'vgg12'"):
        build_teacher("vgg12", SHAPE, 5)
    with pytest.raises(ValueError, match="argument 'width': expected a number > 0, got 0"):
        build_teacher("resnet18", SHAPE, 5, 0)
    with pytest.raises(ValueError, match="argument 'mean, std': expected 3 numbers each"):
        build_teacher("resnet18", SHAPE, 5, mean=[0.5])


def test_outputs_are_those_of_the_module_in_evaluation_mode() -> None:
    module = built()
    x = images()
    teacher = Teacher(module, image_shape=SHAPE, names=("features.2", "features.3"))
    assert teacher.classes == 5
    kept = {n: t.clone() for n, t in module.state_dict().items()}
    for mode in (True, False):
        teacher.train(mode)
        module.train(mode)  # whoever else holds the module
        with torch.enable_grad():
            logits, features = teacher.outputs(x.requires_grad_())
        assert not module.training
        assert not logits.requires_grad
        assert not any(t.requires_grad or t.is_inference() for t in features.values())
        torch.testing.assert_close(logits, module(x).detach())
    assert list(features) == ["features.2", "features.3"]
    # the ReLU works in place of what came before it, and what a hook keeps is a copy
    torch.testing.assert_close(features["features.3"], torch.max_pool2d(features["features.2"], 2))
    assert all(torch.equal(t, kept[n]) for n, t in module.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_hooks_are_removed() -> None:
    module = built()
    teacher = Teacher(module, image_shape=SHAPE, names=("features.0",))

    def hooks() -> int:
        return sum(len(m._forward_hooks) for m in module.modules())

    teacher.outputs(images())
    teacher.layers()
    assert hooks() == 0
    handle = module.get_submodule("classifier").register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        teacher.outputs(images())
    handle.remove()
    assert hooks() == 0


def test_names_are_checked() -> None:
    with pytest.raises(
        ValueError, match=r"expected modules of the teacher \(features, normalise, .*, classifier\), got 'features.99'"
    ):
        Teacher(built(), image_shape=SHAPE, names=("features.99",))
    blocks = (
        r"expected modules of the teacher \(layer1.0, layer1.1, layer1, .*, layer4, normalise, conv1, .*\.\.\.\), got"
    )
    with pytest.raises(ValueError, match=blocks):  # what one wants comes first
        Teacher(built("resnet18"), image_shape=SHAPE, names=("layer5",))
    with pytest.raises(ValueError, match=r"argument 'images': expected shape \[B, 3, 16, 16\], got \[4, 1, 16, 16\]"):
        Teacher(built(), image_shape=SHAPE).outputs(images(shape=(1, 16, 16)))
    with pytest.raises(ValueError, match=r"expected outputs of shape \[B, classes\], got \[1, 3, 16, 16\]"):
        Teacher(nn.ReLU(), image_shape=SHAPE)


def test_layers_in_the_order_of_the_calls() -> None:
    layers = Teacher(built("resnet18"), image_shape=SHAPE).layers()
    depth = {name: convs for name, _, convs in layers}
    assert (depth["conv1"], depth["layer1"], depth["layer2.0"], depth["layer4"]) == (1, 5, 7, 17)  # not the 1x1 ones
    names = [name for name, _, _ in layers]
    assert names.index("layer1.0.relu") < names.index("layer1.0") < names.index("layer1.1.conv1")
    assert {name: shape for name, shape, _ in layers}["layer3"] == (24, 4, 4)


def test_every_teacher_sees_the_same_pixels() -> None:
    """However the batches are normalised: a teacher that reads pixels, and one that wants them its own way."""
    pixels = images()
    batches = Normalisation((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (batches.mean, batches.std))
    module = built(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    want = module.eval()(pixels)
    teacher = Teacher(module, image_shape=SHAPE, images=batches, reads=UNIT)
    torch.testing.assert_close(teacher.outputs((pixels - mean) / std)[0], want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="argument 'images': expected how the batches are normalised"):
        Teacher(module, image_shape=SHAPE, reads=UNIT)
    grey = Teacher(module, image_shape=(1, 16, 16), images=Normalisation((0.0,), (1.0,)), reads=UNIT)
    torch.testing.assert_close(grey.outputs(pixels[:, :1])[0], module(pixels[:, :1].expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match="expected 3 channels, as the teacher reads, got 2"):
        Teacher(module, image_shape=(2, 16, 16), images=UNIT, reads=UNIT)


def test_normalisation_of_a_dataset() -> None:
    data = load_dataset("digits", train_limit=20, test_limit=10)
    assert Normalisation.of(data) == Normalisation((0.0,), (1.0,))
    other = replace(data, name="cifar10", std=(0.0,))
    assert Normalisation.of(other) == Normalisation(data.mean, (1.0,))


def test_dtype_and_digest() -> None:
    module = built()
    teacher = Teacher(module, image_shape=SHAPE, names=("features.3",))
    digest = teacher.digest()
    assert digest == Teacher(module, image_shape=SHAPE).digest()
    assert digest != Teacher(module, image_shape=SHAPE, identity="other").digest()
    logits, features = teacher.double().outputs(images().double())
    assert {logits.dtype, features["features.3"].dtype} == {torch.float64}
    assert teacher.outputs(images())[0].dtype == torch.float32
    assert teacher.float().digest() == digest
    with torch.no_grad():
        next(teacher.parameters()).view(-1)[0] += 1
    assert teacher.digest() != digest


# --- specs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
@pytest.mark.parametrize("name", ["vgg13_bn", "resnet18"])
def test_a_state_dict(name: str, wrap: str | None, tmp_path: Path) -> None:
    module = built(name).eval()
    state: dict[str, Any] = module.state_dict()
    torch.save({wrap: state} if wrap else state, tmp_path / "t.pt")
    teacher = load_teacher(f"{name}:{tmp_path / 't.pt'}", image_shape=SHAPE, classes=3)
    assert teacher.classes == 5  # the file's; it serves features
    torch.testing.assert_close(teacher.outputs(images())[0], module(images()))


def test_a_state_dict_carries_its_normalisation(tmp_path: Path) -> None:
    module = built(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7]).eval()
    torch.save(module.state_dict(), tmp_path / "t.pt")
    spec = f"vgg11_bn:{tmp_path / 't.pt'}"
    with pytest.raises(ValueError, match="argument 'images': expected how the batches are normalised"):
        load_teacher(spec, image_shape=SHAPE, classes=5)
    teacher = load_teacher(spec, image_shape=SHAPE, classes=5, images=UNIT)
    torch.testing.assert_close(teacher.outputs(images())[0], module(images()))


def run(folder: Path, **options: Any) -> tuple[Path, Dataset]:
    common = {"dataset": "digits", "epochs": 1, "train_limit": 64, "test_limit": 20, "out": folder, "quiet": True}
    _, path = ep_train.train(ep_train.TrainConfig(**{**common, **options}))
    return path, load_dataset("digits", train_limit=64, test_limit=20)


@pytest.mark.parametrize("readout", ["softmax", "mse"])
def test_an_ep_run(readout: Any, tmp_path: Path) -> None:
    path, data = run(tmp_path / "r", model="4-4p", local_heads="1", readout=readout)
    teacher = load_teacher(str(path), image_shape=data.image_shape, classes=10, names=("nodes.1", "nodes.2"))
    x = images(3, data.image_shape)
    logits, features = teacher.outputs(x)
    trainer = ep_train.Trainer(ep_train.TrainConfig(model="4-4p", local_heads="1", readout=readout), dataset=data)
    model = trainer.learner.model
    model.load_state_dict(checkpoint.load(path)["model"])
    torch.testing.assert_close(logits, predict(model, x, trainer.config.relax_config())[0])  # type: ignore[arg-type]
    assert {n: tuple(t.shape) for n, t in features.items()} == {"nodes.1": (3, 4, 8, 8), "nodes.2": (3, 4, 4, 4)}
    assert teacher.classes == 10
    with pytest.raises(ValueError, match="expected a run of `ep-train teacher` with resnet18, got an EP run"):
        load_teacher(f"resnet18:{path}", image_shape=data.image_shape, classes=10)
    for shape in ((3, 8, 8), (1, 16, 16)):  # the second would fit the weights
        found = "x".join(map(str, shape))
        with pytest.raises(
            ValueError, match=rf"expected a teacher of {found} images \(cifar10\), got one of 1x8x8 \(digi"
        ):
            load_teacher(str(path), image_shape=shape, classes=10, dataset="cifar10")
    path = rewritten(path, lambda state: [state.pop(key) for key in ("dataset", "image_shape", "normalisation")])
    with pytest.raises(ValueError, match="does not read these images"):  # of a folder that does not say
        load_teacher(str(path), image_shape=(3, 8, 8), classes=10)
    load_teacher(str(path), image_shape=data.image_shape, classes=10, images=Normalisation((0.3,), (0.2,)))


def test_a_teacher_does_not_end_the_students_run(tmp_path: Path) -> None:
    """Whatever its own run did above its tolerance; that is no part of its identity, the tolerance is."""
    path, data = run(tmp_path / "r", model="4-4p", tol=0.5)
    x, digests = images(3, data.image_shape), []
    for tol, on_fail in ((1e-9, "raise"), (1e-9, "warn"), (1e-8, "warn")):
        text = json.loads((path / "config.json").read_text()) | {"tol": tol, "on_fail": on_fail}
        (path / "config.json").write_text(json.dumps(text))
        teacher = load_teacher(str(path), image_shape=data.image_shape, classes=10)
        assert teacher.outputs(x)[0].shape == (3, 10)
        digests.append(teacher.digest())
    assert digests[0] == digests[1] != digests[2]


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A run folder whose checkpoint was changed."""
    state = checkpoint.load(folder)
    change(state)
    checkpoint.save(folder, state)
    return folder


@pytest.mark.parametrize("options", [{"model": "4-4p"}, {"model": "resnet18", "width": 0.1, "method": "backprop"}])
def test_a_run_on_images_with_another_normalisation(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As with another --train-limit: the teacher sees its own; a student of the same images changes nothing."""
    path, data = run(tmp_path / "r", **options)
    x = images(4, data.image_shape)
    as_they_come = load_teacher(str(path), image_shape=data.image_shape, classes=10)
    same = load_teacher(
        str(path), image_shape=data.image_shape, classes=10, images=Normalisation.of(data), dataset=data.name
    )
    assert torch.equal(same.outputs(x)[0], as_they_come.outputs(x)[0])
    assert not caplog.records
    student = Normalisation((0.3,), (0.2,))
    other = load_teacher(str(path), image_shape=data.image_shape, classes=10, images=student, dataset="folder:digits")
    torch.testing.assert_close(other.outputs((x - 0.3) / 0.2)[0], same.outputs(x)[0], rtol=1e-4, atol=1e-5)
    assert other.digest() != same.digest()
    assert "was trained on digits, the student's images are of folder:digits" in caplog.text
    rewritten(path, lambda state: state["normalisation"].update(mean=[0.3], std=[0.2]))
    again = load_teacher(str(path), image_shape=data.image_shape, classes=10, images=Normalisation.of(data))
    torch.testing.assert_close(again.outputs(x)[0], same.outputs((x - 0.3) / 0.2)[0], rtol=1e-4, atol=1e-5)


def test_a_run_by_backprop(tmp_path: Path) -> None:
    """Of a network, and of a teacher's module."""
    for model in ("4-4p", "vgg11_bn"):
        path, data = run(tmp_path / model, model=model, width=0.25, method="backprop")
        teacher = load_teacher(str(path), image_shape=data.image_shape, classes=10)
        config = ep_train.TrainConfig(model=model, width=0.25, method="backprop")
        learner = ep_train.Trainer(config, dataset=data).learner
        learner.model.load_state_dict(checkpoint.load(path)["model"])
        x = images(3, data.image_shape)
        torch.testing.assert_close(teacher.outputs(x)[0], learner.predict(x)[0].detach())


def test_specs_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("torchvision", "torchvision.models", "timm"):
        monkeypatch.setitem(sys.modules, library, None)
    junk = tmp_path / "junk.pt"
    junk.write_bytes(b"junk")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save(built().state_dict(), tmp_path / "vgg.pt")
    torch.save(SimpleNamespace(a=1), tmp_path / "code.pt")
    (tmp_path / "empty").mkdir()
    for spec, message in {
        "": "expected NAME:PATH, a run folder",
        "/no/such": "expected NAME:PATH, a run folder that is there",
        "resnet50": r"not installed here: torchvision, timm; pip install torchvision timm\), got 'resnet50'",
        "vgg16_bn": "expected NAME:PATH with one of vgg11_bn, ",
        "timm:vit": "pip install timm",
        "vgg11_bn:/no/such.pt": "no such file: /no/such.pt",
        f"vgg11_bn:{junk}": "not a readable state dict",
        f"vgg11_bn:{tmp_path / 'code.pt'}": "not a readable state dict",  # weights_only
        f"vgg11_bn:{tmp_path / 'other.pt'}": "expected a state dict of our vgg11_bn",
        f"vgg13_bn:{tmp_path / 'vgg.pt'}": "does not fit vgg13_bn",
        f"{tmp_path / 'vgg.pt'}": "expected a run folder, or NAME:PATH for a state dict, got the file",
        f"{tmp_path / 'empty'}": "is not a run folder",
        f"vgg11_bn:{tmp_path / 'empty'}": "is not a run folder",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_teacher(spec, image_shape=SHAPE, classes=5)
    with pytest.raises(ValueError, match="expected a teacher of 1-channel images, got 3"):
        load_teacher(f"vgg11_bn:{tmp_path / 'vgg.pt'}", image_shape=(1, 16, 16), classes=5)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "t.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="needs safetensors: pip install safetensors"):
        load_teacher(f"vgg11_bn:{tmp_path / 't.safetensors'}", image_shape=SHAPE, classes=5)


class Small(nn.Module):
    """Stands for a model of a library."""

    pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}  # noqa: RUF012  (as timm has it)

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.fc = nn.Linear(3, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_names_of_a_library(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in with the functions that both have."""
    asked: list[dict[str, Any]] = []

    def make(name: str, num_classes: int = 1000, **options: Any) -> Small:
        asked.append({"name": name, **options})
        return Small(num_classes)

    package = SimpleNamespace(list_models=lambda: ["small"], get_model=make, create_model=make)
    for other in ("torchvision", "torchvision.models", "timm"):
        monkeypatch.setitem(sys.modules, other, None)
    if library == "torchvision":
        monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=package))
        monkeypatch.setitem(sys.modules, "torchvision.models", package)
    else:
        monkeypatch.setitem(sys.modules, "timm", package)
    teacher = load_teacher("small", image_shape=SHAPE, classes=5, images=UNIT)
    key, value = ("weights", "DEFAULT") if library == "torchvision" else ("pretrained", True)
    assert asked == [{"name": "small", key: value}]
    assert teacher.classes == 1000
    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if key == "weights" else ([0.5] * 3, [0.25] * 3)
    x = images()
    wanted = (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    torch.testing.assert_close(teacher.outputs(x)[0], teacher.module(wanted), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="argument 'images': expected how the batches are normalised"):
        load_teacher("small", image_shape=SHAPE, classes=5)
    torch.save(Small(5).state_dict(), tmp_path / "s.pt")
    teacher = load_teacher(f"{library}:small:{tmp_path / 's.pt'}", image_shape=SHAPE, classes=5, images=UNIT)
    assert teacher.classes == 5
    assert asked[-1] == {"name": "small", key: None if key == "weights" else False}
    torch.save(built().state_dict(), tmp_path / "v.pt")
    with pytest.raises(ValueError, match=f"does not fit {library}'s small"):
        load_teacher(f"{library}:small:{tmp_path / 'v.pt'}", image_shape=SHAPE, classes=5, images=UNIT)


class Large(Small):
    """One that cannot read small images."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] < 32:
            raise RuntimeError("Kernel size can't be greater than actual input size")
        return super().forward(x)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_what_goes_wrong_in_a_library(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each error says what to do, and is one that the command line shows as a line."""

    def make(name: str, num_classes: int = 1000, weights: object = None, pretrained: bool = False) -> Large:
        if name == "far" and (weights or pretrained):
            raise URLError("no route to host")
        if name == "broken":
            raise TypeError("no such thing")
        return Large(num_classes)

    package = SimpleNamespace(
        list_models=lambda: ["far", "broken", "large"], get_model=make, create_model=make, models=None
    )
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=package))
    monkeypatch.setitem(sys.modules, "torchvision.models", package)
    monkeypatch.setitem(sys.modules, "timm", package)
    torch.save(Small(5).state_dict(), tmp_path / "s.pt")
    for spec, message in {
        "far": rf"downloaded \(URLError: .*no route to host.*\): .* get the file and give {library}:far:PATH",
        f"broken:{tmp_path / 's.pt'}": r"broken cannot be made \(TypeError: no such thing\): choose another",
        "large": r"does not read 3x16x16 images \(RuntimeError: Kernel size.*\): choose a teacher for smaller ones",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_teacher(f"{library}:{spec}", image_shape=SHAPE, classes=5, images=UNIT)
    near = load_teacher(f"{library}:far:{tmp_path / 's.pt'}", image_shape=(3, 32, 32), classes=5, images=UNIT)
    assert near.classes == 5
