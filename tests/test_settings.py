from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest

from cancelable_deps import Cancelable, configure
from cancelable_deps.kernel.options import seconds
from cancelable_deps.kernel.settings import settings

GOOD = [
    (0, 0.0),
    (3, 3.0),
    (0.25, 0.25),
    (math.inf, math.inf),
    (timedelta(minutes=1, milliseconds=500), 60.5),
]
BAD: list[tuple[Any, type[Exception], str]] = [
    (-1, ValueError, "must be zero or more seconds, not -1"),
    (-0.001, ValueError, "must be zero or more seconds, not -0.001"),
    (-math.inf, ValueError, "must be zero or more seconds, not -inf"),
    (timedelta(seconds=-1), ValueError, "must be zero or more seconds, not -1.0"),
    (math.nan, ValueError, "must be zero or more seconds, not nan"),
    ("5", TypeError, r"takes seconds \(int, float\) or a timedelta, not '5'"),
    (True, TypeError, r"takes seconds \(int, float\) or a timedelta, not True"),
    (1j, TypeError, r"takes seconds \(int, float\) or a timedelta, not 1j"),
    (Decimal(1), TypeError, r"takes seconds \(int, float\) or a timedelta, not Decimal"),
    ([1], TypeError, r"takes seconds \(int, float\) or a timedelta, not \[1\]"),
]
TAKERS: list[tuple[str, Callable[[Any], object]]] = [
    ("cleanup_grace", lambda value: configure(cleanup_grace=value)),
    ("listen_after", lambda value: configure(listen_after=value)),
    ("timeout", lambda value: Cancelable(timeout=value)),
    ("timeout", Cancelable.with_timeout),
    ("cleanup_grace", lambda value: Cancelable(cleanup_grace=value)),
    ("interval", lambda value: Cancelable.with_condition(bool, value)),
]


@pytest.fixture(autouse=True)
def settings_restored() -> Iterator[None]:
    kept = (settings.cleanup_grace, settings.listen_after)
    yield
    settings.cleanup_grace, settings.listen_after = kept


def test_the_defaults() -> None:
    assert (settings.cleanup_grace, settings.listen_after) == (5.0, 0.005)


@pytest.mark.parametrize(("value", "expected"), GOOD)
def test_configure_takes_seconds(value: float | timedelta, expected: float) -> None:
    assert seconds(value, "it") == expected
    configure(cleanup_grace=value, listen_after=value)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert (settings.cleanup_grace, settings.listen_after) == (expected, expected)


def test_what_is_not_named_stays() -> None:
    configure(cleanup_grace=2)
    configure(listen_after=1)
    configure()
    assert (settings.cleanup_grace, settings.listen_after) == (2.0, 1.0)


@pytest.mark.parametrize(("value", "error", "text"), BAD)
@pytest.mark.parametrize(("what", "take"), TAKERS)
def test_nonsense_is_refused_at_once_and_named(
    what: str, take: Callable[[Any], object], value: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"^{what} {text}"):
        take(value)
    assert (settings.cleanup_grace, settings.listen_after) == (5.0, 0.005)


def test_a_refused_call_changes_nothing() -> None:
    with pytest.raises(ValueError, match="listen_after"):
        configure(cleanup_grace=1, listen_after=-1)
    assert settings.cleanup_grace == 5.0
