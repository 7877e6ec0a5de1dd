"""What is exported, and how it looks to a type checker: mypy and pyright read this file as a user's code."""

from __future__ import annotations

import subprocess
import sys
import types
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, assert_type

import pytest
from anyio.abc import TaskGroup
from fastapi import Depends, FastAPI
from starlette.requests import Request

import cancelable_deps
from cancelable_deps import (
    Cancelable,
    CancelationReason,
    CancelationToken,
    CancellationEvent,
    RequestCancelable,
    RequestCancelationMiddleware,
    RequestTaskGroup,
    cancelable_with_timeout,
    create_request_task_group,
    current_cancelable,
    wait_for_disconnect,
    with_cancelation,
)

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = "".join(path.read_text() for path in (Path(__file__).parent.parent / "examples").rglob("*.py"))


def test_all_is_what_is_there() -> None:
    there = {
        name
        for name, value in vars(cancelable_deps).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert there == set(cancelable_deps.__all__)
    assert cancelable_deps.__all__ == sorted(cancelable_deps.__all__)


@pytest.mark.parametrize("name", cancelable_deps.__all__)
def test_everything_is_shown_to_users(name: str) -> None:
    told_by_pattern = name.endswith("Cancelation") and "a class for each reason" in README
    assert name in README or name in EXAMPLES or told_by_pattern


@pytest.mark.parametrize("name", cancelable_deps.__all__)
def test_everything_has_a_docstring(name: str) -> None:
    value = getattr(cancelable_deps, name)
    if name in {"RequestCancelable", "RequestTaskGroup", "CancellationEvent"}:
        assert value.__metadata__
    else:
        assert value.__doc__


def test_importing_brings_no_optional_dependency() -> None:
    code = (
        "import sys, cancelable_deps\n"
        "print([m for m in ('trio', 'uvloop', 'uvicorn', 'httpx', 'pytest', 'sqlalchemy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@with_cancelation
async def bare(item_id: int, *, flag: bool = False) -> str:
    """A user's endpoint."""
    return f"{item_id} {flag}"


@with_cancelation(timeout=timedelta(seconds=3), status_codes={CancelationReason.TIMEOUT: 503}, on_cancel=print)
async def configured(item_id: int) -> list[int]:
    return [item_id]


async def user_code(
    request: Request,
    cancel: RequestCancelable,
    get_task_group: RequestTaskGroup,
    event: CancellationEvent,
    limited: Annotated[Cancelable, Depends(cancelable_with_timeout(30))],
) -> None:
    assert_type(await bare(1, flag=True), str)
    assert_type(await configured(1), list[int])
    async with cancel as entered:
        assert_type(entered, Cancelable)
    assert_type(cancel.reason, CancelationReason | None)
    assert_type(cancel.remaining(), float)
    assert_type(await cancel.cancel(message="enough"), bool)
    assert_type(cancel.cancel_nowait(CancelationReason.MANUAL), bool)
    async with limited, limited.shield():
        limited.check()
    async with get_task_group() as tg:
        assert_type(tg, TaskGroup)
        tg.start_soon(bare, 1)
    assert_type(create_request_task_group(request), AbstractAsyncContextManager[TaskGroup])
    assert_type(event.is_set(), bool)
    assert_type(await event.wait(), CancelationReason)
    assert_type(event.reason, CancelationReason | None)
    assert_type(await wait_for_disconnect(request), None)
    assert_type(current_cancelable(), Cancelable | None)
    assert_type(Cancelable.with_timeout(3), Cancelable)
    token = CancelationToken()
    assert_type(await token.wait(), CancelationReason)

    @cancel.on_cancel
    def told(block: Cancelable) -> None: ...

    told(cancel)


def test_middleware_is_accepted_by_add_middleware() -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware, default_timeout=30, exclude=["/health"], cleanup_grace=1.5)
    assert app.user_middleware
