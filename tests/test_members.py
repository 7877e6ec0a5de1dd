from __future__ import annotations

import pytest

from cancelable_deps.kernel.members import Members, with_one_more, without


def filled(count: int) -> tuple[Members[object], list[object]]:
    members: Members[object] = ()
    each = [object() for _ in range(count)]
    for member in each:
        members = with_one_more(members, member)
    return members, each


@pytest.mark.parametrize("count", [0, 1, 2, 8, 9, 100])
def test_they_keep_their_order(count: int) -> None:
    members, each = filled(count)
    assert list(members) == each
    assert len(members) == count
    for left in range(count):
        middle = each.pop(len(each) // 2)
        members = without(members, middle)
        assert list(members) == each
        assert len(members) == count - left - 1
    assert not members
    last = object()
    assert list(with_one_more(members, last)) == [last]


def test_one_takes_no_more_than_a_tuple_of_one() -> None:
    assert type(filled(1)[0]) is tuple


def test_many_are_not_copied() -> None:
    members, each = filled(100)
    for member in each[:50]:
        assert without(members, member) is members
    for _ in range(100):
        assert with_one_more(members, object()) is members


def test_what_is_not_there_can_leave() -> None:
    for count in (0, 2, 100):
        members, each = filled(count)
        assert list(without(members, object())) == each
