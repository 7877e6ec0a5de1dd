"""Operations: list what runs, stop it by its id, let the latest win, start work that outlives its request."""

from .dependencies import RequestOperation as RequestOperation
from .dependencies import RequestOperations as RequestOperations
from .errors import OperationBusy as OperationBusy
from .errors import OperationFailed as OperationFailed
from .errors import OperationLost as OperationLost
from .errors import OperationsUnavailable as OperationsUnavailable
from .errors import OperationTaken as OperationTaken
from .errors import OperationUnknown as OperationUnknown
from .keys import at_most as at_most
from .keys import latest_only as latest_only
from .memory import MemoryBackend as MemoryBackend
from .model import Cancelation as Cancelation
from .model import Operation as Operation
from .model import OperationEvent as OperationEvent
from .model import OperationList as OperationList
from .model import OperationState as OperationState
from .model import Worker as Worker
from .names import ANYONE as ANYONE
from .operations import Operations as Operations
from .redis import RedisBackend as RedisBackend
from .router import operations_router as operations_router
from .running import RunningOperation as RunningOperation

__all__ = [
    "ANYONE",
    "Cancelation",
    "MemoryBackend",
    "Operation",
    "OperationBusy",
    "OperationEvent",
    "OperationFailed",
    "OperationList",
    "OperationLost",
    "OperationState",
    "OperationTaken",
    "OperationUnknown",
    "Operations",
    "OperationsUnavailable",
    "RedisBackend",
    "RequestOperation",
    "RequestOperations",
    "RunningOperation",
    "Worker",
    "at_most",
    "latest_only",
    "operations_router",
]
