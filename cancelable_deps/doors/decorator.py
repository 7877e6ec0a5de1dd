"""The decorator ``@with_cancelation``, which covers a whole handler and keeps its signature."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, ParamSpec, Protocol, TypeVar, overload

from starlette.requests import HTTPConnection, Request
from starlette.responses import StreamingResponse

from ..hosts.fastapi import HAS_GENERATORS
from ..hosts.route_handlers import KEYWORD
from ..kernel.cancelable import block_of
from ..kernel.errors import CancelationError
from ..kernel.loops.current import current_loop
from ..kernel.threads import call_in_thread
from ..kernel.unwrap import raise_as_it_is
from ..request.connection import connection_state
from ..request.lifetime import Lifetime
from ..request.policies import POLICY_ATTRIBUTE
from ..request.response import written
from ..request.state import SCOPE_KEY
from .dress import dressed, what_runs
from .endpoint import RequestFinder, is_async, name_of, refuse_what_cannot_be_covered, yields
from .generators import EndpointGenerator, GuardedGenerator, ThreadedGenerator
from .marks import DECORATED, Decorated
from .options import UNSET, Options
from .streaming import keep_listening

if TYPE_CHECKING:
    from datetime import timedelta

    from starlette.responses import Response

    from ..kernel.cancelable import Cancelable
    from ..kernel.reasons import CancelationReason
    from ..request.blocks import DoorBlock
    from ..request.policies import TimeoutPolicy
    from .options import Unset

E = TypeVar("E", bound=Callable[..., Coroutine[Any, Any, Any] | AsyncIterator[Any]])
P = ParamSpec("P")
R = TypeVar("R")

_COVERED: Final = "__cancelable_deps_covered__"


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
    timeout: float | timedelta | Unset | None = UNSET,
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
    timeout: float | timedelta | Unset | None = UNSET,
    status_codes: Mapping[CancelationReason, int] | None = None,
    on_cancel: Callable[[Cancelable], object] | None = None,
    cleanup_grace: float | None = None,
    abandon_thread: bool = False,
    policy: str | TimeoutPolicy | None = None,
) -> Any:
    """Stop a handler when its client leaves or its time is up, and answer with the status of the reason.

    Put it *below* the route decorator:

    ```python
    @app.get("/report")
    @with_cancelation(timeout=30)
    async def report() -> Report: ...
    ```

    The handler is cancelled at the ``await`` where it stands, as by a `Cancelable`, which `current_cancelable()` returns
    inside. If the handler returns all the same, its result is the response. An ``HTTPException`` from inside, also out of
    a task group, is answered as usual. If the handler is called without a request (by a test or a script), only the
    timeout applies.

    A generator endpoint (with ``yield``) is covered from its first step to its last. It runs in one task of its own, and
    may hold blocks and task groups across its ``yield``. Its response has started by then: when the generator is stopped,
    the response is aborted, so that the client sees that it is incomplete; an event stream ends with ``event: cancelled``.
    A plain ``def`` generator makes each item in a worker thread. It is stopped between two items, when it is closed, or
    where it calls ``check()``. For your own code it becomes an async generator.

    On a WebSocket route the handler is cancelled if the client leaves while the handler is busy. If it leaves while the
    handler waits for a message, the handler gets ``WebSocketDisconnect``, as without the decorator. A handler that is
    stopped for another reason closes the WebSocket with the close code of the reason and its message as the close reason;
    before ``accept`` it refuses the handshake with the status.

    A plain ``def`` handler runs in a worker thread, as without the decorator. For your own code it becomes ``async``:
    call it by ``await report()``. FastAPI calls it like that, too, and therefore validates its result in the event loop.
    A thread cannot be interrupted: the handler is stopped where it calls ``current_cancelable().check()``, and the
    response waits for that. While it waits for a free thread it can be cancelled at once.

    Other decorators may stand above and below. They see the signature, the type hints and the defaults of the handler,
    and are called with its arguments alone. If a decorator above answers a request itself (a cache, a limiter), this one
    is not called. A decorated function in ``app.dependency_overrides`` gets the request only if it has a parameter for
    it.

    :param timeout: seconds from the handler's start; for a ``def`` handler including the wait for a thread, for a
        WebSocket the whole conversation. It replaces the default of the middleware or route class; ``None`` switches that
        off for this route.
    :param status_codes: other statuses for some reasons, such as ``{CancelationReason.TIMEOUT: 503}``.
    :param on_cancel: a function that is called with the `Cancelable`, as by `Cancelable.on_cancel`.
    :param cleanup_grace: the seconds that the handler's cleanup may await undisturbed; the default is that of `configure`.
    :param abandon_thread: for a ``def`` handler: send the response at once, and do not wait for the thread. The thread
        keeps its place in the pool until it has ended. Its result is dropped; an exception that it raises is logged.
    :param policy: a `TimeoutPolicy`, or the name of a policy of the middleware, in place of ``timeout``.
    :raises TypeError: when the app is built, if the decorated object is not an endpoint, or an option has a wrong type.
    :raises ValueError: when the app is built, if a limit is negative or NaN, or a status is outside 400 to 599.
    """
    options = Options(timeout, status_codes, on_cancel, cleanup_grace, abandon_thread, policy)
    if endpoint is None:
        return lambda function: _decorate(function, options)
    return _decorate(endpoint, options)


def _decorate(endpoint: Any, options: Options) -> Any:
    if isinstance(endpoint, staticmethod | classmethod):
        return type(endpoint)(_decorate(endpoint.__func__, options))
    refuse_what_cannot_be_covered(endpoint)
    find = RequestFinder(endpoint)
    if yields(endpoint):
        guarded = _generator_guard(endpoint, find, options)
    else:
        work = _awaitable(endpoint, options)
        guarded = dressed(_guard(work, find, options), endpoint, work)
    if options.policy is not None:
        setattr(guarded, POLICY_ATTRIBUTE, options.policy)
    setattr(guarded, DECORATED, Decorated(endpoint, options))
    find.be_given_the_request(guarded)
    return guarded


def _guard(work: Any, find: RequestFinder, options: Options) -> Any:
    # `dressed` gives `guarded` the globals of the endpoint's module: it finds the names of this module only here.
    run_alone, keep, judge, raise_it = _run_alone, keep_listening, _judge, raise_as_it_is
    is_a, stream, refusal, anything = isinstance, StreamingResponse, CancelationError, BaseException
    keyword = KEYWORD

    async def guarded(*args: Any, **kwargs: Any) -> Any:
        # FastAPI gives the request by this keyword to nearly all; what finds it elsewhere is a call more.
        request = kwargs.pop(keyword, None)
        if request is None:
            request = find(args, kwargs)
            if request is None:
                return await run_alone(work, args, kwargs, options)
        block, owned = options.open_door(request, find.function)
        raised: BaseException | None = None
        result: Any = None
        # As `run_through`, but in this frame: another coroutine would cost the handler something at every `await`.
        try:
            try:
                block.enter()
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
                keep(result, request.scope)
        finally:
            if owned is not None:
                left = owned.end_request()
                if left is not None:
                    await left.join()
        if options.policy is not None:
            response = await judge(block, raised, request)
            if response is not None:
                return response
        if raised is not None:
            try:
                raise_it(options.translate(raised))
            finally:
                del raised  # Its traceback refers to this frame: a reference cycle otherwise.
        return result

    return guarded


async def _judge(block: DoorBlock, raised: BaseException | None, request: HTTPConnection) -> Response | None:
    if block.policy is not None:
        block.policy.judge(request.scope, block.elapsed)
    return await written(raised, request) if isinstance(request, Request) else None


def cover_generator(endpoint: Any) -> Any:
    """Wrap a generator endpoint as a bare ``@with_cancelation`` would; return any other unchanged."""
    if not yields(endpoint) or not HAS_GENERATORS:
        return endpoint
    # Older versions of FastAPI make the routes of an included router again: an endpoint may be covered already.
    return endpoint if hasattr(endpoint, _COVERED) else with_cancelation(endpoint)


def _generator_guard(endpoint: Any, find: RequestFinder, options: Options) -> Any:
    if options.abandon_thread:
        raise TypeError(f"abandon_thread is for `def` handlers that return, and {name_of(endpoint)}() is a generator")
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


def _guard_generator(request: HTTPConnection | None, generator: Any, options: Options) -> GuardedGenerator:
    if request is None:
        return GuardedGenerator(generator, block_of(options.make_lone_block()), current_loop())
    made = SCOPE_KEY not in request.scope
    state = connection_state(request, lifetime=Lifetime.HANDLER)
    if state.cause is not None:
        # Now, because the response starts before the first item, and has a status from then on.
        if made:
            state.close()
        raise options.translate(state.cause.error())
    # A state that a handle has made, too, would otherwise be closed when FastAPI has got the generator.
    return EndpointGenerator(generator, options.make_block(state), state, ours=state.ends_with_handler)


def _awaitable(endpoint: Any, options: Options) -> Any:
    if is_async(endpoint):
        if options.abandon_thread:
            raise TypeError(f"abandon_thread is for `def` handlers, and {name_of(endpoint)}() is `async def`")
        return endpoint

    async def run_in_thread(*args: Any, **kwargs: Any) -> Any:
        return await call_in_thread(functools.partial(endpoint, *args, **kwargs), options.abandon_thread)

    return run_in_thread


async def _run_alone(endpoint: Any, args: Any, kwargs: Any, options: Options) -> Any:
    try:
        async with options.make_lone_block():
            return await endpoint(*args, **kwargs)
    except CancelationError as exc:
        options.translate(exc)
        raise
