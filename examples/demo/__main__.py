"""A demonstration of a server's work after a hang-up, with and without cancelable_deps: `python -m examples.demo`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import uvicorn

# Not relative: `anyio.to_process`, which the side without cancelable_deps uses, loads this file once more by its path.
from examples.demo.app import Materials, create_app
from examples.demo.catalog import works
from examples.demo.ledger import Ledger
from examples.demo.work import make_corpus, make_table

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType


def main() -> None:
    options = parse_options()
    # The word count runs Python code in worker threads. The event loop must get its turn often, or the page would stutter.
    sys.setswitchinterval(0.0005)
    listener = bind(options.host, options.port)
    # When uvicorn has shut down, it raises the signal again for the previous handler. The default one of SIGTERM would
    # leave the files behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), listener, TemporaryDirectory(prefix="cancelable-demo-") as folder:
        serve(listener, generate(Path(folder), options))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=(__doc__ or "").partition(": ")[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free port (default: %(default)s)")
    parser.add_argument("--rows", type=positive, default=3_000_000, help="sales in the table (default: %(default)s)")
    parser.add_argument("--words", type=positive, default=2_000_000, help="words in the books (default: %(default)s)")
    parser.add_argument("--numbers", type=positive, default=1_500_000, help="numbers to try (default: %(default)s)")
    return parser.parse_args()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def bind(host: str, port: int) -> socket.socket:
    """Return the listening socket; it is opened before anything is generated, so that a used port fails at once."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        sys.exit(f"Cannot listen on {host} port {port}: {error}\nTry another: python -m examples.demo --port 0")


def generate(folder: Path, options: argparse.Namespace) -> Materials:
    table = make_table(folder / "sales.db", options.rows, progress_of("sales", options.rows))
    corpus = make_corpus(folder, options.words, progress_of("words", options.words))
    return Materials(table, corpus, options.numbers, folder)


def progress_of(what: str, total: int) -> Callable[[int], None]:
    """Return a function that shows progress in one line of a terminal; a log file gets only its last state."""

    def progress(done: int) -> None:
        if sys.stdout.isatty() or done == total:
            print(f"\rGenerating {done:,} of {total:,} {what}", end="\n" if done == total else "", flush=True)

    return progress


class Server(uvicorn.Server):
    """A server that ends the live feeds and the covered requests as soon as it shuts down, instead of waiting for them."""

    def __init__(self, config: uvicorn.Config, ledger: Ledger) -> None:
        super().__init__(config)
        self.ledger = ledger

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # By way of the loop, because a signal handler may run in the middle of another callback.
        asyncio.get_running_loop().call_soon_threadsafe(self.ledger.close)
        super().handle_exit(sig, frame)


def serve(listener: socket.socket, materials: Materials) -> None:
    ledger = Ledger()
    config = uvicorn.Config(
        create_app(materials, ledger),
        access_log=False,
        log_level="error",
        timeout_graceful_shutdown=1,
    )
    # After Config, which configures uvicorn's loggers and would drop the filter.
    logging.getLogger("uvicorn.error").addFilter(not_a_cut_stream)
    introduce(listener, materials)
    Server(config, ledger).run(sockets=[listener])


def not_a_cut_stream(record: logging.LogRecord) -> bool:
    """Drop uvicorn's error about a response that ends early, because the demonstration aborts streams on purpose."""
    return "returned without completing response" not in record.getMessage()


def introduce(listener: socket.socket, materials: Materials) -> None:
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print("\nOn a command line; Ctrl-C, or -m 1 for one second, hangs up:\n")
    for work in works(materials.table.rows, materials.corpus.words, materials.numbers):
        print("\n".join(f"  {line}" for line in work.curl(address)), end="\n\n")
    print(f"Open {address}/ and hang up on a request. Ctrl-C here ends the server.\n", flush=True)


if __name__ == "__main__":
    main()
