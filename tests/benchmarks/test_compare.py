"""Differences beyond the spread are found, others not; a worktree never outlives a comparison."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import registry, worktree
from benchmarks.case import Row
from benchmarks.compare import Comparison, between, merged
from benchmarks.machine import device_name
from benchmarks.registry import Question
from benchmarks.runner import RunError
from benchmarks.setting import Setting

SETTING = Setting(threads=1)
QUESTION = Question("speed", "how fast", lambda _: [], lambda _: [], "made-up things")


def row(
    name: str, time: float | None = None, revision: str = "", day: int = 1, case: str = "small", **more: Any
) -> Row:
    environment = {
        "when": f"2026-11-{day:02d}T10:00:00+00:00", "device": device_name("cpu"), "revision": revision, "threads": 1,
        "command": "a command",
    }  # fmt: skip
    timed = {} if time is None else {"ms": {"0.2": 0.95 * time, "0.5": time, "0.8": 1.05 * time}}
    return {"question": "speed", "case": case, "name": name, "status": "ok", **timed, "environment": environment,
            **more}  # fmt: skip


def found(before: list[Row], after: list[Row]) -> dict[str, list[str]]:
    return Comparison.of(before, after).found


# --- two sets of rows -------------------------------------------------------------------------------------------------


def test_faster_slower_and_the_same() -> None:
    before = [row("faster", 10), row("slower", 10), row("same", 10)]
    c = Comparison.of(before, [row("faster", 8), row("slower", 12), row("same", 10.9)])
    assert c.found == {
        "faster": ["  speed: small: faster: 10 (9.5 to 10.5) ms before, 8 (7.6 to 8.4) now: 0.8 times"],
        "slower": ["  speed: small: slower: 10 (9.5 to 10.5) ms before, 12 (11.4 to 12.6) now: 1.2 times"],
    }
    assert c.lines()[-1] == "3 rows compared: 1 slower, 1 faster, 1 within the spread or 2 %"


def test_memory_beyond_five_percent_and_cosines_beyond_half_a_percent() -> None:
    mib = 2**20
    before = [row("a", 1, memory=100 * mib, cosine=0.99), row("b", 1, memory=100 * mib, cosine=0.99)]
    after = [row("a", 1, memory=104 * mib, cosine=0.986), row("b", 1, memory=106 * mib, cosine=0.98)]
    changes = found(before, after)
    assert changes == {
        "more memory": ["  speed: small: b: 100.0 MiB before, 106.0 now (1.06 times)"],
        "smaller cosine": ["  speed: small: b: 0.9900 before, 0.9800 now"],
    }
    assert list(found(after, before)) == ["less memory"]  # a cosine that rises is no news
    assert list(found([row("a", cosine=0.9)], [row("a", cosine=float("nan"))])) == ["smaller cosine"]


def test_cosines_of_any_name() -> None:
    tensors = {"a": 0.99, "b": 0.99, "c": 0.99, "d": float("nan")}
    before = [row("x", smallest=0.99, cosines=tensors), row("y", cosine_least=0.9), row("z", smallest=0.99)]
    fell = {**tensors, "b": 0.9, "c": 0.95}
    after = [row("x", smallest=0.99, cosines=fell), row("y", cosine_least=0.8), row("z", smallest=0.987)]
    assert found(before, after) == {
        "smaller cosine": [
            "  speed: small: x: of b: 0.9900 before, 0.9000 now (2 of 4 are smaller)",
            "  speed: small: y: cosine_least 0.9000 before, 0.8000 now",
        ]
    }


def test_rates_decide_where_the_work_has_changed() -> None:
    before = [row("same work", 10, tflops=3.0), row("twice the work", 10, tflops=3.0), row("copy", 10, tb_per_s=0.02)]
    after = [row("same work", 20, tflops=1.5), row("twice the work", 20, tflops=3.0), row("copy", 20, tb_per_s=0.04)]
    changes = found(before, after)
    assert changes["slower"] == [
        "  speed: small: same work: 10 (9.5 to 10.5) ms before, 20 (19 to 21) now: 2 times; 3 TFLOP/s before, 1.5 now"
    ]
    assert changes["faster"] == [  # four times as much in twice the time
        (
            "  speed: small: copy: 10 (9.5 to 10.5) ms before, 20 (19 to 21) now: 0.5 times the same work, which "
            "changed; 0.02 TB/s before, 0.04 now"
        )
    ]


def sharp(time: float) -> dict[str, float]:
    """Quantiles without a spread."""
    return dict.fromkeys(("0.2", "0.5", "0.8"), time)


def test_no_verdict_of_few_rounds_or_below_two_percent() -> None:
    before = [row("one round", 10, rounds=1), row("two now", 10, rounds=5), row("three", 10, rounds=3)]
    after = [row("one round", 99, rounds=5), row("two now", 99, rounds=2), row("three", 99, rounds=3)]
    before += [row("a", ms=sharp(10)), row("b", ms=sharp(10))]
    after += [row("a", ms=sharp(10.15)), row("b", ms=sharp(9.7))]
    c = Comparison.of(before, after)
    assert [line.split(": ")[2] for line in c.found["slower"]] == ["three"]
    assert [line.split(": ")[2] for line in c.found["faster"]] == ["b"]
    assert c.lines()[-2:] == [
        "5 rows compared: 1 slower, 1 faster, 1 within the spread or 2 %",
        "2 rows have too few rounds to tell",
    ]


def test_rows_that_are_wrong_new_or_gone() -> None:
    wrong = {"status": "wrong", "reason": "relative error 1"}
    before = [row("a", 1), row("b", 1), row("c", **wrong), row("d", **wrong)]
    after = [row("a", **wrong), row("c", 1), row("d", **wrong), row("e", 2)]
    changes = found(before, after)
    assert changes["without figures now"] == ["  speed: small: a: ok before, wrong now: relative error 1"]
    assert changes["with figures now"] == ["  speed: small: c: wrong before, 1 (0.95 to 1.05) ms"]
    assert changes["gone"] == ["  speed: small: b: ok"]
    assert changes["new"] == ["  speed: small: e: 2 (1.9 to 2.1) ms"]


def test_a_case_that_failed_as_a_whole() -> None:
    changes = found([row("a", 1), row("b", 1)], [row("", status="failed", reason="TimeoutError")])
    assert list(changes) == ["without figures now"]
    assert len(changes["without figures now"]) == 2
    assert "failed now: TimeoutError" in changes["without figures now"][0]


def test_rows_that_share_a_name_are_compared_in_order() -> None:
    changes = found([row("a", 1), row("a", 5)], [row("a", 1), row("a", 9)])
    assert list(changes) == ["slower"]
    assert "a (2): 5 (" in changes["slower"][0]


def test_passes_are_pooled_to_the_widest_interval() -> None:
    (one, other) = merged([[row("a", 10), row("b", 1)], [row("a", 20), row("b", status="failed")]])
    assert one["ms"] == {"0.2": 9.5, "0.5": 15, "0.8": 21}
    assert other["status"] == "failed"
    passes = [row("a", t, rounds=2, tflops=3 / t, smallest=s, cosines={"w": s}) for t, s in ((10, 0.8), (20, 0.9))]
    (one,) = merged([[passes[0]], [passes[1]]])
    assert one["rounds"] == 4
    assert one["tflops"] * one["ms"]["0.5"] == pytest.approx(3)  # the same work
    assert (one["smallest"], one["cosines"]["w"]) == pytest.approx((0.85, 0.85))


# --- stored rows ------------------------------------------------------------------------------------------------------


def git(where: Path, *args: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", *identity, *args], cwd=where, capture_output=True, text=True, check=True
    ).stdout.strip()


SUITE = """
import json, os, pathlib, subprocess, sys
import value
revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
assert value.__file__.startswith(os.getcwd()), value.__file__
assert sys.argv[1:3] == ["run", "speed"] and sys.argv[3] == "--json", sys.argv
environment = {"when": "2026-11-01T10:00:00", "device": "x", "revision": revision, "argv": sys.argv[5:]}
ms = {"0.2": value.MS, "0.5": value.MS, "0.8": value.MS}
row = {"question": "speed", "case": "c", "name": "ours", "status": "ok", "ms": ms, "environment": environment}
pathlib.Path(sys.argv[4]).write_text(json.dumps([row]))
with open(os.environ["ORDER"], "a") as file:
    file.write(f"{value.MS} ")
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits: of tag ``old``, whose row takes 20 ms, and one whose row takes 10; nothing to build."""
    where = (tmp_path / "repository").resolve()
    (where / "benchmarks" / "questions").mkdir(parents=True)
    git(where.parent, "init", "--quiet", str(where))
    (where / "setup.py").write_text("import sys\nassert sys.argv[1:] == ['build_ext', '--inplace']\nprint('built')\n")
    (where / ".gitignore").write_text("__pycache__\n")
    git(where, "add", ".")
    git(where, "commit", "--quiet", "-m", "empty")
    git(where, "tag", "ancient")
    (where / "benchmarks" / "__main__.py").write_text(SUITE)
    (where / "benchmarks" / "questions" / "speed.py").write_text("")
    for name, value in (("old", 20), ("new", 10)):
        (where / "value.py").write_text(f"MS = {value}\n")
        git(where, "add", ".")
        git(where, "commit", "--quiet", "-m", name)
        git(where, "tag", name)
    monkeypatch.setattr(worktree, "ROOT", where)
    monkeypatch.setattr(registry, "questions", lambda: {"speed": QUESTION})
    monkeypatch.setenv("ORDER", str(tmp_path / "order"))
    monkeypatch.setenv("PYTHONPATH", str(where))  # as a user sets it: another tree must not see this one's packages
    monkeypatch.setattr(worktree.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "results").mkdir()
    return where


def compare(repository: Path, revision: str = "old", run: bool = False, **setting: Any) -> str:
    asked = [QUESTION] if run else []
    results = repository.parent / "results"
    return between(revision, results, Setting(threads=1, **setting), asked, run=run, command="python -m benchmarks x")


def keep(repository: Path, *rows: Row) -> None:
    (repository.parent / "results" / "a.json").write_text(json.dumps(rows))


def test_stored_rows_of_a_revision_against_the_newest(repository: Path) -> None:
    old, new = (git(repository, "rev-parse", "--short", name) for name in ("old", "new"))
    untouched = row("ours", 5, old, case="large")
    keep(repository, row("ours", 99, new, day=2), row("ours", 10, old), row("ours", 8, f"{new}+", day=3), untouched)
    text = compare(repository)
    assert "10 (9.5 to 10.5) ms before, 8 (7.6 to 8.4) now: 0.8 times" in text
    assert f"revision {new}+, measured 2026-11-03" in text
    assert f"speed: large: not measured since {old}" in text
    assert "99" not in text.split("\n\n")[1]
    assert "1 rows compared: 0 slower, 1 faster" in text


def test_a_failure_since_is_said_and_a_skipped_case_is_not(repository: Path) -> None:
    old, new = (git(repository, "rev-parse", "--short", name) for name in ("old", "new"))
    skipped = row("", revision=new, day=4, status="skipped", reason="no time")
    keep(repository, row("ours", 10, old), row("ours", 8, new, day=3), skipped)
    assert "1 rows compared: 0 slower, 1 faster" in compare(repository)
    keep(repository, row("ours", 10, old), row("ours", 8, new, day=3), {**skipped, "status": "failed"})
    assert "ours: ok before, failed now: no time" in compare(repository)


def test_options_choose_stored_rows(repository: Path) -> None:
    old, new = (git(repository, "rev-parse", "--short", name) for name in ("old", "new"))
    both = []
    for revision, faster in ((old, 1), (new, 2)):
        for model, batch in (("vgg5", 8), ("vgg8/2", 32)):
            about = {"case": f"{model}, batch {batch}", "model": model, "batch": batch, "day": faster}
            both += [row("base", 8 / faster, revision, **about)]
            both += [row(f"ours {p}", 4 / faster, revision, precision=p, backend=f"cuda{end}", **about)
                     for p, end in (("fp16", "-wgmma"), ("fp32", ""))]  # fmt: skip
        both.append(row("rate", 4 / faster, revision, case="rate", day=faster))
    keep(repository, *both)
    assert "7 rows compared" in compare(repository)
    text = compare(repository, models=("vgg5",))
    assert "3 rows compared" in text
    assert "vgg8/2" not in text
    assert "speed: left out, where rows do not say their model" in text
    assert "3 rows compared" in compare(repository, batches=(32,))
    text = compare(repository, precisions=("fp16",), models=("vgg8/2",))
    assert "2 rows compared" in text  # and the baseline, which has no precision
    assert "ours fp32" not in text
    assert "6 rows compared" in compare(repository, backends=("cuda",))
    with pytest.raises(RunError, match=r"--model vgg11: no stored rows are left; a model .* have: vgg5, vgg8/2"):
        compare(repository, models=("vgg11",))
    with pytest.raises(RunError, match=r"--backend triton: no stored rows are left; a backend .* have: cuda"):
        compare(repository, backends=("triton",))


def test_conditions_that_differ_are_said(repository: Path) -> None:
    old, new = (git(repository, "rev-parse", "--short", name) for name in ("old", "new"))
    other = row("ours", 8, new, day=3)
    other["environment"]["threads"] = 2
    keep(repository, row("ours", 10, old), other)
    assert "threads differs: 1 before, 2 now" in compare(repository)


def test_a_dirty_tree_is_not_its_commit(repository: Path) -> None:
    old = git(repository, "rev-parse", "--short", "old")
    keep(repository, row("ours", 10, f"{old}+"), row("ours", 9, "1234567", case="large"))
    known = re.escape(", ".join(sorted(["1234567", f"{old}+"])))  # a hash may begin with a smaller digit
    with pytest.raises(RunError, match=rf"there are some of {known}; --run"):
        compare(repository)


def test_without_rows_of_a_revision_or_since(repository: Path) -> None:
    with pytest.raises(RunError, match="there are none of any revision; --run"):
        compare(repository)
    keep(repository, row("ours", 10, git(repository, "rev-parse", "--short", "old")))
    with pytest.raises(RunError, match="the newest rows"):
        compare(repository)
    with pytest.raises(RunError, match="expected a commit, tag or branch"):
        compare(repository, "nonsense")


# --- measured now -----------------------------------------------------------------------------------------------------


def gone(repository: Path) -> bool:
    """Whether nothing is left of a worktree."""
    listed = git(repository, "worktree", "list").splitlines()
    return len(listed) == 1 and not list((repository.parent / "temporary").iterdir())


def test_both_trees_in_turn(repository: Path) -> None:
    text = compare(repository, run=True, models=("3p-4",), batches=(2, 4), only="-x", quick=True)
    assert (repository.parent / "order").read_text() == "20 10 20 10 "
    assert "20 (20 to 20) ms before, 10 (10 to 10) now: 0.5 times" in text
    assert gone(repository)
    command = ["run", "speed", *worktree.options(Setting(models=("3p-4",), batches=(2, 4), only="-x", quick=True))]
    from benchmarks.__main__ import parser, setting_of

    asked = setting_of(parser().parse_args(command))  # what the trees are asked is what we were
    assert asked == Setting(models=("3p-4",), batches=(2, 4), only="-x", quick=True)


def test_nothing_is_left_when_a_tree_cannot_be_built(repository: Path) -> None:
    (repository / "setup.py").write_text("import sys\nprint('no compiler here')\nsys.exit(3)\n")
    git(repository, "commit", "--quiet", "-am", "broken")
    with pytest.raises(RunError, match=r"(?s)setup\.py build_ext --inplace .*exit code 3.*no compiler here"):
        compare(repository, "HEAD", run=True)
    assert gone(repository)


def test_nothing_is_left_when_a_run_fails_or_is_interrupted(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "value.py").write_text("raise RuntimeError('broken here')\n")
    with pytest.raises(RunError, match=r"(?s)wrote no results.*broken here"):
        compare(repository, run=True)
    assert (repository.parent / "order").read_text() == "20 "  # this tree fails, after the worktree had its turn
    assert gone(repository)

    def interrupted(*_: object) -> None:
        assert not gone(repository)
        raise KeyboardInterrupt

    monkeypatch.setattr(worktree, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(repository, run=True)
    assert gone(repository)


def test_a_revision_older_than_the_suite(repository: Path) -> None:
    with pytest.raises(RunError, match=r"has no benchmarks/__main__\.py: it is older"):
        compare(repository, "ancient", run=True)
    (repository / "benchmarks" / "questions" / "speed.py").rename(repository / "benchmarks" / "questions" / "other.py")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "renamed")
    with pytest.raises(RunError, match="asks none of speed"):
        compare(repository, "HEAD", run=True)


def test_an_interrupt_ends_what_was_started(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    script = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    def interrupt() -> None:
        for _ in range(400):
            if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
                break
            time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]

    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            worktree.call([sys.executable, "-c", script], tmp_path, dict(os.environ), tmp_path / "log", (0,))
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
