"""The pace of the machine reaches all that has a deadline."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import machine
from tests.conftest import asks_for_compat

ROOT = Path(__file__).parents[1]
SERVER = """
from tests.server_app import SHORT
from tests.machine import scaled
assert SHORT == scaled(0.4)
print(scaled(1))
"""


def test_a_busy_machine_is_measured_as_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    idle = machine.measured()
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    assert 1 <= idle <= machine.measured() == machine.HIGHEST


def test_a_server_takes_it_from_the_environment() -> None:
    environment = {**os.environ, machine.PACE: "3.5"}
    done = subprocess.run(
        [sys.executable, "-c", SERVER], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "3.5\n"


def test_workers_and_their_timeout_have_it_from_the_session() -> None:
    assert float(os.environ[machine.PACE]) == machine.scaled(1)
    assert "PYTEST_TIMEOUT" in os.environ


@pytest.mark.parametrize(
    ("expression", "asks"),
    [
        ("", False),
        ("not compat", False),
        ("not compat and not real", False),
        ("compat", True),
        ("real or compat", True),
    ],
)
def test_the_tier_of_other_packages_runs_where_it_is_asked_for(expression: str, asks: bool) -> None:
    assert asks_for_compat(expression) is asks
