"""``python tests/first_example.py`` runs the first example of the README: a client asks, hangs up, and is answered 499.

It needs the package and its dependencies alone, and so does the example: that is what this proves in an environment that
holds nothing else.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio

import cancelable_deps

README = Path(__file__).parents[1] / "README.md"
CEILING = 20


def first_example() -> str:
    """Return the first block of Python in the README."""
    found = re.search(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert found, "the README has no example"
    return found[1]


async def hang_up(app: Any, path: str) -> list[dict[str, Any]]:
    """Ask for a path, leave as soon as somebody listens for that, and return the messages that the application sends."""
    received = [{"type": "http.request", "body": b"", "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return received.pop() if received else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope: dict[str, Any] = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET"}
    scope |= {
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [],
    }
    with anyio.fail_after(CEILING):
        await app(scope, receive, send)
    return sent


def main() -> None:
    """Run it, and say which package it was."""
    namespace: dict[str, Any] = {"__name__": "readme"}
    code = first_example()
    exec(compile(code, str(README), "exec"), namespace)  # noqa: S102 - our own README
    path = re.search(r"@app\.get\(\"(.*?)\"\)", code)
    assert path, "the example has no endpoint"
    start, *_ = anyio.run(hang_up, namespace["app"], path[1])
    assert start["status"] == 499, start
    assert version("cancelable-deps") == cancelable_deps.__version__
    print(f"The README's first example is stopped by {cancelable_deps.__version__} in {cancelable_deps.__file__}")


if __name__ == "__main__":
    main()
