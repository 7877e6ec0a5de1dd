"""Tests, which run a second time with the hooks into anyio and trio hidden: ``pytest --public-api``."""

import os

if os.environ.get("CANCELABLE_DEPS_TESTS_PUBLIC_API"):
    # Here, as servers in subprocesses import this package too.
    from cancelable_deps import _polite

    _polite.hooks_are_known = lambda is_trio: False
