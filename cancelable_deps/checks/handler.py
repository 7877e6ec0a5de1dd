"""A handler: what it is, and which doors and handles it has."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from starlette.responses import StreamingResponse

from ..doors.dependencies import (
    cancelable_dependency,
    cancellation,
    create_request_task_group,
    no_timeout,
    request_task_group,
    wait_for_disconnect,
)
from ..doors.dress import innermost
from ..doors.endpoint import is_async, yields
from ..doors.marks import DECORATED, STOPS_HANDLER, TIMEOUT, Decorated
from ..doors.progress import progress_response
from ..doors.route import CancelableRoute, limits_of_route
from ..doors.streaming import CancelableStreamingResponse, cancelable_streaming_response
from ..hosts.fastapi import EVENT_STREAM, RouteBelow, takes_background_tasks
from ..hosts.route_handlers import callables_in
from ..request.policies import POLICY_ATTRIBUTE, TimeoutPolicy
from .reading import classes_returned, is_a, objects_named, uses

if TYPE_CHECKING:
    from collections.abc import Mapping

_HANDLES: Final = (cancelable_dependency, cancellation, request_task_group)
_FUNCTIONS: Final = (create_request_task_group, wait_for_disconnect)
_STREAMS_OF_OURS: Final = (CancelableStreamingResponse, cancelable_streaming_response, progress_response)


class Handler:
    """The handler of a route."""

    def __init__(self, below: RouteBelow) -> None:
        self.below = below
        self.endpoint: Any = getattr(below.route, "endpoint", None)

    @cached_property
    def decorated(self) -> Decorated | None:
        """What the decorator of ours has made it of."""
        parts = [self.endpoint]
        if inspect.isclass(self.endpoint):
            parts = list(vars(self.endpoint).values())
        for part in parts:
            for each in callables_in(part):
                found = getattr(each, "__dict__", {}).get(DECORATED)
                if isinstance(found, Decorated):
                    return found
        return None

    @cached_property
    def function(self) -> Any:
        """The function that the application's author has written; for a class the class."""
        return innermost(self.endpoint if self.decorated is None else self.decorated.endpoint)

    @property
    def is_of_application(self) -> bool:
        """Whether it is not one that FastAPI adds: the pages of its documentation."""
        return (getattr(self.endpoint, "__module__", None) or "").partition(".")[0] not in ("fastapi", "starlette")

    @property
    def is_class(self) -> bool:
        """Whether it is a class with a method for each verb, into which we do not look."""
        return inspect.isclass(self.endpoint)

    @cached_property
    def is_generator(self) -> bool:
        """Whether it has a ``yield``."""
        return not self.is_class and yields(self.function)

    @property
    def is_plain_def(self) -> bool:
        """Whether it runs in a worker thread, from its beginning to its end."""
        return not (self.is_class or self.is_generator or is_async(self.function))

    @property
    def has_route_of_ours(self) -> bool:
        """Whether the route class covers it."""
        return isinstance(self.below.route, CancelableRoute)

    @property
    def is_beside_routes_of_ours(self) -> bool:
        """Whether its router makes its other routes of our class."""
        chosen = getattr(self.below.router, "route_class", None)
        return inspect.isclass(chosen) and issubclass(chosen, CancelableRoute)

    @property
    def has_door(self) -> bool:
        """Whether a decorator, the route class or a dependency covers all of it."""
        stopped = any(getattr(call, STOPS_HANDLER, False) for call in self.below.calls)
        return self.has_route_of_ours or self.decorated is not None or stopped

    @cached_property
    def has_handle(self) -> bool:
        """Whether it may stop a part of itself."""
        calls = self.below.calls
        has_parameter = any(hasattr(call, TIMEOUT) or any(call is each for each in _HANDLES) for call in calls)
        return has_parameter or uses(self.function, *_FUNCTIONS)

    @cached_property
    def streams_of_others(self) -> bool:
        """Whether it returns a stream that is not of our class."""
        if self.is_generator or self.is_class or self.streams_by_ours:
            return False
        kinds = {self.below.response_class, *classes_returned(self.function)}
        return any(_is_stream(kind) for kind in (*kinds, *objects_named(self.function)))

    @property
    def is_event_stream(self) -> bool:
        """Whether it is a generator whose items are events."""
        chosen = self.below.response_class
        is_events = EVENT_STREAM is not None and isinstance(chosen, type) and issubclass(chosen, EVENT_STREAM)
        return self.is_generator and is_events

    @cached_property
    def streams_by_ours(self) -> bool:
        """Whether it returns a stream of ours."""
        return uses(self.function, *_STREAMS_OF_OURS)

    @property
    def streams(self) -> bool:
        """Whether its response may take its time without being silent."""
        return self.is_generator or self.streams_of_others or self.streams_by_ours

    @property
    def takes_background_tasks(self) -> bool:
        """Whether it starts background tasks."""
        return takes_background_tasks(self.below.route)

    @property
    def limits_itself(self) -> bool:
        """Whether its decorator has a timeout that is enforced."""
        if self.decorated is None:
            return False
        policy = self.decorated.options.policy
        is_enforced = policy is not None and (isinstance(policy, str) or not policy.advisory)
        return is_enforced or self.decorated.options.timeout is not None

    def own_timeout(self, policies: Mapping[str, TimeoutPolicy]) -> tuple[bool, float | None]:
        """Return whether it has a timeout of its own or none on purpose, and the seconds."""
        options = None if self.decorated is None else self.decorated.options
        if options is not None and options.replaces_default:
            return True, options.timeout if options.policy is None else _seconds_of(options.policy, policies)
        for call in self.below.calls:
            policy = getattr(call, POLICY_ATTRIBUTE, None)
            if policy is not None:
                return True, _seconds_of(policy, policies)
            if call is no_timeout:
                return True, None
            if hasattr(call, TIMEOUT):
                return True, getattr(call, TIMEOUT)
        route = self.below.route
        if isinstance(route, CancelableRoute) and limits_of_route(route).timeout is not None:
            return True, limits_of_route(route).timeout
        return False, None


def _seconds_of(policy: str | TimeoutPolicy, policies: Mapping[str, TimeoutPolicy]) -> float | None:
    known = policies.get(policy) if isinstance(policy, str) else policy
    return None if known is None else known.enforced_timeout


def _is_stream(kind: Any) -> bool:
    if not is_a(kind, type) or issubclass(kind, CancelableStreamingResponse):
        return False
    is_of_sse_starlette = any(each.__module__.partition(".")[0] == "sse_starlette" for each in kind.__mro__)
    return issubclass(kind, StreamingResponse) or is_of_sse_starlette
