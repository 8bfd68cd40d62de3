"""Races between backends: times, keys, the cache, and ``ep-kernels tune`` with a pretended device. Needs no GPU."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ep_kernels import Network, RelaxConfig, backends, cli, ep_gradients, races
from ep_kernels.races import Machine, Race, Run
from ep_kernels.relaxation import Contrast, Relaxation
from tests.core.nets import NETWORKS, problem

MACHINE = Machine("NVIDIA Test 9000", "0.1.0", "3.9.0")
WON = Race({"cuda": 1e-4, "triton": 2e-4}, {})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("EP_KERNELS_CACHE", str(tmp_path))
    races.forget()
    yield tmp_path
    races.forget()


class Runner:
    """Something that takes a known time, or fails."""

    def __init__(self, seconds: float, error: Exception | None = None):
        self.seconds, self.error, self.calls = seconds, error, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.error is not None:
            raise self.error


def clock(run: Run) -> float:
    """A timer that reads what the runner says."""
    assert isinstance(run, Runner)
    run()
    return run.seconds


# --- a race -----------------------------------------------------------------------------------------------------------


def test_the_fastest_wins() -> None:
    held = races.race({"cuda": Runner(3e-4), "triton": Runner(2e-4)}, clock)
    assert held == Race({"cuda": 3e-4, "triton": 2e-4}, {})
    assert held.winner == "triton"


def test_one_that_fails_is_out() -> None:
    broken = Runner(1e-6, RuntimeError("no kernel image\nis available"))
    held = races.race({"cuda": broken, "triton": Runner(1e-3)}, clock)
    assert held.errors == {"cuda": "RuntimeError: no kernel image"}
    assert held.winner is None  # against nobody
    assert races.race({"cuda": Runner(1, ValueError())}, clock).errors == {"cuda": "ValueError"}


def test_calls_are_timed_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a warm-up; the median does not follow one slow round."""
    rounds: list[int] = []

    def seconds(run: Run, count: int) -> float:
        rounds.append(count)
        return 1.0 if len(rounds) == 4 else 1e-3

    monkeypatch.setattr(races, "_seconds", seconds)
    runner = Runner(0)
    assert races.event_timer(runner) == 1e-3
    assert runner.calls == races.WARMUP
    assert rounds == [1, *[5] * races.ROUNDS]


# --- keys -------------------------------------------------------------------------------------------------------------


def jobs_of(config: RelaxConfig, name: str = "max", batch: int = 3) -> list[Relaxation | tuple[Contrast, ...]]:
    p = problem(NETWORKS[name], batch=batch)
    with backends.recorded() as jobs:
        ep_gradients(p.network, p.parameters, p.x, p.targets, config, backend="reference")
    return jobs


def test_keys_hold_what_the_time_depends_on() -> None:
    base = RelaxConfig()
    worlds = [
        jobs_of(base),
        jobs_of(base, batch=4),
        jobs_of(base, "no pooling, mse"),
        jobs_of(replace(base, operands=torch.float16)),
        jobs_of(replace(base, storage=torch.float16)),
    ]
    for kind in range(3):
        assert len({races.key_of(jobs[kind]) for jobs in worlds}) == len(worlds)
    nudged = [races.key_of(jobs_of(replace(base, estimator=e))[1]) for e in ("symmetric", "tangent", "positive")]
    assert len(set(nudged)) == 3
    assert len({races.key_of(jobs_of(replace(base, schedule=s))[0]) for s in ("sweep", "sync")}) == 2


def test_keys_do_not_hold_the_rest() -> None:
    a, b = jobs_of(RelaxConfig()), jobs_of(RelaxConfig(free_steps=7, nudged_steps=5, beta=0.02))
    assert [races.key_of(job) for job in a] == [races.key_of(job) for job in b]


def test_a_key_in_words() -> None:
    """As it stands in the users' files: a change needs another FORMAT."""
    network = Network.chain((3, 8, 8), [16, 8], ["max", "none"], classes=10)
    p = problem(network, batch=2)
    with backends.recorded() as jobs:
        ep_gradients(network, p.parameters, p.x, p.targets, RelaxConfig(operands="tf32"), backend="reference")
    ends = "0:3x8x8>1:16x4x4/3x3s1x1p1x1max 1:16x4x4>2:8x4x4/3x3s1x1p1x1none"
    downwards = " ".join(reversed(ends.split()))
    head = "cross_entropy10@2"
    assert [races.key_of(job) for job in jobs] == [
        f"relax n=2 phases=1 form=states operands=tf32 storage=None frozen=False order=1x2 {ends} {head}",
        f"relax n=4 phases=2 form=delta nudged operands=tf32 storage=None frozen=True order=2x1 {ends} {head}",
        f"contrasts n=2 phases=2 operands=tf32 storage=float64 {downwards}",
    ]


# --- the cache --------------------------------------------------------------------------------------------------------


def test_what_is_stored_is_found() -> None:
    assert races.winner(lambda: pytest.fail("nothing was measured"), MACHINE) is None
    races.store({"a": WON}, MACHINE)
    path = races.store({"b": Race({"cuda": 3e-4, "triton": 1e-4}, {})}, MACHINE)
    assert path.name == "races-nvidia-test-9000.json"
    assert [races.winner(lambda key=key: key, MACHINE) for key in "abc"] == ["cuda", "triton", None]  # type: ignore[misc]
    assert json.loads(path.read_text())["races"]["a"] == {
        "winner": "cuda",
        "microseconds": {"cuda": 100.0, "triton": 200.0},
    }


