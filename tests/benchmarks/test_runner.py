"""Runs: case by case on disk, resumed, bounded in time, one question's crash no other's."""

from __future__ import annotations

import json
import re
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import child
from benchmarks import rows as row_files
from benchmarks import runner as runners
from benchmarks.case import Case
from benchmarks.registry import Question, Target, named
from benchmarks.rows import append, close_started, flat, read, run_cases
from benchmarks.runner import RunError, Runner, load
from benchmarks.setting import Setting

SETTING = Setting(threads=1, quick=True)


def ask(path: Path, cases, **changes):
    return run_cases(path, "q", cases, **{"only": "", "deadline": time.time() + 60, **changes})


def test_setting_survives_the_command_line():
    given = Setting("cuda", ("vgg11",), (1, 2), ("fp16",), ("cuda",), 3, 7, True, "x", True)
    assert Setting.parse(given.json()) == given


def test_cases_go_on_after_one_that_fails(tmp_path):
    def fail():
        raise ValueError("no\nsecond line")

    def slow():
        with suppress(Exception):  # the end of its time is none
            time.sleep(20)
        return []

    part = tmp_path / "part"
    assert ask(part, [Case("a", fail), Case("b", slow, 0.2), Case("c", lambda: [{"name": "x", "value": 3}])]) == 0
    found = {record["case"]: record for record in read(part)}
    assert [found[key]["status"] for key in "abc"] == ["failed", "failed", "ok"]
    assert found["a"]["reason"] == "ValueError: no"
    assert "stopped after" in found["b"]["reason"]
    assert found["c"]["rows"] == [{"name": "x", "value": 3}]


def test_what_a_deadline_cuts_is_made_up(tmp_path):
    part = tmp_path / "part"
    quick = []

    def slow():
        if not quick:
            time.sleep(20)
        return [{"name": "x"}]

    assert ask(part, [Case("a", slow, 60.0)], deadline=time.time() + 1.2) == row_files.ENDED
    assert read(part)[0]["status"] == "skipped"
    quick.append(1)
    ask(part, [Case("a", slow, 60.0)])
    assert read(part)[0]["status"] == "ok"


def test_a_line_that_was_cut_short_takes_no_other_with_it(tmp_path):
    part = tmp_path / "part"
    part.write_text('{"question": "q", "ca')
    append(part, {"question": "q", "case": "a", "status": "ok", "rows": []})
    assert [record["case"] for record in read(part)] == ["a"]


def test_a_second_process_goes_on_where_the_first_broke(tmp_path):
    part = tmp_path / "part"
    append(part, {"question": "q", "case": "a", "status": "ok", "rows": []})
    append(part, {"question": "q", "case": "b", "status": "started", "rows": []})
    with part.open("a") as file:
        file.write('{"question": "q", "ca\n')  # stopped while it wrote
    close_started(part, "q", "its process ended with exit code -9")
    ran = []
    ask(part, [Case(key, lambda key=key: ran.append(key) or []) for key in "abc"])
    assert ran == ["c"]
    assert [record["status"] for record in read(part)] == ["ok", "failed", "ok"]


def test_cases_are_skipped_when_the_time_is_over_and_made_up_later(tmp_path):
    part = tmp_path / "part"
    assert ask(part, [Case("a", list)], deadline=time.time()) == row_files.ENDED
    assert read(part)[0]["status"] == "skipped"
    ask(part, [Case("a", lambda: [{"name": "x"}])])
    assert read(part)[0]["status"] == "ok"


def test_only_some_cases(tmp_path):
    ask(tmp_path / "part", [Case(key, list) for key in ("vgg8, batch 2", "vgg11, batch 2")], only="vgg11")
    assert [record["case"] for record in read(tmp_path / "part")] == ["vgg11, batch 2"]


def test_rows_carry_what_they_were_measured_on():
    records = [
        {"question": "q", "case": "a", "status": "ok", "rows": [{"name": "x"}, {"name": "y", "status": "wrong"}]},
        {"question": "q", "case": "b", "status": "failed", "reason": "why", "rows": []},
    ]
    found = flat([{**record, "environment": {"device": "d"}} for record in records])
    assert [row["status"] for row in found] == ["ok", "wrong", "failed"]
    assert found[2]["reason"] == "why"
    assert all(row["environment"] == {"device": "d"} and row["question"] == "q" for row in found)


def started(tmp_path, **changes) -> Runner:
    return Runner(SETTING, tmp_path / "out.json", "command", **changes)


ROOFLINE = "roofline"


