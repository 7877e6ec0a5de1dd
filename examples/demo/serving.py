"""The servers of the demonstration: one in this process, or several workers that share a port and a Redis."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import wait
from threading import Thread
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import anyio
import uvicorn

from cancelable_deps.operations import Operations, OperationsUnavailable, RedisBackend
from examples.demo.app import create_app
from examples.demo.ledger import Ledger

if TYPE_CHECKING:
    import socket
    from types import FrameType

    from examples.demo.materials import Materials


class Server(uvicorn.Server):
    """A server that ends the live feeds and the covered requests as soon as it shuts down, instead of waiting for them."""

    def __init__(self, config: uvicorn.Config, ledger: Ledger) -> None:
        super().__init__(config)
        self.ledger = ledger

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # By way of the loop, because a signal handler may run in the middle of another callback.
        asyncio.get_running_loop().call_soon_threadsafe(self.ledger.close)
        super().handle_exit(sig, frame)


def serve(listener: socket.socket, materials: Materials, redis: str | None = None) -> None:
    """Run a server in this process; with `redis`, as one of several workers."""
    # The word count runs Python code in worker threads. The event loop must get its turn often, or the page would stutter.
    sys.setswitchinterval(0.0005)
    ledger = Ledger(None if redis is None else materials.folder)
    backend = None if redis is None else backend_of(redis, listener)
    config = uvicorn.Config(
        create_app(materials, ledger, Operations(backend, background_grace=0)),
        access_log=False,
        log_level="error",
        # Nothing takes so long: the ledger and the lifespan end what runs. But a cleanup may have 5 s.
        timeout_graceful_shutdown=6,
    )
    # After Config, which configures uvicorn's loggers and would drop the filter.
    logging.getLogger("uvicorn.error").addFilter(not_a_cut_stream)
    Server(config, ledger).run(sockets=[listener])


def not_a_cut_stream(record: logging.LogRecord) -> bool:
    """Drop uvicorn's error about a response that ends early, because the demonstration aborts streams on purpose."""
    return "returned without completing response" not in record.getMessage()


def backend_of(redis: str, listener: socket.socket) -> RedisBackend:
    """Return the store that the workers of this port share, and no other demonstration."""
    return RedisBackend(redis, prefix=f"demo-{listener.getsockname()[1]}")


def check_redis(redis: str, listener: socket.socket) -> None:
    """Exit with the way out, unless a Redis answers. Without this the page would come up, and list one worker."""

    async def ask() -> None:
        async with Operations(backend_of(redis, listener)) as operations:
            await operations.get("somebody")

    try:
        anyio.run(ask)
    except OperationsUnavailable:
        # Without its password.
        place = urlsplit(redis)._replace(netloc=urlsplit(redis).netloc.rpartition("@")[2]).geturl()
        sys.exit(
            f"No Redis answers at {place}, and several workers have to share one.\n"
            "Start one (redis-server), name another (--redis URL, or the variable REDIS_URL), or leave --workers out: one "
            "worker needs none."
        )
    except (ImportError, ValueError) as error:
        sys.exit(f"--redis cannot be used: {error}")


def serve_in_workers(listener: socket.socket, materials: Materials, redis: str, count: int) -> None:
    """Run so many servers in processes of their own, until one ends or this process is told to."""
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_work, args=(listener, materials, redis)) for _ in range(count)]
    try:
        for worker in workers:
            worker.start()
        wait([worker.sentinel for worker in workers])
    finally:
        codes = [worker.exitcode for worker in workers]
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()
    sys.exit(f"A worker has ended: exit codes {codes}")


def _work(listener: socket.socket, materials: Materials, redis: str) -> None:
    # A Ctrl-C of the terminal is for the first process, which tells the workers once.
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    Thread(target=_end_with_parent, daemon=True).start()
    with suppress(KeyboardInterrupt):
        serve(listener, materials, redis)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
