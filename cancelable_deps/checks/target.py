"""Find the application that a command line names: ``module:attribute``, as for uvicorn."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

_HOW = 'write it as for uvicorn: "module:app", as in main:app, package.main:app, main:server.app or main:create_app()'


class BadTarget(Exception):
    """A target that leads to no application; the message says why, and how to write one."""


def load(target: str, *, factory: bool = False) -> Any:
    """Return the ASGI application that ``target`` names, or that the function makes which it names.

    The current folder is the first in which modules are looked for.

    :param factory: whether the attribute is a function without arguments that returns the application; a target that
        ends with ``()`` says so itself.
    :raises BadTarget: if there is none.
    """
    path, _, attribute = target.partition(":")
    if not path or not attribute:
        raise BadTarget(f"{target!r} names no application: {_HOW}")
    if attribute.endswith("()"):
        attribute, factory = attribute.removesuffix("()"), True
    found = _attribute(_module(path, target), attribute, target)
    if factory:
        try:
            found = found()
        except Exception as exc:
            raise BadTarget(f"{target}: calling it has failed: {type(exc).__name__}: {exc}") from exc
    if not callable(found):
        raise BadTarget(f"{target} is {found!r}, and no ASGI application: {_HOW}")
    return found


def _module(path: str, target: str) -> Any:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return import_module(path)
    except (Exception, SystemExit) as exc:
        if isinstance(exc, ModuleNotFoundError) and exc.name and f"{path}.".startswith(f"{exc.name}."):
            raise BadTarget(
                f"{target}: there is no module {exc.name!r} in {folder} or the environment: {_HOW}"
            ) from exc
        raise BadTarget(f"{target}: importing {path} has failed: {type(exc).__name__}: {exc}") from exc


def _attribute(module: Any, attribute: str, target: str) -> Any:
    found = module
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            where = module.__name__ if found is module else f"{module.__name__}:{attribute}"
            raise BadTarget(f"{target}: {where} has no attribute {name!r}: {_HOW}") from None
    return found
