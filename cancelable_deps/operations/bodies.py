"""The JSON bodies of the routes of operations, bounded, and read when it is known who asks."""

# Why not as parameters of the handlers: FastAPI reads the body before it asks who sends it, without a limit, and fails at
# an error whose input it cannot encode, such as half of a surrogate pair.

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

MOST_BYTES: Final = 64 * 1024

Model = TypeVar("Model", bound=BaseModel)


async def body_of(request: Request, model: type[Model]) -> Model:
    """Return the body of a request; a body that is empty has the default values.

    :raises HTTPException: 413 if it is too long, 415 if it is not said to be JSON.
    :raises RequestValidationError: if it does not fit.
    """
    body = await _bytes_of(request)
    if not body.strip():
        return _validated(model, {})
    # Also because a form of another site could send any other type without being asked for its right to.
    if _media_type_of(request) != "application/json":
        raise HTTPException(415, "The body has to be JSON, with content-type: application/json")
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise _invalid(("body",), "The body is not valid JSON", "json_invalid") from None
    return _validated(model, {} if data is None else _encodable(data))


@contextmanager
def refusing(place: str) -> Iterator[None]:
    """Answer a ``ValueError`` inside with 422, as FastAPI answers values that are wrong.

    :param place: ``"query"`` or ``"body"``.
    """
    try:
        yield
    except ValueError as exc:
        raise _invalid((place,), str(exc), "value_error") from None


def body_schema(model: type[BaseModel], *, is_required: bool) -> dict[str, Any]:
    """Return the part of a route's OpenAPI that describes its body."""
    content = {"application/json": {"schema": model.model_json_schema()}}
    return {"requestBody": {"content": content, "required": is_required}}


async def _bytes_of(request: Request) -> bytes:
    received = bytearray()
    try:
        async for chunk in request.stream():
            received += chunk
            if len(received) > MOST_BYTES:
                raise HTTPException(413, f"The body has more than {MOST_BYTES:,} bytes")
    except ClientDisconnect:
        raise HTTPException(400, "The client left before its request was complete") from None
    return bytes(received)


def _media_type_of(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _validated(model: type[Model], data: Any) -> Model:
    try:
        return model.model_validate(data)
    except ValidationError as exc:
        # Without the input, which may be long, or something that JSON cannot express.
        errors = exc.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([{**error, "loc": ("body", *error["loc"])} for error in errors]) from None


def _invalid(loc: tuple[str, ...], message: str, kind: str) -> RequestValidationError:
    return RequestValidationError([{"type": kind, "loc": loc, "msg": message}])


def _encodable(value: Any) -> Any:
    """Return a value without halves of surrogate pairs, which JSON can express and nothing else."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return {_encodable(name): _encodable(each) for name, each in value.items()}
    return [_encodable(each) for each in value] if isinstance(value, list) else value
