"""The middleware: the door around a whole application, which may be one of FastAPI, Starlette or bare ASGI."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import translate
from typing import TYPE_CHECKING, Any, cast

from ..hosts.fastapi import functions_called
from ..request.limits import Limits
from ..request.naming import CancelsByName, checked_naming, failing_without
from ..request.policies import POLICY_ATTRIBUTE, TimeoutPolicy, named
from ..request.response import answer
from ..request.run import end_first_door, first_door, run_in_another_door, run_request, run_socket
from .base_http import put_inner_doors

if TYPE_CHECKING:
    from datetime import timedelta

    from starlette.types import ASGIApp, Receive, Scope, Send

    from ..kernel.token import Cause
    from ..request.client_timeout import ClientTimeout

_POLICIES_KEY = "cancelable_deps.policies"
"""The key in a lifespan's scope of the policies of all middleware further out."""

Exclude = str | re.Pattern[str] | Callable[["Scope"], bool]


class RequestCancelationMiddleware:
    """An ASGI middleware that stops each request when its client leaves or its time is up; handlers stay unchanged.

    Add it by ``app.add_middleware(RequestCancelationMiddleware, default_timeout=30)``. If a request is cancelled before
    its response has started, it is answered with the status of the reason, even if the client is gone; middleware further
    out sees that response as well. If the response has started, it is aborted: nothing more is sent, and the client sees
    that it is incomplete. Work after a complete response (background tasks) is not cancelled.

    A WebSocket's handler is cancelled if the client leaves while the handler is busy, and the WebSocket is closed with the
    code of the reason. ``default_timeout`` does not apply to WebSockets, because they may live long.

    Place it outside middleware that may take long: add it after them. Other doors inside share its request state, and so
    its reader and its reason.

    :param default_timeout: seconds from the request's arrival; ``None`` for no limit. A route's own timeout
        (``with_cancelation(timeout=...)``, `cancelable_with_timeout`) replaces it, longer or shorter.
    :param exclude: paths that are left alone: a path or a pattern (``"/health"``, ``"/static/*"``), a compiled regular
        expression that must match the whole path, a function of the ASGI scope, or several of these.
    :param cleanup_grace: the seconds that cleanup may await undisturbed; the default is that of `configure`.
    :param policies: `TimeoutPolicy` objects by name, from which routes choose. If a route has chosen a name that is not
        among them, the application fails to start.
    :param default_policy: one of their names, or a `TimeoutPolicy`, in place of ``default_timeout``.
    :param client_timeout: a `ClientTimeout <cancelable_deps.deadlines.ClientTimeout>`: requests end when the time is up
        that their client gives in a header, if that is sooner. Off by default.
    :param operations: the `Operations` of the application. It fails to start if they are not open by then.
    :param operation_id: the name of a header, such as ``"operation-id"``, by which clients name their requests: 1 to 128
        of the characters ``A-Z a-z 0-9 . _ ~ : -``. The response has it, too. Such a request can be cancelled by that id,
        also before it has come. Another value is answered with 422.
    :raises TypeError: if a limit is not a number, or ``exclude``, a policy or ``client_timeout`` has a wrong type, or ``operation_id`` is
        given without ``operations``.
    :raises ValueError: if a limit is negative or NaN, or a path does not begin with ``/`` or ``*``.
    :raises LookupError: if ``default_policy`` is a name that is not in ``policies``.
    """

    def __init__(
        self,
        app: ASGIApp,
        default_timeout: float | timedelta | None = None,
        exclude: Exclude | Iterable[Exclude] | None = None,
        cleanup_grace: float | None = None,
        policies: Mapping[str, TimeoutPolicy] | None = None,
        default_policy: str | TimeoutPolicy | None = None,
        client_timeout: ClientTimeout | None = None,
        operations: CancelsByName | None = None,
        operation_id: str | None = None,
    ) -> None:
        self.app: ASGIApp = put_inner_doors(app)
        self._operations = operations
        self._naming = checked_naming(operations, operation_id)
        self._limits = Limits(default_timeout, cleanup_grace, policies, default_policy, client_timeout)
        self._excluded = _matchers(exclude)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (self._excluded and self._excludes(scope)):
            if scope["type"] == "websocket" and not self._excludes(scope):
                if self._naming is not None and self._naming.is_used_by(scope):
                    await self._naming.serve(self._serve_socket, scope, receive, send)
                else:
                    await self._serve_socket(scope, receive, send)
            else:
                if scope["type"] == "lifespan":
                    await check_names_at_start(self.app, scope, receive, send, self._limits.policies or {})
                    if self._operations is not None:
                        send = failing_without(self._operations, send)
                await self.app(scope, receive, send)
            return
        if self._naming is not None and self._naming.is_used_by(scope):
            await self._naming.serve(self._serve_named, scope, receive, send)
            return
        block = first_door(scope, receive, send, self._limits)
        if block is None:
            error = await run_in_another_door(self.app, scope, receive, send, self._limits)
        else:
            outcome: BaseException | None = None
            try:
                block.enter()
                await self.app(scope, block.receive, block.send)
            except BaseException as exc:
                outcome = exc
            if outcome is None and block.has_ended_undisturbed():
                return
            try:
                error = await end_first_door(block, outcome)
            finally:
                del outcome, block  # Its traceback refers to this frame: a reference cycle otherwise.
        if error is not None:
            try:
                await answer(error, scope, receive, send)
            finally:
                del error  # Its traceback refers to this frame, too: a reference cycle otherwise.

    async def _serve_named(self, scope: Scope, receive: Receive, send: Send, cause: Cause | None) -> None:
        error = await run_request(self.app, scope, receive, send, self._limits, cause)
        if error is not None:
            try:
                await answer(error, scope, receive, send)
            finally:
                del error  # As above.

    async def _serve_socket(self, scope: Scope, receive: Receive, send: Send, cause: Cause | None = None) -> None:
        await run_socket(self.app, scope, receive, send, self._limits, cause)

    def _excludes(self, scope: Scope) -> bool:
        return any(matches(scope) for matches in self._excluded)


