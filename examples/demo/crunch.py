"""Work without a single `await`, for a process of its own; it imports little, because each process imports it anew."""

from __future__ import annotations

import os
import struct
import time
from typing import BinaryIO

from examples._collatz import count_steps

STEP = 500

_BOARD = struct.Struct("=qqq")


def longest_collatz(below: int, board: str) -> dict[str, int]:
    """Return the number up to `below` that takes the most steps down to 1; write the progress to the board."""
    longest, most, began = 1, 0, time.process_time()
    with open(board, "r+b", buffering=0) as written:
        for number in range(1, below + 1):
            steps = count_steps(number)
            if steps > most:
                longest, most = number, steps
            if number % STEP == 0 or number == below:
                _write(written, number, time.process_time() - began)
    return {"start": longest, "steps": most}


def _write(board: BinaryIO, done: int, seconds: float) -> None:
    board.seek(0)
    board.write(_BOARD.pack(os.getpid(), done, round(seconds * 1000)))


def read(board: bytes) -> tuple[int, int, int] | None:
    """Return the id of the process, the numbers it has done and its CPU time in ms; `None` before it has started."""
    return _BOARD.unpack(board) if len(board) == _BOARD.size else None
