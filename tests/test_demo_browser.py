"""The page of the demonstration in a real browser: hang-ups, stops, a report and searches, clicked through."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from .machine import scaled
from .redis_server import redis_server
from .test_demo import SIZE, client_of_each_worker, running_demo

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from socket import socket

pytestmark = pytest.mark.real

PATIENCE = scaled(30)
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


def row_of(page: Page, text: str) -> Locator:
    return page.locator("#running tr", has_text=text)


@contextmanager
def watched(browser: Browser, address: str, **options: Any) -> Iterator[Page]:
    """A page in which nothing fails, and which asks no other host."""
    faults: list[str] = []
    with browser.new_context(**options) as context:
        page = context.new_page()
        page.set_default_timeout(PATIENCE * 1000)
        expect.set_options(timeout=PATIENCE * 1000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith((address, "data:")) else faults.append(r.url))
        page.goto(address)
        yield page
        assert faults == []


def test_a_click_stops_the_request_of_another_client(browser: Browser, tmp_path: Path) -> None:
    with running_demo(tmp_path) as demo, watched(browser, demo.address) as page:
        expect(page.locator("#nothing")).to_be_visible()
        with demo.open("/upload", "mine") as mine, demo.open("/plain/upload", "plain"):
            demo.saw("plain", lambda run: run["done"] > 0)
            row = row_of(page, "POST /upload")
            expect(row).to_contain_text(str(demo.process.pid))
            expect(page.locator("#running")).not_to_contain_text("plain")
            row.get_by_role("button").click()
            expect(page.locator("#stopped")).to_have_text(
                re.compile(r"^POST /upload on worker \d+: cancelled, as worker")
            )
            expect(row).to_have_count(0)
            assert mine.recv(10_000).startswith(b"HTTP/1.1 499 ")
        expect(page.locator("#log tr", has_text="POST /upload")).to_contain_text("MANUAL")
        page.get_by_role("link", name="The page for operators").click()
        expect(page).to_have_title("Operations")


def test_a_click_stops_what_another_tab_has_started(browser: Browser, tmp_path: Path) -> None:
    with (
        running_demo(tmp_path, DEMO_PACE="5") as demo,
        watched(browser, demo.address) as one,
        watched(browser, demo.address) as other,
    ):
        one.locator("[data-work=feed]").get_by_role("button", name="Start").click()
        one.get_by_role("button", name="Start the report").click()
        for text in ("GET /feed", "write_report"):
            row_of(other, text).get_by_role("button").click()
            expect(other.locator("#stopped")).to_contain_text(f"{text} on worker {demo.process.pid}: cancelled")
        expect(one.locator("[data-work=feed] [data-lane=with] .chip")).to_have_text("stopped: MANUAL")
        expect(one.locator("#report-state")).to_have_text("cancelled: manual")
        expect(one.locator("#report-result")).to_have_text("499: stopped on the page")


def test_a_report_runs_to_its_result(browser: Browser, tmp_path: Path) -> None:
    with running_demo(tmp_path, DEMO_PACE="0") as demo, watched(browser, demo.address) as page:
        page.get_by_role("button", name="Start the report").click()
        expect(page.locator("#report-state")).to_have_text("finished")
        expect(page.locator("#report-answer")).to_have_text(f"202 by worker {demo.process.pid}")
        expect(page.locator("#report-rows")).to_have_text("600,000 of 600,000")
        expect(page.locator("#report-bar")).to_have_js_property("position", 1)
        expect(page.locator("#report-result")).to_have_text(
            re.compile(r"^200: the largest sale was 9999\.\d\d in shop \d+$")
        )
        expect(page.get_by_role("button", name="Start the report")).to_be_enabled()


def test_a_report_is_stopped(browser: Browser, tmp_path: Path) -> None:
    with running_demo(tmp_path, DEMO_PACE="5") as demo, watched(browser, demo.address) as page:
        page.get_by_role("button", name="Start the report").click()
        expect(page.locator("#report-rows")).to_have_text("20,000 of 600,000")
        expect(row_of(page, "write_report").locator("progress")).to_have_js_property("value", 20_000)
        page.get_by_role("button", name="Stop the report").click()
        expect(page.locator("#report-state")).to_have_text("cancelled: manual")
        expect(page.locator("#report-result")).to_have_text("499: stopped on the page")
        expect(page.get_by_role("button", name="Stop the report")).to_be_disabled()


@pytest.mark.parametrize("by_hand", [True, False])
def test_quick_typing_leaves_the_newest_answer_and_saves_work(browser: Browser, tmp_path: Path, by_hand: bool) -> None:
    with running_demo(tmp_path) as demo, watched(browser, demo.address) as page:
        text = page.get_by_label("Words that begin with")
        word = (text.get_attribute("placeholder") or "").rpartition(" ")[2]
        if by_hand:
            text.press_sequentially(word, delay=20)
        else:
            page.get_by_role("button", name="Type it for me").click()
        covered, plain = (page.locator(f"#searches [data-lane={side}]") for side in ("with", "without"))
        for lane in (covered, plain):
            expect(lane.locator("[data-is=sent]")).to_have_text(str(len(word)))
            expect(lane.locator("[data-is=answer]")).to_have_text(re.compile(rf"^“{word}”: {word} [\d,]+$"))
        expect(plain.locator("[data-is=answered]")).to_have_text(str(len(word)))
        expect(plain.locator("[data-is=read]")).to_have_text(f"{len(word) * 600_000:,}")
        answered, superseded = (
            number(covered.locator(f"[data-is={name}]").inner_text()) for name in ("answered", "superseded")
        )
        assert answered + superseded == len(word)
        assert superseded >= 1
        assert number(covered.locator("[data-is=read]").inner_text()) < len(word) * 600_000
        expect(page.locator("#log")).to_contain_text("GET /plain/search")


def test_what_is_typed_is_a_text(browser: Browser, tmp_path: Path) -> None:
    evil = "<img src=x onerror=document.title='evil'>"[:40]
    with running_demo(tmp_path, 1000) as demo, watched(browser, demo.address) as page:
        page.get_by_label("Words that begin with").fill(evil)
        for side in ("with", "without"):
            expect(page.locator(f"#searches [data-lane={side}] [data-is=answer]")).to_have_text(
                f"“{evil}”: no such word"
            )
        assert page.locator("img").count() == 0


def test_the_keyboard_and_a_phone_are_enough(browser: Browser, tmp_path: Path) -> None:
    phone = {"viewport": {"width": 380, "height": 700}, "has_touch": True}
    with running_demo(tmp_path, DEMO_PACE="5") as demo, watched(browser, demo.address, **phone) as page:
        with demo.open("/upload", "first") as first:
            stop = page.get_by_role("button", name=f"Stop POST /upload on worker {demo.process.pid}")
            box = stop.bounding_box()
            assert box is not None
            assert (box["height"] >= 44, box["x"] >= 0, box["x"] + box["width"] <= 380) == (True, True, True)
            assert page.evaluate("document.documentElement.scrollWidth") <= 380
            page.get_by_role("link", name="The page for operators").focus()
            page.keyboard.press("Tab")
            expect(stop).to_be_focused()
            page.keyboard.press("Enter")
            assert first.recv(10_000).startswith(b"HTTP/1.1 499 ")
            # Its row is gone, and the focus has not fallen to the top of the page.
            expect(page.locator("#running-title")).to_be_focused()
        page.get_by_role("button", name="Start the report").tap()
        page.get_by_role("button", name="Stop the report").tap()
        expect(page.get_by_role("progressbar", name="Progress")).to_be_visible()
        expect(page.locator("#report-state")).to_have_text("cancelled: manual")


def test_the_page_shows_the_worker_of_each_row(browser: Browser, tmp_path: Path) -> None:
    options = ("--workers", "2", "--redis")
    with (
        redis_server() as redis,
        running_demo(tmp_path, SIZE, *options, redis.url) as demo,
        client_of_each_worker(demo) as clients,
        ExitStack() as stack,
        watched(browser, demo.address) as page,
    ):
        found: dict[int, list[socket]] = {worker: [] for worker in clients}
        for name in map(str, range(100)):
            connection = stack.enter_context(demo.open("/upload", name))
            found[demo.saw(name, lambda run: run["done"] > 0)["worker"]].append(connection)
            if all(found.values()):
                break
        for worker, connections in found.items():
            there = page.locator("[data-is=worker]", has_text=str(worker))
            rows = row_of(page, "POST /upload").filter(has=there)
            for left in range(len(connections), 0, -1):
                expect(rows).to_have_count(left)
                rows.first.get_by_role("button").click()
            expect(rows).to_have_count(0)
            for connection in connections:
                assert connection.recv(10_000).startswith(b"HTTP/1.1 499 ")
