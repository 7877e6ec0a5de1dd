"""A short run of the soak on a real server; `python -m benchmarks.soak` is the long one."""

import pytest

from benchmarks import soak
from benchmarks.soak import Findings, Reading

BEFORE = Reading({"route begun": 3, "route ended": 3}, tasks=3, descriptors=14, memory=50_000_000)


def failed(after: Reading, findings: Findings | None = None, complaints: int = 0) -> list[str]:
    """The checks that did not hold."""
    return [name for name, held, _ in soak.checks(BEFORE, after, findings or Findings(), complaints) if not held]


@pytest.mark.real
def test_a_few_hundred_requests_of_ill_behaved_clients_leave_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        soak.main(["--server=uvicorn", "--requests=300", "--clients=16"])
    printed = capsys.readouterr().out
    assert not ended.value.code, printed
    first, *lines = printed.splitlines()
    assert first.startswith("uvicorn: ")
    assert "200: " in first
    assert [line.split()[0] for line in lines] == ["ok"] * 6


def test_what_holds_fails_no_check() -> None:
    assert failed(BEFORE) == []


@pytest.mark.parametrize(
    ("after", "check"),
    [
        (Reading({"route begun": 3, "route ended": 2}, 3, 14, 50_000_000), "what began has ended, cleanup included"),
        (Reading({}, 3, 14, 50_000_000), "what began has ended, cleanup included"),
        (Reading(BEFORE.counts, 4, 14, 50_000_000), "no task is left"),
        (Reading(BEFORE.counts, 3, 15, 50_000_000), "no file descriptor is left"),
        (Reading(BEFORE.counts, 3, 14, 90_000_000), "no memory is left"),
    ],
)
def test_what_is_left_fails_its_check(after: Reading, check: str) -> None:
    assert failed(after) == [check]


def test_a_wrong_answer_and_a_traceback_fail_theirs() -> None:
    wrong = Findings(wrong=["one was answered b'two'"])
    assert failed(BEFORE, wrong, complaints=1) == ["every response is its request's own", "nothing in the log"]


@pytest.mark.real
def test_several_workers_with_operations_leave_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        soak.main(["--workers=2", "--requests=1500", "--seconds=60", "--clients=16"])
    printed = capsys.readouterr().out
    assert not ended.value.code, printed
    assert "wrong answers: 0" in printed
    assert "error lines: 0" in printed
    for size in ("ids", "named", "blocks", "early cancels", "ended", "questions", "jobs", "places"):
        assert printed.count(f"| {size} | 0 | 0 |") == 2, printed