def test_a_run_writes_rows_and_keeps_those_of_others(tmp_path):
    other = {"question": "old", "case": "c", "name": "n", "status": "ok", "environment": {"device": "d"}}
    stale = {**other, "question": ROOFLINE, "case": "fp32"}
    runners.save(tmp_path / "out.json", [other, stale])
    run = started(tmp_path)
    run.ask(named([ROOFLINE]))
    rows = load(tmp_path / "out.json")
    assert [(row["question"], row["case"]) for row in rows] == [("old", "c"), (ROOFLINE, "fp32"), (ROOFLINE, "copy")]
    assert rows[1]["tflops"] > 0
    assert rows[1]["environment"]["command"] == "command"
    assert {"device", "threads", "torch", "triton", "revision", "when"} <= set(rows[1]["environment"])
    assert not run.part.exists()


def test_a_stopped_run_goes_on(tmp_path, capsys):
    first = started(tmp_path)
    append(first.part, {"question": ROOFLINE, "case": "fp32", "status": "ok", "rows": [{"name": "kept"}]})
    append(first.part, {"question": ROOFLINE, "case": "copy", "status": "started", "rows": []})
    second = started(tmp_path)
    assert "going on after 2 cases" in capsys.readouterr().out
    second.ask(named([ROOFLINE]))
    rows = load(tmp_path / "out.json")
    assert [row["name"] for row in rows] == ["kept", ""]
    assert rows[1]["reason"] == "its process was stopped"


def test_another_setting_or_revision_is_not_gone_on_with(tmp_path, monkeypatch):
    started(tmp_path)
    with pytest.raises(RunError, match="another setting; --restart begins again"):
        Runner(Setting(threads=2, quick=True), tmp_path / "out.json", "command")
    with monkeypatch.context() as patch:
        patch.setattr(runners, "sources", lambda: "changed")
        with pytest.raises(RunError, match="a run with another sources;"):
            started(tmp_path)
    assert started(tmp_path, restart=True).part.exists()


def test_rows_keep_the_environment_of_the_process_that_made_them(tmp_path, monkeypatch):
    first = started(tmp_path)
    append(first.part, {"question": ROOFLINE, "case": "fp32", "status": "ok", "rows": [{"name": "kept"}]})
    second = Runner(SETTING, tmp_path / "out.json", "later")
    append(second.part, {"question": ROOFLINE, "case": "copy", "status": "ok", "rows": [{"name": "new"}]})
    assert [row["environment"]["command"] for row in second.rows()] == ["command", "later"]


def test_what_had_no_time_replaces_nothing(tmp_path):
    old = {"question": "q", "case": "c", "name": "n", "status": "ok", "environment": {"device": "d"}}
    runners.save(tmp_path / "out.json", [old])
    run = started(tmp_path)
    append(run.part, {"question": "q", "case": "c", "status": "skipped", "reason": "no time", "rows": []})
    run.write()
    assert load(run.out) == [old]
    append(run.part, {"question": "q", "case": "c", "status": "failed", "reason": "it broke", "rows": []})
    run.write()
    assert [row["reason"] for row in load(run.out)] == ["it broke"]


def test_a_question_that_breaks_loses_no_other(tmp_path, monkeypatch):
    """One dies, one does not import; what is asked after them has its rows."""

    def run(command, log, seconds, extra):
        question = command[4]
        if question == "dies":
            append(Path(command[3]), {"question": "dies", "case": "c", "status": "started", "rows": []})
            return -9
        if question == "broken":
            return 1
        append(Path(command[3]), {"question": question, "case": "c", "status": "ok", "rows": [{"name": "x"}]})
        return 0

    monkeypatch.setattr(runners, "run", run)
    asked = [Question(name, "", lambda _: [], list, "") for name in ("dies", "broken", "good")]
    made = started(tmp_path)
    made.ask(asked)
    found = {row["question"]: row for row in load(made.out)}
    assert found["dies"]["reason"] == "its process ended with exit code -9"
    assert found["good"]["status"] == "ok"
    assert "did not run" in made.notes["broken"]


def test_time_is_shared(tmp_path, monkeypatch):
    given = {}

    def run(command, log, seconds, extra):
        given[command[4]] = float(command[5]) - time.time()
        return 0

    monkeypatch.setattr(runners, "run", run)
    asked = [Question(name, "", lambda _: [], list, "", seconds={"cpu": s}) for name, s in (("a", 30.0), ("b", 90.0))]
    started(tmp_path, minutes=2.0).ask(asked)
    assert given["a"] == pytest.approx(30, abs=2)
    assert given["b"] == pytest.approx(120, abs=2)  # a took none of its share


