"""A TCP proxy in threads of its own, between workers and their store: it delays, holds, drops and cuts."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_PART = 1000


class Proxy:
    """Passes bytes on to a server, in parts.

    :ivar delay: seconds that each part takes.
    """

    def __init__(self, host: str, port: int) -> None:
        self.delay = 0.0
        self._goal = host, port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._flows = threading.Event()
        self._flows.set()
        self._links: set[_Link] = set()
        self._is_closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def pause(self) -> None:
        """Hold all bytes back, and accept nobody."""
        self._flows.clear()

    def resume(self) -> None:
        """Pass on what was held back."""
        self._flows.set()

    def cut(self) -> None:
        """Break the connections, also in the middle of an answer."""
        for link in list(self._links):
            link.close()

    def drop(self) -> None:
        """Pass nothing on any more of the connections that there are, and do not close them."""
        for link in list(self._links):
            link.is_dropped = True

    def close(self) -> None:
        self._is_closed = True
        self._flows.set()
        # Closing alone does not end the wait for a connection.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._flows.wait()
            try:
                server = socket.create_connection(self._goal, timeout=10)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            link = _Link(client, server)
            self._links.add(link)
            for source, goal in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=(link, source, goal), daemon=True).start()

    def _pass_on(self, link: _Link, source: socket.socket, goal: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(_PART):
                time.sleep(self.delay)
                self._flows.wait()
                if not link.is_dropped:
                    goal.sendall(data)
        link.close()
        self._links.discard(link)


class _Link:
    def __init__(self, *sockets: socket.socket) -> None:
        self.is_dropped = False
        self._sockets = sockets
        for each in sockets:
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@contextmanager
def proxy_to(host: str, port: int) -> Iterator[Proxy]:
    proxy = Proxy(host, port)
    try:
        yield proxy
    finally:
        proxy.close()
