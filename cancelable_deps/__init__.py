"""Stop a FastAPI request's work when nobody needs it any more, and say why."""

from .cancelable import Cancelable as Cancelable
from .cancelable import current_cancelable as current_cancelable
from .decorator import with_cancelation as with_cancelation
from .dependencies import CancellationEvent as CancellationEvent
from .dependencies import RequestCancelable as RequestCancelable
from .dependencies import RequestTaskGroup as RequestTaskGroup
from .dependencies import cancelable_dependency as cancelable_dependency
from .dependencies import cancelable_with_timeout as cancelable_with_timeout
from .dependencies import cancellation as cancellation
from .dependencies import create_request_task_group as create_request_task_group
from .dependencies import request_task_group as request_task_group
from .dependencies import wait_for_disconnect as wait_for_disconnect
from .errors import CancelationError as CancelationError
from .errors import ConditionCancelation as ConditionCancelation
from .errors import DisconnectCancelation as DisconnectCancelation
from .errors import ManualCancelation as ManualCancelation
from .errors import ParentCancelation as ParentCancelation
from .errors import SignalCancelation as SignalCancelation
from .errors import TimeoutCancelation as TimeoutCancelation
from .middleware import RequestCancelationMiddleware as RequestCancelationMiddleware
from .policies import TimeoutPolicy as TimeoutPolicy
from .policies import no_timeout as no_timeout
from .policies import timeout_policy as timeout_policy
from .progress import progress_response as progress_response
from .reasons import CancelationReason as CancelationReason
from .route import CancelableRoute as CancelableRoute
from .settings import configure as configure
from .shutdown import begin_shutdown as begin_shutdown
from .shutdown import cancelation_lifespan as cancelation_lifespan
from .shutdown import shutdown_token as shutdown_token
from .streaming import CancelableStreamingResponse as CancelableStreamingResponse
from .streaming import cancelable_streaming_response as cancelable_streaming_response
from .token import CancelationToken as CancelationToken
from .websocket import CancelableWebSocket as CancelableWebSocket

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
    "DisconnectCancelation",
    "ManualCancelation",
    "ParentCancelation",
    "RequestCancelable",
    "RequestCancelationMiddleware",
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
__version__ = "0.1.0"
