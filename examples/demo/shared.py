"""The runs of several workers on one machine: each writes its own to a file, and reads those of the others."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    Snapshots = list[dict[str, Any]]


class SharedRuns:
    """A folder with a file for each worker."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own = folder / f"runs-{os.getpid()}.json"
        self._written = ""

    def write(self, runs: Snapshots) -> None:
        """Show the runs of this worker to the others."""
        text = json.dumps(runs)
        if text != self._written:
            # In one step, or another worker would read half of it.
            draft = self._own.with_suffix(".draft")
            draft.write_text(text, encoding="utf-8")
            draft.replace(self._own)
            self._written = text

    def of_others(self) -> Snapshots:
        """Return the runs of the other workers."""
        paths = [path for path in self._folder.glob("runs-*.json") if path != self._own]
        return [run for path in paths for run in json.loads(path.read_text(encoding="utf-8"))]
