"""A reverse proxy over httpx: the upstream request ends with its client, and is told how much time is left.

Run: UPSTREAM=http://localhost:9000 python -m examples.recipes.reverse_proxy     # it needs httpx
     python -m http.server 9000
Try: curl -i localhost:8000/
     curl -i -H 'x-time-left: 0.05' localhost:8000/     # 504: nothing is sent upstream
"""

import logging
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Annotated

import httpx
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse

from cancelable_deps import RequestCancelationMiddleware, cancelation_lifespan
from cancelable_deps.deadlines import ClientTimeout, forward_deadline

UPSTREAM = httpx.URL(os.environ.get("UPSTREAM", "http://localhost:9000"))
TIMEOUT = float(os.environ.get("TIMEOUT", "30"))
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
HOP_BY_HOP = {
    b"connection",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
}

http = httpx.AsyncClient(
    event_hooks={"request": [forward_deadline(header="x-time-left", margin=0.05)]},
    limits=httpx.Limits(max_connections=int(os.environ.get("CONNECTIONS", "100"))),
    timeout=httpx.Timeout(None, connect=5, pool=5),
    trust_env=False,
)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with http:
        yield


app = FastAPI(lifespan=cancelation_lifespan(lifespan), openapi_url=None)
app.add_middleware(
    RequestCancelationMiddleware,
    default_timeout=TIMEOUT,
    client_timeout=ClientTimeout(["x-time-left"], maximum=TIMEOUT),
)

Headers = list[tuple[bytes, bytes]]


def end_to_end(headers: Iterable[tuple[bytes, bytes]], *replaced: bytes) -> Headers:
    """Return the headers for the next hop, with ours in ``Via``: RFC 9110, sections 7.6.1 and 7.6.3."""
    known = [(name.lower(), value) for name, value in headers]
    named = {each.strip().lower() for name, value in known if name == b"connection" for each in value.split(b",")}
    dropped = HOP_BY_HOP | named | set(replaced)
    return [*((name, value) for name, value in known if name not in dropped), (b"via", b"1.1 recipes")]


def request_for_upstream(request: Request) -> httpx.Request:
    query = request.scope["query_string"]
    target = request.scope["raw_path"] + (b"?" + query if query else b"")
    has_body = not {"content-length", "transfer-encoding"}.isdisjoint(request.headers.keys())
    # Not `http.build_request`, which adds the headers of the client, and the cookies that it keeps of all responses.
    return httpx.Request(
        request.method,
        UPSTREAM.copy_with(raw_path=target),
        headers=end_to_end(request.headers.raw, b"host"),
        content=request.stream() if has_body else None,
        extensions={"timeout": http.timeout.as_dict()},
    )


async def upstream(request: Request) -> AsyncIterator[httpx.Response]:
    """Provide the response of the upstream. FastAPI closes it when the answer has been sent, or will not be."""
    try:
        response = await http.send(request_for_upstream(request), stream=True)
    except httpx.TimeoutException as error:
        raise HTTPException(504, "The upstream has not answered in time") from error
    except httpx.TransportError as error:
        raise HTTPException(502, "The upstream cannot be reached, or does not speak HTTP") from error
    try:
        yield response
    finally:
        await response.aclose()


@app.api_route("/{path:path}", methods=METHODS)
async def forward(answer: Annotated[httpx.Response, Depends(upstream)]) -> StreamingResponse:
    forwarded = StreamingResponse(answer.aiter_raw(), answer.status_code)
    forwarded.raw_headers = end_to_end(answer.headers.raw)  # a mapping would lose the second `Set-Cookie`
    return forwarded


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    uvicorn.run(app, date_header=False, server_header=False)
