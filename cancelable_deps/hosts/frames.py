"""How far the framework has come with a request, read from the frames of its task.

No public API says when a handler has returned. The framework then still encodes the result, leaves the dependencies and
sends the response, all in the one coroutine that we await. Its progress shows in its local variables, which are private;
`tests/test_frames.py` fails when they change. They are read only when a request is being stopped.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from fastapi import routing as fastapi_routing
from starlette import concurrency as starlette_concurrency
from starlette import routing as starlette_routing

if TYPE_CHECKING:
    from collections.abc import Iterator


def _inner(function: Any, *names: str) -> CodeType | None:
    """Return the code of a function that is nested in ``function``, by the names of the functions around it and its own."""
    code: CodeType | None = getattr(function, "__code__", None)
    for name in names:
        inside = () if code is None else code.co_consts
        code = next((one for one in inside if isinstance(one, CodeType) and one.co_name == name), None)
    return code


# These await the handler and then its response. Endpoint classes with a method for each verb are not among them: the
# iterator that an ``__await__`` returns hides its frame.
_SENDERS = {
    _inner(getattr(starlette_routing, "request_response", None), "app", "app"),
    _inner(getattr(fastapi_routing, "request_response", None), "app", "app"),
} - {None}
# One of them awaits this: it parses the body, solves the dependencies, calls the handler and encodes its result.
_FASTAPIS_HANDLER = _inner(getattr(fastapi_routing, "get_request_handler", None), "app")
# And that one awaits this, around the handler alone.
_FASTAPIS_CALL = _inner(getattr(fastapi_routing, "run_endpoint_function", None))
# This stands directly inside of it where a ``def`` handler runs in a thread.
_STARLETTES_POOL = getattr(getattr(starlette_concurrency, "run_in_threadpool", None), "__code__", None)


def handler_has_returned(task: Any) -> bool:
    """Return whether the handler of the request in ``task`` has returned; ``False`` for a framework that we do not know."""
    frames = iter(_frames(task))
    for frame in frames:
        if frame.f_code in _SENDERS:
            if "response" in frame.f_locals:
                return True
            inside = next((inner for inner in frames if inner.f_code is _FASTAPIS_HANDLER), None)
            return inside is not None and "raw_response" in inside.f_locals
    return False


def waits_for_thread_of_handler(task: Any) -> bool:
    """Return whether ``task``, on trio, waits for the thread in which a ``def`` handler runs."""
    frames = _frames(task)
    if not any(frame.f_code is _FASTAPIS_CALL for frame in frames):
        return False
    inside = next(frames, None)
    if inside is None or inside.f_code is not _STARLETTES_POOL:
        # An ``async def`` handler, which goes on when its thread has ended.
        return False
    # Waiting for a free thread, or standing at a checkpoint before that, does not count.
    names = [frame.f_code.co_name for frame in frames]
    return ("to_thread_run_sync", "wait_task_rescheduled") in pairwise(names)


def is_parsing_body(task: Any) -> bool:
    """Return whether FastAPI is reading the body in ``task``, to parse it for the handler."""
    if _is_running(_coroutine(task)):
        return _is_parsing(_frame_around(_FASTAPIS_HANDLER))
    return _is_parsing(next((frame for frame in _frames(task) if frame.f_code is _FASTAPIS_HANDLER), None))


def _is_parsing(frame: FrameType | None) -> bool:
    return frame is not None and "errors" not in frame.f_locals


def _frame_around(code: CodeType | None) -> FrameType | None:
    """Return the nearest frame around the caller that runs ``code``."""
    # Frames are not collected in a list: a list of frames that one of them refers to is a reference cycle.
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def _coroutine(task: Any) -> Any:
    return task.get_coro() if hasattr(task, "get_coro") else task.coro


def _is_running(coro: Any) -> bool:
    return bool(getattr(coro, "cr_running", False))


def _frames(task: Any) -> Iterator[FrameType]:
    """Yield the frames of a task that waits, outermost first; nothing for a task that runs."""
    coro = _coroutine(task)
    while coro is not None and not _is_running(coro):
        frame = getattr(coro, "cr_frame", None) or getattr(coro, "gi_frame", None)
        if frame is None:
            return
        yield frame
        coro = getattr(coro, "cr_await", None) or getattr(coro, "gi_yieldfrom", None)
