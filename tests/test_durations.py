"""The syntax of the headers in which a client gives its time; whatever it sends is a number, nothing, or a ValueError."""

from __future__ import annotations

import math
import time
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cancelable_deps.request.durations import (
    LONGEST,
    LONGEST_LIST,
    PREFER,
    checked_name,
    header_named,
    read_all,
    read_wait,
    with_wait,
)

NAMES = [PREFER, "grpc-timeout", "connect-timeout-ms", "x-envoy-expected-rq-timeout-ms", "x-budget"]
RESOLUTION = {PREFER: 1.0, "connect-timeout-ms": 1e-3, "x-envoy-expected-rq-timeout-ms": 1e-3, "x-budget": 1e-3}
each_header = pytest.mark.parametrize("name", NAMES)

latin = st.text(st.characters(max_codepoint=255))
likely = st.text('0123456789HMSmun.;, =\\"waitWAIT-+eE_\t\u0665\xb2', max_size=40)
seconds = st.floats(0, 1e6)


@each_header
@given(values=st.lists(latin | likely, min_size=1, max_size=3))
@example(values=["9" * 70_000])
@example(values=['"' * 999])
@example(values=["\\" * 999 + '"'])
@example(values=["wait=" + '"\\' * 400])
def test_garbage_is_never_another_exception(name: str, values: list[str]) -> None:
    with suppress(ValueError):
        found = read_all(name, header_named(name).read, values)
        assert found is None or 0 <= found < math.inf


@each_header
@given(seconds)
def test_what_is_written_is_read_and_never_more(name: str, value: float) -> None:
    header = header_named(name)
    text = header.write(value)
    if not text:
        assert (name, value < 1) == (PREFER, True)
        return
    found = read_all(name, header.read, [text])
    assert found is not None
    # Of gRPC's units the smallest whose number has eight digits.
    resolution = RESOLUTION.get(name, max(1e-9, value * 1e-5))
    assert value - resolution * 1.001 <= found <= max(value * (1 + 1e-12), 0.001)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1H", 3600),
        ("2M", 120),
        ("3S", 3),
        ("4m", 0.004),
        ("5u", 0.000005),
        ("6n", 0.000000006),
        ("99999999S", 99999999),
        ("0S", 0),
    ],
)
def test_the_units_of_grpc(text: str, expected: float) -> None:
    assert read_all("grpc-timeout", header_named("grpc-timeout").read, [text]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.05, "50000000n"),
        (1.5, "1500000u"),
        (150, "150000m"),
        (150_000, "150000S"),
        (1e8, "1666666M"),
        (1e12, "99999999H"),
    ],
)
def test_grpc_gets_the_finest_unit_that_fits(value: float, expected: str) -> None:
    written = header_named("grpc-timeout").write(value)
    assert written[-1] == expected[-1]
    # Rounded down, and so one less where a fraction is not exact.
    assert 0 <= int(expected[:-1]) - int(written[:-1]) <= 1


def test_envoy_has_zero_for_no_limit() -> None:
    name = "x-envoy-expected-rq-timeout-ms"
    assert read_all(name, header_named(name).read, ["0"]) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wait=5", 5),
        (' , ,foo; bar="a, wait=1" , Wait = "5"; x=y, wait=3', 5),
        ('wait="\\5"', 5),
        ("foo=bar", None),
        ("await=5", None),
        ("wait=5, respond-async", None),
        ("respond-async;x=1, wait=5", None),
        ("", None),
    ],
)
def test_wait_among_other_preferences(text: str, expected: float | None) -> None:
    assert read_wait(text) == expected


@given(others=st.lists(st.sampled_from(["return=minimal", 'a="b, wait=2; c"', "d;e=f", "WAIT=9"])), left=seconds)
def test_wait_is_written_beside_other_preferences(others: list[str], left: float) -> None:
    kept = [other for other in others if other != "WAIT=9"]
    expected = [*kept, f"wait={math.floor(left)}"] if left >= 1 else kept
    assert with_wait(", ".join(others), left) == ", ".join(expected)


@each_header
def test_what_is_too_long_is_not_looked_at(name: str) -> None:
    def read(text: str) -> float:
        raise AssertionError("it was looked at")

    with pytest.raises(ValueError, match="too long"):
        read_all(name, read, ["9" * ((LONGEST_LIST if name == PREFER else LONGEST) + 1)])


@pytest.mark.parametrize(
    "text", ["a" * LONGEST_LIST, '"' * LONGEST_LIST, ("\\" + '"') * 500, ",;" * 500, "wait=" * 200]
)
def test_the_worst_that_is_looked_at_costs_little(text: str) -> None:
    # Steps that multiply would take minutes; the ceiling is for a machine that is busy.
    started = time.process_time()
    with suppress(ValueError):
        read_wait(text)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("name", ["", "a b", "a:", "\xe4", "a\r\n", "a\n"])
def test_names_that_no_header_can_have(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name of a header"):
        checked_name(name)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, True])
def test_a_parser_of_ones_own_may_not_return_everything(value: float) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        read_all("x-own", lambda text: value, ["5"])
