"""Generators that run in one task from their first step to their last, whichever tasks ask for the items."""

from __future__ import annotations

from asyncio import CancelledError
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Final, cast

import anyio
import anyio.lowlevel
import anyio.to_thread
from starlette.requests import ClientDisconnect

from ..hosts.fastapi import last_item
from ..hosts.starlette import spare_streams_listening
from ..kernel.cancelable import cancelable_of
from ..kernel.errors import CancelationError
from ..kernel.foreign import EXITS, SENDING, ThisTask, as_failure, call_in_thread
from ..kernel.reasons import CancelationReason
from ..kernel.unwrap import raise_as_it_is
from ..request.abort import abort_at_once
from ..request.sse import reason_and_message

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from ..kernel.block import Block
    from ..kernel.loops.base import EventLoop, Worker
    from ..request.blocks import DoorBlock
    from ..request.state import RequestState


_END: Final = object()
_WORK: Final = "the generator of a response"


async def feed(
    iterator: Any,
    sink: Callable[[Any], Awaitable[object]],
    blocks: tuple[Block, ...],
    step: Callable[[Awaitable[Any]], Awaitable[Any]],
) -> None:
    """Pass all items of ``iterator`` to ``sink``; throw an exception of the sink into the iterator, at its ``yield``.

    So a generator may hold ``async with``, scopes and task groups across its ``yield``. A cancellation that does not
    belong to this task is an ordinary failure of the iterator or the sink.

    :param step: awaits each step of the iterator.
    """
    this_task = ThisTask()
    try:
        item = await step(anext(iterator))
        while True:
            try:
                await sink(item)
            except BaseException as exc:
                item = await _throw(iterator, _told(exc, this_task, SENDING), blocks, step)
            else:
                item = await step(anext(iterator))
    except StopAsyncIteration:
        pass
    except BaseException as exc:
        # A thread that asked whether it is cancelled has raised it: the block makes its own error of it.
        is_ours = isinstance(exc, CancelledError) and any(block.cause is not None for block in blocks)
        raise_as_it_is(exc if is_ours else _told(exc, this_task, _WORK))


def _told(exc: BaseException, this_task: ThisTask, what: str) -> BaseException:
    return exc if this_task.is_ended_by(exc) else as_failure(exc, what)


async def _throw(iterator: Any, exc: BaseException, blocks: tuple[Block, ...], step: Any) -> Any:
    throw = getattr(iterator, "athrow", None)
    if throw is None:
        raise exc
    try:
        return await step(throw(exc))
    except StopAsyncIteration:
        for block in blocks:
            if block.cause is not None:
                # The generator has swallowed the cancellation, but a part of the stream is missing.
                raise block.cause.error() from None
        raise


async def close(iterator: Any) -> None:
    """Close an iterator that can be closed; harmless for one that has ended."""
    aclose = getattr(iterator, "aclose", None)
    if aclose is None:
        return
    this_task = ThisTask()
    try:
        await aclose()
    except BaseException as exc:
        raise_as_it_is(_told(exc, this_task, _WORK))


class ThreadedGenerator:
    """An asynchronous iterator over a plain iterable, which makes each item in a worker thread and waits for the thread.

    It stops between two items. A generator is then closed, in a thread as well: `GeneratorExit` is raised at its
    ``yield``. No other exception is thrown into it.
    """

    _iterator: Any = None

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items

    def __aiter__(self) -> ThreadedGenerator:
        return self

    async def __anext__(self) -> Any:
        item = await anyio.to_thread.run_sync(call_in_thread, _WORK, self._next)
        if item is _END:
            raise StopAsyncIteration
        return item

    def _next(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self._items)
        try:
            # A StopIteration cannot leave a thread, because a future does not accept it.
            return next(self._iterator, _END)
        except StopAsyncIteration as exc:
            # The consumer would take it for the end of the items.
            raise RuntimeError(f"{_WORK} raised StopAsyncIteration") from exc

    async def aclose(self) -> None:
        # Only generators and files, for example, have a close().
        end = getattr(self._items if self._iterator is None else self._iterator, "close", None)
        if end is not None:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(call_in_thread, _WORK, end)


