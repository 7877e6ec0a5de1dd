"""Tests. With ``pytest --public-api``, those of the kernel and the doors run with the hooks into anyio and trio hidden."""

import os

HIDDEN = "CANCELABLE_DEPS_TESTS_PUBLIC_API"
"""Set in the environment by that option, as servers in subprocesses import this package too."""


def hide_hooks() -> None:
    from cancelable_deps.kernel.loops import known

    known.hooks_are_known = lambda is_trio: False


if HIDDEN in os.environ:
    hide_hooks()
