"""The page of errors quotes messages word for word, and has all of those of the build and of the import."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.docs.pages import ROOT, blocks, text

PAGE = "docs/faq.md"
GAP = "\0"  # in a message: what differs from case to case
PYTHON = ("setup.py", "ep_kernels/**/*.py", "python/ep_train/**/*.py")
NATIVE = ("CMakeLists.txt", "cmake/*.cmake", "csrc/cpu/*.cpp")


def strings(node: ast.AST) -> Iterator[str]:
    """Every text in a piece of Python, with gaps where values or %-fields go."""
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
        yield "".join(str(part) for part in parts)
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                yield from strings(part)
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield re.sub(r"%[-.\d]*[sdgrf]", GAP, node.value)
    for child in ast.iter_child_nodes(node):
        yield from strings(child)


def native(source: str) -> str:
    """C++ and CMake with neighbouring texts joined, and gaps where values go."""
    joined = re.sub(r'"\s*(?:\n\s*)?"(?=[^;)\s])', "", source)
    joined = re.sub(r'"\s*<<.*?<<\s*"', GAP, joined)
    return re.sub(r"\$(?:ENV)?\{\w+\}", GAP, joined)


@pytest.fixture(scope="module")
def messages() -> list[str]:
    """All texts of the sources."""
    found: list[str] = []
    for pattern in PYTHON:
        for path in ROOT.glob(pattern):
            found += strings(ast.parse(path.read_text(encoding="utf-8")))
    found += [native(path.read_text(encoding="utf-8")) for pattern in NATIVE for path in ROOT.glob(pattern)]
    return found


def quoted() -> list[str]:
    """Messages on the page: the lines of its blocks of text, and the reasons in its tables."""
    lines = [line for _, block in blocks(PAGE, "text") for line in block.splitlines()]
    cells = [row.split(" | ")[0].removeprefix("|") for row in text(PAGE).splitlines() if row.startswith("| `")]
    return lines + [code for cell in cells for code in re.findall(r"`([^`]+)`", cell)]


def is_said(message: str, texts: list[str]) -> bool:
    """Whether a text of the sources holds the message, with anything in place of ``...``."""
    whole = re.compile(r"[^\n]*?".join(re.escape(part) for part in message.strip(".").split("...")))
    return any(whole.search(found) for found in texts)


def test_messages_are_quoted_word_for_word(messages: list[str]) -> None:
    lines = quoted()
    assert len(lines) > 50
    assert [line for line in lines if not is_said(line, messages)] == []


def test_another_wording_is_noticed(messages: list[str]) -> None:
    assert not is_said("the free phase has not settled: residual ...", messages)
    assert not is_said("nvcc: expected CUDA >= ...; ... was ...", messages)


def test_every_message_of_the_build_is_there() -> None:
    page = "\n".join(quoted())
    build = (ROOT / "CMakeLists.txt").read_text() + (ROOT / "cmake/cuda.cmake").read_text()
    raised = re.findall(r'message\((?:FATAL_ERROR|WARNING)\s+"(.*?)"\)', native(build), re.DOTALL)
    raised += re.findall(r'set\((?:\$\{why\}|missing) "(.*?)"(?: PARENT_SCOPE)?\)', native(build))
    raised += re.findall(r'set\(EP_NOTE "(.+?)"\)', native(build))
    setup = ast.parse((ROOT / "setup.py").read_text())
    for node in ast.walk(setup):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ExecError":
            raised += list(strings(node.args[0]))[:1]
    assert len(raised) > 12
    assert [message for message in raised if not on(page, message)] == []


def test_every_message_of_the_import_is_there() -> None:
    page = "\n".join(quoted())
    source = ast.parse((ROOT / "ep_kernels/_library.py").read_text())
    functions = {node.name: node for node in source.body if isinstance(node, ast.FunctionDef)}
    said = [text for name in ("_missing", "_broken") for text in strings(functions[name]) if " " in text]
    assert len(said) >= 4
    assert [message for message in said if not on(page, message)] == []


def on(page: str, message: str) -> bool:
    """Whether the page has every part of a message between its gaps."""
    parts = [part.strip(" .:;'\n") for part in message.split(GAP)]
    return all(part in page for part in parts if len(part) > 3)
