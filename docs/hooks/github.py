"""Pages are written as GitHub shows them; here is what the site reads differently.

* Links to files outside docs/ lead to the repository (``repo_url`` in mkdocs.yml), or become the names of the files.
* A list may follow a paragraph without an empty line, and be nested by the width of its marker: Python-Markdown wants
  an empty line, and four spaces.
* ``\\|`` in code within a table is a bar: Python-Markdown shows the backslash.
* Words behind a fence's language (``gpu`` in ``python gpu``) are for the tests: Python-Markdown takes such a
  block for text.
* Pages named in ``nav`` that are not there yet are left out.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.hooks.github")

FENCE = re.compile(r"^( *)(`{3,}|~{3,})")
ITEM = re.compile(r"^( *)([*+-]|\d+[.)])( +)(?=\S)")
WORDS = re.compile(r"^( *`{3,}\w+) [\w ]+$", re.M)
# A code span is passed over; the text of a link may hold some.
LINK = re.compile(r"(?P<ticks>`+)(?!`).*?(?<!`)(?P=ticks)(?!`)|(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)", re.S)


def on_config(config: Any) -> Any:
    """Leave pages that are not there out of ``nav``."""
    if config["nav"]:
        config["nav"] = present(config["nav"], Path(config["docs_dir"]))
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, **_: object) -> str:
    """What the site makes of a page."""
    root = Path(config["config_file_path"]).parent
    folder = posixpath.join(Path(config["docs_dir"]).relative_to(root).as_posix(), posixpath.dirname(page.file.src_uri))
    url = f"{config['repo_url'].rstrip('/')}/{{kind}}/{config['extra']['branch']}" if config["repo_url"] else None
    return outside_code(lists(WORDS.sub(r"\1", markdown)), lambda text: bars(links(text, folder, root, url)))


def present(nav: Any, docs: Path) -> Any:
    """``nav`` without the pages that are not in ``docs``, and without sections that are then empty."""
    if isinstance(nav, str):
        return nav if "://" in nav or (docs / nav).is_file() else None
    if isinstance(nav, dict):
        kept = {title: present(part, docs) for title, part in nav.items()}
        return {title: part for title, part in kept.items() if part} or None
    return [part for part in (present(part, docs) for part in nav) if part]


def links(text: str, folder: str, root: Path, url: str | None) -> str:
    """Rewrite links out of docs/.

    Args:
        text: without blocks of code.
        folder: of the page, from ``root``, as ``docs`` or ``docs/api``.
        root: of the repository.
        url: prefix of a file's address, with ``{kind}`` (blob or tree) in it; None: there is none.
    """

    def rewritten(found: re.Match[str]) -> str:
        label, target = found["text"], found["target"]
        if target is None or re.match(r"[a-z][a-z+.-]*:|#|/", target):
            return found[0]
        path, hash_, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        if path.split("/")[0] == folder.split("/")[0]:
            return found[0]
        if path.startswith("..") or not (root / path).exists():
            log.warning("a page in %s links to '%s', which is not in the repository", folder, target)
            return found[0]
        if url is not None:
            kind = "tree" if (root / path).is_dir() else "blob"
            return f"[{label}]({url.format(kind=kind)}/{path}{hash_}{anchor})"
        name = label.strip("`")
        return f"`{path}`" if path.endswith(name) else f"{label} (`{path}`)"

    return LINK.sub(rewritten, text)


def bars(text: str) -> str:
    """Bars in code within tables, without their backslashes."""
    rows = (re.sub(r"`[^`]+`", lambda code: code[0].replace("\\|", "|"), line) for line in text.split("\n"))
    return "\n".join(
        row if line.lstrip().startswith("|") else line for row, line in zip(rows, text.split("\n"), strict=True)
    )


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Apply ``change`` to what is between fenced blocks and blocks of indented code."""
    done: list[str] = []
    text: list[str] = []
    fence: str | None = None
    listed = blank = False

    def flush() -> None:
        if text:
            done.append(change("\n".join(text)))
            text.clear()

    for line in markdown.split("\n"):
        found = FENCE.match(line)
        if fence is not None:
            done.append(line)
            if found and found[2].startswith(fence) and line.strip() == found[2]:
                fence = None
        elif found:
            flush()
            fence = found[2]
            done.append(line)
        elif line.startswith("    ") and blank and not listed:
            flush()
            done.append(line)
            continue  # so does the next indented line
        else:
            listed = bool(ITEM.match(line)) or (listed and (not line.strip() or not blank or line.startswith(" ")))
            text.append(line)
        blank = not line.strip()
    flush()
    return "\n".join(done)


def lists(markdown: str) -> str:
    """Put an empty line before lists that follow a paragraph, and nest by four spaces."""
    done: list[str] = []
    open_items: list[int] = []  # the columns at which the contents of the items begin
    fence: str | None = None
    shift = 0
    after = ""  # the line before

    def moved(line: str, by: int) -> str:
        return " " * by + line if by >= 0 else line[min(-by, len(line) - len(line.lstrip())) :]

    for line in markdown.split("\n"):
        indent = len(line) - len(line.lstrip())
        found, item = FENCE.match(line), ITEM.match(line)
        if fence is not None:
            done.append(moved(line, shift) if line.strip() else line)
            if found and found[2].startswith(fence) and line.strip() == found[2]:
                fence = None
            after = line
            continue
        starts = bool(item) or bool(found) or not after.strip()
        if line.strip() and starts:
            while open_items and indent < open_items[-1]:
                open_items.pop()
            if item and not open_items and indent >= 4:
                item = None  # indented code
            shift = 4 * len(open_items) - open_items[-1] if open_items else 0
            interrupts = item is not None and after.strip() and not ITEM.match(after) and not open_items
            if interrupts and item is not None and item[2] in "*+-1.1)" and not in_list(done):
                done.append("")
            if item is not None:
                open_items.append(len(item[0]))
            if found:
                fence = found[2]
            line = moved(line, shift)
        done.append(line)
        after = line if line.strip() else ""
    return "\n".join(done)


def in_list(lines: list[str]) -> bool:
    """The paragraph that ends here is that of a list's item."""
    for line in reversed(lines):
        if not line.strip():
            return False
        if ITEM.match(line):
            return True
    return False
