"""The page on which operators see what runs, and stop it."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from typing import TYPE_CHECKING, Final

from starlette.responses import HTMLResponse

from .answers import NO_STORE

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.responses import Response

_FILE: Final = "page.html"


def page_responses() -> Callable[[], Response]:
    """Return a function that makes the response with the page, which is read now, when the application is built."""
    html = files(__name__.rpartition(".")[0]).joinpath(_FILE).read_text(encoding="utf-8")
    headers = {
        **NO_STORE,
        "content-security-policy": content_security_policy(html),
        "cross-origin-opener-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
    }
    return lambda: HTMLResponse(html, headers=headers)


def content_security_policy(html: str) -> str:
    """Return a policy by which nothing runs but the script of the page, and nothing is loaded from another host."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hash_of('script', html)}",
            f"style-src {_hash_of('style', html)}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )


def _hash_of(element: str, html: str) -> str:
    [content] = re.findall(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
