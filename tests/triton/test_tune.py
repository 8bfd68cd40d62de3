"""Tiles: the user's cache, the choice among measured ones, and the problems that a network asks for. Needs no GPU."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import ep_kernels.triton as backend
from ep_kernels import Network, Parameters, RelaxConfig, backends, ep_gradients
from ep_kernels.cache import cache_folder
from ep_kernels.triton import launch, measure, tiling, tune
from ep_kernels.triton.arch import INTERPRETER, KNOWN, Arch
from ep_kernels.triton.problems import training_problems
from ep_kernels.triton.tiling import Problem, Tile
from tests.core.nets import NETWORKS, VARIANTS, problem

DEVICE = "NVIDIA Test 9000"
ARCH = KNOWN[90]
STEP = Problem("step", 256, 16, 16, 128, 1152, 2)
DRIVE = Problem("drive", 256, 16, 16, 128, 1152, 2, True)
TILES = tiling.candidates(STEP, ARCH)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a device by name only."""
    monkeypatch.setenv("EP_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "_device_name", lambda: DEVICE)
    tune.forget()
    yield tmp_path
    tune.forget()


# --- the cache --------------------------------------------------------------------------------------------------------


def test_what_is_stored_is_chosen() -> None:
    estimated = tiling.choose_tile(STEP, ARCH)
    other = next(tile for tile in TILES if tile != estimated)
    tune.store({STEP: (other, 1e-5)}, DEVICE, ARCH)
    assert tune.tuned(STEP, ARCH) == other == tiling.choose_tile(STEP, ARCH)
    assert tune.tuned(DRIVE, ARCH) is None
    assert tune.tuned(dataclasses.replace(STEP, n=255), ARCH) is None


def test_storing_merges() -> None:
    tune.store({STEP: (TILES[0], 1e-5)}, DEVICE, ARCH)
    tune.store({DRIVE: (TILES[1], 2e-5)}, DEVICE, ARCH)
    path = tune.store({STEP: (TILES[2], 3e-5)}, DEVICE, ARCH)
    assert (tune.tuned(STEP, ARCH), tune.tuned(DRIVE, ARCH)) == (TILES[2], TILES[1])
    tiles = json.loads(path.read_text())["tiles"]
    assert {name: entry["microseconds"] for name, entry in tiles.items()} == {
        tune.key(STEP): 30.0,
        tune.key(DRIVE): 20.0,
    }


def test_a_key_is_every_field() -> None:
    text = "kernel=drive n=256 height=16 width=16 channels=128 depth=1152 element_size=2 pooled=True products=ieee"
    assert tune.key(DRIVE) == text  # as it stands in the users' files: a change needs another FORMAT
    for field in dataclasses.fields(Problem):
        other = dataclasses.replace(DRIVE, **{field.name: "step" if field.name == "kernel" else 7})
        assert tune.key(other) != text


def test_the_file_is_read_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tune.store({STEP: (TILES[0], 1e-5)}, DEVICE, ARCH)
    reads: list[Path] = []
    read = tune._read
    monkeypatch.setattr(tune, "_read", lambda path, *rest: (reads.append(path), read(path, *rest))[1])
    for _ in range(3):
        assert tune.tuned(STEP, ARCH) == TILES[0]
    assert reads == [path]
    path.unlink()
    assert tune.tuned(STEP, ARCH) == TILES[0]
    tune.forget()
    assert tune.tuned(STEP, ARCH) is None


def test_only_the_current_device_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tune.store({STEP: (TILES[0], 1e-5)}, DEVICE, ARCH)
    monkeypatch.setattr(tune, "_device_name", lambda: "NVIDIA Other")
    assert tune.tuned(STEP, ARCH) is None
    monkeypatch.setattr(tune, "_device_name", lambda: None)
    assert tune.tuned(STEP, ARCH) is None


def test_the_interpreter_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_device_name", lambda: pytest.fail("asked for a device"))
    assert tune.tuned(STEP, INTERPRETER) is None


def test_no_device_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> str:
        raise RuntimeError("CUDA error")

    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_name", lost)
    for started in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda started=started: started)
        assert tune._device_name() is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"format": 1, "tiles": []}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_ignored_with_one_warning(
    cache: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tune.cache_file(DEVICE)
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "ep_kernels"):
        assert tune.tuned(STEP, ARCH) is None
        assert tune.tuned(DRIVE, ARCH) is None
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert "ep-kernels tune" in record.getMessage()
    tune.store({STEP: (TILES[0], 1e-5)}, DEVICE, ARCH)  # replaces it
    assert tune.tuned(STEP, ARCH) == TILES[0]