class GuardedGenerator:
    """An asynchronous iterator over ``iterator``, which runs inside ``block`` in a task of ours.

    FastAPI asks for the items of an endpoint in a task that may end before the generator has. A block that is open across
    a ``yield`` would then be closed in another task. If the consumer is cancelled while it asks for an item, or calls
    ``aclose()``, the generator is stopped, and its cleanup waited for.
    """

    _worker: Worker | None = None
    _error: BaseException | None = None
    _is_over = False

    def __init__(self, iterator: Any, block: Block, loop: EventLoop) -> None:
        self._iterator = iterator
        self._block = block
        self._loop = loop

    def __aiter__(self) -> GuardedGenerator:
        return self

    async def __anext__(self) -> Any:
        if self._is_over:
            raise StopAsyncIteration
        if self._worker is None:
            self._to_consumer, self._items = anyio.create_memory_object_stream[Any](0)
            self._worker = self._loop.spawn(self._produce, copy_context())
        try:
            return await self._items.receive()
        except anyio.EndOfStream:
            await self._stopped()
            error = self._error
            if error is not None and not isinstance(error, EXITS):
                # If another task has cancelled our task, the consumer is not cancelled: it gets a failure.
                error = as_failure(error, _WORK)
            return await self._end(error)
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        self._is_over = True
        if self._worker is None:
            await close(self._iterator)
        elif not self._worker.done:
            self._cancel()
        await self._stopped()

    def _cancel(self) -> None:
        self._block.cancel_nowait(CancelationReason.PARENT, "The response ended before its generator")

    async def _hand_over(self, item: Any) -> None:
        await self._to_consumer.send(item)

    async def _stopped(self) -> None:
        self._is_over = True
        if self._worker is not None:
            self._items.close()
            with anyio.CancelScope(shield=True):
                await self._worker.join()

    async def _end(self, error: BaseException | None) -> Any:
        """Answer ``__anext__`` after the last item: stop, or raise the exception that has stopped the generator."""
        if error is None:
            raise StopAsyncIteration
        raise_as_it_is(error)

    async def _produce(self) -> None:
        try:
            async with cancelable_of(self._block):
                try:
                    await feed(self._iterator, self._hand_over, (self._block,), _as_it_is)
                finally:
                    await close(self._iterator)
        except Exception as exc:
            self._error = exc
        except BaseException as exc:
            self._error = exc
            if self._is_over or not isinstance(exc, EXITS):
                raise
            # The consumer raises it: in its task it ends the process, in ours, on trio, only the loop.
        finally:
            self._to_consumer.close()
            self._produced()

    def _produced(self) -> None: ...


class EndpointGenerator(GuardedGenerator):
    """The generator of a FastAPI endpoint, whose response starts before the first item is there."""

    def __init__(self, iterator: Any, block: DoorBlock, state: RequestState, *, ours: bool) -> None:
        super().__init__(iterator, block, state.loop)
        self._state = state
        self._policy = block.policy
        self._ours = ours
        if state.outermost is None:
            spare_streams_listening(state.scope)
        if ours:
            state.keep_through_response()
        # The stack is private. If it is gone one day, the generator is closed when it is garbage-collected.
        if state.request_stack is not None:
            state.request_stack.push_async_exit(self._response_ended)

    async def _response_ended(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        await self.aclose()
        error = self._error
        if self._ours and isinstance(exc, ClientDisconnect) and exc.__context__ is error and error is not None:
            # Under ASGI 2.4 Starlette takes any OSError out of a stream for one of the server's send().
            raise_as_it_is(error)

    def _cancel(self) -> None:
        if self._state.is_deferring:
            # Under ASGI 2.4 the early end of the response is the only sign that the client has left.
            self._state.client_left()
        else:
            super()._cancel()
            # The response received the disconnect and had time to end by itself. It has: the stream ends here.
            cast("DoorBlock", self._block).stop_at_once()

    def _produced(self) -> None:
        if self._policy is not None:
            self._policy.judge(self._state.scope, self._block.elapsed)

    async def _hand_over(self, item: Any) -> None:
        try:
            await super()._hand_over(item)
        except anyio.BrokenResourceError:
            if not self._state.is_deferring:
                raise

    async def _end(self, error: BaseException | None) -> Any:
        if not self._ours:
            # The door around us aborts the response, and is about to cancel this task: the cancellation arrives here.
            await anyio.lowlevel.checkpoint()
        if error is None or (isinstance(error, CancelationError) and error.reason is CancelationReason.DISCONNECT):
            self._close_state()
            raise StopAsyncIteration
        if isinstance(error, CancelationError) and self._ours:
            event = last_item(self._state.scope, "cancelled", reason_and_message(error))
            raw = self._state.reader.raw
            self._close_state()
            if event is not None:
                return event
            if await abort_at_once(raw, self._state.scope):
                raise StopAsyncIteration
        raise_as_it_is(error)

    def _close_state(self) -> None:
        if self._ours:
            # Before the last bytes are sent, because every server reports a disconnect after them.
            self._state.close()


async def _as_it_is(step: Awaitable[Any]) -> Any:
    return await step
