import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import _instructions, check, inflight, operations, overhead
from benchmarks._asgi import at_once, serve
from benchmarks._doors import OURS
from benchmarks._rivals import BY_HAND
from benchmarks._variants import BARE, FLOORS, REFERENCES, Variant

pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent
DECORATOR = next(variant for variant in OURS if variant.name == "decorator")
HANDLE = next(variant for variant in OURS if variant.name == "RequestCancelable")
RIVALS = ["fastapi-disconnect", "aiofence", "hother-cancelable"]

counts_instructions = pytest.mark.skipif(_instructions.why_not() is not None, reason="needs valgrind and a C compiler")


def rows_of(variant: Variant, lines: list[str]) -> list[list[str]]:
    """The columns of the lines that begin with the variant's whole name."""
    return [line[44:].split() for line in lines if line[:44].rstrip() == variant.name]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_overhead_prints_a_row_for_every_door(loop: str, capsys: pytest.CaptureFixture[str]) -> None:
    overhead.main(["--rounds=2", "--requests=2", f"--loop={loop}", "--wait", "0", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(f"{loop}, Python") for line in lines) == 1
    for variant in [*FLOORS, *OURS, *REFERENCES, *BY_HAND]:
        (row,) = rows_of(variant, lines)
        times = [number.rstrip("!") for number in [*row[0:4], *row[5:9]]]
        assert all(float(number) >= 0 for number in times), variant.name
        assert (row[4], row[9]) == ("-", "-")


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


def table(variants: list[Variant], seconds: dict[str, float], instructions: dict[str, float]) -> list[overhead.Row]:
    """The rows of one handler."""
    rounds = {name: [ratio, ratio] for name, ratio in seconds.items()}
    return overhead.rows(variants, [rounds], {name: [ratio] for name, ratio in instructions.items()})


@pytest.mark.parametrize(
    ("seconds", "instructions", "word"),
    [(1.1, None, "ok"), (1.2, None, "MISSED"), (1.1, 1.05, "ok"), (1.1, 1.07, "MISSED"), (1.2, 1.05, "MISSED")],
)
def test_overhead_marks_a_door_that_misses_a_target(seconds: float, instructions: float | None, word: str) -> None:
    counted = {} if instructions is None else {BARE: 1.0, DECORATOR.name: instructions}
    (row,) = table([DECORATOR], {BARE: 1.0, DECORATOR.name: seconds}, counted)
    assert overhead.verdict(row, []) == f"1.12, 1.06 {word}"


@pytest.mark.parametrize(("seconds", "word"), [(1.27, "ok"), (1.29, "MISSED")])
def test_overhead_compares_a_handle_with_its_floor(seconds: float, word: str) -> None:
    (row,) = table([HANDLE], {BARE: 1.0, HANDLE.floor: 1.2, HANDLE.name: seconds}, {})
    assert overhead.verdict(row, []) == f"floor + 0.08, 0.08 {word}"


def test_overhead_marks_a_target_that_is_missed_at_the_second_handler() -> None:
    rounds = [{BARE: [1.0], DECORATOR.name: [ratio]} for ratio in (1.0, 1.5)]
    (row,) = overhead.rows([DECORATOR], rounds, {})
    assert [cost.missed(DECORATOR.target)[0] for cost in row.costs] == [False, True]
    assert overhead.verdict(row, []) == "1.12, 1.06 MISSED"


@pytest.mark.parametrize("instructions", [{}, {BARE: 1.0, DECORATOR.name: 1.05, "quicker": 1.01}])
def test_overhead_marks_a_door_that_a_rival_beats(instructions: dict[str, float]) -> None:
    rival = Variant("quicker", DECORATOR.build, "rival", "decorator")
    seconds = {BARE: 1.0, DECORATOR.name: 1.1, rival.name: 1.05 if not instructions else 1.2}
    ours, theirs = table([DECORATOR, rival], seconds, instructions)
    assert overhead.verdict(ours, [theirs]) == "1.12, 1.06 ok, BEHIND quicker"


def test_overhead_says_what_it_needs_to_count_instructions(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    overhead.main(["--rounds=1", "--requests=1", "--loop=asyncio", "--wait=0", "--only=bare", "--instructions"])
    text = capsys.readouterr().out
    assert "instructions: not counted; this needs Linux, valgrind" in text
    assert len(rows_of(FLOORS[0], text.splitlines())) == 1


@counts_instructions
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_clock_of_the_counted_process_moves_only_when_the_loop_waits(loop: str, tmp_path: Path) -> None:
    program = f"""
import asyncio, time
from benchmarks._asgi import run_on

async def main():
    started = time.monotonic()
    sum(range(1_000_000))
    assert time.monotonic() == started
    await asyncio.sleep(3600)
    assert 3600 <= time.monotonic() - started < 3601

run_on({loop!r}, main())
"""
    environment = {**os.environ, "LD_PRELOAD": str(_instructions.compiled(tmp_path))}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)


@counts_instructions
@pytest.mark.timeout(300)
def test_instructions_repeat() -> None:
    waits = [0.0, 2.0]
    first, second = (_instructions.count([FLOORS[0]], "asyncio", waits, 32, layouts=1) for _ in range(2))
    assert len(first[BARE]) == 2
    assert all(counted > 10_000 for counted in first[BARE])
    assert first[BARE] == pytest.approx(second[BARE], rel=0.005)


@pytest.mark.parametrize("variant", BY_HAND, ids=lambda variant: variant.name)
def test_what_is_written_by_hand_answers_and_is_stopped(variant: Variant) -> None:
    asyncio.run(serve(variant.build(at_once), requests=2, concurrency=1))
    measured = inflight.measure(variant, "asyncio", count=5, idle=0.01, ballast=5)
    assert measured.statuses == f"5 x {503 if variant.polls else 200}"


@pytest.mark.parametrize("variant", OURS, ids=lambda variant: variant.name)
def test_every_door_is_stopped_by_a_hang_up_in_the_benchmark(variant: Variant) -> None:
    measured = inflight.measure(variant, "asyncio", count=20, idle=0.01, ballast=10)
    assert measured.statuses == f"20 x {200 if variant.door == 'event' else 499}"


def test_inflight_prints_a_row_for_each_number_of_requests(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    inflight.main(
        [
            "--counts",
            "5",
            "10",
            "--repeats=1",
            "--idle=0.01",
            "--ballast=10",
            "--loop=asyncio",
            "--only=RequestTaskGroup",
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines if "bare request took" in line] == ["5 requests", "10 requests"]
    for variant in [FLOORS[0], *(variant for variant in OURS if variant.name == "RequestTaskGroup")]:
        assert [len(row) > 10 for row in rows_of(variant, lines)] == [True, True]


@pytest.mark.parametrize(
    ("over_bare", "hang_up", "growth", "served_growth", "words"),
    [
        (3.9, 49.0, 1.2, 1.2, ""),
        (4.1, 49.0, 1.2, 1.2, "KiB over bare above 4"),
        (3.9, 51.0, 1.2, 1.2, "hang-up above 50 us"),
        (3.9, 49.0, 1.3, 1.2, "hang-up grows above 1.25"),
        (3.9, 49.0, 1.2, 1.3, "serving grows above 1.25"),
    ],
)
def test_inflight_marks_a_missed_target(
    over_bare: float, hang_up: float, growth: float, served_growth: float, words: str
) -> None:
    assert inflight.missed(over_bare, hang_up, growth, served_growth).removeprefix("  MISSED: ") == words


def test_check_prints_a_row_for_each_block(capsys: pytest.CaptureFixture[str]) -> None:
    check.main(["--calls=100"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:28].rstrip() for line in lines[1:]] == list(check.BLOCKS)
    assert all(float(line.split()[-2]) > 0 for line in lines[1:])


def test_the_matrix_of_databases_prints_a_row_and_what_it_could_not_measure() -> None:
    command = [sys.executable, "-m", "benchmarks.databases", "sqlite3 in threads"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()]
    assert rows[0] == ["way", "hang-up", "timeout", "shutdown", "kill -9"]
    assert rows[2][0] == "sqlite3 in threads"
    assert all(cell.startswith(("stops", "504; stops")) for cell in rows[2][1:])
    assert rows[3][0].startswith("pymongo")


def test_operations_prints_a_line_for_each_figure(capsys: pytest.CaptureFixture[str]) -> None:
    operations.main(["--running=20", "--calls=5", "--loop=asyncio"])
    lines = capsys.readouterr().out.splitlines()[2:]
    names = {line[:44].rstrip() for line in lines}
    assert {"cancel by id, end to end", "list 100", "count", "start to 202", "starts a second", "cancel_all"} <= names
    assert all(float(line[44:56].replace(",", "")) >= 0 for line in lines)


@pytest.mark.parametrize(
    ("value", "target", "is_least", "word"),
    [
        (1, 1, False, "ok"),
        (1.1, 1, False, "MISSED"),
        (1, 1, True, "ok"),
        (0.9, 1, True, "MISSED"),
        (1, None, False, ""),
    ],
)
def test_operations_marks_a_missed_target(value: float, target: float | None, is_least: bool, word: str) -> None:
    line = operations.line(operations.Figure("name", value, "ms", target, is_least))
    assert line.endswith(word)
    assert ("MISSED" in line) == (word == "MISSED")
