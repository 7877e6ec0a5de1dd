"""Stop a WebSocket's work when its client leaves, and close the WebSocket when the client is silent for too long.

    python -m examples.websocket
    curl http://127.0.0.1:8000

Open http://127.0.0.1:8000 in a browser, ask, and close the tab while the answer is being made: the server prints that it
stopped at once, which a plain handler would not do before it sends or receives again. Say nothing for 10 seconds, or take
longer than a minute in all, and the socket is closed with 4504.
"""

from collections.abc import AsyncIterator

import anyio
import uvicorn
from fastapi import FastAPI, WebSocket
from fastapi.responses import HTMLResponse

from cancelable_deps import CancelableWebSocket, RequestCancelable, with_cancelation

app = FastAPI()

PAGE = """
<form><input autofocus value="Why?"> <button>Ask</button></form><pre></pre>
<script>
const log = line => document.querySelector("pre").append(line + "\\n");
const socket = new WebSocket(`ws://${location.host}/ask`);
socket.onmessage = event => log(event.data);
socket.onclose = event => log(`closed: ${event.code} ${event.reason}`);
document.forms[0].onsubmit = () => { socket.send(document.querySelector("input").value); return false; };
</script>
"""
IDLE, TOTAL, THINKING = 10.0, 60.0, 1.0


@app.get("/", response_class=HTMLResponse)
async def page() -> str:
    return PAGE


@app.websocket("/ask")
async def ask(websocket: WebSocket, cancel: RequestCancelable) -> None:
    """Hold a conversation: a message that arrives while an answer is being made is answered next."""
    async with CancelableWebSocket(websocket, cancel, idle_timeout=IDLE, timeout=TOTAL) as socket:
        await socket.accept()
        async for question in socket.iter_text():
            async for word in answer(question):
                await socket.send_text(word)


@app.websocket("/report")
@with_cancelation(timeout=TOTAL)
async def report(websocket: WebSocket) -> None:
    """Only send: the decorator stops the whole handler when the client leaves."""
    await websocket.accept()
    async for word in answer("the report"):
        await websocket.send_text(word)
    await websocket.close()


async def answer(question: str) -> AsyncIterator[str]:
    """Simulate a language model, which costs money while it works."""
    done = False
    try:
        for word in f"I have thought about {question!r}".split():
            await anyio.sleep(THINKING)
            yield word
        done = True
    finally:
        print(f"{question} {'is answered' if done else 'was stopped: nobody listens any more'}", flush=True)


if __name__ == "__main__":
    uvicorn.run(app)
