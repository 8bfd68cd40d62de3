"""A run's config.json means the same wherever it is read: every path in it is absolute."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ep_train import TrainConfig
from ep_train.config_file import FREE, START, config_from_json, for_another_run, going_on, portable, with_free
from ep_train.run_folder import RunFolder


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"out": Path("runs/a")}, {"out": Path("{here}/runs/a")}),
        ({"data_root": Path("data")}, {"data_root": Path("{here}/data")}),
        ({"data_root": Path("~/data")}, {"data_root": Path("{home}/data")}),
        ({"dataset": "folder:images"}, {"data_root": Path("{here}")}),
        ({"dataset": "folder:../a:b"}, {"data_root": Path("{here}")}),
        ({"dataset": "folder:/there/../a:b"}, {"dataset": "folder:/a:b"}),
        ({"dataset": "folder:~/images"}, {"dataset": "folder:{home}/images"}),
        ({"dataset": "folder:"}, {}),
        ({"dataset": "cifar10"}, {}),
        (
            {"dataset": "folder:images", "data_root": Path("data")},
            {"dataset": "folder:images", "data_root": Path("{here}/data")},
        ),
        ({"dataset": "folder:/images", "data_root": Path("/data")}, {}),
        ({"dataset": "folder:images", "data_root": Path("../data")},
         {"dataset": "folder:images", "data_root": Path("{above}/data")}),
        ({"teacher": "vgg11_bn:t.pt", "teacher_cache": Path("c.npz")},
         {"teacher": "vgg11_bn:{here}/t.pt", "teacher_cache": Path("{here}/c.npz")}),
        ({"teacher": "there"}, {"teacher": "{here}/there"}),
        ({"teacher": "there/a:b"}, {"teacher": "{here}/there/a:b"}),
        ({"teacher": "resnet18"}, {}),
        ({"teacher": "torchvision:there"}, {}),
        ({"teacher": "torchvision:resnet18:t.pt"}, {"teacher": "torchvision:resnet18:{here}/t.pt"}),
        ({"teacher": "timm:resnet18"}, {}),
    ],
)  # fmt: skip
def test_paths(
    given: dict[str, Any], expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path.resolve() / "here"
    (here / "there" / "a:b").mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path.resolve() / "home"))
    config = TrainConfig(**given)
    places = {"here": str(here), "above": str(here.parent), "home": str(here.parent / "home")}
    filled = {name: type(value)(str(value).format(**places)) for name, value in expected.items()}
    RunFolder(here).write_config(dataclasses.asdict(portable(config)))
    monkeypatch.chdir("/")
    found = config_from_json(here / "config.json")
    assert found == dataclasses.replace(config, **filled)
    assert portable(found) == found


def test_links_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they lead to may be another place tomorrow."""
    here = tmp_path.resolve()
    (here / "disk1" / "images").mkdir(parents=True)
    (here / "data").symlink_to("disk1")
    monkeypatch.chdir(here)
    place = Path("data/images")
    config = TrainConfig(dataset="folder:images", data_root=Path("data"), out=place / "run", teacher="data/images")
    found = portable(dataclasses.replace(config, teacher_cache=place / "c"))
    assert (found.data_root, found.out, found.teacher) == (here / "data", here / place / "run", str(here / place))
    assert found.teacher_cache == here / place / "c"
    assert portable(TrainConfig(dataset=f"folder:{here / place}")).dataset == f"folder:{here / place}"
    (here / "far" / "inside").mkdir(parents=True)
    (here / "link").symlink_to("far/inside")
    up = portable(TrainConfig(data_root=Path("link/../other"))).data_root  # far/other, and not other
    assert up == here / "link/../other"
    assert portable(TrainConfig(data_root=up)).data_root == up


def test_every_path_of_a_configuration_is_known() -> None:
    """A new option that is a path has to be made absolute, too."""
    paths = {field.name for field in dataclasses.fields(TrainConfig) if "Path" in str(field.type)}
    assert paths == {"data_root", "out", "teacher_cache"}


def test_free_options() -> None:
    assert {*FREE, *START} <= {field.name for field in dataclasses.fields(TrainConfig)}
    config = TrainConfig(threads=2, epochs=7, device="cpu")
    assert with_free(config, threads=None, data_root=Path("x"), device="cuda") == dataclasses.replace(
        config, data_root=Path("x"), device="cuda"
    )
    with pytest.raises(TypeError, match="got epochs"):
        with_free(config, epochs=3)
    with pytest.raises(ValueError, match="argument 'threads'"):
        with_free(config, threads=0)
    config = dataclasses.replace(config, dataset="folder:/images")
    with pytest.raises(ValueError, match=r"argument 'data_root': expected none, as the images are in folder:/images"):
        with_free(config, data_root=Path("x"))
    assert for_another_run(dataclasses.replace(config, out=Path("x"), overwrite=True)) == config


def test_free_options_of_a_run_that_goes_on() -> None:
    """Those that are not given stay."""
    theirs = TrainConfig(threads=2, data_root=Path("/x"), keep_checkpoints=5, device="cuda", epochs=3, quiet=True)
    ours = TrainConfig(keep_checkpoints=7, device="cpu", epochs=4)
    expected = dataclasses.replace(ours, threads=2, data_root=Path("/x"))
    assert going_on(ours, theirs) == expected
