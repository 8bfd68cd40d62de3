"""Files of runs, truncated or garbled: only the documented errors, and no wrong numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_train import TrainConfig, Trainer, checkpoint
from ep_train.checkpoint import CheckpointError
from ep_train.config_file import config_from_json
from ep_train.run_folder import RunFolder, RunFolderError, read_metrics
from tests.core.threads import one_thread  # noqa: F401  (autouse)
from tests.train.test_checkpoint import rehash

TINY = TrainConfig(model="2p", train_limit=20, test_limit=10, batch_size=10, device="cpu", quiet=True)
FILES = ("weights.safetensors", "state.pt", "manifest.json")
few = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("run")
    trainer = Trainer(TINY)
    for step in (0, 1):
        checkpoint.save(path, {**trainer.state(), "step": step, "seconds": float(step)})
    yield path
    shutil.rmtree(path)


@st.composite
def damage(draw: st.DrawFn) -> st.SearchStrategy[bytes]:
    """A function of a file's bytes: cut, overwritten, lengthened, or something else altogether."""
    kind = draw(st.sampled_from(("cut", "overwrite", "insert", "replace")))
    at, data = draw(st.integers(0, 10_000)), draw(st.binary(min_size=1, max_size=40))

    def change(old: bytes) -> bytes:
        place = at % max(len(old), 1)
        return {
            "cut": old[:place],
            "overwrite": old[:place] + data + old[place + len(data) :],
            "insert": old[:place] + data + old[place:],
            "replace": data,
        }[kind]

    return change  # type: ignore[return-value]


@few
@given(name=st.sampled_from(FILES), change=damage())
def test_damage_is_noticed(folder: Path, name: str, change: object) -> None:
    file = folder / "checkpoints" / "step-00000001" / name
    good = file.read_bytes()
    file.write_bytes(change(good))  # type: ignore[operator]
    try:
        same = file.read_bytes() == good
        assert checkpoint.load(folder)["seconds"] == (1.0 if same else 0.0)
        if not same:
            with pytest.raises(CheckpointError, match=name):
                checkpoint.read(file.parent)
    finally:
        file.write_bytes(good)


@few
@given(name=st.sampled_from(FILES[:2]), change=damage())
def test_readers_of_forged_files(folder: Path, name: str, change: object) -> None:
    """The manifest fits them: they reach safetensors and torch.load, and perhaps a trainer."""
    checkpoint_ = folder / "checkpoints" / "step-00000001"
    good = {file: (checkpoint_ / file).read_bytes() for file in FILES}
    (checkpoint_ / name).write_bytes(change(good[name]))  # type: ignore[operator]
    rehash(checkpoint_)
    try:
        state = checkpoint.read(checkpoint_)
        Trainer(TINY).restore(state, [])
    except CheckpointError:
        pass
    finally:
        for file, data in good.items():
            (checkpoint_ / file).write_bytes(data)


simple = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
plain = simple | st.just(torch.ones(2))
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = sorted(checkpoint.KINDS)


@few
@given(key=st.sampled_from([*KEYS, "rollbacks"]), value=values, inside=st.booleans())
def test_states_of_other_values(folder: Path, key: str, value: object, inside: bool) -> None:
    trainer = Trainer(TINY)
    state = checkpoint.load(folder)
    if inside and isinstance(state[key], dict):
        inner = sorted(state[key])[0]
        state[key] = {**state[key], inner: value}
    else:
        state[key] = value
    try:
        trainer.restore(state, [])
    except CheckpointError:
        return
    assert trainer.step in (0, 1)


ROWS = b'{"epoch": 1, "train_loss": 2.5}\n{"epoch": 2, "train_loss": null, "nonfinite": {"train_loss": "nan"}}\n'


@few
@given(change=damage())
def test_metrics(tmp_path_factory: pytest.TempPathFactory, change: object) -> None:
    path = tmp_path_factory.mktemp("metrics")
    data = change(ROWS)  # type: ignore[operator]
    (path / "metrics.jsonl").write_bytes(data)
    (path / "config.json").write_text("{}")
    try:
        rows = RunFolder.resume(path, before_epoch=2).read_metrics()
    except RunFolderError:
        assert (path / "metrics.jsonl").read_bytes() == data
        return
    assert len(rows) <= 4
    assert read_metrics(path) == rows or "nan" in str(rows)


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"nonfinite": {"a": 1' + "0" * 400 + '}, "a": null}',
        '{"nonfinite": [1]}',
        '{"nonfinite": {"a/b": "nan"}, "a": 3}',
        '{"a": 1' + "0" * 5000 + "}",
    ],
    ids=["deep", "huge", "list", "path", "digits"],
)
def test_odd_lines_of_metrics(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n{{}}\n")
    with pytest.raises(RunFolderError, match="line 1: "):
        read_metrics(tmp_path)


GOOD = json.dumps({k: None if v is None else v for k, v in asdict(TINY).items()}, default=str).encode()


@few
@given(change=damage())
def test_config(tmp_path_factory: pytest.TempPathFactory, change: object) -> None:
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_bytes(change(GOOD))  # type: ignore[operator]
    try:
        config_from_json(path)
    except CheckpointError:
        return


@pytest.mark.parametrize("name", sorted(asdict(TINY)))
@settings(max_examples=5, deadline=None)
@given(
    value=st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.integers(), max_size=2)
)
def test_values_of_a_config(tmp_path_factory: pytest.TempPathFactory, name: str, value: object) -> None:
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps({**json.loads(GOOD), name: value}))
    try:
        config_from_json(path)
    except CheckpointError:
        return
