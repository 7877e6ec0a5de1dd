"""A server in a process of its own, on a free port, with its output in a file."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE = 20.0


class ServerProcess:
    """A module of Python that serves, from its start until `stop`."""

    patience = PATIENCE
    """The seconds that it has for its end."""

    def __init__(self, port: int, module: Sequence[str], log: Path, **environment: str) -> None:
        self.port = port
        self._log = log
        command = [sys.executable, "-m", *module]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment}
            )

    def stop(self) -> None:
        """Ask it to end, and kill it if it does not."""
        self._process.terminate()
        try:
            self._process.wait(self.patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
