"""``@with_cancelation``: the whole handler is covered, and its signature stays."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, ParamSpec, Protocol, TypeVar, cast, overload

import anyio
from starlette.requests import HTTPConnection, Request
from starlette.responses import StreamingResponse
from starlette.websockets import WebSocket

from ..hosts.route_handlers import KEYWORD, TARGET_ATTRIBUTE, Target, is_told, request_for
from ..kernel.cancelable import Cancelable, block_of, cancelable_of
from ..kernel.errors import CancelationError
from ..kernel.foreign import with_own_failures
from ..kernel.loops.current import current_loop
from ..kernel.options import takes
from ..kernel.reasons import CancelationReason
from ..kernel.settings import seconds
from ..kernel.unwrap import raise_as_it_is
from ..request.policies import POLICY_ATTRIBUTE, TimeoutPolicy, checked_status, found, written
from ..request.state import SCOPE_KEY, RequestState
from ..request.websocket import connection_state
from .dress import dressed, innermost, signature_of, what_runs
from .generators import EndpointGenerator, GuardedGenerator, ThreadedGenerator
from .streaming import CancelableStreamingResponse, keep_for_stream

if TYPE_CHECKING:
    from datetime import timedelta

    from starlette.responses import Response
    from starlette.types import Message, Receive, Send

    from ..request.blocks import DoorBlock

E = TypeVar("E", bound=Callable[..., Coroutine[Any, Any, Any] | AsyncIterator[Any]])
P = ParamSpec("P")
R = TypeVar("R")

_COVERED: Final = "__cancelable_deps_covered__"


class _Unset:
    """``timeout`` was not given, where ``None`` switches the default off."""

    def __repr__(self) -> str:
        return "the default"


UNSET: Final = _Unset()


class _Decorator(Protocol):
    @overload
    def __call__(self, endpoint: E, /) -> E: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, endpoint: Callable[P, Iterator[R]], /
    ) -> Callable[P, AsyncIterator[R]]: ...

    @overload
    def __call__(self, endpoint: Callable[P, R], /) -> Callable[P, Coroutine[Any, Any, R]]: ...


@overload
def with_cancelation(endpoint: E, /) -> E: ...  # type: ignore[overload-overlap]


@overload
def with_cancelation(  # type: ignore[overload-overlap]
    endpoint: Callable[P, Iterator[R]], /
) -> Callable[P, AsyncIterator[R]]: ...


@overload
def with_cancelation(endpoint: Callable[P, R], /) -> Callable[P, Coroutine[Any, Any, R]]: ...


@overload
def with_cancelation(
    *,
    timeout: float | timedelta | _Unset | None = UNSET,
    status_codes: Mapping[CancelationReason, int] | None = None,
    on_cancel: Callable[[Cancelable], object] | None = None,
    cleanup_grace: float | None = None,
    abandon_thread: bool = False,
    policy: str | TimeoutPolicy | None = None,
) -> _Decorator: ...


def with_cancelation(
    endpoint: Any = None,
    /,
    *,
    timeout: float | timedelta | _Unset | None = UNSET,
    status_codes: Mapping[CancelationReason, int] | None = None,
    on_cancel: Callable[[Cancelable], object] | None = None,
    cleanup_grace: float | None = None,
    abandon_thread: bool = False,
    policy: str | TimeoutPolicy | None = None,
) -> Any:
    """Stop this handler when nobody needs its result, and answer with the status of the reason.

    Put it *below* the route decorator::

        @app.get("/report")
        @with_cancelation(timeout=30)
        async def report() -> Report: ...

    The handler is cancelled at the ``await`` where it stands, as by a `Cancelable`, which is `current_cancelable()`
    inside. A handler that finishes anyway has finished: its result is the response. An ``HTTPException`` from anywhere
    below, a task group included, arrives as itself. Called without a request (your own test, a script), the handler runs
    with the timeout alone.

    Of a generator endpoint (with ``yield``), the generator is covered from its first step to its last, in one task of
    ours, and may hold what it likes across its ``yield``. Its response has started by then: it is cut, or as an event
    stream ends with ``event: cancelled``. A plain ``def`` generator makes each item in a worker thread; it is stopped
    between two items, by being closed, or where it calls ``check()``, and is an async generator for those who call it
    themselves.

    On a WebSocket route a client that drops while the handler is busy stops it; one that leaves while the handler
    waits for its message is told by ``WebSocketDisconnect``, as ever. A stop for another reason closes with the close
    code of the reason and its message as the text; before ``accept`` it refuses the handshake with the status.

    A plain ``def`` handler runs in a worker thread, as without the decorator, and becomes an ``async`` one for those who
    call it themselves: ``await report()``, while ``report()`` alone has not begun. (FastAPI is one of them, and therefore
    validates its result in the event loop.) Nothing can interrupt a thread: it is stopped where it calls
    ``current_cancelable().check()``, and the response waits for it. While it waits for a free thread it can be cancelled
    at once.

    Other decorators may stand above and below. They find the signature, the type hints and the defaults of the handler,
    and are called with its arguments alone: the request comes to us beside them. What a decorator above answers itself
    (a cache, a limiter) never comes to us. What stands in for a dependency by ``app.dependency_overrides`` is told no
    request, unless it has a parameter for it.

    :param timeout: seconds from the handler's start, of a WebSocket in all, for a ``def`` one the waiting for a thread
        included. It replaces the default of the middleware or route class; ``None`` switches that off for this route.
    :param status_codes: other statuses for some reasons, as ``{CancelationReason.TIMEOUT: 503}``.
    :param on_cancel: called with the `Cancelable`, as by `Cancelable.on_cancel`.
    :param cleanup_grace: seconds that the handler's cleanup may await undisturbed; the default is that of `configure`.
    :param abandon_thread: for a ``def`` handler: send the response of the reason at once, and leave the thread alone. It
        keeps its place among the threads until it has ended; what it returns is dropped, what it raises is logged.
    :param policy: a `TimeoutPolicy`, or the name of one of the middleware's, in place of ``timeout``.
    :raises TypeError: when the app is built, for what is no endpoint.
    :raises ValueError: when the app is built, for limits or statuses that make no sense.
    """
    options = _Options(timeout, status_codes, on_cancel, cleanup_grace, abandon_thread, policy)
    if endpoint is None:
        return lambda function: _decorate(function, options)
    return _decorate(endpoint, options)


class _Options:
    def __init__(
        self,
        timeout: float | timedelta | _Unset | None,
        status_codes: Mapping[CancelationReason, int] | None,
        on_cancel: Callable[[Cancelable], object] | None,
        cleanup_grace: float | None,
        abandon_thread: bool,
        policy: str | TimeoutPolicy | None,
    ) -> None:
        if policy is not None and not isinstance(policy, str | TimeoutPolicy):
            raise TypeError(f"policy takes the name of a policy or a TimeoutPolicy, not {policy!r}")
        if policy is not None and not isinstance(timeout, _Unset):
            raise TypeError("give timeout or policy, not both: a policy has a timeout")
        self.policy = policy
        self.abandon_thread = abandon_thread
        self.replaces_default = policy is not None or not isinstance(timeout, _Unset)
        self.timeout = None if timeout is None or isinstance(timeout, _Unset) else seconds(timeout, "timeout")
        if status_codes is not None and not isinstance(status_codes, Mapping):
            raise TypeError(
                f"status_codes maps reasons to statuses, as {{CancelationReason.TIMEOUT: 503}}, not {status_codes!r}"
            )
        self.status_codes = {reason: _status(reason, code) for reason, code in (status_codes or {}).items()}
        if on_cancel is not None and not takes(on_cancel, 1):
            raise TypeError(f"on_cancel must be a function that takes the Cancelable, not {on_cancel!r}")
        self.on_cancel = on_cancel
        self.cleanup_grace = None if cleanup_grace is None else seconds(cleanup_grace, "cleanup_grace")

    def make_block(self, state: RequestState) -> DoorBlock:
        if self.replaces_default:
            state.lift_default()
        block = state.door_class(state, timeout=self.timeout, cleanup_grace=self.cleanup_grace)
        if self.on_cancel is not None:
            cancelable_of(block).on_cancel(self.on_cancel)
        if self.policy is not None:
            policy = block.policy = found(self.policy, state)
            block.timeout = policy.enforced_timeout
        return block

    def make_lone_block(self) -> Cancelable:
        """For an endpoint that is called without a request."""
        timeout = self.policy.enforced_timeout if isinstance(self.policy, TimeoutPolicy) else self.timeout
        block = Cancelable(timeout=timeout, cleanup_grace=self.cleanup_grace)
        if self.on_cancel is not None:
            block.on_cancel(self.on_cancel)
        return block

    def translate(self, exc: BaseException) -> BaseException:
        if isinstance(exc, CancelationError):
            exc.status_code = self.status_codes.get(exc.reason, exc.status_code)
        return exc


def _status(reason: object, code: object) -> int:
    if not isinstance(reason, CancelationReason):
        raise TypeError(f"status_codes maps CancelationReason to a status, and {reason!r} is no CancelationReason")
    return checked_status(code, reason)


def _decorate(endpoint: Any, options: _Options) -> Any:
    if isinstance(endpoint, staticmethod | classmethod):
        return type(endpoint)(_decorate(endpoint.__func__, options))
    _refuse_what_cannot_be_covered(endpoint)
    find = _RequestFinder(endpoint)
    if _yields(endpoint):
        guarded = _generator_guard(endpoint, find, options)
    else:
        work = _awaitable(endpoint, options)
        guarded = dressed(_guard(work, find, options), endpoint, work)
    if options.policy is not None:
        setattr(guarded, POLICY_ATTRIBUTE, options.policy)
    find.be_given_the_request(guarded)
    return guarded


def _guard(work: Any, find: _RequestFinder, options: _Options) -> Any:
    # `guarded` becomes a function of the endpoint's module, among whose globals ours are not.
    run_alone, state_of, keep, judge, raise_it = _run_alone, connection_state, _keep_listening, _judge, raise_as_it_is
    key, is_a, stream, refusal, anything = SCOPE_KEY, isinstance, StreamingResponse, CancelationError, BaseException

    async def guarded(*args: Any, **kwargs: Any) -> Any:
        request = find(args, kwargs)
        if request is None:
            return await run_alone(work, args, kwargs, options)
        made = key not in request.scope
        state = state_of(request, held=True)
        if made and request.scope.get("endpoint") is not find.function:
            # Perhaps a dependency, or one step of a handler: what comes after it is to be listened for as well.
            made = not state.close_with_handler()
        raised: BaseException | None = None
        result: Any = None
        try:
            block = options.make_block(state)
            try:
                block.enter(state.loop)
            except refusal as exc:
                raise options.translate(exc) from None
            try:
                result = await work(*args, **kwargs)
            except anything as exc:
                raised = exc
            raised = block.leave(raised)
            if block.is_unsettled:
                await block.settle()
            if raised is None and is_a(result, stream):
                keep(result, state, made)
        finally:
            if made and not state.is_kept:
                state.close()
                if state.is_reading:
                    await state.join()
        if options.policy is not None:
            response = await judge(block, raised, request)
            if response is not None:
                return response
        if raised is not None:
            try:
                raise_it(options.translate(raised))
            finally:
                del raised  # Its traceback knows this frame: a cycle, as long as this frame knows it.
        return result

    return guarded


def _keep_listening(response: StreamingResponse, state: RequestState, made: bool) -> None:
    if isinstance(response, CancelableStreamingResponse):
        keep_for_stream(state, response, made=made)
    elif state.is_listening:
        _listen_through(response, state)


async def _judge(block: DoorBlock, raised: BaseException | None, request: HTTPConnection) -> Response | None:
    if block.policy is not None:
        block.policy.judge(block)
    return await written(raised, request) if isinstance(request, Request) else None


def cover_generator(endpoint: Any) -> Any:
    """``endpoint``, under a door that gives it its limits; as a bare decorator does if it is a generator."""
    if not _yields(endpoint) or find_spec("fastapi.sse") is None:
        return endpoint
    # Older versions of FastAPI make the routes of an included router anew.
    return endpoint if hasattr(endpoint, _COVERED) else with_cancelation(endpoint)


def _yields(endpoint: Any) -> bool:
    function = what_runs(endpoint)
    return inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function)


def _generator_guard(endpoint: Any, find: _RequestFinder, options: _Options) -> Any:
    if options.abandon_thread:
        raise TypeError(f"abandon_thread is for `def` handlers that return, and {_name(endpoint)}() is a generator")
    in_threads = inspect.isgeneratorfunction(what_runs(endpoint))
    guard = _guard_generator

    def items(*args: Any, **kwargs: Any) -> Any:
        generator = endpoint(*args, **kwargs)
        return ThreadedGenerator(generator) if in_threads else generator

    def guarded(*args: Any, **kwargs: Any) -> Any:
        return guard(find(args, kwargs), items(*args, **kwargs), options)

    result = dressed(guarded, endpoint, items, is_generator=True)
    setattr(result, _COVERED, True)
    return result


def _guard_generator(request: HTTPConnection | None, generator: Any, options: _Options) -> GuardedGenerator:
    if request is None:
        return GuardedGenerator(generator, block_of(options.make_lone_block()), current_loop())
    made = SCOPE_KEY not in request.scope
    state = connection_state(request, held=True)
    if state.token.cause is not None:
        # While there is still a status to choose: the response starts before the first item.
        if made:
            state.close()
        raise options.translate(state.token.cause.error())
    # One that a handle has made would be closed when FastAPI has got its generator.
    ours = made or state.ends_with_handler
    return EndpointGenerator(generator, options.make_block(state), state, ours=ours)


def _awaitable(endpoint: Any, options: _Options) -> Any:
    if _is_async(endpoint):
        if options.abandon_thread:
            raise TypeError(f"abandon_thread is for `def` handlers, and {_name(endpoint)}() is `async def`")
        return endpoint
    from ..kernel.threads import call_in_thread

    async def run_in_thread(*args: Any, **kwargs: Any) -> Any:
        return await call_in_thread(functools.partial(endpoint, *args, **kwargs), options.abandon_thread)

    return run_in_thread


async def _run_alone(endpoint: Any, args: Any, kwargs: Any, options: _Options) -> Any:
    try:
        async with options.make_lone_block():
            return await endpoint(*args, **kwargs)
    except CancelationError as exc:
        options.translate(exc)
        raise


def _listen_through(response: StreamingResponse, state: RequestState) -> None:
    # Starlette's response would await the server's receive() beside our reader, which must not be cancelled for it:
    # granian then reports a client as gone that is not. So the response listens through the reader, until it ends.
    version = state.scope.get("asgi", {}).get("spec_version", "2.0")
    if tuple(map(int, version.split("."))) >= (2, 4) or state.outermost is not None:
        # It does not listen, or a door hands it our reader.
        return

    listen, stream_response = response.listen_for_disconnect, response.stream_response

    async def listen_for_disconnect(receive: Receive) -> None:
        try:
            await listen(state.receive)
        finally:
            with anyio.CancelScope(shield=True):
                await state.aclose()

    async def stream_until_the_end(send: Send) -> None:
        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                state.close()
            await send(message)

        # Starlette's group would take that for the end of a task which was cancelled, and wait for the client to leave.
        await with_own_failures("the body of a StreamingResponse", stream_response, send_and_close)

    state.keep_through_response()
    response.listen_for_disconnect = listen_for_disconnect  # type: ignore[method-assign]
    response.stream_response = stream_until_the_end  # type: ignore[method-assign]


class _RequestFinder(Target):
    """Finds the request that an endpoint is called for: among its arguments, or where FastAPI tells it."""

    def __init__(self, endpoint: Any) -> None:
        signature = signature_of(endpoint)
        namespace = getattr(what_runs(endpoint), "__globals__", {})
        self.annotations = {
            name: _resolve(parameter.annotation, namespace) for name, parameter in signature.parameters.items()
        }
        names = list(signature.parameters)
        self.own = next((name for name in names if _is_a(self.annotations[name], HTTPConnection)), None)
        if self.own is None:
            self.own = _starlettes_own(signature)
        self.index = None if self.own is None else names.index(self.own)

    def be_given_the_request(self, guarded: Any) -> None:
        """``guarded`` is the function that will ask."""
        self.function = guarded
        self.has_own = self.own is not None
        setattr(guarded, TARGET_ATTRIBUTE, self)
        if not self.has_own and not is_told():
            guarded.__signature__ = _with_request(signature_of(guarded))

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HTTPConnection | None:
        if self.own is None:
            found = kwargs.pop(KEYWORD, None)
            if found is None:
                found = request_for(self)
            if found is None and args:
                found = _first_of(args)
        elif self.own in kwargs:
            found = kwargs[self.own]
        else:
            found = args[self.index] if self.index is not None and len(args) > self.index else None
        return found if isinstance(found, (Request, WebSocket)) else None


def _with_request(signature: inspect.Signature) -> inspect.Signature:
    parameters = list(signature.parameters.values())
    ours = inspect.Parameter(KEYWORD, inspect.Parameter.KEYWORD_ONLY, annotation=HTTPConnection, default=None)
    at = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters.insert(at, ours)
    return signature.replace(parameters=parameters)


def _first_of(args: tuple[Any, ...]) -> Any:
    """Starlette gives an endpoint its request alone, whatever the parameter is called."""
    return next((given for given in args[:2] if isinstance(given, HTTPConnection)), None)


def _starlettes_own(signature: inspect.Signature) -> str | None:
    """The request of ``async def endpoint(request)`` or ``on_receive(self, websocket, data)``.

    Starlette allows it to have no annotation. To FastAPI, which knows no ``self``, it would be a query parameter.
    """
    names = [name for name in signature.parameters if name != "self"]
    is_method = len(names) < len(signature.parameters)
    if names[:1] not in (["request"], ["websocket"]) or (len(names) > 1 and not is_method):
        return None
    return names[0] if signature.parameters[names[0]].annotation is inspect.Parameter.empty else None


def _refuse_what_cannot_be_covered(endpoint: Any) -> None:
    if inspect.isclass(endpoint) or not callable(endpoint):
        raise TypeError(
            f"@with_cancelation takes an endpoint (a function), not {endpoint!r}. It stands below the route decorator, "
            "directly above the function; its options have names: @with_cancelation(timeout=30)."
        )
    function = what_runs(endpoint)
    if {"scope", "receive", "send"} <= set(inspect.signature(function).parameters):
        raise TypeError(
            f"{_name(endpoint)} is an ASGI application, and @with_cancelation takes an endpoint. Wrap an application in "
            "RequestCancelationMiddleware."
        )
    if _yields(endpoint):
        if find_spec("fastapi.sse") is None:
            raise TypeError(f"{_name(endpoint)}() is a generator: as endpoints, FastAPI has these since 0.135")
        return
    if not _is_async(endpoint) and any(
        _is_a(kind, WebSocket) for kind in _RequestFinder(endpoint).annotations.values()
    ):
        raise TypeError(
            f"{_name(endpoint)}() is a plain `def`, and a WebSocket endpoint is awaited: make it `async def`."
        )


def _is_async(endpoint: Any) -> bool:
    """Whether it or, as FastAPI looks at it, what it wraps is ``async def``."""
    if inspect.iscoroutinefunction(what_runs(endpoint)):
        return True
    while isinstance(endpoint, functools.partial):
        endpoint = endpoint.func
    return inspect.iscoroutinefunction(endpoint)


def _name(endpoint: Any) -> str:
    return getattr(innermost(endpoint), "__qualname__", repr(endpoint))


def _resolve(annotation: Any, namespace: dict[str, Any]) -> Any:
    if isinstance(annotation, str):
        try:
            return eval(annotation, namespace)
        except Exception:
            return annotation
    return annotation


def _is_a(annotation: Any, kind: type) -> bool:
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    return inspect.isclass(annotation) and issubclass(cast("type", annotation), kind)