def limits_of_middleware(middleware: RequestCancelationMiddleware) -> Limits:
    """Return the limits of a middleware of ours."""
    return middleware._limits


def operations_of_middleware(middleware: RequestCancelationMiddleware) -> CancelsByName | None:
    """Return the operations that a middleware of ours was given."""
    return middleware._operations


def is_excluded(middleware: RequestCancelationMiddleware, scope: Scope) -> bool:
    """Return whether a middleware of ours leaves a request alone."""
    return middleware._excludes(scope)


def _matchers(exclude: Any) -> list[Callable[[Scope], bool]]:
    if exclude is None:
        return []
    if isinstance(exclude, str | bytes | re.Pattern) or not isinstance(exclude, Iterable):
        exclude = [exclude]
    return [_matcher(pattern) for pattern in exclude]


def _matcher(pattern: Any) -> Callable[[Scope], bool]:
    if isinstance(pattern, str):
        if not pattern.startswith(("/", "*")):
            raise ValueError(
                f"exclude takes paths that begin with '/', such as '/health' or '/static/*', not {pattern!r}"
            )
        pattern = re.compile(translate(pattern))
    if isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str):
        fullmatch = pattern.fullmatch
        return lambda scope: fullmatch(_route_path(scope)) is not None
    if callable(pattern):
        return cast("Callable[[Scope], bool]", pattern)
    raise TypeError(f"exclude takes paths, compiled patterns or functions of the scope, not {pattern!r}")


def _route_path(scope: Scope) -> str:
    """Return the path as the application's routes see it, without the prefix that it is mounted under."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path


async def check_names_at_start(
    wrapped: ASGIApp, scope: Scope, receive: Receive, send: Send, policies: Mapping[str, TimeoutPolicy]
) -> None:
    """Look for unknown policies in the routes of an application that starts, and let the start fail if there is one."""
    # The scope has no application yet if this middleware stands around all of it.
    app = scope.get("app", wrapped)
    known = scope[_POLICIES_KEY] = {**scope.get(_POLICIES_KEY, {}), **policies, **_policies_of(app)}
    try:
        _check_names(getattr(app, "routes", ()), known)
    except LookupError as error:
        # Raising is not enough: servers take that for an application without a lifespan, and go on.
        await receive()
        await send({"type": "lifespan.startup.failed", "message": str(error)})
        raise


def _check_names(routes: Iterable[Any], policies: Mapping[str, TimeoutPolicy]) -> None:
    for function, path, apps in functions_called(routes):
        name = getattr(function, POLICY_ATTRIBUTE, None)
        if isinstance(name, str):
            known = dict(policies)
            for app in apps:
                known |= _policies_of(app)
            named(name, known, f" (route {path})")


def _policies_of(app: Any) -> dict[str, TimeoutPolicy]:
    """Return the policies that the middleware of an application has."""
    policies: dict[str, TimeoutPolicy] = {}
    for middleware in getattr(app, "user_middleware", ()):
        given = middleware.kwargs.get("policies")
        if isinstance(given, Mapping):
            policies |= {name: policy for name, policy in given.items() if isinstance(policy, TimeoutPolicy)}
    return policies
