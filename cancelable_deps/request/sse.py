"""The format of Server-Sent Events, and the event that ends an aborted stream."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..kernel.errors import CancelationError

    Headers = Iterable[tuple[bytes, bytes]]

SSE = "text/event-stream"
_ENDS_OF_EVENTS = (b"\n\n", b"\r\n\r\n", b"\r\r")


def is_event_stream(headers: Headers) -> bool:
    """Return whether a response with these headers is an event stream to which an event can be added."""
    fields = {name.lower(): value for name, value in headers}
    media_type = fields.get(b"content-type", b"").partition(b";")[0].strip().lower()
    # Nothing can be added to a compressed stream from outside of its compressor.
    return media_type == SSE.encode() and b"content-encoding" not in fields


def last_event(error: CancelationError, last: bytes | memoryview) -> bytes:
    """Return the event that ends an aborted stream.

    :param last: the last piece of the body that was sent, if any.
    """
    data = format_sse(json.dumps(reason_and_message(error)), event="cancelled")
    if last and not bytes(last[-4:]).endswith(_ENDS_OF_EVENTS):
        # A stream that is passed on from elsewhere comes in chunks of any size: ours must not be added to half an event.
        data = b"\n\n" + data
    return data


def reason_and_message(error: CancelationError) -> dict[str, str]:
    """Return the data of the event that ends an aborted stream."""
    return {"reason": str(error.reason), "message": str(error.detail)}


def format_sse(data: str, event: str | None = None) -> bytes:
    """Return one Server-Sent Event. FastAPI has this function since 0.135, and we support older versions."""
    lines = [] if event is None else [f"event: {event}"]
    lines += [f"data: {line}" for line in data.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return ("\n".join(lines) + "\n\n").encode()
