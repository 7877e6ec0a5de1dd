"""A demonstration of a server's work after a hang-up, with and without cancelable_deps: `python -m examples.demo`."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

# Not relative: `anyio.to_process`, which the side without cancelable_deps uses, loads this file once more by its path.
from examples.demo.catalog import works
from examples.demo.materials import Materials
from examples.demo.serving import check_redis, serve, serve_in_workers
from examples.demo.work import make_corpus, make_table

if TYPE_CHECKING:
    from collections.abc import Callable

REDIS = "redis://127.0.0.1:6379"


def main() -> None:
    options = parse_options()
    listener = bind(options.host, options.port)
    if options.workers > 1:
        check_redis(options.redis, listener)
    # When uvicorn has shut down, it raises the signal again for the previous handler. The default one of SIGTERM would
    # leave the files behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), listener, TemporaryDirectory(prefix="cancelable-demo-") as folder:
        materials = generate(Path(folder), options)
        introduce(listener, materials)
        if options.workers > 1:
            serve_in_workers(listener, materials, options.redis, options.workers)
        else:
            serve(listener, materials)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=(__doc__ or "").partition(": ")[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free port (default: %(default)s)")
    parser.add_argument("--rows", type=positive, default=3_000_000, help="sales in the table (default: %(default)s)")
    parser.add_argument("--words", type=positive, default=2_000_000, help="words in the books (default: %(default)s)")
    parser.add_argument("--numbers", type=positive, default=1_500_000, help="numbers to try (default: %(default)s)")
    parser.add_argument("--workers", type=positive, default=1, help="processes; several share a Redis (default: 1)")
    parser.add_argument("--redis", metavar="URL", help=f"for several workers (default: REDIS_URL, or {REDIS})")
    options = parser.parse_args()
    if options.redis is not None and options.workers == 1:
        parser.error("--redis is for several workers: add --workers 2")
    options.redis = options.redis or os.environ.get("REDIS_URL") or REDIS
    return options


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


def introduce(listener: socket.socket, materials: Materials) -> None:
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print("\nOn a command line; Ctrl-C, or -m 1 for one second, hangs up:\n")
    for work in works(materials.table.rows, materials.corpus.words, materials.numbers):
        print("\n".join(f"  {line}" for line in work.curl(address)), end="\n\n")
    print(f"Open {address}/ and hang up on a request. Ctrl-C here ends the server.\n", flush=True)


if __name__ == "__main__":
    main()
