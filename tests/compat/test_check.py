"""The start-up check on applications with other people's packages: it finds what the other tests here find, and no more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

EXPECTED = {
    # Two streams whose decorator has a timeout, and none that it does not end.
    ("sse", "timed-deco"): {("stream-outlives-timeout", "/three"), ("stream-outlives-timeout", "/ticks")},
    ("streams", "timed-deco"): {
        ("stream-outlives-timeout", "/injected"),
        ("stream-outlives-timeout", "/own"),
        ("background-not-covered", "/injected"),
    },
    ("streams", "deco"): {("background-not-covered", "/injected")},
    **{("wsgi", f"mw-{name}"): {("wsgi-mount", "mount /w")} for name in ("flask", "django", "own")},
    **{
        ("wsgi", f"timed-{name}"): {("wsgi-mount", "mount /w"), ("def-without-check", "/gate/{key}")}
        for name in ("flask", "django", "own")
    },
}
NAMES = [
    "decorators",
    "django_asgi",
    "mariadb",
    "mcp_sdk",
    "observers",
    "quart_asgi",
    "rabbitmq",
    "socket_io",
    "sse",
    "strawberry_graphql",
    "streams",
    "wsgi",
]


# In a process of its own: some of these packages can be set up once in a process.
CODE = """
import importlib, json, sys
from cancelable_deps.checks import check_stack
apps = importlib.import_module(f"tests.compat.apps.{sys.argv[1]}").apps()
found = {door: [(finding.code, finding.where) for finding in check_stack(app)] for door, app in apps.items()}
print("FOUND", json.dumps(found))
"""


@pytest.mark.parametrize("name", NAMES)
def test_what_is_found(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, name], check=True, capture_output=True, text=True, cwd=ROOT)
    doors: dict[str, Any] = json.loads(done.stdout.rpartition("FOUND ")[2])
    for door, findings in doors.items():
        # Without a door, the lifespan of these applications has nothing to end.
        found = set(map(tuple, findings)) - {("nothing-covered", "cancelation_lifespan")}
        assert found == EXPECTED.get((name, door), set()), door
