"""The pages of the documentation, and what stands in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = tuple(sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md")))
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *DOCS)


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def fences(page: str) -> list[tuple[int, str, str]]:
    """Fenced blocks: the line on which the code starts, the words behind the fence, and the code."""
    content = text(page)
    found = re.finditer(r"^( *)```([^\n`]*)\n(.*?)^\1```$", content, re.MULTILINE | re.DOTALL)
    return [(content.count("\n", 0, match.start(3)), match.group(2).strip(), match.group(3)) for match in found]


def blocks(page: str, words: str) -> list[tuple[int, str]]:
    """Fenced blocks with these words behind the fence: the line on which the code starts, and the code."""
    return [(line, code) for line, found, code in fences(page) if found == words]


def shell_lines(page: str) -> list[str]:
    """Lines of the blocks of sh, continued ones joined; of `a && b` each, without variables that are set before."""
    joined = [line for _, block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in joined for part in line.split("&&")]
    return [re.sub(r"^(?:[A-Z][A-Z0-9_]*=\S* +)+", "", part) for part in parts]


def inline_code(page: str) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text(page))]


def command_lines(page: str, program: str) -> list[str]:
    """Shell commands that start with ``program``: in blocks of sh, and inline."""
    return [line for line in (*shell_lines(page), *inline_code(page)) if line.startswith(f"{program} ")]


def module_lines(page: str) -> list[tuple[str, list[str]]]:
    """Module and arguments of every ``-m MODULE ...`` in the blocks of sh (of python, torchrun, srun)."""
    found = []
    for line in shell_lines(page):
        if not re.match(r"(?:python|torchrun|srun) ", line):
            continue
        words = shlex.split(line, comments=True)
        if "-m" in words:
            at = words.index("-m") + 1
            found.append((words[at], words[at + 1 :]))
    return found


def anchors(page: str) -> set[str]:
    """Targets of links to headings, as GitHub names them."""
    prose = re.sub(r"^```.*?^```$", "", text(page), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
