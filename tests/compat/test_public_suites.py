"""The tests of our hosts about what our doors touch come out the same behind all of the doors at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.public_suites import SUITES, Workshop, difference

PATIENCE = 30


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ["starlette", "fastapi"])
def test_the_suite_of_a_host_comes_out_the_same(name: str, tmp_path: Path) -> None:
    suite = SUITES[name]
    workshop = Workshop(suite, tmp_path)
    workshop.prepare()
    bare = workshop.outcomes("bare", suite.bounded, jobs=1, patience=PATIENCE)
    assert len(bare) > 100
    lines = difference(bare, workshop.outcomes("all", suite.bounded, jobs=1, patience=PATIENCE))
    assert not lines, "\n".join(lines)
