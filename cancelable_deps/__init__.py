"""Stop a FastAPI request's work when nobody needs it any more, and say why."""

# The map. A folder is a floor, and imports from the floors above it in this list alone: `tests/test_layout.py`.
# CONTRIBUTING.md says more of each file. Public are the names below and those of `checks`, `databases`, `deadlines`,
# `observability`, `operations` and `testing`; other paths may change.
#
# kernel/     stop a block of work, without the web
#   cancelable task_group token errors reasons                    what users see
#   block callbacks stoppable timed                               the classes under Cancelable, one job each
#   remaining detached                                            the time around the caller; work that goes on without it
#   timeouts condition shields interrupting threads               what ends a block, what delays that, where work runs
#     processes/(pool child)
#   loops/(base current asyncio_loop trio_loop thread_loop        the event loops,
#     asyncio_scopes trio_scopes unwinding known                  polite cancellation in their scopes,
#     public_scopes public_asyncio public_trio)                   and the same by public API alone
#   settings events options log foreign unwrap members sweep      tools
#   registry                                                      what all that runs in a loop has in common
# hosts/      facts about other software that it does not promise
#   starlette fastapi route_handlers frames                       the frameworks
#   servers serving signals debugger                              their surroundings
# request/    one request or WebSocket, whichever doors cover it
#   first_door state client progress lifetime                     its first block, and the state that all doors share
#   in_flight connection shutdown                                 all requests of a loop, how one is found, how all end
#   naming                                                        the id that a client gives its request
#   read_ahead http_reader websocket_reader                       the only code that awaits receive()
#   blocks websocket postponed policies limits                    what is stopped, when, and after how long
#   watchers defaults                                             what listens; the timeout that a route replaces
#   client_timeout durations admission                            the time that a client gives, in its headers
#   run response abort sse                                        its way through a door, and its response
#   report                                                        what is told of it to hooks
# doors/      the ways into an application
#   decorator options endpoint dress generators                   @with_cancelation
#   middleware base_http wsgi route                               the application, one router
#   dependencies event streaming progress websocket lifespan      handles, responses, WebSockets, the shutdown
#   at_start marks                                                for the checks
# deadlines/  the time of a request for the services that it calls
#   forward transport
# operations/ what runs, and stopping it from elsewhere
#   operations model errors names dependencies keys               what users see
#   running local remembered conditions listing clock             what runs in this worker
#   router schemas rights bodies prefer answers events_stream     the routes,
#     page                                                        and the page in them
#   cancels watching turns background archive doubtful records    what is done with it, here and in other workers
#     accepted stoppable report
#   worker exchange outbox entries                                one worker, and what workers tell each other
#   backend memory memory_keys together                           the store that they share
#   redis/(store scripts layout graves choice client batches      the same in Redis,
#     redis_py core_redis held_client)                            by either client library
# observability/ what an operator sees
#   telemetry metrics spans gauges                                metrics and spans of OpenTelemetry
#   operation_ids                                                 the id of the operation in each line of a log
# databases/  sessions of SQLAlchemy, limits of PostgreSQL
#   session statements
# checks/     what in an application breaks or weakens cancellation; __main__ is its command
#   stack store start target                                      how one asks: a call, a lifespan, a command
#   around inside outside findings                                what is found: middleware, handlers, the server
#   survey handler reading                                        how: the places of an application, their code
# testing/    a client that hangs up
#   client calls websockets clock tasks hub

import sys
import types

