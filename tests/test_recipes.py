"""The programs of `examples/recipes`: how they are started, what the checks say of them, and the pages that quote them.

What they do has tests of its own: `test_recipe_proxy.py`, and those of packages that are not installed with ours in
`tests/compat`.
"""

from __future__ import annotations

import importlib
import runpy
import sys
import textwrap
from pathlib import Path

import pytest
import uvicorn

from cancelable_deps.checks import check_stack
from tests.snippets import ROOT, snippets_of

NEEDS = {"llm_usage": "openai", "mcp_tools": "mcp", "reverse_proxy": "httpx"}
"""The package of others that each needs."""
PAGES = {"llm_usage": "llm-usage.md", "mcp_tools": "mcp.md", "reverse_proxy": "reverse-proxy.md"}
FOLDER = ROOT / "examples" / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
IMPORTED = [
    pytest.param(name, marks=[] if NEEDS[name] == "httpx" else [pytest.mark.compat], id=name) for name in sorted(NEEDS)
]
"""Those that can be imported where the tests run."""


def test_every_recipe_is_here() -> None:
    assert RECIPES == sorted(NEEDS) == sorted(PAGES)


@pytest.mark.parametrize("name", IMPORTED)
def test_is_all_right(name: str) -> None:
    assert check_stack(importlib.import_module(f"examples.recipes.{name}").app) == []


@pytest.mark.parametrize("name", IMPORTED)
def test_runs_as_a_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: started.append(app))
    monkeypatch.delitem(sys.modules, f"examples.recipes.{name}", raising=False)
    runpy.run_module(f"examples.recipes.{name}", run_name="__main__")
    assert [callable(entry) for entry in started] == [True]


@pytest.mark.parametrize("name", RECIPES)
def test_tells_how_to_run_it(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    docstring = text.split('"""')[1]
    assert f"python -m examples.recipes.{name} " in docstring
    assert f"it needs {NEEDS[name]}\n" in docstring
    assert "curl" in docstring


@pytest.mark.parametrize("name", RECIPES)
def test_its_page_quotes_it(name: str) -> None:
    page: Path = ROOT / "docs" / PAGES[name]
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    quoted = [snippet for snippet in snippets_of(page).values() if textwrap.dedent(snippet).strip("\n") in text]
    assert quoted == list(snippets_of(page).values())
    assert quoted
    assert f"`examples/recipes/{name}.py`" in page.read_text(encoding="utf-8")
