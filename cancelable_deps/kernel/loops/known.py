"""Check whether the private parts of anyio and trio that polite cancellation hooks into are as expected.

This does not compare versions: each name, signature and call that `asyncio_scopes.py` and `trio_scopes.py` rely on is
looked up, without running anything. If one is missing or has changed, `public_scopes.py` does the same with public API,
and one warning is logged.
"""

from __future__ import annotations

import inspect
from asyncio import CancelledError
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ..log import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KNOWN_VERSIONS = {"anyio": "4.16", "trio": "0.31 to 0.35"}
"""The versions with which the whole test suite has passed with the hooks. Used in the warning only."""

SCOPE_SLOTS = {
    "_active",
    "_cancel_called",
    "_cancel_handle",
    "_cancel_reason",
    "_cancelled_caught",
    "_cancelling_at_enter",
    "_child_scopes",
    "_deadline",
    "_host_task",
    "_parent_scope",
    "_pending_uncancellations",
    "_shield",
    "_tasks",
    "_timeout_handle",
}
"""All attributes of anyio's scope. A scope that we insert into its tree by hand would lack any further attribute."""

_SCOPE_METHODS = {
    "__enter__": ["self"],
    "__exit__": ["self", "exc_type", "exc_val", "exc_tb"],
    "_deliver_cancellation": ["self", "origin"],
    "_restart_cancellation_in_parent": ["self"],
    "cancel": ["self", "reason"],
}

_SCOPE_CALLS = {
    # The methods that start a delivery and pass it to inner scopes, by calling the method that we override.
    "__enter__": {"_deliver_cancellation", "_child_scopes", "_tasks", "cancelling"},
    "_deliver_cancellation": {"_deliver_cancellation", "_child_scopes", "_tasks", "_shield", "cancel", "call_soon"},
    "_restart_cancellation_in_parent": {"_deliver_cancellation", "_cancel_called", "_cancel_handle", "_shield"},
    "cancel": {"_deliver_cancellation"},
    # The end of a scope, which depends on the message of the exception and the cancellation count of the task.
    "__exit__": {
        "_pending_uncancellations",
        "_cancelling_at_enter",
        "uncancel",
        "_timeout_handle",
        "_parent_cancellation_is_visible_to_us",
        "_restart_cancellation_in_parent",
        "_child_scopes",
    },
}

_SCOPE_ASKS = {
    # A scope that is left must read these properties, which our subclasses override, not the attributes behind them.
    "_effectively_cancelled": {"_cancel_called", "shield", "_parent_scope"},
    "_parent_cancellation_is_visible_to_us": {"shield", "_parent_scope", "_effectively_cancelled"},
    "shield": {"_shield"},
}

_THREAD_ASKS = {
    # A worker thread reads the properties of the scope that it was given, and of the scopes around it.
    "check_cancelled": {"threadlocals", "current_cancel_scope", "cancel_called", "shield", "_parent_scope"},
    "run_sync_in_worker_thread": {"_parent_scope", "put_nowait"},
}

_TRIO_SLOTS = {
    "CancelStatus": {"_scope", "_parent", "_children", "_tasks", "effectively_cancelled"},
    "CancelScope": {"_cancel_status", "_cancel_called", "_cancel_reason"},
    "Task": {"coro", "_child_nurseries", "_cancel_status", "_next_send_fn"},
}

_TRIO_METHODS = {
    ("CancelStatus", "recalculate"): ["self"],
    ("CancelStatus", "close"): ["self"],
    ("Task", "_activate_cancel_status"): ["self", "cancel_status"],
    ("Runner", "reschedule"): ["self", "task", "next_send"],
}

_TRIO_CALLS = {
    # A scope is read by its status only.
    ("CancelStatus", "recalculate"): {
        "_scope",
        "cancel_called",
        "parent_cancellation_is_visible_to_us",
        "_cancel_reason",
        "_tasks",
        "_children",
    },
    ("CancelStatus", "effective_deadline"): {"_scope", "deadline", "shield"},
    ("CancelScope", "_close"): {"_cancel_status", "parent_cancellation_is_visible_to_us", "effectively_cancelled"},
    ("Task", "_activate_cancel_status"): {"_cancel_status", "_tasks"},
    # A task is stepped by the object in its attribute `coro` when it is rescheduled.
    ("Runner", "reschedule"): {"coro", "send", "_next_send_fn"},
    ("Nursery", "__init__"): {"_pending_excs", "_closed", "_cancel_status"},
}


def asyncio_is_known() -> bool:
    """Return whether anyio's scopes on asyncio are as expected; log once if they are not."""
    return _report("asyncio", "anyio")


def trio_is_known() -> bool:
    """Return whether trio's tasks are as expected; log once if they are not. Loads trio, so call it only on trio."""
    return _report("trio", "trio")


def hooks_are_known(is_trio: bool) -> bool:
    """Return whether the private parts that the hooks need are as expected; public API is used otherwise."""
    return trio_is_known() if is_trio else asyncio_is_known()


