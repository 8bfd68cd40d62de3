"""The documentation is true: its code runs, its command lines parse, and what it names is in the tree."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tyro

from ep_train.check import CheckConfig
from ep_train.cli import TEACHER, RecipeConfig, ResumeConfig, started_from
from ep_train.config import TrainConfig

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")))
COMMANDS: dict[str, type] = {
    "train": TrainConfig,
    "teacher": TrainConfig,
    "check": CheckConfig,
    "resume": ResumeConfig,
    "recipe": RecipeConfig,
}
SOURCES = ("ep_kernels/**/*.py", "python/**/*.py", "csrc/**/*", "setup.py", "CMakeLists.txt", "Makefile")


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    """Fenced blocks of one language: the line on which the code starts, and the code."""
    content = text(page)
    found = re.finditer(rf"^```{language}\n(.*?)^```$", content, re.MULTILINE | re.DOTALL)
    return [(content.count("\n", 0, match.start(1)), match.group(1)) for match in found]


def command_lines(page: str, program: str) -> list[str]:
    """Shell commands that start with ``program``: in blocks of sh, and inline."""
    lines = [line for _, block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text(page))]
    return [line for line in lines if line.startswith(f"{program} ")]


def anchors(page: str) -> set[str]:
    """Targets of links to headings, as GitHub names them."""
    prose = re.sub(r"^```.*?^```$", "", text(page), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", "docs/concepts.md"])
def test_python_runs(page: str) -> None:
    found = blocks(page, "python")
    assert found
    namespace: dict[str, Any] = {}
    for line, block in found:
        # The padding makes a traceback name the page's own line.
        exec(compile("\n" * line + block, page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES)
def test_command_lines_parse(page: str) -> None:
    lines = command_lines(page, "ep-train")
    if page == "README.md":
        assert lines
    for line in lines:
        arguments = shlex.split(line, comments=True)[1:]
        if "--help" in arguments or arguments[-2:] == ["--preset", "list"]:
            continue
        command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "train"
        if "--config" in arguments:  # a file that is not there
            at = arguments.index("--config")
            del arguments[at : at + 2]
        try:
            if command in ("train", "teacher"):
                start = TEACHER if command == "teacher" else started_from(arguments, TrainConfig())
                tyro.cli(TrainConfig, args=arguments, default=start)
            elif arguments:
                tyro.cli(COMMANDS[command], args=arguments)
        except SystemExit:
            pytest.fail(f"{page}: ep-train does not accept: {line}")


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", text("Makefile"), re.MULTILINE))
    used = {line.split()[1] for line in command_lines(page, "make")}
    assert {name for name in used if "=" not in name} <= targets


def test_environment_variables_are_in_the_code() -> None:
    section = text("README.md").split("\n## Environment variables\n")[1].split("\n## ")[0]
    listed = set(re.findall(r"^\| `([A-Z0-9_]+)`", section, re.MULTILINE))
    named = set(re.findall(r"\b(?<!@)[A-Z]+(?:_[A-Z]+)+\b(?!@)", text("README.md")))
    # pip's own variables, torch's, and CMake's in an error message are not read by this code.
    others = {name for name in named if name.startswith("PIP_")} | {
        "OMP_NUM_THREADS",
        "OMP_WAIT_POLICY",
        "CMAKE_CXX_COMPILER",
    }
    assert listed >= named - others
    files = [path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files if path.suffix not in (".pyc", ".so"))
    assert [name for name in sorted(listed) if not re.search(rf"\b{name}\b", code)] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(str(file.resolve().relative_to(ROOT))), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_code_style_exist(page: str) -> None:
    named = re.findall(r"`((?:csrc|ep_kernels|python|benchmarks|tests|docs)/[\w./]+\.\w+)`", text(page))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_is_filled_in(page: str) -> None:
    assert re.findall(r"@@\w+@@", text(page)) == []