@pytest.mark.parametrize(
    ("field", "value"), [("format", 2), ("device", "NVIDIA Other"), ("arch", "sm_80"), ("triton", "3.0.0")]
)
def test_a_foreign_file_is_ignored(field: str, value: object, caplog: pytest.LogCaptureFixture) -> None:
    path = tune.store({STEP: (TILES[0], 1e-5)}, DEVICE, ARCH)
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with caplog.at_level(logging.WARNING, "ep_kernels"):
        assert tune.tuned(STEP, ARCH) is None
    assert f"got {value!r}" in caplog.text


@pytest.mark.parametrize(
    "entry",
    [
        {"tile": [128, 128, 48, 8, 4, 16]},  # not in the table
        {"tile": [128, 128]},
        {"tile": ["a"] * 6},
        {"tile": [128.0, 128, 64, 8, 4, 16]},
        {"tile": None},
        {},
        [],
        None,
    ],
)
def test_an_entry_that_is_no_tile_of_the_table_is_ignored(entry: object) -> None:
    path = tune.store({DRIVE: (TILES[0], 1e-5)}, DEVICE, ARCH)
    content = json.loads(path.read_text())
    content["tiles"][tune.key(STEP)] = entry
    path.write_text(json.dumps(content))
    assert tune.tuned(STEP, ARCH) is None
    assert tune.tuned(DRIVE, ARCH) == TILES[0]


def test_a_folder_that_cannot_be_read_is_no_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = cache / "file"
    file.touch()
    monkeypatch.setenv("EP_KERNELS_CACHE", str(file))
    assert tune.tuned(STEP, ARCH) is None
    with pytest.raises(OSError, match="file"):
        tune.store({STEP: (TILES[0], 1e-5)}, DEVICE, ARCH)


