"""Docstrings as the API pages show them: what their style abbreviates is written out.

* ``src, dst: text`` in a list of arguments becomes an entry for each name.
* Roles, as :func:`ep_kernels.backend`, become links to what is on the site.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):$")
NAMES = re.compile(r"^    (\w+(?:, \w+)+): ")
ROLE = re.compile(r":(?:func|meth|class|mod|attr|data):`~?([\w.]+)`")


class Docstrings(griffe.Extension):
    """The extension that mkdocs.yml names."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite every docstring of a package."""
        seen = [pkg]
        for obj in seen:  # grows
            if obj.docstring is not None:
                obj.docstring.value = with_links(one_entry_each(obj.docstring.value), obj)
            seen += [member for member in obj.members.values() if not member.is_alias]  # type: ignore[misc]


def one_entry_each(text: str) -> str:
    """Repeat an entry of several names for each of them."""
    done: list[str] = []
    listed = False
    lines = text.split("\n")
    for at, line in enumerate(lines):
        if SECTION.match(line):
            listed = line.startswith(("Args", "Attributes"))
        elif line and not line.startswith(" "):
            listed = False
        several = NAMES.match(line) if listed else None
        if several is None:
            done.append(line)
            continue
        rest = [line[several.end() :]]
        for more in lines[at + 1 :]:
            if not more.startswith("     "):
                break
            rest.append(more)
        *earlier, last = several[1].split(", ")
        for name in earlier:
            done += [f"    {name}: {rest[0]}", *rest[1:]]
        done.append(f"    {last}: {rest[0]}")
    return "\n".join(done)


def with_links(text: str, obj: griffe.Object) -> str:
    """Roles as links; of a name that is not on the site the name remains."""

    def link(found: re.Match[str]) -> str:
        name = found[1]
        return f'<autoref identifier="{full_name(name, obj)}" optional><code>{name}</code></autoref>'

    return ROLE.sub(link, text)


def full_name(name: str, obj: griffe.Object) -> str:
    """The path of what an object's docstring calls ``name``."""
    if name.startswith(("ep_kernels.", "ep_train.")):
        return name
    scope: griffe.Object | griffe.Alias | None = obj
    while scope is not None:
        if name.split(".")[0] in scope.members:
            return f"{scope.path}.{name}"
        scope = scope.parent
    return name
