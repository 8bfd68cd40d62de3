"""Distillation: what may be asked for, terms of every kind of shape, automatic pairs, and the cache of logits."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ep_kernels import Network, reference
from ep_train import checkpoint, cli
from ep_train.data import Batches, Dataset, load_dataset
from ep_train.distill import CacheError, Distillation, FeatureTerm, LogitCache, cache_key, pair_features
from ep_train.losses import AugmentedLoss, LocalErrors
from ep_train.models import build_network
from ep_train.teachers import Teacher, build_teacher
from tests.core.threads import one_thread  # noqa: F401  (autouse)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "arguments? 'logits, local_logits, features': expected at least one term, got 'none'"),
        ({"logits": -1.0}, "argument 'logits': expected a finite number >= 0, got -1.0"),
        ({"local_logits": math.inf}, "argument 'local_logits'"),
        ({"logits": 1.0, "temperature": 0.0}, "argument 'temperature': expected a finite number > 0, got 0.0"),
        ({"features": ("3",)}, "argument 'features': expected pairs as 3=features.7, or auto, got '3'"),
        ({"features": ("0=a",)}, "argument 'features'"),
        (
            {"features": ("2=layer1", "auto")},
            "argument 'features': expected auto alone, or pairs without it, got '2=layer1 auto'",
        ),
        ({"features": ("1=a",), "feature_weight": ()}, "argument 'feature_weight': expected finite numbers >= 0"),
        ({"features": ("1=a",), "feature_weight": (1.0, 2.0)}, "argument 'feature_weight': expected one number or 1"),
        ({"features": ("1=a",), "feature_loss": "l1"}, "argument 'feature_loss': expected mse or cosine, got 'l1'"),
        ({"features": ("1=a",), "map": "both"}, "argument 'map': expected student or teacher, got 'both'"),
        ({"features": ("1=a",), "cache": Path("x")}, "argument 'cache': expected no features"),
    ],
)
def test_what_may_not_be_asked_for(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Distillation: {message}"):
        Distillation(**options)


# --- terms on features ------------------------------------------------------------------------------------------------

NET = Network.chain((2, 8, 6), [3, 4], ["none", "max"], classes=2, hidden=[7], feedback_gain=0.5)  # 3x8x6, 4x4x3, 7
# student's node, teacher's features, what is compared: pool of the head, shape of the target by side of the map
TERMS: dict[str, tuple[int, tuple[int, ...], int | None, tuple[int, ...], tuple[int, ...]]] = {
    "same size": (1, (5, 8, 6), None, (5, 8, 6), (3, 8, 6)),
    "the teacher's is larger": (1, (5, 16, 9), None, (5, 8, 6), (3, 8, 6)),
    "the student's is larger": (1, (5, 4, 4), 4, (5, 4, 4), (3, 4, 4)),
    "each is larger in one direction": (2, (5, 2, 9), 2, (5, 2, 2), (4, 2, 2)),
    "a vector of the teacher": (2, (5,), 1, (5,), (4, 1, 1)),
    "a vector of the student": (3, (5, 4, 4), None, (5,), (7,)),
    "two vectors": (3, (5,), None, (5,), (7,)),
    "tokens": (2, (6, 5), 1, (5,), (4, 1, 1)),
}


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("loss", ["mse", "cosine"])
@pytest.mark.parametrize("name", TERMS)
def test_a_term(name: str, loss: Any, side: Any) -> None:
    node, shape, pool, of_student, of_teacher = TERMS[name]
    generator = torch.Generator().manual_seed(1)
    term = FeatureTerm(NET, node, "m", shape, weight=0.6, loss=loss, side=side, generator=generator)
    head = term.head
    assert (head.node, head.pool, head.loss) == (node, pool, loss)
    wanted = of_student if side == "student" else of_teacher
    assert head.output_shape(NET.shapes[node]) == wanted
    replace(NET, local_heads=(head,))  # a network takes it
    features, state = (torch.randn(3, *s, generator=generator) for s in (shape, NET.shapes[node]))
    compared = term.compared(features)
    target = term.target(compared)
    assert target.shape == (3, *wanted)
    if len(shape) == 3:
        size = wanted[1:] or (1, 1)
        mean = F.adaptive_avg_pool2d(features, size)  # type: ignore[arg-type]
    else:
        mean = (features.mean(1) if len(shape) == 2 else features)[:, :, None, None]
    if term.map is not None:
        mean = F.conv2d(mean, term.map.weight.view(wanted[0], 5, 1, 1), term.map.bias)
        assert term.map.weight.std() < 3 / math.sqrt(5)
    torch.testing.assert_close(target, mean.reshape(target.shape), rtol=1e-5, atol=1e-6)
    if side == "teacher":
        z = reference.head_feature(head, state)
        ours = 0.5 * (z - target).square().flatten(1).mean(1)
        if loss == "cosine":
            ours = 1 - F.cosine_similarity(z, target, 1)
        torch.testing.assert_close(term.loss(state, compared), 0.6 * ours.reshape(3, -1).mean(1))


def module_of(name: str, shape: tuple[int, int, int]) -> Teacher:
    return Teacher(build_teacher(name, shape, 10, 0.05), image_shape=shape)


def test_automatic_pairs() -> None:
    shape = (3, 32, 32)
    student = build_network("vgg11", shape, 10, width=0.05)  # maps of 16, 8, 8, 4, 4, 2, 2, 1
    auto = Distillation(features=("auto",))
    assert pair_features(student, module_of("vgg16_bn", shape), auto) == [
        (1, "features.6"),  # after the first pool: 2 of 13 convolutions, and 1 of 8 layers
        (3, "features.16"),  # ReLU of the fifth
        (5, "features.26"),
        (7, "features.36"),
        (8, "features"),
    ]
    assert pair_features(student, module_of("resnet18", shape), auto) == [
        (1, "layer2.0"),
        (3, "layer3.0"),
        (5, "layer4.0"),
        (7, "layer4.0"),  # no maps of 2x2: the depth alone
        (8, "layer4"),
    ]
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    with pytest.raises(ValueError, match="expected a student and a teacher with maps for 'auto'"):
        pair_features(student, Teacher(flat, image_shape=shape), auto)
    with pytest.raises(ValueError, match="argument 'features': expected layers from 1 to 8, got '9=a'"):
        pair_features(student, module_of("resnet18", shape), Distillation(features=("9=a",)))
    with pytest.raises(ValueError, match="argument 'feature_weight': expected one number or 5 of them"):
        AugmentedLoss(
            student, 10, distillation=replace(auto, feature_weight=(1.0, 2.0)), teacher=module_of("resnet18", shape)
        )


def test_automatic_pairs_leave_out_what_passes_on_its_input() -> None:
    """A shortcut without weights comes after the convolution beside it, and holds what was there before."""
    shape = (3, 32, 32)
    teacher = module_of("resnet18", shape)
    names = [name for name, _, _ in teacher.layers()]
    assert "layer1.0.downsample" not in names
    assert {"relu", "layer1.0.relu", "layer2.0.downsample"} <= set(names)  # one in place; one with weights
    student = build_network("4-4-4p-4-4p-4-4-4p", shape, 10)  # maps of 32, 32, 16, 16, 8, 8, 8, 4
    pairs = pair_features(student, teacher, Distillation(features=("auto",)))
    assert pairs[0] == (2, "layer1")
    for layers in range(2, 20):  # every depth of a first stage of full size
        student = build_network("-".join(["4"] * layers) + "-4p", shape, 10)
        (_, name), *_ = pair_features(student, teacher, Distillation(features=("auto",)))
        assert not name.endswith("downsample")
    parts = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Dropout(), nn.Sequential(nn.Identity()), nn.Flatten()]
    module = nn.Sequential(*parts, nn.Linear(4096, 2))
    assert [name for name, _, _ in Teacher(module, image_shape=shape).layers()] == ["0", "1", "4", "5"]


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_cache_goes_round(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "logits.npz"
    logits = torch.randn(5, 3)
    cache = LogitCache(path, 5, 3, "key")
    assert cache.get(torch.tensor([0])) is None
    cache.put(torch.tensor([4, 1]), logits[[4, 1]])
    assert not path.exists()
    got = cache.get(torch.tensor([1, 4]))
    assert got is not None
    assert torch.equal(got, logits[[1, 4]])
    assert cache.get(torch.tensor([1, 2])) is None
    cache.put(torch.tensor([0, 2, 3]), logits[[0, 2, 3]])
    assert cache.complete
    again = LogitCache(path, 5, 3, "key")
    assert again.complete
    got = again.get(torch.arange(5))
    assert got is not None
    assert torch.equal(got, logits)  # not a digit is lost
    assert [p.name for p in path.parent.iterdir()] == ["logits.npz"]


def test_a_cache_of_something_else_or_with_other_numbers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "logits.npz"
    LogitCache(path, 4, 3, "key").put(torch.arange(4), torch.randn(4, 3))
    whole = path.read_bytes()
    with pytest.raises(CacheError, match=r"logits.npz is of another teacher, other images or .*: remove it, or name"):
        LogitCache(path, 4, 3, "other")
    with pytest.raises(CacheError, match="is damaged"):
        LogitCache(path, 5, 3, "key")
    stored = dict(np.load(path))
    stored["logits"] = stored["logits"] + 1  # a well-formed file
    np.savez(path, **stored)
    with pytest.raises(CacheError, match="its numbers are not those that were written"):
        LogitCache(path, 4, 3, "key")
    for damaged in (whole[: len(whole) // 2], b"", bytes([*whole[:200], whole[200] ^ 255, *whole[201:]])):
        path.write_bytes(damaged)
        with pytest.raises(CacheError, match="is damaged"):
            LogitCache(path, 4, 3, "key")
        assert path.read_bytes() == damaged  # left as it is


class Counted(nn.Module):
    """How often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.images = 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        out: Tensor = self.linear(x.flatten(1))
        return out


