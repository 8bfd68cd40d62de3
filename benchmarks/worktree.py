"""Asks the same questions of a revision, in a worktree that is built for it, and of this tree, in turn."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.case import Row
from benchmarks.machine import ROOT
from benchmarks.runner import RunError, load
from benchmarks.setting import Setting

PASSES = 2  # of both trees, in turn
TAIL = 25  # lines of a log that an error shows
PATIENCE = 15.0  # seconds that a process may take to end its own ones


@dataclass(frozen=True)
class Commit:
    """A revision of this repository. ``short``: as results name it."""

    full: str
    short: str

    @staticmethod
    def of(revision: str) -> Commit:
        """What git makes of a name.

        Raises:
            RunError: it knows no such commit.
        """
        try:
            full = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
            return Commit(full, git("rev-parse", "--short", full))
        except (OSError, subprocess.CalledProcessError):
            raise RunError(f"argument REV: expected a commit, tag or branch of {ROOT}, got {revision!r}") from None

    def wrote(self, row: Row) -> bool:
        """Whether a row is of this commit as it is: a ``+`` (other changes) makes it another."""
        return self.named(str(row["environment"].get("revision") or ""))

    def named(self, short: str) -> bool:
        """Whether this is how git shortens it: to more digits as a repository grows."""
        return len(short) >= 4 and self.full.startswith(short)

    def has(self, path: str) -> bool:
        """Whether it holds a file."""
        try:
            git("cat-file", "-e", f"{self.full}:{path}")
        except subprocess.CalledProcessError:
            return False
        return True


def git(*args: str) -> str:
    """Output of a git command on this repository."""
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def measure_both(commit: Commit, setting: Setting, names: Sequence[str]) -> tuple[list[list[Row]], list[list[Row]]]:
    """Rows of each pass, of the revision and of this tree.

    Raises:
        RunError: a tree that cannot be built or run.
    """
    before: list[list[Row]] = []
    after: list[list[Row]] = []
    with worktree(commit) as tree:
        print(f"building {commit.short} in {tree}", flush=True)
        build(tree, setting)
        for number in range(PASSES):
            for where, passes in ((tree, before), (ROOT, after)):
                print(f"pass {number + 1} of {PASSES}: {commit.short if where == tree else 'this tree'}", flush=True)
                out = tree.parent / f"{'before' if where == tree else 'now'}-{number}.json"
                passes.append(ask(where, setting, names, out))
                found = {str(row["environment"].get("revision")) for row in passes[-1]}
                if where == tree and not all(commit.named(name.rstrip("+")) for name in found):
                    raise RunError(f"{tree}: expected rows of {commit.short}, got those of {', '.join(sorted(found))}")
    return before, after


@contextmanager
def worktree(commit: Commit) -> Iterator[Path]:
    """A checkout of the commit in a temporary folder, which is gone afterwards, whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix=f"ep-kernels-{commit.short}-")).resolve()
    tree = folder / "tree"
    try:
        try:
            git("worktree", "add", "--detach", str(tree), commit.full)
        except subprocess.CalledProcessError as error:
            raise RunError(f"git worktree add {tree}: {error.stderr.strip()}") from error
        yield tree
    finally:
        remove = ["git", "worktree", "remove", "--force", "--force", str(tree)]  # twice: one that git locked, too
        subprocess.run(remove, cwd=ROOT, capture_output=True, check=False, start_new_session=True)
        shutil.rmtree(folder, ignore_errors=True)


def build(tree: Path, setting: Setting) -> None:
    """The library, in place."""
    environment = tree_environment(tree)
    if not setting.cuda:
        environment.setdefault("EP_KERNELS_BUILD", "cpu")
    call([sys.executable, "setup.py", "build_ext", "--inplace"], tree, environment, tree.parent / "build.log", (0,))


def ask(tree: Path, setting: Setting, names: Sequence[str], out: Path) -> list[Row]:
    """One pass of a tree's own suite; its exit code is 1 where some rows have no figures."""
    command = [sys.executable, "-m", "benchmarks", "run", *names, "--json", str(out), *options(setting)]
    call(command, tree, tree_environment(tree), out.with_suffix(".output"), (0, 1))
    if not out.exists():
        raise RunError(f"{' '.join(command)} in {tree} wrote no results{tail(out.with_suffix('.output'))}")
    return load(out)


def options(setting: Setting) -> list[str]:
    """Of the command line that makes this setting."""
    found = ["--device", setting.device, "--threads", str(setting.threads), "--rounds", str(setting.rounds)]
    for name in ("models", "batches", "precisions", "backends"):
        given = getattr(setting, name)
        option = {"batches": "--batch"}.get(name, f"--{name[:-1]}")
        found += [option, *map(str, given)] if given else []
    found += ["--quick"] if setting.quick else []
    return [*found, f"--only={setting.only}"] if setting.only else found


def tree_environment(tree: Path) -> dict[str, str]:
    """Python finds that tree's packages, and none of this one's."""
    inherited = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    others = [p for p in inherited if Path(p).resolve() not in (ROOT, ROOT / "python")]
    paths = [str(tree), str(tree / "python"), *others]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def call(command: Sequence[str], tree: Path, environment: dict[str, str], log: Path, codes: tuple[int, ...]) -> None:
    """Run it in the tree; what it started ends with it, and with us.

    Raises:
        RunError: another exit code, with the end of its output.
    """
    with log.open("w") as file:
        process: subprocess.Popen[Any] = subprocess.Popen(
            command, cwd=tree, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait()
        finally:
            end(process)
    if code not in codes:
        raise RunError(f"{' '.join(command)} in {tree} ended with exit code {code}{tail(log)}")


def end(process: subprocess.Popen[Any]) -> None:
    """As Ctrl-C would, so that it can end processes in sessions of their own; then by force."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tail(log: Path) -> str:
    """The end of a log, for an error."""
    lines = log.read_text(errors="replace").splitlines()[-TAIL:] if log.exists() else []
    return ":\n" + "\n".join(f"  {line}" for line in lines) if lines else ""
