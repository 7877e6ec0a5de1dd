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
from .reasons import CancelationReason as CancelationReason
from .route import CancelableRoute as CancelableRoute
from .settings import configure as configure
from .token import CancelationToken as CancelationToken

__all__ = [
    "Cancelable",
    "CancelableRoute",
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
    "cancelable_dependency",
    "cancelable_with_timeout",
    "cancellation",
    "configure",
    "create_request_task_group",
    "current_cancelable",
    "request_task_group",
    "wait_for_disconnect",
    "with_cancelation",
]
__version__ = "0.1.0"
