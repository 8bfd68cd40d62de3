"""The report says what the newest rows say, of each device, and loses nothing to a question that fails."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from benchmarks import registry
from benchmarks.case import Row
from benchmarks.markdown import cases, good, ms, table
from benchmarks.plots import OTHERS, OURS, bars, panels, picture
from benchmarks.registry import Question, Target
from benchmarks.report import BEGIN, END, write
from benchmarks.runner import RunError

CPU, GPU = "A processor, 2 cores", "Accelerator 9000"


def environment(device: str = CPU, day: int = 1, revision: str = "aaaaaaa", **more: Any) -> Row:
    gpu = {"capability": "9.0", "cuda": "13.0", "cudnn": "9", "driver": "600.1", "memory_gib": 139}
    return {
        "when": f"2026-11-{day:02d}T10:00:00+00:00", "command": "python -m benchmarks run cpu", "device": device,
        "threads": 2, "python": "3.11.7", "torch": "2.13.0", "triton": "none", "ep_kernels": "0.1.0",
        "revision": revision, **(gpu if device.startswith("Acc") else {}), **more,
    }  # fmt: skip


def row(name: str, time: float, question: str = "speed", case: str = "small", **more: Any) -> Row:
    timed = {"ms": {"0.2": 0.9 * time, "0.5": time, "0.8": 1.1 * time}}
    return {"question": question, "case": case, "name": name, "status": "ok", **timed, "environment": environment(),
            **more}  # fmt: skip


def lines(rows: Sequence[Row]) -> list[str]:
    return table(("name", "ms"), [[r["name"], ms(r)] for r in rows])


def targets(rows: Sequence[Row]) -> list[Target]:
    return [Target(f"time of {r['name']}", r["ms"]["0.5"], "<=", 5, r["case"]) for r in rows]


def draw(rows: Sequence[Row], figure: Any) -> None:
    figure.subplots().barh([r["name"] for r in rows], [r["ms"]["0.5"] for r in rows])


SPEED = Question("speed", "how fast", lambda _: [], lines, "made-up things", draw=draw, targets=targets)
SIZE = Question("size", "how large", lambda _: [], lines, "other things")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an empty ``results`` and a page with markers."""
    monkeypatch.setattr(registry, "questions", lambda: {"size": SIZE, "speed": SPEED})
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(f"# Title\n\nBefore.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    return tmp_path


def keep(place: Path, name: str, *rows: Row) -> None:
    (place / "results" / name).write_text(json.dumps(rows))


def report(place: Path) -> str:
    return write(place / "results", place / "docs" / "page.md", place / "docs" / "img")


def test_the_newest_rows_of_each_device_win(place: Path) -> None:
    other = {"environment": environment("Another processor", day=1)}
    keep(place, "a.json", row("ours", 2, environment=environment(day=3)), row("ours", 7, case="large"))
    keep(place, "b.json", row("ours", 3), row("gone since", 4), row("ours", 8, **other))
    text = write(place / "results", None, None)
    first, second = text.split("### Another processor")
    assert "| ours | 2.00 (1.80 to 2.20) |" in first
    assert "| ours | 7.00 (6.30 to 7.70) |" in first  # the only ones of that case
    assert "3.00" not in text
    assert "gone since" not in text
    assert "| ours | 8.00 (7.20 to 8.80) |" in second
    assert "2026-11-01, 2026-11-03" in first


def test_a_later_failure_replaces_no_figures(place: Path) -> None:
    failed = {"status": "failed", "reason": "TimeoutError: stopped", "environment": environment(day=5, revision="bbb")}
    skipped = {**failed, "status": "skipped", "reason": "the question's time was over"}
    keep(place, "a.json", row("ours", 2), row("theirs", 4), row("ours", 7, case="large"))
    keep(place, "b.json", row("", 0, **skipped), row("ours", 8, case="large", environment=environment(day=5)))
    keep(place, "c.json", row("ours", 0, case="never", **failed))
    text = write(place / "results", None, None)
    assert "| ours | 2.00 (1.80 to 2.20) |" in text
    assert "| theirs | 4.00 (3.60 to 4.40) |" in text
    assert "* small: measured 2026-11-01; 2026-11-05, revision bbb: skipped: the question's time was over" in text
    assert "| ours | 7.00" not in text  # large has newer figures
    assert "never: measured" not in text  # there the failure is all that there is: the question's own table has it
    wrong = {**failed, "environment": environment(day=6)}
    keep(place, "d.json", row("ours", 3, environment=environment(day=6)), row("theirs", 0, **wrong))
    text = write(place / "results", None, None)
    assert "| ours | 3.00" in text
    assert "Without figures since" not in text
    assert "4.00" not in text  # a run with some figures of a case is that case's newest


def test_a_copy_of_a_file_repeats_nothing(place: Path) -> None:
    keep(place, "a.json", row("ours", 2), row("theirs", 3))
    keep(place, "b.json", row("ours", 2), row("theirs", 3))
    assert write(place / "results", None, None).count("| ours | 2.00 (") == 1


def test_other_files_are_passed_over(place: Path) -> None:
    keep(place, "a.json", row("ours", 2))
    (place / "results" / "deep.json").write_text('[{"table": "depth", "row": "a"}]')
    (place / "results" / "old.json").write_text('{"sweep": {"rows": []}}')
    (place / "results" / "b.part.jsonl").write_text('{"question": "speed", "case": "unfinished", "rows": []}\n')
    text = write(place / "results", None, None)
    assert "| ours | 2.00" in text
    assert "unfinished" not in text
    (place / "results" / "broken.json").write_text('[{"question": "spe')
    with pytest.raises(RunError, match=r"broken\.json is no JSON"):
        write(place / "results", None, None)


def test_targets_say_what_rows_say(place: Path) -> None:
    keep(place, "a.json", row("ours", 2), row("theirs", 9))
    text = report(place)
    assert "| time of ours | 2 | <= 5 | met | small |" in text
    assert "| time of theirs | 9 | <= 5 | MISSED | small |" in text


def asking(question: Question, *targets: Target) -> Question:
    """The same, with what it asks of a GPU."""
    found = copy.copy(question)
    object.__setattr__(found, "asked", targets)
    return found


def test_without_a_gpu_its_section_says_what_is_asked(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time = Target("time of ours", None, "<=", 5, "the largest")
    size, rate = Target("size", None, ">=", 60, "all"), Target("rate", None, ">=", 2, "all")
    known = {"size": asking(SIZE, size), "speed": asking(SPEED, time, rate)}
    monkeypatch.setattr(registry, "questions", lambda: known)
    keep(place, "a.json", row("ours", 2))
    cpu, gpu = report(place).split("## GPU")
    assert "not measured" not in cpu
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in gpu.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        ["size", "", ">= 60", "not measured", "all"],
        ["time of ours", "", "<= 5", "not measured", "the largest"],
        ["rate", "", ">= 2", "not measured", "all"],
    ]
    assert "Nothing has been measured on a GPU yet. `python -m benchmarks.gpu`" in gpu
    keep(place, "b.json", row("ours", 3, environment=environment(GPU)))
    cpu, gpu = report(place).split("## GPU")
    assert GPU not in cpu
    assert "Nothing has been measured" not in gpu
    assert "| time of ours | 3 | <= 5 | met | small |" in gpu
    assert "the largest" not in gpu  # it was judged
    assert "| rate |  | >= 2 | not measured | all |" in gpu
    assert "driver 600.1" in gpu


def test_the_page_keeps_what_is_around_the_markers(place: Path) -> None:
    keep(place, "a.json", row("ours", 2), row("a file", 3, "size"))
    text = report(place)
    page = (place / "docs" / "page.md").read_text()
    assert page == f"# Title\n\nBefore.\n\n{BEGIN}\n\n{text}\n{END}\n\nAfter.\n"
    assert text.index("#### size") < text.index("#### speed")  # as the registry has them
    assert f"Conditions: made-up things; {CPU}, 2026-11-01." in text
    assert "![speed: how fast](img/bench-cpu-speed.png)" in text
    assert (place / "docs" / "img" / "bench-cpu-speed.png").stat().st_size > 1000
    assert "![size" not in text  # it draws nothing


def test_a_second_report_changes_nothing(place: Path) -> None:
    keep(place, "a.json", row("ours", 2), row("ours", 4, case="large"))
    report(place)
    before = {path: path.read_bytes() for path in (place / "docs").rglob("*.*")}
    report(place)
    assert len(before) == 2
    assert {path: path.read_bytes() for path in (place / "docs").rglob("*.*")} == before


@pytest.mark.parametrize("text", ["nothing", BEGIN, f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n", None])
def test_a_page_without_its_markers_is_an_error(place: Path, text: str | None) -> None:
    keep(place, "a.json", row("ours", 2))
    page = place / "docs" / "page.md"
    page.unlink()
    if text is not None:
        page.write_text(text)
    with pytest.raises(RunError) as error:
        report(place)
    assert all(part in str(error.value) for part in (str(page), BEGIN, END))
    assert (page.read_text() if text is not None else None) == text
    assert not (place / "docs" / "img").exists()


def test_a_question_that_fails_loses_no_other(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(_rows: Sequence[Row], _figure: Any = None) -> Any:
        raise ValueError("no such column")

    keep(place, "a.json", row("ours", 2), row("a file", 3, "size"))
    report(place)  # leaves a picture
    failing = {"size": replace(SIZE, table=bad), "speed": replace(SPEED, draw=bad)}
    monkeypatch.setattr(registry, "questions", lambda: failing)
    text = report(place)
    assert "The picture could not be drawn: ValueError: no such column" in text
    assert "bench-cpu-speed.png" not in text
    assert not (place / "docs" / "img" / "bench-cpu-speed.png").exists()  # it showed other rows
    assert "| ours | 2.00 (1.80 to 2.20) |" in text
    assert "The table could not be made: ValueError: no such column" in text


def test_revisions_are_told_apart(place: Path) -> None:
    newer = {"environment": environment(day=2, revision="bbbbbbb+")}
    keep(place, "a.json", row("x", 1, "size", **newer), row("y", 2), row("y", 3, case="large", **newer))
    text = write(place / "results", None, None)
    assert "By revision: bbbbbbb+: size, speed (large); aaaaaaa: speed (small)." in text
    assert "not committed" in text
    keep(place, "a.json", row("x", 1, "size"), row("y", 2))
    assert "By revision" not in write(place / "results", None, None)


def test_two_devices_of_a_kind_have_pictures_of_their_own(place: Path) -> None:
    keep(place, "a.json", row("ours", 2), row("ours", 3, environment=environment("Other")))
    text = report(place)
    names = sorted(path.name for path in (place / "docs" / "img").iterdir())
    assert names == ["bench-cpu-speed-a-processor-2-cores.png", "bench-cpu-speed-other.png"]
    assert all(f"(img/{name})" in text for name in names)


def test_pictures_of_an_earlier_report_are_deleted(place: Path) -> None:
    keep(place, "a.json", row("ours", 2))
    report(place)
    folder = place / "docs" / "img"
    (folder / "deep-gain.png").write_bytes(b"mine")
    keep(place, "b.json", row("ours", 3, environment=environment("Other")))
    write(place / "results", None, None)  # writes nothing, so it deletes nothing
    assert (folder / "bench-cpu-speed.png").exists()
    report(place)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["bench-cpu-speed-a-processor-2-cores.png", "bench-cpu-speed-other.png", "deep-gain.png"]


def test_bars_and_panels(tmp_path: Path) -> None:
    figures = []

    def drawing(rows: Sequence[Row], figure: Any) -> None:
        figures.append(figure)
        names = cases(good(rows))
        for axes, case in zip(panels(figure, names), names, strict=False):
            bars(axes, [row for row in good(rows) if row["case"] == case], lambda row: row["ms"]["0.5"])

    rows = [row("theirs", 3), row("ours, fp32", 2), row("", 0, case="large", status="failed")]
    picture(drawing, rows, tmp_path / "two.png")
    (axes,) = figures[0].axes
    assert axes.get_title() == "small"
    assert [patch.get_width() for patch in axes.patches] == [3, 2]
    assert [mpl.colors.to_hex(patch.get_facecolor()) for patch in axes.patches] == [OTHERS, OURS]
    picture(drawing, rows[2:], tmp_path / "none.png")  # nothing has figures
    assert [text.get_text() for text in figures[1].axes[0].texts] == ["no figures"]
    assert (tmp_path / "none.png").stat().st_size > 1000


def test_quick_figures_are_marked(place: Path) -> None:
    quick = environment(command="python -m benchmarks run speed --quick")
    keep(place, "a.json", row("ours", 2, environment=quick))
    assert "figures mean nothing" in write(place / "results", None, None)
