"""The errors of operations. Each is an ``HTTPException``, and so a response."""

from __future__ import annotations

from starlette.exceptions import HTTPException

RETRY_AFTER_SECONDS = 1


class OperationsUnavailable(HTTPException):
    """The store that the workers share cannot be reached (status 503). The call may take effect all the same.

    The response has a ``Retry-After`` header of one second.
    """

    def __init__(self, detail: str = "The store of operations cannot be reached") -> None:
        super().__init__(503, detail, headers={"retry-after": str(RETRY_AFTER_SECONDS)})


class OperationUnknown(HTTPException, LookupError):
    """There is no such operation, it is forgotten, or it belongs to somebody else (status 404)."""

    def __init__(self) -> None:
        super().__init__(404, "There is no such operation")


class OperationBusy(HTTPException):
    """The key is taken by another operation, so that this one is not started (status 409)."""

    def __init__(
        self, detail: str = "An operation of the same key is running", *, status_code: int = 409, retry_after: int = 1
    ) -> None:
        super().__init__(status_code, detail, headers={"retry-after": str(retry_after)})


class OperationTaken(HTTPException):
    """The id belongs to an operation of another owner (status 409)."""

    def __init__(self) -> None:
        super().__init__(409, "This id is taken")


class OperationLost(HTTPException):
    """The worker of the operation is gone, and with it the result (status 410)."""

    def __init__(self) -> None:
        super().__init__(410, "The worker of this operation is gone; how far it came is not known")


class OperationFailed(HTTPException):
    """The work has failed in another process, or its result could not be kept (status 500)."""

    def __init__(self, detail: str = "The work failed", status_code: int = 500) -> None:
        super().__init__(status_code, detail)
