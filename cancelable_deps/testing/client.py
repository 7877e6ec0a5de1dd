"""A client of an application that can hang up, and checks of the outcome."""

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

    from ..kernel.loops.base import Worker
    from ..kernel.reasons import CancelationReason

_NEVER = HangUp()

# Seconds after which an application that has not ended is cancelled once more, when the client is left.
_NEXT_CANCELLATION = 1


class CancelableClient:
    """A client of ``app`` that can hang up: ``async with CancelableClient(app) as client:``.

    The application runs beside the test, in the same event loop, on asyncio or trio; it may be any ASGI application. On
    asyncio it runs as on a server, in a task without a scope of anyio around it. It has the test's context variables.
    Entering the client starts the application's lifespan, and leaving ends it; exceptions of the lifespan are raised in
    the test. ``send()`` raises ``RuntimeError`` for a message that a server would refuse.

    :param app: the ASGI application.
    :param base_url: the URL that paths are relative to.
    :param headers: headers of every request.
    :param cookies: cookies of every request.
    :param lifespan: ``False`` to not run the application's lifespan.
    :param disconnect: how often ``receive()`` returns ``http.disconnect`` after a hang-up: it ``"repeats"``, as with
        uvicorn, or comes ``"once"``, after which ``receive()`` blocks, as with hypercorn and daphne.
    :param spec_version: the ASGI version that the server announces. Starlette's streams listen for the disconnect below
        2.4; from 2.4 on they expect an ``OSError`` of ``send()``.
    :param send_raises: whether ``send()`` raises ``OSError`` after the hang-up, as ASGI says since 2.4. Servers differ.
    :param raise_app_exceptions: whether exceptions of the application are raised in the test; with ``False`` they are
        only in ``call.exception``.
    :param root_path: the ``root_path`` of the ASGI scope.
    :param client: the address and port of the client in the ASGI scope.
    :param ceiling: the seconds that the test waits for anything, before it fails with a message; on a clock that
        `advance` does not move.
    :raises TypeError: if ``app`` is not callable, or ``ceiling`` is not a number.
    :raises ValueError: if ``disconnect`` is another word, or ``ceiling`` is negative or NaN.
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
            raise ValueError(f'disconnect must be "repeats" or "once", not {disconnect!r}')
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
        """The cookies of the client and those that responses have set; they are sent with the following requests."""
        return self._http.cookies

    async def __aenter__(self) -> Self:
        """Open the client, and start the application's lifespan; raise what the application raises at its start."""
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
        """Shut the application's lifespan down, and cancel the calls that still run."""
        failure: BaseException | None = None
        tasks, self._tasks = self._opened, None
        try:
            if self._lifespan is not None:
                # Also after a test that has failed or is cancelled, so that the application closes what it has opened.
                with anyio.CancelScope(shield=True):
                    await self._lifespan.stop()
        except Exception as error:
            failure = error
        finally:
            await tasks.close()
        if exc is None and failure is not None:
            raise failure

    async def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request, and return the response when the application has ended, background tasks included.

        Cancelling the call cancels the application. Exceptions of the application are raised here.

        :param options: the options of ``httpx.AsyncClient.request``, such as ``json=`` or ``headers=``; ``timeout=`` has
            no effect.
        :raises httpx.RemoteProtocolError: if the application ends before its response is complete.
        """
        content = options.pop("content", None)
        if not isinstance(content, Iterable | AsyncIterable) or isinstance(content, str | bytes | dict):
            return await self._http.request(method, path, content=content, **options)
        async with aclosing(pieces_of(content)) as pieces:
            return await self._http.request(method, path, content=pieces, **options)

    async def get(self, path: str, **options: Any) -> httpx.Response:
        """Send a GET request, as `request`."""
        return await self.request("GET", path, **options)

    async def head(self, path: str, **options: Any) -> httpx.Response:
        """Send a HEAD request, as `request`."""
        return await self.request("HEAD", path, **options)

    async def options(self, path: str, **options: Any) -> httpx.Response:
        """Send an OPTIONS request, as `request`."""
        return await self.request("OPTIONS", path, **options)

    async def post(self, path: str, **options: Any) -> httpx.Response:
        """Send a POST request, as `request`."""
        return await self.request("POST", path, **options)

    async def put(self, path: str, **options: Any) -> httpx.Response:
        """Send a PUT request, as `request`."""
        return await self.request("PUT", path, **options)

    async def patch(self, path: str, **options: Any) -> httpx.Response:
        """Send a PATCH request, as `request`."""
        return await self.request("PATCH", path, **options)

    async def delete(self, path: str, **options: Any) -> httpx.Response:
        """Send a DELETE request, as `request`."""
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

        Leaving the block waits until the application has ended, and raises what the application raised. If the test
        fails or is cancelled inside, the application is cancelled.

        :param hang_up: the moment at which the client leaves by itself. Alternatively call ``await call.hang_up()``.
        :param content: the body. An iterable is sent piece by piece, an asynchronous one at its own pace. An iterable
            that never ends makes a client that stops sending.
        :param body_by_hand: whether the test sends the body itself, by ``await call.send_body(...)``.
        :param options: further options of ``httpx.AsyncClient.request``, such as ``headers=``.
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

        Leaving the block drops the connection, if it is still open, and waits until the application has ended. It raises
        what the application raised. If the test fails or is cancelled inside, the application is cancelled.

        :param subprotocols: the subprotocols that the client offers.
        :param refusal_response: whether the server supports the ASGI extension ``websocket.http.response``, by which an
            application refuses the handshake with an HTTP response of its own.
        :param options: further options of ``httpx.AsyncClient.request``, such as ``headers=``.
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
            raise httpx.RemoteProtocolError(f"the response is incomplete: {call}", request=request)
        return response

    @property
    def _opened(self) -> _Tasks:
        if self._tasks is None:
            raise RuntimeError("the client is not open: use it inside `async with CancelableClient(app) as client:`")
        if not self._tasks.is_here:
            raise RuntimeError(
                "the client was opened in another event loop. A fixture that opens it must run in the loop of its tests "
                "(pytest-asyncio: the same `loop_scope`)."
            )
        return self._tasks

    @asynccontextmanager
    async def _run(self, call: Exchange) -> AsyncGenerator[None]:
        call.begin(self._opened.start_application)
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
    """The tasks of a client. They outlive the task that opens it: pytest-asyncio leaves a fixture in another one."""

    def __init__(self) -> None:
        self._group = anyio.create_task_group()
        self._opened = anyio.Event()
        self._applications: list[Worker] = []
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

    def start_application(self, work: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
        """Start the application as a server does: on asyncio in a task without a scope of anyio around it.

        Return the function that cancels it.
        """
        if self._loop.is_trio:
            scope = anyio.CancelScope()
            self._group.start_soon(_in_scope, scope, work)
            return scope.cancel

        async def serve() -> None:
            try:
                await work()
            except (Exception, BaseExceptionGroup) as exc:
                self._error = exc
            finally:
                # A task keeps its context, and so all that the application has put there.
                self._applications.remove(worker)

        serve.__qualname__ = work.__qualname__  # the name of the task
        worker = self._loop.spawn(serve, copy_context())
        self._applications.append(worker)
        return worker.cancel

    async def close(self) -> None:
        """Cancel the tasks that still run, and raise an exception that was not handled."""
        self._group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await self._end_applications()
            await self._worker.join()
        if self._error is not None:
            raise self._error

    @property
    def _alive(self) -> list[Worker]:
        return [worker for worker in self._applications if not worker.done]

    async def _end_applications(self) -> None:
        while self._alive:
            for worker in self._alive:
                worker.cancel()
            # Not at every pass of the loop, as anyio does: that would pierce the shields of the application's cleanup.
            with real_seconds(_NEXT_CANCELLATION):
                for worker in list(self._alive):
                    await worker.join()

    async def _run(self) -> None:
        try:
            async with self._group:
                self._opened.set()
                await anyio.sleep_forever()
        except (Exception, BaseExceptionGroup) as exc:
            self._error = exc


async def _in_scope(scope: anyio.CancelScope, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with scope:
        await work()


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
        tasks.start_application(self._run)
        await self._wait_for("lifespan.startup", "started")
        self.is_supported = any(event["type"] == "lifespan.startup.complete" for event in self._events)
        if self._failed("startup"):
            await self._wait_for("lifespan.ended", "ended")
            raise self._error or RuntimeError(f"the application failed to start: {self._message}")

    async def stop(self) -> None:
        if not self.is_supported:
            return
        self._may_stop.set()
        # An exception that it has raised between start and shutdown is raised here, too.
        await self._wait_for("lifespan.shutdown", "shut down")
        if self._failed("shutdown"):
            raise self._error or RuntimeError(f"the application failed to shut down: {self._message}")

    def _failed(self, phase: str) -> bool:
        return (
            any(event["type"] == f"lifespan.{phase}.failed" for event in self._events)
            or (
                # An application that raises before it has called receive() does not support lifespans.
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
    """Check that ``call`` has ended and was cancelled by ``cancelable_deps``.

    :param call: a call of `CancelableClient.start` or `CancelableClient.websocket`.
    :param reason: the reason that it must have been cancelled for; ``None`` for any.
    :raises AssertionError: if that is not so; the message says what happened instead.
    """
    if call.reason is None or not call.has_ended:
        raise AssertionError(f"the call was not cancelled: {call.describe()}")
    if reason is not None and call.reason != reason:
        raise AssertionError(f"the call was cancelled for {call.reason!s}, not for {reason!s}: {call.describe()}")


@asynccontextmanager
async def no_tasks_left() -> AsyncGenerator[None]:
    """Check that the code inside the block leaves no task behind in the running event loop.

    :raises AssertionError: if it does; the message has the name of each task and the line where it stands.
    """
    before = tasks_now()
    yield
    left = await tasks_left(before)
    if left:
        raise AssertionError("tasks are left behind: " + "; ".join(map(str, left)))
