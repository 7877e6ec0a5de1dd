"""The work of the demonstration: tasks that take a server a while, done in slices.

The code here knows neither requests nor cancellation. Every slice runs in a worker thread, and the work can be stopped at
every `await` between two slices. `advance(n)` is called inside the slice, so that a slice that runs when the work is
stopped is counted, too.
"""

from __future__ import annotations

import hashlib
import random
import re
import sqlite3
import zlib
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from heapq import nlargest
from itertools import pairwise
from typing import TYPE_CHECKING, Any, BinaryIO

import anyio
import anyio.to_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from anyio.abc import TaskGroup

    Sale = tuple[str, int]
    Advance = Callable[[int], None]
    OpenTaskGroup = Callable[[], AbstractAsyncContextManager[TaskGroup]]

SLICE_ROWS = 20_000
PIECE_BYTES = 96 * 1024
READERS = 4

_CREATE = "CREATE TABLE sales (id INTEGER PRIMARY KEY, shop TEXT, cents INTEGER)"
_FILL = """
    WITH RECURSIVE numbers (id) AS (SELECT ? UNION ALL SELECT id + 1 FROM numbers WHERE id < ?)
    INSERT INTO sales SELECT id, 'shop ' || ((id * 40503 >> 3) % 40), (id * 2654435761 >> 9) % 1000000 FROM numbers
"""
_LARGEST = """
    SELECT shop, cents FROM (
        SELECT shop, cents, row_number() OVER (PARTITION BY shop ORDER BY cents DESC) AS place
        FROM sales WHERE id > ? AND id <= ?
    ) WHERE place <= 3
"""


@dataclass(frozen=True)
class Table:
    """A table of sales in a SQLite file."""

    path: Path
    rows: int

    def connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, isolation_level=None)


@dataclass(frozen=True)
class Corpus:
    """Books of made-up words, one file each, with a word that is in them."""

    books: list[Path]
    words: int
    example: str


def make_table(path: Path, rows: int, progress: Advance) -> Table:
    """Fill a table with sales; call `progress` with the number of rows written so far."""
    table = Table(path, rows)
    with closing(table.connect()) as connection:
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(_CREATE)
        for first, last in _spans(rows, 250_000):
            connection.execute(_FILL, (first + 1, last))
            progress(last)
    return table


def make_corpus(folder: Path, words: int, progress: Advance) -> Corpus:
    """Write books of up to 100,000 words; call `progress` with the number of words written so far."""
    dice = random.Random(20)
    vocabulary = ["".join(dice.choices("abcdefghiklmnoprstuvw", k=dice.randint(2, 11))) for _ in range(600)]
    books: list[Path] = []
    for written, end in _spans(words, 100_000):
        book = folder / f"book-{len(books)}.txt"
        book.write_text(_pages(dice.choices(vocabulary, k=end - written)), encoding="ascii")
        books.append(book)
        progress(end)
    return Corpus(books, words, example=max(vocabulary, key=len))


def _pages(words: list[str]) -> str:
    return "".join(" ".join(words[start : start + 500]) + "\n" for start in range(0, len(words), 500))


def _spans(total: int, step: int) -> list[tuple[int, int]]:
    return [(first, min(first + step, total)) for first in range(0, total, step)]


async def largest_sales(
    table: Table, advance: Advance, after_slice: Callable[[], Awaitable[Any]] | None = None
) -> dict[str, list[int]]:
    """Return the three largest sales of each shop, in cents; call `after_slice` between two slices."""
    largest: dict[str, list[int]] = {}
    for span in _spans(table.rows, SLICE_ROWS):
        for shop, cents in await anyio.to_thread.run_sync(_read_slice, table, span, advance):
            largest[shop] = nlargest(3, [*largest.get(shop, []), cents])
        if after_slice is not None:
            await after_slice()
    return largest


def _read_slice(table: Table, span: tuple[int, int], advance: Advance) -> list[Sale]:
    # A connection for each slice, because when the server itself cancels a task at shutdown, the thread goes on with its
    # slice, and closing a connection that the thread uses would crash the process.
    with closing(table.connect()) as connection:
        sales: list[Sale] = connection.execute(_LARGEST, span).fetchall()
    advance(span[1] - span[0])
    return sales


async def count_words(corpus: Corpus, advance: Advance, open_task_group: OpenTaskGroup) -> dict[str, dict[str, int]]:
    """Return the most common words and pairs of words, counted by several tasks at once."""
    counts = [Counter[str]() for _ in range(READERS)]
    async with open_task_group() as task_group:
        for reader, counter in enumerate(counts):
            task_group.start_soon(_read_books, corpus.books[reader::READERS], counter, advance)
    return await anyio.to_thread.run_sync(_commonest, counts)


async def _read_books(books: list[Path], counter: Counter[str], advance: Advance) -> None:
    for path in books:
        # Opened in the event loop, because that takes microseconds. The file is read in the thread.
        with path.open("rb") as book:
            while await anyio.to_thread.run_sync(_count_piece, book, counter, advance):
                pass


def _count_piece(book: BinaryIO, counter: Counter[str], advance: Advance) -> bool:
    words = re.findall(r"\w+", b" ".join(book.readlines(PIECE_BYTES)).decode())
    counter.update(words)
    counter.update(map(" ".join, pairwise(words)))
    advance(len(words))
    return bool(words)


async def find_words(corpus: Corpus, text: str, advance: Advance) -> dict[str, int]:
    """Return the five most common words that begin with `text`, and how often each occurs."""
    found = Counter[str]()
    for path in corpus.books:
        with path.open("rb") as book:
            while await anyio.to_thread.run_sync(_find_in_piece, book, text, found, advance):
                pass
    return dict(found.most_common(5))


def _find_in_piece(book: BinaryIO, text: str, found: Counter[str], advance: Advance) -> bool:
    words = b" ".join(book.readlines(PIECE_BYTES)).decode().split()
    found.update(word for word in words if word.startswith(text))
    advance(len(words))
    return bool(words)


def _commonest(counts: list[Counter[str]]) -> dict[str, dict[str, int]]:
    total = Counter[str]()
    for counter in counts:
        total.update(counter)
    ranking = total.most_common()
    return {
        "words": dict([entry for entry in ranking if " " not in entry[0]][:5]),
        "pairs": dict([entry for entry in ranking if " " in entry[0]][:5]),
    }


async def take_in(stream: AsyncIterator[bytes], advance: Advance) -> dict[str, str | int]:
    """Hash and compress an upload while it arrives."""
    digest, packer, packed = hashlib.sha256(), zlib.compressobj(9), 0

    def take(chunk: bytes) -> int:
        digest.update(chunk)
        advance(len(chunk))
        return len(packer.compress(chunk))

    async for chunk in stream:
        packed += await anyio.to_thread.run_sync(take, chunk)
    packed += len(await anyio.to_thread.run_sync(packer.flush))
    return {"sha256": digest.hexdigest(), "packed_bytes": packed}


async def sales_feed(table: Table, advance: Advance, events: int, pace: float) -> AsyncIterator[dict[str, int]]:
    """Yield the largest sale of one slice of the table after another, `pace` seconds apart."""
    for span in _spans(table.rows, SLICE_ROWS)[:events]:
        sales = await anyio.to_thread.run_sync(_read_slice, table, span, advance)
        yield {"sales": span[1], "largest": max(cents for _, cents in sales)}
        await anyio.sleep(pace)
