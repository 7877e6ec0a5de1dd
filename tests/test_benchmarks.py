import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import check, inflight, overhead
from benchmarks._doors import OURS
from benchmarks._variants import BARE, FLOORS, REFERENCES, Variant

pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent
DECORATOR = next(variant for variant in OURS if variant.name == "decorator")
RIVALS = ["fastapi-disconnect", "aiofence", "hother-cancelable"]


def rows_of(variant: Variant, lines: list[str]) -> list[list[str]]:
    """The columns of the lines that begin with the variant's whole name."""
    return [line[44:].split() for line in lines if line[:44].rstrip() == variant.name]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_overhead_prints_a_row_for_every_door(loop: str, capsys: pytest.CaptureFixture[str]) -> None:
    overhead.main(["--rounds=2", "--requests=2", f"--loop={loop}", "--wait", "0", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(f"{loop}, handler") for line in lines) == 2
    for variant in [*FLOORS, *OURS, *REFERENCES]:
        rows = rows_of(variant, lines)
        assert len(rows) == 2, variant.name
        assert all(float(row[0]) > 0 and float(row[2]) > 0 for row in rows)


def test_overhead_shows_every_rival_or_says_that_it_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    overhead.main(["--rounds=1", "--requests=1", "--loop=asyncio", "--wait=0", "--only", *RIVALS])
    text = capsys.readouterr().out
    for rival in RIVALS:
        assert f"{rival}: not installed" in text or f"\n{rival}: " in text


def test_overhead_keeps_the_floors_of_the_rows_that_were_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    overhead.main(["--rounds=1", "--requests=1", "--loop=asyncio", "--wait=0", "--only=CancellationEvent"])
    names = {line[:44].rstrip() for line in capsys.readouterr().out.splitlines()}
    assert {BARE, "no-op async dependency", "CancellationEvent"} <= names
    assert "decorator" not in names


def test_python_dash_m_runs_it() -> None:
    flags = ["--rounds=1", "--requests=1", "--loop=asyncio", "--wait=0", "--only=route class"]
    command = [sys.executable, "-m", "benchmarks.overhead", *flags]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "\nroute class " in printed


@pytest.mark.parametrize(("cost", "word"), [(1.2, "ok"), (1.4, "MISSED")])
def test_overhead_marks_a_door_that_misses_its_target(cost: float, word: str) -> None:
    (row,) = overhead.rows([DECORATOR], {BARE: [1.0, 1.0], DECORATOR.name: [cost, cost]})
    assert overhead.verdict(row, None) == f"1.30 {word}"


def test_overhead_marks_a_door_that_a_rival_beats() -> None:
    rival = Variant("quicker", DECORATOR.build, "rival", "decorator")
    measured = {BARE: [1.0], DECORATOR.name: [1.2], rival.name: [1.1]}
    ours, theirs = overhead.rows([DECORATOR, rival], measured)
    assert overhead.verdict(ours, theirs) == "1.30 ok, BEHIND quicker"


@pytest.mark.parametrize("variant", OURS, ids=lambda variant: variant.name)
def test_every_door_is_stopped_by_a_hang_up_in_the_benchmark(variant: Variant) -> None:
    measured = inflight.measure(variant, "asyncio", count=20, idle=0.01, ballast=10)
    assert measured.statuses == f"20 x {200 if variant.door == 'event' else 499}"


def test_inflight_prints_a_row_for_each_number_of_requests(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    inflight.main(
        ["--counts", "5", "10", "--repeats=1", "--idle=0.01", "--ballast=10", "--loop=asyncio", "--only=route class"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines if "bare request took" in line] == ["5 requests", "10 requests"]
    for variant in [FLOORS[0], *(variant for variant in OURS if variant.name == "route class")]:
        assert len(rows_of(variant, lines)) == 2


@pytest.mark.parametrize(
    ("over_bare", "hang_up", "growth", "words"),
    [
        (4.9, 59.0, 1.4, ""),
        (5.1, 59.0, 1.4, "KiB over bare above 5"),
        (4.9, 61.0, 1.4, "hang-up above 60 us"),
        (4.9, 59.0, 1.6, "grows above 1.5"),
    ],
)
def test_inflight_marks_a_missed_target(over_bare: float, hang_up: float, growth: float, words: str) -> None:
    assert inflight.missed(over_bare, hang_up, growth).removeprefix("  MISSED: ") == words


def test_check_prints_a_row_for_each_block(capsys: pytest.CaptureFixture[str]) -> None:
    check.main(["--calls=100"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:28].rstrip() for line in lines[1:]] == list(check.BLOCKS)
    assert all(float(line.split()[-2]) > 0 for line in lines[1:])