def test_what_had_no_time_is_made_up_by_the_same_command(tmp_path, monkeypatch):
    def run(command, log, seconds, extra):
        part, question = Path(command[3]), command[4]
        status = "skipped" if question == "late" and not ready else "ok"
        append(part, {"question": question, "case": "c", "status": status, "rows": [{"name": status}]})
        return 0

    monkeypatch.setattr(runners, "run", run)
    ready: list[int] = []
    asked = [Question(name, "", lambda _: [], list, "") for name in ("first", "late")]
    first = started(tmp_path)
    first.ask(asked)
    assert first.notes["time"].startswith("1 cases have had none")
    ready.append(1)
    second = started(tmp_path)
    second.ask(asked)
    assert not second.notes
    assert [row["name"] for row in load(second.out)] == ["ok", "ok"]
    assert not second.part.exists()


def test_a_child_is_stopped_with_what_it_started(tmp_path):
    began = time.time()
    nested = "import subprocess; subprocess.run(['sleep', '41.7'], start_new_session=True)"
    script = f'{sys.executable} -c "{nested}" & sleep 50'
    assert runners.run(["sh", "-c", script], tmp_path / "log", 3) is None
    assert time.time() - began < 20
    for _ in range(50):  # a killed process takes a moment
        left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if _says(path, b"41.7")]
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(left)


def _says(path, word):
    try:
        return word in path.read_bytes()
    except OSError:
        return False


@pytest.mark.parametrize("text", ['{"a": 1}', "[1, 2", '[{"question": "q"}]'])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(RunError, match="not a result file"):
        load(tmp_path / "x.json")


def test_targets_are_judged():
    verdicts = {value: Target("m", value, "<=", 3.0, "x").verdict for value in (2.0, 3.0, 3.1, None)}
    assert verdicts == {2.0: "met", 3.0: "met", 3.1: "MISSED", None: "not measured"}
    assert Target("m", 9.0, ">=", 10.0, "x").verdict == "MISSED"


def test_the_command_line(tmp_path, capsys):
    out = tmp_path / "sub" / "r.json"
    given = ["run", ROOFLINE, "--quick", "--threads", "1", "--json", str(out)]
    assert command.main(given) == 0
    assert "2 rows, 0 without figures" in capsys.readouterr().out
    (environment,) = {json.dumps(row["environment"]) for row in json.loads(out.read_text())}
    assert json.loads(environment)["command"] == f"python -m benchmarks {' '.join(given)}"


def test_list_names_every_question(capsys):
    assert command.main(["list"]) == 0
    printed = capsys.readouterr().out
    for question in named(["cpu", "gpu"]):
        assert f"\n{question.name} " in f"\n{printed}"
        assert question.what in printed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["run", "speed"], "expected some of cpu, gpu, .*got speed"),
        (["run", "roofline", "--threads", "0"], "--threads: expected at least 1, got 0"),
        (["run", "roofline", "--device", "cuda"], "torch sees no CUDA device"),
    ],
)
def test_bad_options(given, message, capsys, tmp_path):
    if "cuda" in given and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command.main([*given, "--json", str(tmp_path / "r.json")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_dry_run_lists_every_case(capsys):
    assert command.main(["run", "cpu", "--quick", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for question in named(["cpu"]):
        for case in question.cases(SETTING):
            assert f"\n  {case.key}\n" in printed + "\n"
    assert "gpu_tests" not in printed


def test_wgmma_has_cases_of_its_own(tmp_path, monkeypatch):
    """Its process is another one, and asks what the first one has asked already."""
    ran = []
    question = Question("q", "", lambda s: [Case("a", lambda: ran.append(s.wgmma) or [])], list, "")
    monkeypatch.setattr(child, "questions", lambda: {"q": question})
    for setting in (SETTING, replace(SETTING, wgmma=True)):
        child.main(str(tmp_path / "part"), "q", str(time.time() + 60), setting.json())
    assert ran == [False, True]
    assert [record["case"] for record in read(tmp_path / "part")] == ["a", "a, wgmma"]


def test_cases_have_names_of_their_own():
    for setting in (SETTING, Setting(), Setting("cuda"), Setting("cuda", wgmma=True, backends=("cuda",))):
        for question in named(["gpu" if setting.cuda else "cpu"]):
            keys = [case.key for case in question.cases(setting)]
            assert keys
            assert len(keys) == len(set(keys))