@cache
def _report(backend: str, package: str) -> bool:
    strange = what_is_strange(backend)
    if strange is None:
        return True
    # Once, because the reader can do no more than choose another version.
    logger.warning(
        "%s %s has other private parts than cancelable_deps expects (%s): cancellations are delivered by its public "
        "API, which costs more. Tested: %s %s.",
        package,
        _version(package),
        strange,
        package,
        KNOWN_VERSIONS[package],
    )
    return False


def what_is_strange(backend: str) -> str | None:
    """Return the name of the first private part that is not as expected; ``None`` if there is none."""
    looks = {"asyncio": _strange_in_asyncio, "trio": _strange_in_trio}[backend]
    try:
        return next(looks(), None)
    except Exception as exc:
        # A check that fails has found an unexpected part, too.
        return f"{type(exc).__name__}: {exc}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of an unknown version"


def _strange_in_asyncio() -> Iterator[str]:
    module = import_module("anyio._backends._asyncio")
    scope = module.CancelScope
    if set(scope.__slots__) != SCOPE_SLOTS:
        yield "CancelScope.__slots__"
    for name, parameters in _SCOPE_METHODS.items():
        if not _has_signature(getattr(scope, name, None), parameters):
            yield f"CancelScope.{name}"
    for name, used in _SCOPE_CALLS.items():
        if not used <= _names_in(getattr(scope, name)):
            yield f"CancelScope.{name}"
    for name, used in _SCOPE_ASKS.items():
        if not _asks(getattr(scope, name, None), used):
            yield f"CancelScope.{name}"
    if not _can_become_another(scope):
        yield "CancelScope.__class__"
    for name, used in _THREAD_ASKS.items():
        if not used <= _names_in(getattr(module.AsyncIOBackend, name).__func__):
            yield f"AsyncIOBackend.{name}"
    if not isinstance(module._task_states.data, dict):
        yield "_task_states"
    if set(module.TaskState.__slots__) != {"__weakref__", "cancel_scope", "parent_id"}:
        yield "TaskState.__slots__"
    if not _has_signature(module.TaskState.__init__, ["self", "parent_id", "cancel_scope"]):
        yield "TaskState"
    ours, others = CancelledError("Cancelled via cancel scope 1f; why"), CancelledError("why")
    if not module.is_anyio_cancellation(ours) or module.is_anyio_cancellation(others):
        yield "is_anyio_cancellation"


def _strange_in_trio() -> Iterator[str]:
    import trio  # loads late: an application on asyncio may not have it

    import_module("outcome").Error  # noqa: B018 - in which trio sends an exception to a task
    run = import_module("trio._core._run")
    for name, slots in _TRIO_SLOTS.items():
        if not slots <= set(getattr(run, name).__slots__):
            yield f"{name}.__slots__"
    for (name, method), parameters in _TRIO_METHODS.items():
        if not _has_signature(getattr(getattr(run, name), method, None), parameters):
            yield f"{name}.{method}"
    for (name, method), used in _TRIO_CALLS.items():
        if not used <= _names_in(getattr(getattr(run, name), method)):
            yield f"{name}.{method}"
    if not inspect.ismemberdescriptor(getattr(trio.lowlevel.Task, "coro", None)):
        yield "Task.coro"
    status = run.CancelStatus
    if not _asks(
        getattr(status, "parent_cancellation_is_visible_to_us", None),
        {"_parent", "_scope", "shield", "effectively_cancelled"},
    ):
        yield "CancelStatus.parent_cancellation_is_visible_to_us"
    if getattr(getattr(status, "parent", None), "fset", None) is None:
        yield "CancelStatus.parent"
    if not {"scope", "parent"} <= set(inspect.signature(status).parameters):
        yield "CancelStatus"
    if not _can_become_another(status):
        yield "CancelStatus.__class__"


def _asks(asked: Any, used: set[str]) -> bool:
    return isinstance(asked, property) and asked.fget is not None and used <= _names_in(asked.fget)


def _can_become_another(kind: Any) -> bool:
    """Return whether the class of an object of this kind can be changed to a subclass with the same slots."""
    another: Any = type(kind.__name__, (kind,), {"__slots__": ()})
    kind.__new__(kind).__class__ = another
    return bool(kind.__dictoffset__ == 0)


def _has_signature(function: Callable[..., object] | None, parameters: list[str]) -> bool:
    return inspect.isfunction(function) and list(inspect.signature(function).parameters) == parameters


def _names_in(function: Any) -> set[str]:
    """Return all names that the code of ``function`` uses, also in its inner functions."""
    code = inspect.unwrap(function).__code__
    names = set(code.co_names)
    for constant in code.co_consts:
        if inspect.iscode(constant):
            names.update(constant.co_names)
    return names


# At import, so that a warning appears at the start of the log. Not for trio, which this would load.
hooks_are_known(is_trio=False)
