"""What a Prometheus sees of a real server, and whether the dashboard asks for nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.servers import PATIENCE, VARIANTS, Server, request, started
from tests.snippets import ROOT
from tests.socket_client import SocketClient

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(sys.platform == "win32", reason="the servers of Unix"),
]

DASHBOARD = ROOT / "docs/grafana/cancelable_deps.json"
BY_PROMETHEUS = {"job", "instance"}
"""The labels that Prometheus itself adds."""

Sample = tuple[str, tuple[tuple[str, str], ...]]
HIDDEN = "secret"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on which each kind of thing has happened."""
    variant = dataclasses.replace(VARIANTS[1], app="tests.telemetry_app:app")
    with started(variant, tmp_path_factory.mktemp("server")) as server:
        for _ in range(3):
            with closing(server.connect()) as connection:
                connection.send(request(f"/work/{HIDDEN}", "", None, operation_id=HIDDEN))
                wait_for(server, lambda found: found["cancelable_deps_operations_active", (("kind", "request"),)] == 1)
                connection.reset()
            wait_for(server, lambda found: found["cancelable_deps_operations_active", (("kind", "request"),)] == 0)
        assert server.ask(f"/short/{HIDDEN}").status == 504
        assert server.ask(f"/advised/{HIDDEN}").status == 200
        with closing(SocketClient(server.port, f"/socket/{HIDDEN}")) as socket:
            assert socket.accepted()
            wait_for(server, lambda found: found["cancelable_deps_operations_active", (("kind", "websocket"),)] == 1)
        job = server.ask("/jobs", "", b"").json()
        assert server.ask(f"/stop/{job}", "", b"").json() == "cancelled"
        assert server.ask("/stop/unheard-of", "", b"").json() == "unknown"
        yield server
        assert not server.complaints()


def scraped(server: Server) -> dict[Sample, float]:
    """The samples of this package, without the labels that say so."""
    answer = server.ask("/metrics/")
    assert answer.status == 200
    text = answer.body.decode()
    assert HIDDEN not in text
    return {
        (
            sample.name,
            tuple(sorted((key, value) for key, value in sample.labels.items() if "otel_" not in key)),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("cancelable_deps_")
    }


def wait_for(server: Server, is_so: Callable[[dict[Sample, float]], bool]) -> dict[Sample, float]:
    until = time.monotonic() + PATIENCE
    while not is_so(found := scraped(server)):
        assert time.monotonic() < until, found
    return found


def labels(**given: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(given.items()))


def test_what_has_happened_is_there(server: Server) -> None:
    dropped = labels(kind="websocket", reason="disconnect", http_route="/socket/{name}")
    found = wait_for(server, lambda found: ("cancelable_deps_cancelation_duration_seconds_count", dropped) in found)
    hang_up = labels(kind="request", reason="disconnect", http_route="/work/{name}")
    timeout = labels(kind="request", reason="timeout", http_route="/short/{name}")
    job = labels(kind="background", reason="manual", http_route="")
    totals = {key: value for key, value in found.items() if key[0] == "cancelable_deps_cancelations_total"}
    assert {names: value for (_, names), value in totals.items()} == {hang_up: 3, timeout: 1, dropped: 1, job: 1}
    for metric in ("cancelation_duration", "cleanup_duration"):
        for names, count in ((hang_up, 3), (timeout, 1), (dropped, 1), (job, 1)):
            assert found[f"cancelable_deps_{metric}_seconds_count", names] == count
            assert 0 <= found[f"cancelable_deps_{metric}_seconds_sum", names] < PATIENCE
    # The handler's cleanup takes a hundredth of a second.
    assert found["cancelable_deps_cleanup_duration_seconds_sum", hang_up] >= 0.03
    quick = labels(kind="request", reason="disconnect", http_route="/work/{name}", le="0.005")
    assert found["cancelable_deps_cleanup_duration_seconds_bucket", quick] == 0
    assert found["cancelable_deps_timeouts_advisory_total", labels(kind="request", http_route="/advised/{name}")] == 1
    assert found["cancelable_deps_cancels_sent_total", labels(outcome="cancelled")] == 1
    assert found["cancelable_deps_cancels_sent_total", labels(outcome="unknown")] == 1
    assert 0 <= found["cancelable_deps_lease_age_seconds", ()] < PATIENCE
    active = {
        names[0][1]: value for (name, names), value in found.items() if name == "cancelable_deps_operations_active"
    }
    assert active == {"request": 0, "websocket": 0, "background": 0, "detached": 0, "tracked": 0}


def queries(dashboard: Any) -> Iterator[str]:
    """Every query of a dashboard, those of its variables too."""
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            assert variable["definition"] == variable["query"]["query"]
            yield variable["definition"]


def test_the_dashboard_asks_for_what_there_is(server: Server) -> None:
    known: dict[str, set[str]] = {}
    for name, names in scraped(server):
        known.setdefault(name, set()).update(key for key, _ in names)
    asked = set()
    for query in queries(json.loads(DASHBOARD.read_text())):
        metrics = re.findall(r"cancelable_deps_\w+", query)
        assert metrics, query
        assert set(metrics) <= known.keys()
        allowed = set.intersection(*(known[metric] for metric in metrics)) | BY_PROMETHEUS
        grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")}
        selected = set(re.findall(r"[{,](\w+)(?==~|=|!=)", query))
        listed = set(re.findall(r"label_values\(\w+, (\w+)\)", query))
        assert grouped | selected | listed <= allowed, query
        assert query.count("(") == query.count(")")
        asked |= {re.sub(r"_(total|bucket|sum|count)$", "", metric) for metric in metrics}
    assert asked == {re.sub(r"_(total|bucket|sum|count|created)$", "", name) for name in known}


def test_the_dashboard_is_one() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    assert "id" not in dashboard  # Grafana gives it one on importing.
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        used = set(re.findall(r"\$\{?(\w+)", json.dumps(panel)))
        assert used <= variables | {"__rate_interval"}
        legends = {name for target in panel["targets"] for name in re.findall(r"{{(\w+)}}", target["legendFormat"])}
        for target in panel["targets"]:
            assert legends <= set(re.findall(r"\w+", target["expr"]))
    places = [panel["gridPos"] for panel in panels]
    overlaps = [
        (one, other)
        for index, one in enumerate(places)
        for other in places[index + 1 :]
        if one["x"] < other["x"] + other["w"] and other["x"] < one["x"] + one["w"]
        if one["y"] < other["y"] + other["h"] and other["y"] < one["y"] + one["h"]
    ]
    assert overlaps == []


def test_the_page_of_the_documentation_names_every_metric(server: Server) -> None:
    page = Path(ROOT / "docs/observability.md").read_text()
    for name, _ in scraped(server):
        assert f"`{re.sub(r'_(bucket|sum|count|created)$', '', name)}`" in page
