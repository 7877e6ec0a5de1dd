"""The pieces of work that the page shows and the terminal lists."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from .work import READERS, SLICE_ROWS

LIMIT = float(os.environ.get("DEMO_LIMIT", "2"))
UPLOAD_BYTES = 64 * 1024 * 1024
FEED_EVENTS = 50


@dataclass(frozen=True)
class Work:
    """One piece of work, reachable with cancellation, with a time limit, and plain."""

    name: str
    title: str
    door: str
    text: str
    unit: str
    total: int
    method: str = "GET"
    process: bool = False

    @property
    def paths(self) -> dict[str, str]:
        return {
            "with": f"/{self.name}",
            "limited": f"/limited/{self.name}",
            "plain": f"/plain/{self.name}",
        }

    def curl(self, address: str) -> list[str]:
        command = {
            "report": "curl -i ",
            "words": "curl -i ",
            "upload": f"head -c {self.total} /dev/urandom | curl -i -X POST -T - ",
            "feed": "curl -iN ",
            "collatz": "curl -i ",
        }[self.name]
        return [f"{command}{address}{path}" for path in self.paths.values()]

    def for_page(self, address: str) -> dict[str, Any]:
        return asdict(self) | {"paths": self.paths, "curl": self.curl(address)}


def works(rows: int, words: int, numbers: int) -> list[Work]:
    """Return all pieces of work, for a table of `rows`, a corpus of `words` and so many `numbers` to try."""
    return [
        Work(
            name="report",
            title="A report over a SQLite table",
            door="@with_cancelation",
            text=f"The largest of {rows:,} sales, shop by shop, read {SLICE_ROWS:,} rows at a time.",
            unit="rows",
            total=rows,
        ),
        Work(
            name="words",
            title="A word count in a task group",
            door="RequestTaskGroup",
            text=f"{READERS} tasks count the words and pairs of words in books of {words:,} words.",
            unit="words",
            total=words,
        ),
        Work(
            name="upload",
            title="An upload, hashed while it arrives",
            door="RequestCancelable",
            text="SHA-256 and zlib of every chunk. What is on its way when you hang up still arrives; then one side "
            "answers 499, the other fails with a traceback and a 500 in your log.",
            unit="bytes",
            total=UPLOAD_BYTES,
            method="POST",
        ),
        Work(
            name="feed",
            title="A paced feed of server-sent events",
            door="RequestCancelationMiddleware",
            text="Five slices of the table per second. Starlette itself ends it on this server, but cannot tell why.",
            unit="rows",
            total=min(rows, FEED_EVENTS * SLICE_ROWS),
        ),
        Work(
            name="collatz",
            title="A search in a process of its own",
            door="run_in_process()",
            text=f"Collatz sequences of {numbers:,} numbers: pure Python that never yields. One side kills its process, "
            "the other lets it burn a CPU for nobody.",
            unit="numbers",
            total=numbers,
            process=True,
        ),
    ]
