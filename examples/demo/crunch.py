"""Work without a single `await`, for a process of its own; it imports little, as the process does."""

from __future__ import annotations

import os
import struct
import time
from typing import BinaryIO

from examples._collatz import count_steps

STEP = 500

_BOARD = struct.Struct("=qqq")


def longest_collatz(below: int, board: str) -> dict[str, int]:
    """The number up to `below` that takes the most steps down to 1; how far it has come is written on the board."""
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
    """Which process works, how many numbers it has done, and its CPU time in milliseconds; nothing before it starts."""
    return _BOARD.unpack(board) if len(board) == _BOARD.size else None
