"""``python -m tests.compat.serve NAME`` serves `tests.compat.apps.NAME`, each of its doors under a path of its own."""

from __future__ import annotations

import importlib
import logging
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette

from tests.compat.doors import say


class Announced(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        say("server", f"listening on {self.servers[0].sockets[0].getsockname()[1]}")


class Doors:
    """Calls the application of the door that the first part of the path names, as a proxy would that serves it there."""

    def __init__(self, apps: dict[str, Any]) -> None:
        self.apps = apps
        self.lifespans = Starlette(lifespan=self.lifespan)

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for served in self.apps.values():
                if hasattr(served, "router"):
                    await stack.enter_async_context(served.router.lifespan_context(served))
            yield

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.lifespans(scope, receive, send)
            return
        door = scope["path"].split("/", 2)[1]
        await self.apps[door]({**scope, "root_path": f"/{door}"}, receive, send)


def main(name: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    apps = importlib.import_module(f"tests.compat.apps.{name}").apps()
    config = uvicorn.Config(Doors(apps), port=0, log_config=None, access_log=False, timeout_graceful_shutdown=8)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    Announced(config).run()


if __name__ == "__main__":
    main(sys.argv[1])
