"""Every snippet of the README runs, and does what the README says."""

from __future__ import annotations

import re
from pathlib import Path

import anyio
import pytest
from fastapi import FastAPI

import cancelable_deps
from cancelable_deps.testing import advance
from tests.calls import get, hang_up, movable_clock, running
from tests.snippets import PAGES, README, forgotten, run

pytestmark = pytest.mark.anyio


def test_none_is_forgotten() -> None:
    assert forgotten(README, Path(__file__).read_text()) == []


def test_it_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 165


def test_the_changelog_has_the_version() -> None:
    sections = re.findall(r"^## (.*)$", (README.parent / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [section for section in sections if section != "Unreleased"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", section) for section in released)
    assert released[0].split(" - ")[0] == cancelable_deps.__version__


def test_it_leads_to_every_page_that_it_names() -> None:
    text = README.read_text()
    for page in PAGES:
        if page.name not in ("index.md", "api.md"):
            assert f"(docs/{page.name}" in text


@movable_clock
async def test_first_example() -> None:
    app = run("README.md", "cancelable_deps")["app"]
    call = await hang_up(app, "/report")
    assert (call.status, call.json()) == (499, {"detail": "Client closed the request"})
    async with running(app, "/report") as call:
        await call.running()
        await advance(30)
    assert (call.status, call.json()) == (504, {"detail": "Timed out after 30 seconds"})


@movable_clock
async def test_decorator() -> None:
    app = run("README.md", "The decorator")["app"]
    assert (await hang_up(app, "/generate/small", "POST")).status == 499
    async with running(app, "/generate/small", "POST") as call:
        await call.running()
        await advance(21)
    assert call.status == 503


async def test_handle() -> None:
    app = run("README.md", "A handle")["app"]
    assert (await get(app, "/search")).json() == ["found"]
    assert (await hang_up(app, "/search")).status == 499


@movable_clock
async def test_middleware() -> None:
    app: FastAPI = run("README.md", "The middleware")["app"]

    @app.get("/anything")
    @app.get("/health")
    async def anything() -> None:
        await anyio.sleep(60)

    assert (await hang_up(app, "/anything")).status == 499
    async with running(app, "/anything") as covered, running(app, "/health") as excluded:
        await covered.running()
        await excluded.running()
        await advance(60)
    assert (covered.status, excluded.status) == (504, 200)


@pytest.mark.parametrize("page", [README, README.with_name("CONTRIBUTING.md")], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    # Those between the pages of docs/ are looked at when the documentation is built.
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text())
    assert links
    for path, anchor in links:
        target = page if not path else page.parent / path
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, f"{path}#{anchor}"
