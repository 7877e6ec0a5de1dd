"""Free ports for servers that tests start.

A port that the system chooses is free for a moment only: a connection of another process may get it as its own end, or
another test process may be told the same one, and a client then talks to a stranger's server. These lie below the range
from which the system chooses, and each process has a block of them to itself.
"""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from itertools import cycle
from pathlib import Path
from typing import Final

BUS: Final = 10_000
"""A server of a Redis Cluster listens on a second port, which is higher by this; that one is free as well."""
_FIRST: Final = 12_000
_BLOCKS: Final = 50
_SIZE: Final = 200


def free_port() -> int:
    """Return a port of this process's block on which nobody listens."""
    for _ in range(_SIZE):
        port = next(_block())
        if _is_free(port) and _is_free(port + BUS):
            return port
    raise AssertionError("somebody listens on all ports of this process's block")


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


_blocks: dict[int, cycle[int]] = {}
"""The ports by process, as a forked one inherits those of its parent."""


def _block() -> cycle[int]:
    pid = os.getpid()
    if pid not in _blocks:
        _blocks[pid] = _taken_block()
    return _blocks[pid]


def _taken_block() -> cycle[int]:
    folder = Path(tempfile.gettempdir()) / f"cancelable-deps-ports-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for number in range(_BLOCKS):
        # It stays open, and locked, until the process ends, however it ends.
        file = os.open(folder / str(number), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            continue
        begin = _FIRST + number * _SIZE
        return cycle(range(begin, begin + _SIZE))
    raise AssertionError(f"{_BLOCKS} processes have a block of ports each already")