def test_a_race_that_nobody_won_is_not_stored() -> None:
    races.store({"a": Race({"cuda": 1e-4}, {"triton": "broken"})}, MACHINE)
    assert races.winner(lambda: "a", MACHINE) is None


@pytest.mark.parametrize("change", [{"device": "NVIDIA Other"}, {"ep_kernels": "0.2.0"}, {"triton": "3.10.0"}])
def test_it_is_of_one_device_and_one_pair_of_versions(change: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    path = races.store({"a": WON}, MACHINE)
    other = replace(MACHINE, **change)  # type: ignore[arg-type]
    path.rename(races.cache_file(other.device))
    with caplog.at_level(logging.WARNING, "ep_kernels"):
        assert races.winner(lambda: "a", other) is None
    assert "measured backends are not used" in caplog.text


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"{}", b'{"format": 1, "races": []}', b"[" * 100_000])
def test_a_damaged_file_is_empty_with_one_warning(content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = races.cache_file(MACHINE.device)
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "ep_kernels"):
        assert [races.winner(lambda: "a", MACHINE) for _ in range(2)] == [None, None]
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    races.store({"a": WON}, MACHINE)  # replaces it
    assert races.winner(lambda: "a", MACHINE) == "cuda"


@pytest.mark.parametrize("entry", [{"winner": "cpu"}, {"winner": None}, {}, [], None, "cuda"])
def test_a_damaged_entry_is_ignored(entry: object) -> None:
    path = races.store({"a": WON, "b": WON}, MACHINE)
    content = json.loads(path.read_text())
    content["races"]["a"] = entry
    path.write_text(json.dumps(content))
    races.forget()
    assert [races.winner(lambda key=key: key, MACHINE) for key in "ab"] == [None, "cuda"]  # type: ignore[misc]


def test_the_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    path = races.store({"a": WON}, MACHINE)
    assert races.winner(lambda: "a", MACHINE) == "cuda"
    path.unlink()
    assert races.winner(lambda: "a", MACHINE) == "cuda"


def test_without_a_home_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(races.cache, "cache_folder", no_home)
    assert races.winner(lambda: "a", MACHINE) is None


# --- the command ------------------------------------------------------------------------------------------------------

OPTIONS = ["tune", "--races-only", "--network", "4p-5", "--input", "3", "8", "8", "--batch", "2"]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Two backends of a pretended GPU, which is the CPU: cuda takes 1 ms, triton 2; the dictionary says who cannot."""
    missing: dict[str, str | None] = {"cuda": None, "triton": None}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backends, "status", lambda: {"reference": None, "cpu": None, **missing})
    monkeypatch.setattr(backends, "why_not", lambda name, *_: missing[name])
    monkeypatch.setattr(backends, "machine", lambda _: MACHINE)
    monkeypatch.setattr(backends, "choose", lambda *_, **__: "cpu")
    batch = cli._training_batch
    monkeypatch.setattr(cli, "_training_batch", lambda network, n, _: batch(network, n, torch.device("cpu")))

    def timer(run: Run) -> float:
        run()
        name = run.args[1]  # type: ignore[attr-defined]
        return 1e-3 if name == "cuda" else 2e-3

    monkeypatch.setattr(races, "event_timer", timer)
    return missing


@pytest.mark.usefixtures("device")
def test_tune_races_every_part_of_a_batch(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(OPTIONS) == 0
    first, *rows, last = capsys.readouterr().out.splitlines()
    assert first.endswith(", on NVIDIA Test 9000: cuda against triton")
    assert [row.split("  ")[0] for row in rows] == [
        "relax n=2 phases=1 form=states",
        "relax n=4 phases=2 form=delta",
        "contrasts n=2 phases=2 operands=float16",
    ]
    assert all(row.endswith("cuda    1000.0 us  triton    2000.0 us  cuda by 2.00x") for row in rows)
    file = races.cache_file(MACHINE.device)
    assert last == f"kept in {file}"
    assert [entry["winner"] for entry in json.loads(file.read_text())["races"].values()] == ["cuda"] * 3


def test_tune_with_one_backend_has_nothing_to_race(
    device: dict[str, str | None], cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    device["triton"] = "triton is not installed"
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    for options in (OPTIONS, [o for o in OPTIONS if o != "--races-only"]):
        assert cli.main(options) == 0
        out = capsys.readouterr().out
        assert out == "nothing to race, it takes two backends for this GPU: triton: triton is not installed\n"
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("device")
def test_tune_says_who_did_not_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def timer(run: Run) -> float:
        if run.args[1] == "cuda":  # type: ignore[attr-defined]
            raise RuntimeError("out of memory")
        return 1e-3

    monkeypatch.setattr(races, "event_timer", timer)
    assert cli.main([*OPTIONS, "--cache", str(tmp_path / "other")]) == 1
    out = capsys.readouterr().out
    assert out.count("    cuda did not run: RuntimeError: out of memory") == 3
    assert out.splitlines()[-1] == f"to use them: EP_KERNELS_CACHE={tmp_path / 'other'}"
    assert json.loads(races.cache_file(MACHINE.device, tmp_path / "other").read_text())["races"] == {}


def test_a_dry_run_lists_no_races(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*OPTIONS, "--dry-run"]) == 2
    assert "nothing to list with --races-only" in capsys.readouterr().err


def test_random_parameters_fit_the_network() -> None:
    network = cli.network_of("4p-5", [3, 8, 8])
    parameters, x, targets = cli._training_batch(network, 2, torch.device("cpu"))
    assert x.shape == (2, 3, 8, 8)
    assert [t.shape for t in targets] == [(2, 10)]
    assert all(0.2 < float(w.std()) * w[0].numel() ** 0.5 < 2 for w in parameters.weights)
