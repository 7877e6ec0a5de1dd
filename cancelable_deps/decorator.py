"""``@with_cancelation``: the whole handler is covered, and its signature stays."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast, overload

import anyio
from starlette.requests import HTTPConnection, Request
from starlette.responses import StreamingResponse
from starlette.websockets import WebSocket

from ._exceptions import raise_as_it_is
from ._request import SCOPE_KEY, DoorBlock, RequestState, request_state
from .cancelable import Cancelable
from .errors import CancelationError
from .reasons import CancelationReason
from .settings import seconds

if TYPE_CHECKING:
    from datetime import timedelta

    from starlette.types import Message, Receive, Send

E = TypeVar("E", bound=Callable[..., Coroutine[Any, Any, Any]])

# Under this name the endpoint is given the request, if it has no parameter for it.
_INJECTED: Final = "cancelable_deps_request"


class _Unset:
    """``timeout`` was not given, where ``None`` switches the default off."""

    def __repr__(self) -> str:
        return "the default"


UNSET: Final = _Unset()


@overload
def with_cancelation(endpoint: E, /) -> E: ...


@overload
def with_cancelation(
    *,
    timeout: float | timedelta | _Unset | None = UNSET,
    status_codes: Mapping[CancelationReason, int] | None = None,
    on_cancel: Callable[[Cancelable], object] | None = None,
    cleanup_grace: float | None = None,
) -> Callable[[E], E]: ...


def with_cancelation(
    endpoint: Any = None,
    /,
    *,
    timeout: float | timedelta | _Unset | None = UNSET,
    status_codes: Mapping[CancelationReason, int] | None = None,
    on_cancel: Callable[[Cancelable], object] | None = None,
    cleanup_grace: float | None = None,
) -> Any:
    """Stop this handler when nobody needs its result, and answer with the status of the reason.

    Put it *below* the route decorator::

        @app.get("/report")
        @with_cancelation(timeout=30)
        async def report() -> Report: ...

    The handler is cancelled at the ``await`` where it stands, as by a `Cancelable`, which is `current_cancelable()`
    inside. A handler that finishes anyway has finished: its result is the response. An ``HTTPException`` from anywhere
    below, a task group included, arrives as itself. Called without a request (your own test, a script), the handler
    runs with the timeout alone.

    :param timeout: seconds from the handler's start. It replaces the default of the middleware or route class;
        ``None`` switches that off for this route.
    :param status_codes: other statuses for some reasons, as ``{CancelationReason.TIMEOUT: 503}``.
    :param on_cancel: called with the `Cancelable`, as by `Cancelable.on_cancel`.
    :param cleanup_grace: seconds that the handler's cleanup may await undisturbed; the default is that of `configure`.
    :raises TypeError: when the app is built, for what is no ``async def`` endpoint.
    :raises ValueError: when the app is built, for limits or statuses that make no sense.
    """
    options = _Options(timeout, status_codes, on_cancel, cleanup_grace)
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
    ) -> None:
        self.replaces_default = not isinstance(timeout, _Unset)
        self.timeout = None if timeout is None or isinstance(timeout, _Unset) else seconds(timeout, "timeout")
        if status_codes is not None and not isinstance(status_codes, Mapping):
            raise TypeError(
                f"status_codes maps reasons to statuses, as {{CancelationReason.TIMEOUT: 503}}, not {status_codes!r}"
            )
        self.status_codes = {reason: _status(reason, code) for reason, code in (status_codes or {}).items()}
        if on_cancel is not None and not callable(on_cancel):
            raise TypeError(f"on_cancel must be a function that takes the Cancelable, not {on_cancel!r}")
        self.on_cancel = on_cancel
        self.cleanup_grace = None if cleanup_grace is None else seconds(cleanup_grace, "cleanup_grace")

    def translate(self, exc: BaseException) -> BaseException:
        if isinstance(exc, CancelationError):
            exc.status_code = self.status_codes.get(exc.reason, exc.status_code)
        return exc


def _status(reason: object, code: object) -> int:
    if not isinstance(reason, CancelationReason):
        raise TypeError(f"status_codes maps CancelationReason to a status, and {reason!r} is no CancelationReason")
    if isinstance(code, bool) or not isinstance(code, int):
        raise TypeError(f"the status for {reason} must be a number such as 503, not {code!r}")
    if not 400 <= code <= 599:
        raise ValueError(f"the status for {reason} must tell of an error (400 to 599), not {code}")
    if code == 408:
        raise ValueError(f"408 for {reason} makes clients send the request again (RFC 9110); use 503 or 504")
    return code


def _decorate(endpoint: Any, options: _Options) -> Any:
    _refuse_what_cannot_be_covered(endpoint)
    signature = inspect.signature(endpoint)
    find = _RequestFinder(endpoint, signature)

    async def guarded(*args: Any, **kwargs: Any) -> Any:
        request = find(args, kwargs)
        if request is None:
            return await _run_alone(endpoint, args, kwargs, options)
        made = SCOPE_KEY not in request.scope
        state = request_state(request)
        if made:
            state.hold()
        try:
            return await _run(endpoint, args, kwargs, options, state)
        finally:
            if made:
                await state.handler_returned()

    _dress(guarded, endpoint, signature, find)
    return guarded


async def _run(endpoint: Any, args: Any, kwargs: Any, options: _Options, state: RequestState) -> Any:
    if options.replaces_default:
        state.lift_default()
    block = DoorBlock(state, timeout=options.timeout, cleanup_grace=options.cleanup_grace)
    if options.on_cancel is not None:
        block.on_cancel(options.on_cancel)
    try:
        block._enter()
    except CancelationError as exc:
        raise options.translate(exc) from None
    raised: BaseException | None = None
    result: Any = None
    try:
        result = await endpoint(*args, **kwargs)
    except BaseException as exc:
        raised = exc
    outcome = await block._exit(raised)
    if outcome is not None:
        raise_as_it_is(options.translate(outcome))
    if isinstance(result, StreamingResponse) and state.reader.is_armed:
        _listen_through(result, state)
    return result


async def _run_alone(endpoint: Any, args: Any, kwargs: Any, options: _Options) -> Any:
    block = Cancelable(timeout=options.timeout, cleanup_grace=options.cleanup_grace)
    if options.on_cancel is not None:
        block.on_cancel(options.on_cancel)
    try:
        async with block:
            return await endpoint(*args, **kwargs)
    except CancelationError as exc:
        options.translate(exc)
        raise


def _listen_through(response: StreamingResponse, state: RequestState) -> None:
    # Starlette's response would await the server's receive() beside our reader, which must not be cancelled for it:
    # granian then reports a client as gone that is not. So the response listens through the reader, until it ends.
    version = state.scope.get("asgi", {}).get("spec_version", "2.0")
    if tuple(map(int, version.split("."))) >= (2, 4):
        return

    stream_response = response.stream_response

    async def listen_for_disconnect(receive: Receive) -> None:
        try:
            await state.wait_disconnected()
        finally:
            with anyio.CancelScope(shield=True):
                await state.aclose()

    async def stream_until_the_end(send: Send) -> None:
        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                state.close()
            await send(message)

        await stream_response(send_and_close)

    state.keep_through_response()
    response.listen_for_disconnect = listen_for_disconnect  # type: ignore[method-assign]
    response.stream_response = stream_until_the_end  # type: ignore[method-assign]


class _RequestFinder:
    """Finds the request among the arguments that an endpoint is called with."""

    def __init__(self, endpoint: Any, signature: inspect.Signature) -> None:
        namespace = getattr(_innermost(endpoint), "__globals__", {})
        self.annotations = {
            name: _resolve(parameter.annotation, namespace) for name, parameter in signature.parameters.items()
        }
        self.returns = _resolve(signature.return_annotation, namespace)
        for name, annotation in self.annotations.items():
            if _is_a(annotation, WebSocket):
                raise TypeError(
                    f"{_name(endpoint)}() takes a WebSocket ({name}): @with_cancelation covers HTTP endpoints only"
                )
        names = list(signature.parameters)
        self.own = next((name for name in names if _is_a(self.annotations[name], HTTPConnection)), None)
        if self.own is None and _is_starlette_endpoint(signature):
            self.own = names[-1]
        self.index = None if self.own is None else names.index(self.own)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Request | None:
        if self.own is None:
            found = kwargs.pop(_INJECTED, None)
        elif self.own in kwargs:
            found = kwargs[self.own]
        else:
            found = args[self.index] if self.index is not None and len(args) > self.index else None
        return found if isinstance(found, Request) else None


def _is_starlette_endpoint(signature: inspect.Signature) -> bool:
    """``async def endpoint(request)``, which Starlette allows to have no annotation."""
    names = [name for name in signature.parameters if name != "self"]
    return names == ["request"] and signature.parameters["request"].annotation is inspect.Parameter.empty


def _dress(guarded: Any, endpoint: Any, signature: inspect.Signature, find: _RequestFinder) -> None:
    """Make the wrapper look like the endpoint, with one more keyword for FastAPI to give the request to."""
    functools.update_wrapper(guarded, endpoint, assigned=("__module__", "__doc__"))
    # As FastAPI names a partial or a callable object, which has no name of its own.
    guarded.__name__ = getattr(endpoint, "__name__", type(endpoint).__name__)
    guarded.__qualname__ = getattr(endpoint, "__qualname__", guarded.__name__)
    # Resolved: FastAPI would look for what they name in our module, or nowhere if the endpoint is a partial.
    parameters = [
        parameter.replace(annotation=find.annotations[parameter.name]) for parameter in signature.parameters.values()
    ]
    if find.own is None:
        ours = inspect.Parameter(_INJECTED, inspect.Parameter.KEYWORD_ONLY, annotation=Request, default=None)
        at = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
        parameters.insert(at, ours)
    guarded.__signature__ = signature.replace(parameters=parameters, return_annotation=find.returns)


def _refuse_what_cannot_be_covered(endpoint: Any) -> None:
    if inspect.isclass(endpoint) or not callable(endpoint):
        raise TypeError(
            f"@with_cancelation takes an endpoint (an `async def` function), not {endpoint!r}. It stands below the "
            "route decorator, directly above the function."
        )
    function = _innermost(endpoint)
    if not inspect.isroutine(function):
        function = type(function).__call__
    if {"scope", "receive", "send"} <= set(inspect.signature(function).parameters):
        raise TypeError(
            f"{_name(endpoint)} is an ASGI application, and @with_cancelation takes an endpoint. Wrap an application in "
            "RequestCancelationMiddleware."
        )
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        raise TypeError(
            f"{_name(endpoint)}() is a generator, which runs after the handler has returned: @with_cancelation does "
            "not cover it. Use RequestCancelationMiddleware or CancelableRoute."
        )
    if not inspect.iscoroutinefunction(function):
        raise TypeError(
            f"{_name(endpoint)}() is a plain `def`, which runs in a worker thread and cannot be cancelled. Make it "
            "`async def`, or ask `CancellationEvent.is_set()` in it where it can stop."
        )


def _innermost(function: Any) -> Any:
    """What is left when all partials and wrappers are taken off."""
    while isinstance(function, functools.partial) or hasattr(function, "__wrapped__"):
        function = function.func if isinstance(function, functools.partial) else function.__wrapped__
    return function


def _name(endpoint: Any) -> str:
    return getattr(_innermost(endpoint), "__qualname__", repr(endpoint))


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
