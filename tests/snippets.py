"""The Python snippets of a Markdown page, by the heading that each stands under."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))

_HEADING_OR_SNIPPET = re.compile(
    r"^#+ (?P<heading>[^\n]*)$|^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


def snippets_of(page: Path) -> dict[str, str]:
    """Return the snippets of ``page``; the second under one heading has `` (2)`` behind it."""
    found: dict[str, str] = {}
    heading = ""
    for match in _HEADING_OR_SNIPPET.finditer(page.read_text(encoding="utf-8")):
        if match["heading"] is not None:
            heading = match["heading"].replace("`", "")
        elif match["language"] == "python":
            count = sum(key.removesuffix(" (2)") == heading for key in found)
            assert count < 2, f"{page.name}: more than two snippets under {heading!r}"
            found[f"{heading} ({count + 1})" if count else heading] = match["text"]
    return found


def forgotten(page: Path, tests: str) -> list[str]:
    """Return the headings of the snippets of ``page`` that the text of a test file does not run by ``run(...)``."""
    return [
        heading
        for heading in snippets_of(page)
        if f'run("{page.name}", "{heading}")' not in tests and f'compiled("{page.name}", "{heading}")' not in tests
    ]


def compiled(page: str, heading: str) -> Any:
    """Compile a snippet, and do not run it."""
    path = README if page == README.name else ROOT / "docs" / page
    return compile(snippets_of(path)[heading], f"{page}, {heading}", "exec")


def run(page: str, heading: str) -> dict[str, Any]:
    """Run a snippet as a module, and return its names."""
    namespace: dict[str, Any] = {"__name__": "snippet"}
    exec(compiled(page, heading), namespace)  # noqa: S102 - our own pages
    return namespace