from .doors.decorator import with_cancelation as with_cancelation
from .doors.dependencies import CancellationEvent as CancellationEvent
from .doors.dependencies import RequestCancelable as RequestCancelable
from .doors.dependencies import RequestTaskGroup as RequestTaskGroup
from .doors.dependencies import cancelable_dependency as cancelable_dependency
from .doors.dependencies import cancelable_with_timeout as cancelable_with_timeout
from .doors.dependencies import cancellation as cancellation
from .doors.dependencies import cancellation_event as cancellation_event
from .doors.dependencies import create_request_task_group as create_request_task_group
from .doors.dependencies import no_timeout as no_timeout
from .doors.dependencies import request_task_group as request_task_group
from .doors.dependencies import timeout_policy as timeout_policy
from .doors.dependencies import wait_for_disconnect as wait_for_disconnect
from .doors.event import RequestCancellationEvent as RequestCancellationEvent
from .doors.lifespan import begin_shutdown as begin_shutdown
from .doors.lifespan import cancelation_lifespan as cancelation_lifespan
from .doors.lifespan import shutdown_token as shutdown_token
from .doors.middleware import RequestCancelationMiddleware as RequestCancelationMiddleware
from .doors.progress import progress_response as progress_response
from .doors.route import CancelableRoute as CancelableRoute
from .doors.streaming import CancelableStreamingResponse as CancelableStreamingResponse
from .doors.streaming import cancelable_streaming_response as cancelable_streaming_response
from .doors.websocket import CancelableWebSocket as CancelableWebSocket
from .kernel.cancelable import Cancelable as Cancelable
from .kernel.cancelable import current_cancelable as current_cancelable
from .kernel.detached import Detached as Detached
from .kernel.errors import CancelationError as CancelationError
from .kernel.errors import ConditionCancelation as ConditionCancelation
from .kernel.errors import DisconnectCancelation as DisconnectCancelation
from .kernel.errors import ManualCancelation as ManualCancelation
from .kernel.errors import ParentCancelation as ParentCancelation
from .kernel.errors import SignalCancelation as SignalCancelation
from .kernel.errors import TimeoutCancelation as TimeoutCancelation
from .kernel.reasons import CancelationReason as CancelationReason
from .kernel.settings import configure as configure
from .kernel.token import CancelationToken as CancelationToken
from .request.policies import TimeoutPolicy as TimeoutPolicy

__all__ = [
    "Cancelable",
    "CancelableRoute",
    "CancelableStreamingResponse",
    "CancelableWebSocket",
    "CancelationError",
    "CancelationReason",
    "CancelationToken",
    "CancellationEvent",
    "ConditionCancelation",
    "Detached",
    "DisconnectCancelation",
    "ManualCancelation",
    "ParentCancelation",
    "RequestCancelable",
    "RequestCancelationMiddleware",
    "RequestCancellationEvent",
    "RequestTaskGroup",
    "SignalCancelation",
    "TimeoutCancelation",
    "TimeoutPolicy",
    "begin_shutdown",
    "cancelable_dependency",
    "cancelable_streaming_response",
    "cancelable_with_timeout",
    "cancelation_lifespan",
    "cancellation",
    "cancellation_event",
    "configure",
    "create_request_task_group",
    "current_cancelable",
    "no_timeout",
    "progress_response",
    "request_task_group",
    "shutdown_token",
    "timeout_policy",
    "wait_for_disconnect",
    "with_cancelation",
]
__version__ = "0.2.0"

# The former paths of modules, which can be imported until 0.3, and the places of their names now.
# Why no files: they would be a floor of their own. Type checkers do not see these paths.
_FORMER_PATHS = {
    "cancelable": ["kernel.cancelable"],
    "decorator": ["doors.decorator", "doors.options"],
    "dependencies": ["doors.dependencies"],
    "errors": ["kernel.errors"],
    "middleware": ["doors.middleware"],
    "policies": ["request.policies", "doors.dependencies", "doors.middleware", "kernel.options", "request.response"],
    "progress": ["doors.progress"],
    "reasons": ["kernel.reasons"],
    "route": ["doors.route"],
    "settings": ["kernel.settings", "kernel.options"],
    "shutdown": ["doors.lifespan"],
    "streaming": ["doors.streaming"],
    "task_group": ["kernel.task_group"],
    "token": ["kernel.token"],
    "websocket": ["doors.websocket"],
}


def _former_module(path: str, places: list[str]) -> types.ModuleType:
    """Return the module that has all names of a former one: that of now, or one made of several."""
    now = [sys.modules[f"{__name__}.{place}"] for place in places]
    if len(now) == 1:
        return now[0]
    made = types.ModuleType(f"{__name__}.{path}", now[0].__doc__)
    for module in reversed(now):  # The first place has the last word.
        vars(made).update((name, value) for name, value in vars(module).items() if not name.startswith("__"))
    return made


def _keep_former_paths() -> None:
    for path, places in _FORMER_PATHS.items():
        globals()[path] = sys.modules[f"{__name__}.{path}"] = _former_module(path, places)


_keep_former_paths()
