"""A client of an application that can hang up, and checks of what it has got."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable
from contextlib import aclosing, asynccontextmanager, suppress
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import anyio
import anyio.lowlevel

try:
    import httpx
except ImportError:  # pragma: no cover - httpx is installed with our tests
    raise ImportError('cancelable_deps.testing needs httpx: pip install "cancelable-deps[testing]"') from None

from ..kernel.loops.current import current_loop
from ..kernel.options import seconds
from .calls import Call, Disconnects, Exchange, HangUp, Personality, pieces_of
from .clock import real_seconds
from .tasks import tasks_left, tasks_now
from .websockets import SocketCall

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
    from types import TracebackType

    from starlette.types import ASGIApp, Message, Scope

    from ..kernel.reasons import CancelationReason

_NEVER = HangUp()


class CancelableClient:
    """A client of ``app`` that runs beside the test, in the same event loop: ``async with CancelableClient(app) as c:``.

    Entering runs the application's lifespan up to its start, leaving to its end; what the application raises there is
    raised here. Works on asyncio and trio, for any ASGI application. Where a server refuses a message of the application,
    ``send()`` raises ``RuntimeError``, as it does there.

    :param lifespan: ``False`` leaves the application's lifespan alone, for tests that do without what it opens.
    :param disconnect: ``"repeats"`` ``http.disconnect`` for whoever asks again, as uvicorn does, or says it ``"once"``
        and then blocks, as hypercorn and daphne do.
    :param spec_version: the version of ASGI that the server announces. From 2.4 on Starlette's streams learn from
        ``send()`` that the client left; below they listen.
    :param send_raises: whether ``send()`` raises ``OSError`` after the hang-up, as ASGI has it since 2.4. Servers differ.
    :param raise_app_exceptions: raise in the test what the application raises; ``False`` leaves it to ``call.exception``.
    :param ceiling: seconds after which something that a test waits for will not come any more, and the test fails with
        a message; by a clock that `advance` does not move.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        base_url: str = "http://testserver",
        headers: Mapping[str, str] | None = None,
        cookies: dict[str, str] | None = None,
        lifespan: bool = True,
        disconnect: Disconnects = "repeats",
        spec_version: str = "2.3",
        send_raises: bool = False,
        raise_app_exceptions: bool = True,
        root_path: str = "",
        client: tuple[str, int] = ("127.0.0.1", 50000),
        ceiling: float = 10,
    ) -> None:
        if disconnect not in ("repeats", "once"):
            raise ValueError(f'disconnect is "repeats" or "once", not {disconnect!r}')
        if not callable(app):
            raise TypeError(f"CancelableClient takes an ASGI application, not {app!r}")
        self.app = app
        self._http = httpx.AsyncClient(
            base_url=base_url, headers=headers, cookies=cookies, transport=_Transport(self._answer), trust_env=False
        )
        self._personality = Personality(disconnect, spec_version, send_raises, seconds(ceiling, "ceiling"))
        self._raises = raise_app_exceptions
        self._root_path = root_path
        self._client = client
        self._state: dict[str, Any] = {}
        self._has_lifespan = lifespan
        self._lifespan: _Lifespan | None = None
        self._tasks: _Tasks | None = None
        self._running: set[Exchange] = set()

    @property
    def cookies(self) -> httpx.Cookies:
        """Those that responses have set; they are sent with the following requests."""
        return self._http.cookies

    async def __aenter__(self) -> Self:
        if self._tasks is not None:
            raise RuntimeError("this client is open already; another CancelableClient(app) may be opened beside it")
        tasks = _Tasks()
        await tasks.open()
        if self._has_lifespan:
            self._lifespan = _Lifespan(self.app, self._state, self._personality)
            try:
                await self._lifespan.start(tasks)
            except BaseException as exc:
                await tasks.close()
                raise exc from exc.__cause__
        self._tasks = tasks
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        failure: BaseException | None = None
        tasks, self._tasks = self._opened, None
        try:
            if self._lifespan is not None:
                # Also after a test that has failed, or is cancelled: what the application has opened is to be closed.
                with anyio.CancelScope(shield=True):
                    await self._lifespan.stop()
        except Exception as error:
            failure = error
        finally:
            await tasks.close()
        if exc is None and failure is not None:
            raise failure

    async def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The response of the application. ``options`` are httpx's; a ``timeout`` does nothing.

        A background task of the application has ended when it is there.

        :raises httpx.RemoteProtocolError: if the application ends before its response does.
        """
        content = options.pop("content", None)
        if not isinstance(content, Iterable | AsyncIterable) or isinstance(content, str | bytes | dict):
            return await self._http.request(method, path, content=content, **options)
        async with aclosing(pieces_of(content)) as pieces:
            return await self._http.request(method, path, content=pieces, **options)

    async def get(self, path: str, **options: Any) -> httpx.Response:
        return await self.request("GET", path, **options)

    async def head(self, path: str, **options: Any) -> httpx.Response:
        return await self.request("HEAD", path, **options)

    async def options(self, path: str, **options: Any) -> httpx.Response:
        return await self.request("OPTIONS", path, **options)

    async def post(self, path: str, **options: Any) -> httpx.Response:
        return await self.request("POST", path, **options)

    async def put(self, path: str, **options: Any) -> httpx.Response:
        return await self.request("PUT", path, **options)

    async def patch(self, path: str, **options: Any) -> httpx.Response:
        return await self.request("PATCH", path, **options)

    async def delete(self, path: str, **options: Any) -> httpx.Response:
        return await self.request("DELETE", path, **options)

    @asynccontextmanager
    async def start(
        self,
        method: str,
        path: str,
        *,
        hang_up: HangUp = _NEVER,
        body_by_hand: bool = False,
        content: str | bytes | Iterable[bytes] | AsyncIterable[bytes] | None = None,
        **options: Any,
    ) -> AsyncGenerator[Call]:
        """Run a request beside the test: ``async with client.start("GET", "/report") as call:``.

        Leaving the block waits for the application's end, and raises what the application raised. If the test fails
        inside, the application is cancelled.

        :param hang_up: the moment at which the client leaves by itself; or call ``await call.hang_up()``.
        :param content: the body; an iterable is sent piece by piece, an asynchronous one as slowly as it comes. One
            that never ends is a client that stops sending.
        :param body_by_hand: the body is what the test gives to ``await call.send_body(...)``.
        """
        request = self._http.build_request(method, path, content=content, **options)
        stream = content if isinstance(content, AsyncIterable) else request.stream
        body = None if body_by_hand else stream
        call = Call(self.app, request, self._scope_of(request), self._personality, hang_up, body)
        async with self._run(call):
            self._opened.start_soon(partial(call.feed, content))
            yield call
        if call.status is not None and not call.has_left:
            self._http.cookies.extract_cookies(httpx.Response(call.status, headers=call.headers, request=request))

    @asynccontextmanager
    async def websocket(
        self,
        path: str,
        *,
        subprotocols: Sequence[str] = (),
        refusal_response: bool = True,
        **options: Any,
    ) -> AsyncGenerator[SocketCall]:
        """Open a WebSocket that runs beside the test: ``async with client.websocket("/chat") as socket:``.

        Leaving the block drops the client, if it is still there, and waits for the application's end.

        :param refusal_response: whether the server has the extension by which an application refuses the handshake with
            an HTTP response of its own.
        """
        request = self._http.build_request("GET", path, **options)
        request.headers.update({"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"})
        if subprotocols:
            request.headers["sec-websocket-protocol"] = ", ".join(subprotocols)
        scope = self._scope_of(request)
        scope.pop("method")
        scope["type"] = "websocket"
        scope["scheme"] = "wss" if request.url.scheme in ("https", "wss") else "ws"
        scope["subprotocols"] = list(subprotocols)
        scope["extensions"] = {"websocket.http.response": {}} if refusal_response else {}
        socket = SocketCall(self.app, scope, self._personality)
        async with self._run(socket):
            yield socket
            await socket.drop()

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        call = Call(self.app, request, self._scope_of(request), self._personality, _NEVER, request.stream)
        async with self._run(call):
            self._opened.start_soon(partial(call.feed, None))
            response = await call.response()
        if not call.is_complete:
            raise httpx.RemoteProtocolError(f"the response was cut: {call}", request=request)
        return response

    @property
    def _opened(self) -> _Tasks:
        if self._tasks is None:
            raise RuntimeError("the client works inside its block: `async with CancelableClient(app) as client:`")
        if not self._tasks.is_here:
            raise RuntimeError(
                "the client was opened in another event loop. A fixture that opens it must run in the loop of its tests "
                "(pytest-asyncio: the same `loop_scope`)."
            )
        return self._tasks

    @asynccontextmanager
    async def _run(self, call: Exchange) -> AsyncGenerator[None]:
        self._opened.start_soon(call.run)
        self._running.add(call)
        try:
            yield
            await call.ended()
        except BaseException:
            call.give_up()
            with anyio.CancelScope(shield=True), suppress(AssertionError):
                await call.ended()
            raise
        finally:
            self._running.discard(call)
        if not self._running:
            await call.look_for_what_is_left()
        if call.failure is not None:
            raise call.failure
        if self._raises and call.exception is not None:
            raise call.exception

    def _scope_of(self, request: httpx.Request) -> Scope:
        url = request.url
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": self._personality.spec_version},
            "http_version": "1.1",
            "method": request.method,
            "scheme": url.scheme,
            "path": url.path,
            "raw_path": url.raw_path.partition(b"?")[0],
            "root_path": self._root_path,
            "query_string": url.query,
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "client": self._client,
            "server": (url.host, url.port or {"https": 443, "wss": 443}.get(url.scheme, 80)),
            "extensions": {},
        }
        if self._lifespan is not None and self._lifespan.is_supported:
            scope["state"] = self._state.copy()
        return scope


class _Transport(httpx.AsyncBaseTransport):
    def __init__(self, answer: Callable[[httpx.Request], Awaitable[httpx.Response]]) -> None:
        self._answer = answer

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self._answer(request)


class _Tasks:
    """A task group in a task of its own: pytest-asyncio enters and leaves a fixture in two different ones."""

    def __init__(self) -> None:
        self._group = anyio.create_task_group()
        self._opened = anyio.Event()
        self._error: BaseException | None = None

    async def open(self) -> None:
        self._loop = current_loop()
        self._worker = self._loop.spawn(self._run, copy_context())
        try:
            await self._opened.wait()
        except BaseException:
            self._worker.cancel()
            raise

    @property
    def is_here(self) -> bool:
        return self._loop.is_running_here()

    def start_soon(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._group.start_soon(work)

    async def close(self) -> None:
        """Cancel what still runs, and raise what nobody expected."""
        self._group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await self._worker.join()
        if self._error is not None:
            raise self._error

    async def _run(self) -> None:
        try:
            async with self._group:
                self._opened.set()
                await anyio.sleep_forever()
        except (Exception, BaseExceptionGroup) as exc:
            self._error = exc


class _Lifespan:
    """The application's lifespan, in a task of its own."""

    def __init__(self, app: ASGIApp, state: dict[str, Any], personality: Personality) -> None:
        self._app = app
        self._state = state
        self._ceiling = personality.ceiling
        self._may_stop = anyio.Event()
        self._events: list[Message] = []
        self._changed = anyio.Event()
        self._error: BaseException | None = None
        self._ended = False
        self._asked = False
        self.is_supported = False

    async def start(self, tasks: _Tasks) -> None:
        tasks.start_soon(self._run)
        await self._wait_for("lifespan.startup", "started")
        self.is_supported = any(event["type"] == "lifespan.startup.complete" for event in self._events)
        if self._failed("startup"):
            await self._wait_for("lifespan.ended", "ended")
            raise self._error or RuntimeError(f"the application failed to start: {self._message}")

    async def stop(self) -> None:
        if not self.is_supported:
            return
        self._may_stop.set()
        # What it has raised in the middle is told here, too.
        await self._wait_for("lifespan.shutdown", "shut down")
        if self._failed("shutdown"):
            raise self._error or RuntimeError(f"the application failed to shut down: {self._message}")

    def _failed(self, phase: str) -> bool:
        return (
            any(event["type"] == f"lifespan.{phase}.failed" for event in self._events)
            or (
                # One that raises before it has asked for an event has no lifespan.
                self._error is not None and (self._asked and phase == "startup" and not self.is_supported)
            )
            or (self._error is not None and phase == "shutdown")
        )

    @property
    def _message(self) -> str:
        return str(self._events[-1].get("message", "")) if self._events else ""

    async def _wait_for(self, phase: str, what: str) -> None:
        with real_seconds(self._ceiling) as scope:
            while not self._ended and not any(event["type"].startswith(phase) for event in self._events):
                await self._changed.wait()
        if scope.cancelled_caught:
            raise AssertionError(f"the application has not {what} within {self._ceiling:g} seconds")

    async def _run(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self._state}
        try:
            await self._app(scope, self._receive, self._send)
        except Exception as exc:
            self._error = exc
        finally:
            self._ended = True
            self._notify()

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "lifespan.startup"}
        await self._may_stop.wait()
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Message) -> None:
        self._events.append(message)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


def assert_cancelled(call: Exchange, reason: CancelationReason | None = None) -> None:
    """Fail, and say what happened instead, unless ``call`` was cancelled by us, for ``reason`` if one is given."""
    if call.reason is None or not call.has_ended:
        raise AssertionError(f"the call was not cancelled: {call.describe()}")
    if reason is not None and call.reason != reason:
        raise AssertionError(f"the call was cancelled for {call.reason!s}, not for {reason!s}: {call.describe()}")


@asynccontextmanager
async def no_tasks_left() -> AsyncGenerator[None]:
    """Fail if what runs inside leaves a task behind in the running event loop, and say where it stands."""
    before = tasks_now()
    yield
    left = await tasks_left(before)
    if left:
        raise AssertionError("tasks are left behind: " + "; ".join(map(str, left)))