def test_an_interrupted_write_leaves_the_old_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tune.store({STEP: (TILES[0], 1e-5)}, DEVICE, ARCH)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", stop)
        with pytest.raises(KeyboardInterrupt):
            tune.store({STEP: (TILES[1], 1e-5)}, DEVICE, ARCH)
    assert list(cache.iterdir()) == [path]
    assert tune.tuned(STEP, ARCH) == TILES[0]


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path
    monkeypatch.setenv("EP_KERNELS_CACHE", "~/tiles")
    monkeypatch.setenv("HOME", "/home/user")
    assert cache_folder() == Path("/home/user/tiles")
    monkeypatch.delenv("EP_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/ep-kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # ignored, as its specification says
    assert cache_folder() == Path("/home/user/.cache/ep-kernels")
    assert tune.cache_file(DEVICE).name == f"tiles-nvidia-test-9000-triton-{tune.triton.__version__}.json"


# --- measuring --------------------------------------------------------------------------------------------------------


class FakeBench:
    """Writes a result for each tile: of ``results``, or all the same."""

    def __init__(self, results: dict[Tile, Callable[[], float]] | None = None):
        self.out = torch.zeros(4)
        self.outputs = [self.out]
        self.results = results or {}

    def launch(self, tile: Tile) -> Callable[[], None]:
        result = self.results.get(tile, lambda: 1.0)

        def run() -> None:
            self.out.fill_(result())

        run.tile = tile  # type: ignore[attr-defined]
        return run


def timer(times: dict[Tile, float]) -> Callable[[Callable[[], None]], float]:
    return lambda launch: times.get(launch.tile, 1.0)  # type: ignore[attr-defined]


def test_the_fastest_wins() -> None:
    measured = measure.measure(STEP, ARCH, FakeBench(), timer({TILES[4]: 0.25, TILES[3]: 0.5}))
    assert measured.winner is not None
    assert measured.winner.tile == TILES[4]
    assert measured.gain == 4.0
    assert [c.tile for c in measured.candidates] == list(tiling.candidates(STEP, ARCH))


def test_noise_does_not_replace_the_choice_of_the_table() -> None:
    measured = measure.measure(STEP, ARCH, FakeBench(), timer({TILES[0]: 0.99}))
    assert measured.winner is not None
    assert measured.winner.tile == measured.estimated == tiling._estimated(STEP, ARCH)
    assert measured.gain == 1.0


def refused() -> float:
    raise RuntimeError("out of resource: shared memory\nand more")


@pytest.mark.parametrize(
    ("result", "why"),
    [
        (lambda: 1.01, "wrong: relative error 1.0e-02"),
        (lambda: math.nan, "wrong"),
        (refused, "out of resource: sh"),
    ],
)
def test_a_wrong_or_failing_tile_is_rejected(result: Callable[[], float], why: str) -> None:
    measured = measure.measure(STEP, ARCH, FakeBench({TILES[4]: result}), timer({TILES[4]: 0.1, TILES[3]: 0.5}))
    assert measured.winner is not None
    assert measured.winner.tile == TILES[3]
    (rejected,) = [c for c in measured.candidates if c.error is not None]
    assert rejected.tile == TILES[4]
    assert rejected.seconds is None
    assert why in str(rejected.error)
    assert "and more" not in str(rejected.error)


def test_a_first_tile_that_fails_is_not_the_yardstick() -> None:
    for result in (refused, lambda: math.nan):
        measured = measure.measure(STEP, ARCH, FakeBench({TILES[0]: result}), timer({TILES[1]: 0.5}))
        assert measured.winner is not None
        assert measured.winner.tile == TILES[1]


def test_no_tile_runs() -> None:
    measured = measure.measure(STEP, ARCH, FakeBench(dict.fromkeys(TILES, refused)), timer({}))
    assert measured.winner is None
    assert measured.gain is None
    assert all(c.error for c in measured.candidates)


def test_a_failure_of_the_timer_is_that_of_the_tile() -> None:
    def fails(launch: Callable[[], None]) -> float:
        raise RuntimeError("no capture")

    assert measure.measure(STEP, ARCH, FakeBench(), fails).winner is None


def test_operands_have_the_size_of_the_problem() -> None:
    with pytest.raises(ValueError, match=r"'precision': expected operands of 2 bytes, got tf32"):
        measure.RandomBench(STEP, ARCH, torch.device("cpu"), "tf32")


SMALL = [
    Problem("step", 4, 6, 5, 16, 144, 2),
    Problem("step", 4, 6, 5, 16, 0, 4),
    Problem("step", 4, 6, 5, 16, 16 * 35, 2),
    Problem("drive", 4, 6, 4, 16, 9 * 48, 2, True),
    Problem("drive", 4, 6, 5, 32, 25 * 16, 2),
    Problem("drive", 4, 1, 1, 32, 640, 2),
    Problem("contrast", 4, 6, 5, 16, 9 * 32, 2),
    Problem("contrast", 4, 1, 1, 16, 9 * 32, 2),
]


@pytest.mark.parametrize("asked", SMALL, ids=tune.key)
@pytest.mark.parametrize("arch", [ARCH, KNOWN[80], INTERPRETER], ids=lambda arch: arch.name)
def test_random_operands_pose_the_problem(asked: Problem, arch: Arch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound without a tile, the launch asks for one for this very problem."""
    posed: list[Problem] = []
    monkeypatch.setattr(launch, "choose_tile", lambda p, arch: (posed.append(p), tiling.candidates(p, arch)[0])[1])
    bench = measure.RandomBench(asked, arch, torch.device("cpu"), "float16", torch.float16)
    bench._launch(None)  # type: ignore[arg-type]
    assert posed == [asked]


# --- the problems of a network ----------------------------------------------------------------------------------------

CONFIGS = {
    "default": RelaxConfig(),
    "classical": RelaxConfig.classical(free_steps=3, nudged_steps=3),
    "even_odd, states": RelaxConfig(schedule="even_odd", form="states"),
    "sweep, states, one-sided": RelaxConfig(form="states", estimator="positive", winners="live"),
    "tangent, two bytes": RelaxConfig(estimator="tangent", operands=torch.bfloat16, storage=torch.float16),
    "sync, delta": RelaxConfig(schedule="sync", nudged_steps=6, tol=1e-3),
    "linear nudge": RelaxConfig(linear_nudge=True, operands=torch.bfloat16, free_steps=1, nudged_steps=1),
}


TRAINED = [
    *(pytest.param(n, c, id=f"{name}-{config}") for name, n in NETWORKS.items() for config, c in CONFIGS.items()),
    *(pytest.param(n, RelaxConfig(), id=name) for name, n in VARIANTS.items()),
    *(
        pytest.param(VARIANTS["cosine"], RelaxConfig(estimator=estimator, form=form), id=f"{estimator}-{form}")
        for estimator in ("five_phase", "contrastive", "coupled")
        for form in ("delta", "states")
    ),
]


@pytest.mark.parametrize(("network", "config"), TRAINED)
def test_the_problems_are_those_that_a_batch_asks_for(
    network: Network, config: RelaxConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[Problem, None] = {}

    def choose(asked_for: Problem, arch: Arch) -> Tile:
        asked[asked_for] = None
        return tiling.candidates(asked_for, arch)[0]

    monkeypatch.setattr(launch, "choose_tile", choose)
    monkeypatch.setattr(launch.Call, "__call__", lambda call: None)  # bound, not run
    monkeypatch.setattr(backends, "relax", lambda r, name=None: backend.relax(r))
    monkeypatch.setattr(backends, "each_contrast", lambda jobs, name=None: iter(backend.contrasts(jobs)))
    backend.clear()
    p = problem(network)
    parameters = Parameters.from_named(network, {k: v.float() for k, v in p.parameters.named().items()})
    try:
        ep_gradients(network, parameters, p.x.float(), [t.float() for t in p.targets], config)
    finally:
        backend.clear()
    expected = training_problems(network, config, p.x.shape[0])
    assert set(expected) == set(asked)
    assert len(expected) == len(asked)
