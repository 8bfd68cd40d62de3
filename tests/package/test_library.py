"""Loading the compiled library: once, on first use, and with a message that helps when it cannot be."""

import json
import sys
import threading
from pathlib import Path

import pytest
import torch

from ep_kernels import _library


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree in which nothing was built, in the place of the one under test."""
    root = tmp_path / "tree"
    (root / "ep_kernels" / "lib").mkdir(parents=True)
    (root / "CMakeLists.txt").touch()
    monkeypatch.setattr(_library, "PACKAGE", root / "ep_kernels")
    monkeypatch.setattr(_library, "LIBRARY", root / "ep_kernels" / "lib" / "libep_kernels.so")
    monkeypatch.setattr(_library, "_loaded", False)
    monkeypatch.setattr(sys, "path", [str(root)])
    return root


def test_library_of_this_environment_loads() -> None:
    assert _library.load_error() is None
    assert _library.build_info()["build"] in ("cpu", "cuda")


def test_unbuilt_tree_says_what_was_looked_for_and_what_to_run(tree: Path) -> None:
    message = _library.load_error()
    assert message is not None
    assert str(_library.LIBRARY) in message
    assert "has not been built" in message
    assert f"pip install --no-build-isolation -e {tree}" in message
    with pytest.raises(ImportError, match="has not been built"):
        _library.load()


def test_tree_that_shadows_a_wheel_names_the_wheel(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site-packages"
    (site / "ep_kernels" / "lib").mkdir(parents=True)
    (site / "ep_kernels" / "lib" / "libep_kernels.so").touch()
    monkeypatch.setattr(sys, "path", [str(tree), "", str(site)])
    message = _library.load_error()
    assert message is not None
    assert f"shadows the wheel installed in {site}" in message
    assert "from another directory" in message


def test_incomplete_installation_asks_for_a_reinstall(tree: Path) -> None:
    (tree / "CMakeLists.txt").unlink()
    assert "pip install --force-reinstall --no-deps ep-kernels" in str(_library.load_error())


def test_library_that_does_not_load_gives_both_torch_versions_and_the_cause(tree: Path) -> None:
    _library.LIBRARY.write_bytes(b"not a library")
    message = _library.load_error()
    assert message is not None
    assert torch.__version__ in message
    assert "torch >= 2.10" in message
    assert "file too short" in message or "invalid ELF header" in message  # the dynamic loader's own words


def test_a_failed_load_is_tried_again_and_a_good_one_happens_once(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _library.load_error() is not None
    _library.LIBRARY.touch()  # built in the meantime
    calls: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", calls.append)
    threads = [threading.Thread(target=_library.load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [str(_library.LIBRARY)]


@pytest.mark.parametrize("content", [None, "", "not json", "[]"])
def test_build_info_is_empty_where_there_is_none(tree: Path, content: str | None) -> None:
    if content is not None:
        _library.LIBRARY.with_name("build_info.json").write_text(content)
    assert _library.build_info() == {}


def test_build_info_is_what_the_build_wrote(tree: Path) -> None:
    _library.LIBRARY.with_name("build_info.json").write_text(json.dumps({"build": "cpu"}))
    assert _library.build_info() == {"build": "cpu"}
