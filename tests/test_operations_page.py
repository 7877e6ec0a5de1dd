"""The operators' page in a real browser: what it shows, and that a cancel clicked there stops another client's request."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from cancelable_deps.operations.page import content_security_policy
from tests.machine import scaled
from tests.operations_page_app import HOSTILE_PATH
from tests.ports import free_port
from tests.test_demo_browser import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
PATIENCE = scaled(30)
PAGE = "/admin/operations/page"
EVIL = "<img src=x onerror=\"document.title='evil'\"><script>document.title='evil'</script>"
"""Where a name, a label, a message or an owner is expected."""


def test_the_policy_of_the_page_lets_nothing_else_in() -> None:
    html = Path(sys.modules[content_security_policy.__module__].__file__ or "").with_name("page.html").read_text()
    policy = content_security_policy(html)
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert (
        re.findall(r"\son\w+=|\sstyle=|javascript:|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", html)
        == []
    )
    assert re.findall(r"https?://", html) == []


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium: install it (Debian: apt-get install chromium) to run the page in a browser")
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path, args=OPTIONS) as browser:
        yield browser


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "tests.operations_page_app:app",
        "--port",
        str(port),
        "--log-level",
        "warning",
    ]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + PATIENCE
        while True:
            with suppress(httpx.HTTPError):
                httpx.get(f"{address}/admin/operations/workers")
                break
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.05)
        yield address
    finally:
        process.kill()
        process.wait()


@contextmanager
def opened(browser: Browser, address: str, query: str = "", **options: Any) -> Iterator[Page]:
    """Open the page; at the end nothing may have been refused, failed or asked of another host."""
    faults: list[str] = []
    with browser.new_context(**options) as context:
        page = context.new_page()
        page.set_default_timeout(PATIENCE * 1000)
        expect.set_options(timeout=PATIENCE * 1000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("request", lambda r: None if r.url.startswith((address, "data:")) else faults.append(r.url))
        page.goto(address + PAGE + query)
        yield page
        assert page.title() == "Operations"
        assert faults == []


class Client:
    """Another client, whose request runs in a thread of its own."""

    def __init__(self, url: str, id: str, values: dict[str, str]) -> None:
        self.response: httpx.Response | None = None
        self._thread = threading.Thread(target=self._run, args=(url, id, values), daemon=True)
        self._thread.start()

    def _run(self, url: str, id: str, values: dict[str, str]) -> None:
        self.response = httpx.get(url, params=values, headers={"operation-id": id}, timeout=None)

    def answer(self) -> httpx.Response:
        self._thread.join(PATIENCE)
        assert self.response is not None, "the request still runs"
        return self.response


@contextmanager
def waiting(address: str, *ids: str, path: str = "/wait/1", **values: str) -> Iterator[list[Client]]:
    """Have requests run, which are stopped at the end."""
    clients = [Client(address + quote(path), id, values) for id in ids]
    try:
        for id in ids:
            httpx.get(f"{address}/until/{id}", timeout=PATIENCE)
        yield clients
    finally:
        for id in ids:
            httpx.post(f"{address}/admin/operations/{id}/cancel")


def row_of(page: Page, text: str) -> Any:
    return page.locator("tr.operation", has_text=text)


@pytest.mark.real
def test_a_cancel_stops_the_request_of_another_client(browser: Browser, address: str) -> None:
    with waiting(address, "first", "second", name="alice") as [first, second], opened(browser, address) as page:
        row = row_of(page, "alice").first
        row.get_by_role("button", name="Stop").click()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("GET /wait/{number}")
        expect(dialog).to_contain_text("alice")
        expect(dialog.get_by_role("button", name="Keep it running")).to_be_focused()
        id = dialog.locator("dd").nth(1).inner_text()
        dialog.get_by_label("Message").fill("maintenance")
        dialog.get_by_role("button", name="Stop it").click()
        stopped, other = (first, second) if id == "first" else (second, first)
        answer = stopped.answer()
        assert (answer.status_code, answer.json()) == (499, {"detail": "maintenance"})
        expect(page.locator("#said")).to_have_text("GET /wait/{number}: cancelled")
        expect(row_of(page, "alice")).to_have_count(1)
        expect(page.locator("#ends")).to_contain_text(re.compile(r"manual [1-9]"))
        assert other.response is None


@pytest.mark.real
def test_nothing_is_stopped_without_a_confirmation(browser: Browser, address: str) -> None:
    with waiting(address, "kept", name="alice") as [client], opened(browser, address) as page:
        button, keep = row_of(page, "alice").get_by_role("button", name="Stop"), "Keep it running"
        for way_out in ("click", "key"):
            button.click()
            if way_out == "click":
                page.get_by_role("button", name=keep).click()
            else:
                page.keyboard.press("Escape")
            expect(page.get_by_role("dialog")).to_have_count(0)
            expect(button).to_be_focused()
        page.get_by_role("button", name="Refresh").click()
        expect(row_of(page, "alice")).to_have_count(1)
        assert client.response is None


@pytest.mark.real
def test_the_filters_are_those_of_the_url(browser: Browser, address: str) -> None:
    with (
        waiting(address, "one", name="alice", stage="render"),
        waiting(address, "two", name="bob", stage="fetch"),
        opened(browser, address) as page,
    ):
        expect(page.locator("tr.operation", has_text="/wait/")).to_have_count(2)
        page.locator("summary").click()
        page.get_by_label("Owner").fill("bob")
        page.get_by_label("Owner").press("Enter")
        expect(page.locator("tr.operation")).to_have_count(1)
        expect(page).to_have_url(re.compile(r"\?owner=bob$"))
        page.get_by_label("Labels").fill("stage:render")
        page.get_by_label("Labels").blur()
        expect(page.locator("#nothing")).to_be_visible()
        expect(page).to_have_url(re.compile(r"\?owner=bob&label=stage%3Arender$"))
        page.go_back()
        expect(row_of(page, "bob")).to_have_count(1)
        expect(page.get_by_label("Labels")).to_have_value("")
        page.get_by_role("button", name="Clear filters").click()
        expect(page.locator("tr.operation", has_text="/wait/")).to_have_count(2)
        page.goto(f"{address}{PAGE}?label=stage:render&kind=request")
        expect(page.locator("tr.operation")).to_have_count(1)
        expect(page.get_by_label("Kind")).to_have_value("request")
        expect(page.get_by_label("Labels")).to_have_value("stage:render")


@pytest.mark.real
def test_hostile_texts_are_texts(browser: Browser, address: str) -> None:
    with (
        waiting(address, "evil", path=HOSTILE_PATH, name=EVIL, stage=EVIL, key=EVIL, progress=EVIL),
        opened(browser, address, f"?owner={quote(EVIL, safe='')}") as page,
    ):
        row = page.locator("tr.operation")
        expect(row).to_have_count(1)
        expect(row).to_contain_text(EVIL)
        expect(row).to_contain_text(HOSTILE_PATH)
        row.locator("button.plain").click()
        expect(page.locator("tr.more dl")).to_contain_text("onerror")
        row.get_by_role("button", name="Stop").click()
        expect(page.get_by_role("dialog")).to_contain_text(EVIL)
        page.get_by_label("Message").fill(EVIL)
        page.get_by_role("button", name="Stop it").click()
        expect(page.locator("#said")).to_contain_text("cancelled")
        assert page.locator("img, table script, p script, dialog script").count() == 0


@pytest.mark.real
def test_pause_keeps_what_is_shown(browser: Browser, address: str) -> None:
    with opened(browser, address, "?owner=pausing") as page:
        expect(page.locator("#nothing")).to_be_visible()
        page.get_by_role("button", name="Pause").click()
        expect(page.get_by_role("button", name="Pause")).to_have_attribute("aria-pressed", "true")
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        with waiting(address, "unseen", name="pausing"):
            page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
            assert asked == []
            expect(page.locator("tr.operation")).to_have_count(0)
            page.get_by_role("button", name="Pause").click()
            expect(row_of(page, "pausing")).to_have_count(1)
            assert asked != []


@pytest.mark.real
def test_details_and_progress_go_on_behind_a_row(browser: Browser, address: str) -> None:
    with (
        waiting(address, "far", name="carol", done="30", total="120"),
        opened(browser, address, "?owner=carol") as page,
    ):
        row = page.locator("tr.operation")
        expect(row.locator("progress")).to_have_attribute("max", "120")
        expect(row.locator("progress")).to_have_attribute("value", "30")
        expect(row).to_contain_text("30 of 120")
        toggle = row.locator("button.plain")
        expect(toggle).to_have_attribute("aria-expanded", "false")
        toggle.click()
        details = page.locator("tr.more dl")
        expect(details).to_contain_text("far")
        elapsed = details.locator("dt", has_text="elapsed").locator("+ dd")
        before = elapsed.inner_text()
        expect(elapsed).not_to_have_text(before)
        toggle.click()
        expect(details).to_be_hidden()


@pytest.mark.real
def test_the_keyboard_is_enough(browser: Browser, address: str) -> None:
    with waiting(address, "keys", name="dave") as [client], opened(browser, address, "?owner=dave") as page:
        expect(page.locator("tr.operation")).to_have_count(1)

        def tab_to(name: str) -> None:
            for _ in range(40):
                page.keyboard.press("Tab")
                if page.evaluate("document.activeElement.textContent || ''") == name:
                    return
            raise AssertionError(f"{name} cannot be reached by the tabulator")

        tab_to("GET /wait/{number}")
        page.keyboard.press("Enter")
        expect(page.locator("tr.more dl")).to_be_visible()
        tab_to("Stop")
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog")).to_be_visible()
        # What is behind the dialog cannot be reached.
        for _ in range(6):
            page.keyboard.press("Tab")
            assert page.evaluate(
                "document.activeElement === document.body || !!document.activeElement.closest('dialog')"
            )
        page.get_by_label("Message").focus()
        page.keyboard.type("by hand")
        page.keyboard.press("Enter")
        assert client.answer().json() == {"detail": "by hand"}
        expect(page.locator("tr.operation")).to_have_count(0)
        # The row is gone, and the focus has not fallen to the top of the page.
        assert page.evaluate("document.activeElement.id") == "caption"


@pytest.mark.real
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(browser: Browser, address: str, scheme: Any) -> None:
    narrow = {"width": 380, "height": 700}
    long = "x" * 200
    with (
        waiting(address, f"phone-{scheme}", name=long, stage=long, done="1", total="2"),
        opened(browser, address, f"?owner={long}", viewport=narrow, color_scheme=scheme, has_touch=True) as page,
    ):
        row = page.locator("tr.operation")
        row.locator("button.plain").tap()
        expect(page.locator("tr.more dl")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 380
        button = row.get_by_role("button", name="Stop")
        box = button.bounding_box()
        assert box is not None
        assert box["height"] >= 44
        button.tap()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_be_visible()
        box = dialog.bounding_box()
        assert box is not None
        assert (box["x"] >= 0, box["x"] + box["width"] <= 380) == (True, True)
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 26)")
        page.keyboard.press("Escape")


@pytest.mark.real
def test_workers_that_do_not_answer_are_named(browser: Browser, address: str) -> None:
    with opened(browser, address) as page:

        def silent(route: Any) -> None:
            answer = route.fetch()
            route.fulfill(response=answer, json={**answer.json(), "unreachable": ["w-silent"]})

        expect(page.locator("#unreachable")).to_be_hidden()
        page.route(re.compile(r"/admin/operations/(\?.*)?$"), silent)
        expect(page.locator("#unreachable")).to_contain_text("w-silent")
        page.unroute_all(behavior="wait")
        expect(page.locator("#unreachable")).to_be_hidden()


@pytest.mark.real
def test_a_server_that_is_away_is_said_and_waited_for(browser: Browser, address: str) -> None:
    with browser.new_page() as page:
        page.set_default_timeout(PATIENCE * 1000)
        page.goto(address + PAGE)
        expect(page.locator("#trouble")).to_be_hidden()
        page.route(re.compile("/workers$"), lambda route: route.abort())
        expect(page.locator("#trouble")).to_contain_text("does not answer", timeout=PATIENCE * 1000)
        page.unroute_all(behavior="wait")
        page.route(re.compile("/workers$"), lambda route: route.fulfill(status=403, json={"detail": "Not you"}))
        expect(page.locator("#trouble")).to_contain_text("403: Not you", timeout=PATIENCE * 1000)
        page.unroute_all(behavior="wait")
        expect(page.locator("#trouble")).to_be_hidden(timeout=PATIENCE * 1000)


@pytest.mark.real
def test_the_page_works_in_a_mounted_application(browser: Browser, address: str) -> None:
    with waiting(address, "mounted", name="erin") as [client], browser.new_page() as page:
        page.set_default_timeout(PATIENCE * 1000)
        page.goto(f"{address}/mounted/page?owner=erin")
        page.locator("tr.operation").get_by_role("button", name="Stop").click()
        page.get_by_role("button", name="Stop it").click()
        assert client.answer().status_code == 499
