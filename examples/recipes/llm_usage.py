"""A chat whose tokens are accounted for however it ends: complete, out of time, or left by its client.

Run: OPENAI_API_KEY=... python -m examples.recipes.llm_usage     # it needs openai
     OPENAI_BASE_URL=http://localhost:11434/v1 chooses another service of the same API, MODEL its model
Try: curl -N -d '{"text": "Tell me a story"}' -H 'content-type: application/json' localhost:8000/chat/ann     # Ctrl-C
     curl localhost:8000/usage/ann
"""

import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import anyio
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from openai import APIError, AsyncOpenAI, AsyncStream
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel

from cancelable_deps import (
    RequestCancelationMiddleware,
    cancelable_streaming_response,
    cancelation_lifespan,
    current_cancelable,
)

MODEL = os.environ.get("MODEL", "gpt-5-mini")
TIMEOUT = float(os.environ.get("TIMEOUT", "60"))
GRACE = float(os.environ.get("GRACE", "5"))
LEDGER = anyio.Path(os.environ.get("LEDGER", "usage.jsonl"))

llm = AsyncOpenAI(api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=0)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with llm:
        yield


app = FastAPI(lifespan=cancelation_lifespan(lifespan, grace=GRACE))
app.add_middleware(RequestCancelationMiddleware)


class Question(BaseModel):
    text: str


class Usage(BaseModel):
    """A row of the ledger."""

    user: str
    ended: str = "complete"
    """`complete`, the reason of the cancelation, or the name of an error."""
    completion_tokens: int = 0
    prompt_tokens: int | None = None
    is_counted_by_us: bool = True
    """The service has not sent its own numbers: one token for each chunk that came."""

    def take(self, numbers: CompletionUsage) -> None:
        self.completion_tokens = numbers.completion_tokens
        self.prompt_tokens = numbers.prompt_tokens
        self.is_counted_by_us = False


async def answer(user: str, question: Question) -> AsyncIterator[str]:
    usage = Usage(user=user)
    cancel = current_cancelable()
    assert cancel is not None, "a cancelable response runs us in its block"
    try:
        with ExitStack() as until_the_bill:
            async with await ask(question) as chunks:
                async for chunk in chunks:
                    if chunk.usage is not None:
                        usage.take(chunk.usage)
                    for choice in chunk.choices:
                        if choice.delta.content:
                            usage.completion_tokens += 1
                            yield f"data: {json.dumps(choice.delta.content)}\n\n"
                        if choice.finish_reason:
                            # Only the numbers are still to come: a client that leaves now does not stop them.
                            until_the_bill.enter_context(cancel.defer_disconnect())
                            yield "data: [DONE]\n\n"
    except APIError as error:
        usage.ended = type(error).__name__
        yield "event: error\ndata: the model does not answer\n\n"
    except BaseException as error:
        usage.ended = str(cancel.reason or type(error).__name__)
        raise
    finally:
        with cancel.shield():
            await write(usage)


async def ask(question: Question) -> AsyncStream[ChatCompletionChunk]:
    return await llm.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question.text}],
        stream=True,
        stream_options={"include_usage": True},
    )


async def write(usage: Usage) -> None:
    async with await LEDGER.open("a") as ledger:
        await ledger.write(usage.model_dump_json() + "\n")


@app.post("/chat/{user}")
async def chat(user: str, question: Question) -> StreamingResponse:
    return cancelable_streaming_response(
        answer(user, question), media_type="text/event-stream", timeout=TIMEOUT, send_timeout=30
    )


@app.get("/usage/{user}")
async def usage_of(user: str) -> list[Usage]:
    lines = (await LEDGER.read_text()).splitlines() if await LEDGER.exists() else []
    return [usage for usage in map(Usage.model_validate_json, lines) if usage.user == user]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    uvicorn.run(app)