def digits() -> Dataset:
    return load_dataset("digits", train_limit=50, test_limit=10)


def loss_of(data: Dataset, teacher: Teacher, path: Path, **options: Any) -> AugmentedLoss:
    asked = Distillation(logits=1.0, local_logits=0.5, cache=path)
    network = build_network("4-4p", data.image_shape, 10)
    return AugmentedLoss(
        network, 10, local=LocalErrors("1"), distillation=asked, teacher=teacher, dataset=data, **options
    )


def test_targets_from_the_cache(tmp_path: Path) -> None:
    data, module = digits(), Counted()
    teacher = Teacher(module, image_shape=data.image_shape)
    path = tmp_path / "c.npz"
    loss = loss_of(data, teacher, path)
    module.images = 0
    order = torch.randperm(50)[:32]
    batches = Batches(data, "train", batch_size=50, shuffle=False, drop_last=False)
    (images, labels), *_ = batches.epoch()
    for _ in range(3):
        cached = loss.targets(images[order], labels[order], order)
    assert module.images == 50  # one pass over the training images
    plain = loss.targets(images[order], labels[order])  # no indices: the teacher runs
    assert module.images == 50 + 32
    for ours, theirs in zip(cached, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    module.images = 0
    again = loss_of(data, teacher, path)  # from the file
    module_runs = module.images
    for ours, theirs in zip(again.targets(images[order], labels[order], order), cached, strict=True):
        assert torch.equal(ours, theirs)
    assert module.images == module_runs
    with torch.no_grad():
        module.linear.weight[0, 0] += 1e-3
    with pytest.raises(CacheError, match="is of another teacher"):
        loss_of(data, teacher, path)


def test_a_cache_is_filled_from_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch by batch: the training images are not kept on the device."""
    asked: list[dict[str, Any]] = []

    def batches(*arguments: Any, **options: Any) -> Batches:
        asked.append(options)
        return Batches(*arguments, **options)

    monkeypatch.setattr("ep_train.distill.cache.Batches", batches)
    data = digits()
    cache = LogitCache(tmp_path / "c.npz", 50, 10, "key")
    cache.fill(Teacher(Counted(), image_shape=data.image_shape), data, torch.device("cpu"))
    assert cache.complete
    assert [options["resident"] for options in asked] == [False]


@pytest.mark.parametrize(("name", "code"), [("SIGUSR1", 75), ("SIGTERM", 130)])
def test_a_signal_ends_a_run_while_its_cache_is_filled(
    name: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, path, original = tmp_path / "run", tmp_path / "c.npz", Teacher.outputs
    seen: list[int] = []

    def outputs(self: Teacher, images: Tensor) -> Any:
        if len(images) > 1:  # not the blank one of its beginning
            seen.append(len(images))
            if len(seen) == 2:
                signal.raise_signal(getattr(signal, name))
        return original(self, images)

    monkeypatch.setattr(Teacher, "outputs", outputs)
    monkeypatch.setattr("ep_train.distill.cache.BATCH", 20)
    torch.save(build_teacher("vgg11_bn", (1, 8, 8), 10, 4 / 64).state_dict(), tmp_path / "t.pt")
    options = ["--model", "4p", "--train-limit", "100", "--test-limit", "10", "--batch-size", "10", "--epochs", "1"]
    options += ["--teacher", f"vgg11_bn:{tmp_path / 't.pt'}", "--teacher-cache", str(path), "--distill-logits", "1"]
    assert cli.main([*options, "--quiet", "--device", "cpu", "--out", str(out)]) == code
    assert seen == [20, 20]
    assert not path.exists()
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["status"], summary["signal"], summary["epochs"]) == ("interrupted", name, 0)
    assert checkpoint.load(out)["step"] == 0
    assert cli.main(["resume", str(out), "--quiet"]) == 0
    assert seen == [20] * 7
    assert path.exists()
    assert json.loads((out / "summary.json").read_text())["status"] == "finished"


def test_what_a_cache_depends_on() -> None:
    data = digits()
    teacher = Teacher(Counted(), image_shape=data.image_shape)
    key = cache_key(teacher, data)
    assert key == cache_key(teacher, digits())
    turned = data.train_images.clone()
    turned[0, 0, 3, 3] += 1
    assert key != cache_key(teacher, replace(data, train_images=turned))
    assert key != cache_key(teacher, replace(data, name="cifar10"))  # normalised in another way


def test_a_cache_of_augmented_images_is_refused(tmp_path: Path) -> None:
    data = digits()
    teacher = Teacher(Counted(), image_shape=data.image_shape)
    with pytest.raises(ValueError, match=r"argument 'cache': expected fixed images \(no crops, no mirroring\)"):
        loss_of(data, teacher, tmp_path / "c.npz", augmented=True)
    asked = Distillation(logits=1.0, cache=tmp_path / "c.npz")
    with pytest.raises(ValueError, match="argument 'dataset': expected the dataset whose logits the cache keeps"):
        AugmentedLoss(build_network("4-4p", (1, 8, 8), 10), 10, distillation=asked, teacher=teacher)
