"""``python -m cancelable_deps check module:app``: what in an application breaks or weakens cancellation."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import traceback
from dataclasses import asdict
from typing import TYPE_CHECKING

import anyio

from .checks.findings import LEVELS
from .checks.stack import backends_of, check_stack, in_order
from .checks.store import check_store
from .checks.target import BadTarget, load
from .kernel.options import seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import ASGIApp

    from .checks.findings import Finding

_WIDTH = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code: 1 if there are warnings, 0 if there are none, 2 if it could not check."""
    options = _parser().parse_args(arguments)
    try:
        app = load(options.target, factory=options.factory)
        findings = [*check_stack(app, workers=options.workers, server_grace=options.server_grace), *_stores(app)]
    except BadTarget as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except Exception:
        # Not with the exit code that Python would give it: that of warnings.
        traceback.print_exc()
        return 2
    findings = in_order([finding for finding in findings if finding.code not in options.ignore])
    _print_json(options.target, findings) if options.json else _print(options.target, findings)
    return int(any(finding.level == "warning" for finding in findings))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cancelable_deps")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    check = commands.add_parser(
        "check",
        help="name what in an application breaks or weakens cancellation",
        description="Name what in an application breaks or weakens cancellation, and what to do about it. Its module is "
        "imported, and the Redis of its operations is asked; nothing else is run. Exits with 1 if there are warnings, with 0 if there are none, with 2 if it "
        "could not check.",
    )
    check.add_argument("target", help="the application, as for uvicorn: main:app, main:create_app()")
    check.add_argument("--factory", action="store_true", help="the target is a function that returns the application")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument(
        "--ignore",
        action="append",
        default=[],
        choices=sorted(LEVELS),
        metavar="CODE",
        help="leave a code out; repeat it",
    )
    check.add_argument(
        "--workers",
        type=_processes,
        default=_workers(),
        help="the processes that will serve it; the default is $WEB_CONCURRENCY",
    )
    check.add_argument(
        "--server-grace", type=_seconds, metavar="SECONDS", help="how long the server waits for requests at the end"
    )
    return parser


def _processes(given: str) -> int:
    if not given.isdecimal() or not int(given):
        raise argparse.ArgumentTypeError(f"{given!r} is not a number of processes")
    return int(given)


def _seconds(given: str) -> float:
    try:
        return seconds(float(given), "it")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given!r} is not a number of seconds") from None


def _workers() -> int | None:
    try:
        return _processes(os.environ.get("WEB_CONCURRENCY", ""))
    except argparse.ArgumentTypeError:
        return None  # The server will say so.


def _stores(app: ASGIApp) -> list[Finding]:
    return [finding for backend in backends_of(app) for finding in anyio.run(check_store, backend)]


def _print(target: str, findings: Sequence[Finding]) -> None:
    for finding in findings:
        print(f"{finding.level}: {finding.code} ({finding.where})")
        print(textwrap.fill(finding.message, _WIDTH, initial_indent="    ", subsequent_indent="    "))
    warnings = sum(finding.level == "warning" for finding in findings)
    print(f"{target}: {_number(warnings, 'warning')}, {_number(len(findings) - warnings, 'note')}")


def _number(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"


def _print_json(target: str, findings: Sequence[Finding]) -> None:
    print(json.dumps({"target": target, "findings": [asdict(finding) for finding in findings]}, indent=2))


if __name__ == "__main__":
    sys.exit(main())
