"""The documentation is true: its code runs, its command lines parse, and what it names is in the tree."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

import ep_kernels.cli
import ep_train.cli
from tests.docs.pages import (
    PAGES,
    ROOT,
    anchors,
    blocks,
    command_lines,
    fences,
    inline_code,
    module_lines,
    shell_lines,
    text,
)

SOURCES = ("ep_kernels/**/*.py", "python/**/*.py", "csrc/**/*", "setup.py", "CMakeLists.txt", "Makefile")
# What may stand behind a fence. Blocks of python run on any machine, one page in one namespace; those of `python gpu`
# where torch sees a CUDA device. What needs several processes or a package that tests do not have is no `python`.
LANGUAGES = {"", "python", "python gpu", "sh", "text", "text other", "cmake", "cpp", "bibtex", "json", "yaml"}
# Programs whose lines in blocks of sh are read by their own parsers.
MODULES = {
    "ep_kernels.info": "ep_kernels.info",
    "ep_train": "ep_train.cli",
    "benchmarks": "benchmarks.__main__",
    "benchmarks.aot": "benchmarks.aot",
    "benchmarks.deep": "benchmarks.deep.__main__",
    "benchmarks.gpu": "benchmarks.gpu",
    "benchmarks.scaling": "benchmarks.scaling.__main__",
}


class Parsed(BaseException):
    """A command line has been read without an error."""


@pytest.fixture
def stop_when_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end with ``Parsed`` where they would begin their work."""

    def stopping(parse: Callable[..., object]) -> Callable[..., None]:
        def parsed(*args: object, **kwargs: object) -> None:
            parse(*args, **kwargs)
            raise Parsed

        return parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stopping(argparse.ArgumentParser.parse_args))
    monkeypatch.setattr(tyro, "cli", stopping(tyro.cli))


def reads(main: Callable[[list[str]], object], arguments: list[str]) -> bool:
    """Whether a command takes these arguments, as ``--help``, as a list that it prints, or to begin its work."""
    try:
        return main(arguments) in (0, None)
    except Parsed:
        return True
    except SystemExit as end:
        return end.code == 0


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") or blocks(page, "python gpu")])
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a page may write files
    namespace: dict[str, Any] = {"__name__": page}
    for line, words, block in fences(page):
        if words == "python" or (words == "python gpu" and torch.cuda.is_available()):
            # The padding makes a traceback name the page's own line.
            exec(compile("\n" * line + block, page, "exec"), namespace)


def test_there_is_python_to_run() -> None:
    assert blocks("README.md", "python")
    assert blocks("docs/concepts.md", "python")
    assert blocks("docs/quickstart.md", "python")


@pytest.mark.parametrize("page", PAGES)
def test_fences_say_what_is_in_them(page: str) -> None:
    assert {words for _, words, _ in fences(page)} - LANGUAGES == set()


@pytest.mark.usefixtures("stop_when_parsed")
@pytest.mark.parametrize("page", PAGES)
def test_command_lines_parse(page: str) -> None:
    lines = command_lines(page, "ep-train")
    if page in ("README.md", "docs/recipes.md"):
        assert lines
    for line in lines:
        arguments = shlex.split(line, comments=True)[1:]
        if "--config" in arguments:  # a file that is not there
            at = arguments.index("--config")
            del arguments[at : at + 2]
        if len(arguments) == 1 and not arguments[0].startswith("-"):  # a command that is named, not shown
            arguments.append("--help")
        assert reads(ep_train.cli.main, arguments), f"{page}: ep-train does not accept: {line}"


@pytest.mark.usefixtures("stop_when_parsed")
@pytest.mark.parametrize("page", PAGES)
def test_lines_of_other_programs_parse(page: str) -> None:
    for line in shell_lines(page):
        if line.startswith("ep-kernels "):
            arguments = shlex.split(line, comments=True)[1:]
            assert reads(ep_kernels.cli.main, arguments), f"{page}: ep-kernels does not accept: {line}"
    for module, arguments in module_lines(page):
        if module in MODULES:
            main = importlib.import_module(MODULES[module]).main
            assert reads(main, arguments), f"{page}: {module} does not accept: {' '.join(arguments)}"


@pytest.mark.usefixtures("stop_when_parsed")
def test_wrong_command_lines_are_noticed() -> None:
    assert not reads(ep_train.cli.main, ["--epoch", "3"])
    assert not reads(ep_train.cli.main, ["--preset", "laborieux2021"])
    assert not reads(ep_kernels.cli.main, ["tune", "--batches", "3"])
    assert not reads(importlib.import_module("benchmarks.__main__").main, ["ask"])


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
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
    prefix = r"(?:csrc|ep_kernels|python|benchmarks|tests|docs)/[\w./]+\.\w+"
    named = [code for code in inline_code(page) if re.fullmatch(prefix, code)]
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_is_filled_in(page: str) -> None:
    assert re.findall(r"@@\w+@@", text(page)) == []
