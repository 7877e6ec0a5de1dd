"""The former paths of modules: what users could import from them is still there, and the same object as everywhere."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys

import pytest

import cancelable_deps
from cancelable_deps import CancelationError, TimeoutCancelation

NAMES = {
    "cancelable": ["Cancelable", "current_cancelable"],
    "decorator": ["UNSET", "cover_generator", "with_cancelation"],
    "dependencies": [
        "CancellationEvent",
        "RequestCancelable",
        "RequestCancellationEvent",
        "RequestTaskGroup",
        "cancelable_dependency",
        "cancelable_with_timeout",
        "cancellation",
        "create_request_task_group",
        "request_task_group",
        "wait_for_disconnect",
    ],
    "errors": [
        "RETRY_AFTER_SECONDS",
        "CancelationError",
        "ConditionCancelation",
        "DisconnectCancelation",
        "ManualCancelation",
        "ParentCancelation",
        "SignalCancelation",
        "TimeoutCancelation",
    ],
    "middleware": ["Exclude", "RequestCancelationMiddleware"],
    "policies": [
        "POLICY_ATTRIBUTE",
        "ResponseWriter",
        "TimeoutPolicy",
        "answer",
        "check_names_at_start",
        "checked_status",
        "found",
        "named",
        "no_timeout",
        "timeout_policy",
        "written",
    ],
    "progress": ["progress_response"],
    "reasons": ["CancelationReason"],
    "route": ["CancelableRoute"],
    "settings": ["configure", "seconds", "settings"],
    "shutdown": ["begin_shutdown", "cancelation_lifespan", "shutdown_token"],
    "streaming": ["CancelableStreamingResponse", "cancelable_streaming_response", "keep_for_stream"],
    "task_group": ["CancelableTaskGroup"],
    "token": [
        "Callback",
        "CancelationToken",
        "Cause",
        "Listener",
        "call_in_passing",
        "call_logged",
        "check_reason",
        "close_unawaited",
        "telling_everybody",
    ],
    "websocket": ["CancelableWebSocket"],
}


@pytest.mark.parametrize("path", NAMES)
def test_a_former_path_has_all_its_names(path: str) -> None:
    module = importlib.import_module(f"cancelable_deps.{path}")
    assert [name for name in NAMES[path] if not hasattr(module, name)] == []
    assert getattr(cancelable_deps, path) is module


@pytest.mark.parametrize("path", NAMES)
def test_an_exported_name_is_the_same_object_there(path: str) -> None:
    module = importlib.import_module(f"cancelable_deps.{path}")
    exported = set(NAMES[path]) & set(cancelable_deps.__all__)
    assert [name for name in exported if getattr(module, name) is not getattr(cancelable_deps, name)] == []


# Each time nothing of the package has been imported: FastAPI has, which takes most of the time.
IMPORTS = """
import sys

for path, name in {names!r}:
    for module in [module for module in sys.modules if module.partition(".")[0] == "cancelable_deps"]:
        del sys.modules[module]
    exec(f"import cancelable_deps.{{path}} as m; from cancelable_deps.{{path}} import {{name}} as it; assert m.{{name}} is it")
    print(path)
"""


def test_a_former_path_may_be_the_first_import() -> None:
    code = IMPORTS.format(names=[(path, names[0]) for path, names in NAMES.items()])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stderr, done.stdout.split()) == ("", list(NAMES))


def test_an_error_pickled_by_its_former_path_is_the_error_of_now() -> None:
    assert pickle.loads(b"ccancelable_deps.errors\nTimeoutCancelation\n.") is TimeoutCancelation
    assert issubclass(TimeoutCancelation, CancelationError)
