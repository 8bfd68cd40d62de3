"""Tests of tests: a source with one text replaced must fail a check that the source passes.

A check is a function of a module of this repository; it gets the compiled module and raises when something is wrong.

    with mutant("csrc/cuda/kernels/mainloop.cuh", "__syncthreads();", "", index=1) as path:
        assert "Mismatch" in caught("tests.host.test_step:check", path)
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from tests.host.build import JOBS, ROOT, SUFFIX, BuildError, build, call, folder, load, tool

SURVIVED, CAUGHT = 0, 77  # exit codes of main()


def replace(text: str, old: str, new: str, index: int | None = None) -> str:
    """`text` with one `old` replaced: the only one, or the one of that index. Raises ValueError if there is none."""
    count = text.count(old)
    if index is None and count != 1:
        raise ValueError(f"expected {old!r} once, found it {count} times: give its index")
    if not 0 <= (index or 0) < count:
        raise ValueError(f"expected {old!r} at index {index}, found it {count} times")
    at = -1
    for _ in range((index or 0) + 1):
        at = text.index(old, at + 1)
    return text[:at] + new + text[at + len(old) :]


def objects(target: str, source: Path) -> set[str]:
    """The build's objects of `target` that a source or header is part of."""
    ninja, where = str(tool("ninja")), str(folder())
    inputs = set(call(ninja, "-C", where, "-t", "inputs", target + SUFFIX).split())
    found, current = set(), ""
    for line in call(ninja, "-C", where, "-t", "deps").splitlines():
        if line and not line.startswith(" "):
            current = line.split(":")[0]
        elif line and (folder() / line.strip()).resolve() == source and current in inputs:
            found.add(current)
    return found


def commands(target: str) -> list[str]:
    """What ninja runs for `target`, compilations and the link."""
    return call(str(tool("ninja")), "-C", str(folder()), "-t", "commands", target + SUFFIX).splitlines()


def output(command: str) -> str:
    """The file that a compiler's command writes."""
    found = re.search(r" -o (\S+)", command)
    return found[1] if found else ""


@contextmanager
def mutant(path: str, old: str, new: str, *, index: int | None = None, target: str = "ep_host") -> Iterator[Path]:
    """The module `target` with one text of a source or header (a path from the root) replaced; only what depends on it
    is compiled. Raises ValueError if the text is not there, BuildError if the mutant does not compile."""
    build(target)
    source = (ROOT / path).resolve()
    tree = ROOT / Path(path).parts[0] if path.startswith("csrc/") else ROOT / "tests" / "host"
    changed = replace(source.read_text(), old, new, index)
    stale = objects(target, source)
    if not stale:
        raise ValueError(f"{path} is no part of {target}")
    with tempfile.TemporaryDirectory(prefix="ep-mutant-") as name:
        copy, made = Path(name) / "tree", Path(name) / "objects"
        shutil.copytree(tree, copy, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / source.relative_to(tree)).write_text(changed)
        made.mkdir()
        fresh = {each: str(made / f"{i}.o") for i, each in enumerate(sorted(stale))}
        compile_, link = [], ""
        for command in commands(target):
            if output(command) in fresh:
                command = command.replace(output(command), fresh[output(command)]).replace(f"{tree}/", f"{copy}/")
                compile_.append(command.replace(" -O2 -g1 ", " -O0 "))  # compiled once and run for a moment
            elif output(command) == target + SUFFIX:
                link = command
        result = Path(name) / (target + SUFFIX)
        with ThreadPoolExecutor(int(JOBS)) as pool:
            list(pool.map(shell, compile_))
        parts = [fresh.get(word, str(result) if word == target + SUFFIX else word) for word in link.split(" ")]
        shell(" ".join(parts))
        yield result


def shell(command: str) -> None:
    """A command of the build's, run where ninja would."""
    done = subprocess.run(["sh", "-c", command], cwd=folder(), capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{command}\n{done.stdout}\n{done.stderr}")


def caught(check: str, module: Path, timeout: float = 600) -> str:
    """What the check `"package.module:function"` says of a module: its exception, or how it crashed; "" if it passes.
    In a process of its own: a mutant may crash, and its ops are registered under the same names."""
    words = [sys.executable, "-m", "tests.host.mutant", check, str(module)]
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    try:
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"no end after {timeout} seconds"
    if done.returncode == SURVIVED:
        return ""
    if done.returncode == CAUGHT:
        return done.stdout
    if done.returncode < 0:
        return f"signal {-done.returncode}"
    raise RuntimeError(f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}")


def main(check: str, path: str) -> int:
    """Runs a check; exceptions outside of it are errors of the test, not catches."""
    module_name, function = check.split(":")
    run = getattr(import_module(module_name), function)
    module = load(Path(path))
    try:
        run(module)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        return CAUGHT
    return SURVIVED


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
