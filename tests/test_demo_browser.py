"""The page of the demonstration in a real browser: one hang-up, clicked through."""

from __future__ import annotations

import os
import re
import shutil
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from .test_demo import running_demo

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.real

# As root Chromium has no sandbox, and nothing here may look for the world outside.
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]


@pytest.fixture
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None and "CI" not in os.environ:
        pytest.skip("needs Chromium: install it (Debian: apt-get install chromium) to run the page in a browser")
    assert path is not None, "CI has to install Chromium"
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path, args=OPTIONS) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    with running_demo(tmp_path) as demo, browser.new_page() as page:
        page.set_default_timeout(30_000)
        page.goto(demo.address)
        yield page


def test_hang_up_by_hand(page: Page) -> None:
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    card = page.locator("[data-work=report]")
    covered, plain = card.locator("[data-lane=with]"), card.locator("[data-lane=without]")
    patience = 30_000

    card.get_by_role("button", name="Start").click()
    for lane in (covered, plain):
        expect(lane.locator(".number")).to_contain_text(re.compile(r"^[1-9][\d,]*000 "), timeout=patience)
    card.get_by_role("button", name="Hang up").click()

    expect(covered.locator("[data-is=reason]")).to_have_text("DISCONNECT", timeout=patience)
    expect(covered.locator("[data-is=status]")).to_have_text("499")
    expect(covered.locator("[data-is=elapsed]")).to_have_text(re.compile(r"^[\d,]+ ms$"))
    expect(plain.locator(".chip")).to_have_text("finished, for nobody", timeout=patience)
    assert number(covered.locator(".number").inner_text()) < number(plain.locator(".number").inner_text())
    assert number(covered.locator("[data-is=after]").inner_text()) < number(
        plain.locator("[data-is=after]").inner_text()
    )
    expect(page.locator("#log")).to_contain_text("GET /plain/report", timeout=patience)
    assert errors == []


def test_process_is_shown_and_gone(page: Page) -> None:
    card = page.locator("[data-work=collatz]")
    covered = card.locator("[data-lane=with]")
    card.get_by_role("button", name="Start").click()
    expect(covered.locator("[data-is=cpu]")).to_have_text(re.compile(r"^[\d,]+ ms$"), timeout=30_000)
    card.get_by_role("button", name="Hang up").click()
    expect(covered.locator("[data-is=reason]")).to_have_text("DISCONNECT", timeout=30_000)
    expect(covered.locator("[data-is=process]")).to_have_text(re.compile(r"^\d+, gone$"))
    expect(page.locator("[data-work=report] [data-is=process]")).to_have_count(0)


def number(text: str) -> int:
    return int(text.split()[0].replace(",", ""))
