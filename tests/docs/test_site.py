"""The site: it builds without a warning and loads nothing from elsewhere, and its hooks change what they should."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import ep_kernels
import ep_train
from ep_train.learners import network_of
from ep_train.presets import PRESETS
from ep_train.recipes import RECIPES, estimate
from ep_train.trainer import TrainConfig
from tests.docs.pages import ROOT, text

SITE_PACKAGES = ("material", "mkdocstrings", "mkdocstrings_handlers")


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_hook_{name}", ROOT / "docs" / "hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site(tmp_path: Path) -> None:
    """One test, as several processes run the tests, and each would build a site of its own (6 s)."""
    for package in SITE_PACKAGES:
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "DOCS_REPOSITORY": "https://example.org/owner/name"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "WARNING" not in built.stderr
    every_page_is_built(tmp_path)
    public_names_are_in_the_api(tmp_path)
    nothing_is_loaded_from_elsewhere(tmp_path)
    links_out_of_the_pages_lead_to_the_repository(tmp_path)
    tables_and_equations_are_readable(tmp_path)
    no_markdown_is_left(tmp_path)


def every_page_is_built(site: Path) -> None:
    pages = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in ROOT.glob("docs/**/*.md")]
    assert [str(page) for page in pages if not (site / page).is_file()] == []
    assert not (site / "hooks").exists()


def public_names_are_in_the_api(site: Path) -> None:
    html = "".join(path.read_text(encoding="utf-8") for path in site.glob("api/*.html"))
    shown = set(re.findall(r'id="([\w.]+)"', html))
    names = [f"{module.__name__}.{name}" for module in (ep_kernels, ep_train) for name in module.__all__]
    left_out = {"ep_kernels.__version__", "ep_train.ARCHITECTURES"}  # the second is ep_kernels.architectures'
    assert [name for name in names if name not in shown | left_out] == []
    assert "ep_kernels.architectures.ARCHITECTURES" in shown
    assert not re.search(r":(?:func|class|meth|mod|attr|data):", html)  # roles have become links


def nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for path in site.glob("**/*.html"):
        html = path.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"?(https?:[^\" >]+)", html)
        assert loaded == [], path


def links_out_of_the_pages_lead_to_the_repository(site: Path) -> None:
    html = (site / "concepts.html").read_text(encoding="utf-8")
    assert 'href="https://example.org/owner/name/blob/main/ep_kernels/plan.py"' in html
    html = (site / "performance.html").read_text(encoding="utf-8")
    assert 'href="https://example.org/owner/name/blob/main/CONTRIBUTING.md#how-results-are-measured"' in html


def tables_and_equations_are_readable(site: Path) -> None:
    html = (site / "concepts.html").read_text(encoding="utf-8")
    assert "<code>1/2 |z - t|^2</code>" in html
    equation = re.search(r"<pre><span></span><code>[^<]*E\(s\) = sum_l k\^l", re.sub(r"<a id[^>]*></a>", "", html))
    assert equation is not None
    assert html.count("<table>") >= 5


def no_markdown_is_left(site: Path) -> None:
    for path in site.glob("**/*.html"):
        html = re.sub(r"<(pre|code|script)\b.*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        shown = re.sub(r"<[^>]+>", "", html)
        assert re.findall(r"```.*|\]\(.*|^\s*\|.*\|\s*$|\*\*.*", shown, re.MULTILINE) == [], path


@pytest.mark.parametrize(
    ("link", "with_url", "without"),
    [
        ("[plan.py](../ep_kernels/plan.py)", "[plan.py](U/blob/ep_kernels/plan.py)", "`ep_kernels/plan.py`"),
        ("[the README](../README.md#install)", "[the README](U/blob/README.md#install)", "the README (`README.md`)"),
        ("[`csrc`](../csrc/)", "[`csrc`](U/tree/csrc)", "`csrc`"),
        ("[next](concepts.md#energy)", "[next](concepts.md#energy)", "[next](concepts.md#energy)"),
        ("[web](https://pytorch.org)", "[web](https://pytorch.org)", "[web](https://pytorch.org)"),
        ("`[code](../setup.py)`", "`[code](../setup.py)`", "`[code](../setup.py)`"),
        ("![picture](img/deep-loss.png)", "![picture](img/deep-loss.png)", "![picture](img/deep-loss.png)"),
    ],
)
def test_links(link: str, with_url: str, without: str) -> None:
    links = hook("github").links
    assert links(f"a {link} b", "docs", ROOT, "U/{kind}") == f"a {with_url} b"
    assert links(f"a {link} b", "docs", ROOT, None) == f"a {without} b"


def test_a_link_to_no_file_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    hook("github").links("[x](../no/such/file.py)", "docs", ROOT, None)
    assert "no/such/file.py" in caplog.text  # which `strict` makes an error


def test_code_is_left_alone() -> None:
    github = hook("github")
    page = "a [x](../setup.py)\n\n    [x](../setup.py)\n\n```python\n[x](../setup.py)\n- a\n```\nb\n"
    shown = github.outside_code(github.lists(page), lambda t: github.links(t, "docs", ROOT, None))
    assert shown == page.replace("a [x](../setup.py)\n\n ", "a x (`setup.py`)\n\n ", 1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("text\n* a\n* b\n", "text\n\n* a\n* b\n"),
        ("* a\n  goes on\n  * b\n    * c\n* d\n", "* a\n  goes on\n    * b\n        * c\n* d\n"),
        ("3. a\n   * b\n4. c\n", "3. a\n    * b\n4. c\n"),
        (
            "* a\n\n  still a\n\n  ```sh\n  make\n  ```\n\nend\n",
            "* a\n\n    still a\n\n    ```sh\n    make\n    ```\n\nend\n",
        ),
        ("in 2026. 7 of\n7. no list\n", "in 2026. 7 of\n7. no list\n"),
        ("text\n\n    * code\n", "text\n\n    * code\n"),
    ],
)
def test_lists(given: str, expected: str) -> None:
    assert hook("github").lists(given) == expected


def test_bars_in_tables() -> None:
    assert hook("github").bars("| `a \\| b` | c \\| d |\n`a \\| b`") == "| `a | b` | c \\| d |\n`a \\| b`"


def test_nav_leaves_out_pages_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.md").touch()
    nav = ["a.md", "b.md", {"One": ["a.md", "b.md"]}, {"None": ["b.md"]}, {"Web": "https://pytorch.org"}]
    assert hook("github").present(nav, tmp_path) == ["a.md", {"One": ["a.md"]}, {"Web": "https://pytorch.org"}]


def test_docstrings_are_written_out() -> None:
    pytest.importorskip("griffe")
    docstrings = hook("docstrings")
    given = "What.\n\nArgs:\n    a, b: of x,\n        or y\n    c: z\n\nNote, this: stays.\n"
    expected = (
        "What.\n\nArgs:\n    a: of x,\n        or y\n    b: of x,\n        or y\n    c: z\n\nNote, this: stays.\n"
    )
    assert docstrings.one_entry_each(given) == expected
    scope = SimpleNamespace(path="p.C", members={"run": None}, parent=None)
    assert 'identifier="p.C.run"' in docstrings.with_links("see :meth:`run`", scope)
    assert 'identifier="ep_kernels.backend"' in docstrings.with_links("see :func:`~ep_kernels.backend`", scope)


@pytest.mark.parametrize("module", [ep_kernels, ep_kernels.functional, ep_train], ids=lambda module: module.__name__)
def test_public_functions_document_their_arguments(module: ModuleType) -> None:
    """Every argument has an entry under Args, and what comes back one under Returns."""
    own = [name for name, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
    lacking = []
    for name in getattr(module, "__all__", own):
        function = getattr(module, name)
        if not inspect.isfunction(function) or name.startswith("_"):
            continue
        doc, signature = inspect.getdoc(function) or "", inspect.signature(function)
        entries = re.findall(r"^    ([\w, ]+):", doc.partition("\nArgs:\n")[2].partition("\n\n")[0], re.MULTILINE)
        named = {name for entry in entries for name in entry.split(", ")}
        lacking += [f"{name}: {argument}" for argument in signature.parameters if argument not in named]
        if signature.return_annotation not in (None, "None") and "\nReturns:\n" not in doc and name != "backend":
            lacking.append(f"{name}: what it returns")
        if ": " in doc.partition("\nReturns:\n")[2].partition("\n\n")[0]:
            lacking.append(f"{name}: what stands before a colon under Returns is taken for a type")
    assert lacking == []


def test_recipes_are_all_there_with_their_costs() -> None:
    page = text("docs/recipes.md")
    assert [name for name in RECIPES if f"ep-train recipe {name}" not in page] == []
    rows = dict(re.findall(r"^\| `ep-train --preset ([\w-]+)` .*\| (\d+ \| [\d.]+) \|$", page, re.MULTILINE))
    assert list(rows) == list(PRESETS)
    for name, preset in PRESETS.items():
        config = TrainConfig(**preset.values)  # type: ignore[arg-type]
        network = network_of(config, (3, 32, 32), 100 if config.dataset == "cifar100" else 10)
        cost = estimate(network, config.relax_config(), config.batch_size, optimizer=config.optimizer)
        assert rows[name] == f"{config.epochs} | {cost.multiply_adds / 1e9:.2f}", name
