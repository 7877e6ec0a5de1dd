"""The floors of the package: what a file may import, and whose private names it may use."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import cancelable_deps

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PACKAGE = Path(cancelable_deps.__file__).parent
FLOORS = (
    "kernel",
    "hosts",
    "request",
    "doors",
    "databases",
    "deadlines",
    "operations",
    "observability",
    "checks",
    "testing",
)
FILES = sorted(PACKAGE.rglob("*.py"))
LATE = "# loads late"
KNOW_PRIVATE_NAMES_OF_OTHERS = ("kernel/loops/", "hosts/", "testing/clock.py")
LATE_BY_NATURE = "kernel/loops/current.py"
MOST_METHODS, MOST_LINES = 30, 50
MAPS = {"cancelable_deps/__init__.py": r"# The map\..*?\n\n", "CONTRIBUTING.md": r"```text\ntesting/.*?```"}
PUBLIC_ALL_THE_SAME = {"_exit", "_replace", "_asdict", "_fields"}  # Of `os` and of named tuples, and documented.
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def floor_of(name: str) -> int:
    first = name.partition("/")[0]
    return FLOORS.index(first) if first in FLOORS else len(FLOORS)


def imports_of(path: Path) -> Iterator[str]:
    """Yield the files of the package that a file imports, for types and late ones too."""
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        elif (node.module or "").partition(".")[0] == PACKAGE.name:
            base = PACKAGE.parent.joinpath(*(node.module or "").split("."))
        else:
            continue
        for alias in node.names:
            files = (base / f"{alias.name}.py", base / alias.name / "__init__.py", base.with_suffix(".py"))
            yield name_of(next((file for file in files if file.exists()), base / "__init__.py"))


def problems(found: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted(set(found))


def test_every_file_stands_on_a_floor() -> None:
    assert [name_of(path) for path in FILES if path.parent == PACKAGE] == ["__init__.py", "__main__.py"]
    assert {name_of(path).partition("/")[0] for path in FILES} == {"__init__.py", "__main__.py", *FLOORS}


def test_no_import_goes_up() -> None:
    found = ((name_of(path), goal) for path in FILES for goal in imports_of(path))
    assert problems((name, goal) for name, goal in found if floor_of(goal) > floor_of(name)) == []


def test_there_is_no_circle() -> None:
    arrows = set(problems((name_of(path), goal) for path in FILES for goal in imports_of(path)))
    while free := {name for _, name in arrows} - {name for name, _ in arrows}:
        arrows = {arrow for arrow in arrows if arrow[1] not in free}
    while free := {name for name, _ in arrows} - {name for _, name in arrows}:
        arrows = {arrow for arrow in arrows if arrow[0] not in free}
    assert not arrows


def test_no_import_stands_in_a_function() -> None:
    files = [path for path in FILES if name_of(path) != LATE_BY_NATURE]
    assert problems((name_of(path), text) for path in files for text in late_imports(path)) == []


def late_imports(path: Path) -> Iterator[str]:
    lines = path.read_text().splitlines()
    functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, Function)]
    for node in (inner for function in functions for inner in ast.walk(function)):
        if isinstance(node, ast.Import | ast.ImportFrom) and LATE not in lines[node.lineno - 1]:
            yield ast.unparse(node)


def test_private_names_of_others_stand_where_others_are_known() -> None:
    files = [path for path in FILES if not name_of(path).startswith(KNOW_PRIVATE_NAMES_OF_OTHERS)]
    assert problems((name_of(path), name) for path in files for name in private_names_of_others(path)) == []


def private_names_of_others(path: Path) -> Iterator[str]:
    """Yield the private names that a file uses, or imports, and does not define: others' files or packages do."""
    own = set(names_defined(path))
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute):
            if is_private(node.attr) and node.attr not in own and not is_its_own(node):
                yield node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            parts = (getattr(node, "module", None) or "").split(".") + [alias.name for alias in node.names]
            yield from (part for part in ".".join(parts).split(".") if is_private(part))


def names_defined(path: Path) -> Iterator[str]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, Function | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_its_own(node):
            yield node.attr


def is_its_own(attribute: ast.Attribute) -> bool:
    return isinstance(attribute.value, ast.Name) and attribute.value.id in ("self", "cls")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC_ALL_THE_SAME


def test_no_class_has_too_many_methods() -> None:
    classes = ((path, node) for path in FILES for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef))
    counted = ((path, node.name, sum(isinstance(each, Function) for each in node.body)) for path, node in classes)
    assert problems((name_of(path), name) for path, name, count in counted if count > MOST_METHODS) == []


def test_no_function_is_too_long() -> None:
    functions = ((path, node) for path in FILES for node in ast.walk(tree_of(path)) if isinstance(node, Function))
    assert problems((name_of(path), node.name) for path, node in functions if length_of(node) > MOST_LINES) == []


def length_of(function: Function) -> int:
    first = function.body[0]
    docstring = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(function) else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


@pytest.mark.parametrize("page", MAPS)
def test_the_maps_name_every_file(page: str) -> None:
    found = re.search(MAPS[page], (PACKAGE.parent / page).read_text(), re.DOTALL)
    assert found
    words = set(re.findall(r"\w+", found[0]))
    assert sorted({path.stem for path in FILES} - words - {"__init__"}) == []


@pytest.mark.parametrize("folder", ["", *FLOORS])
def test_every_folder_says_what_lives_there(folder: str) -> None:
    assert ast.get_docstring(tree_of(PACKAGE / folder / "__init__.py"))
