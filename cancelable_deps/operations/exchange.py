"""The exchange of entries between workers: reading, answering, asking, signs of life, and repair after a break."""

from __future__ import annotations

import inspect
import random
import time
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import anyio

from ..kernel.log import logger
from .backend import Gap, Unavailable
from .entries import Entry, decoded, new_entry_id
from .outbox import Outbox
from .together import together

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from anyio.abc import TaskGroup

    from .backend import Beat, Identity, OperationsBackend
    from .clock import Clock

    Handler = Callable[[Entry], Any]

_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 2.0
_MOST_REMEMBERED: Final = 100_000
_MOST_LOOKED_FOR: Final = 5000
"""So many entries are looked for in one call, which blocks the store."""

_OLD: Final = 2.0
_ANSWER_SECONDS: Final = 5.0
"""The longest that a worker tries to answer."""

CALL_SECONDS: Final = 1.0
"""The longest that one call of the store may take, except reading."""

_OF_TURNS: Final = frozenset({"granted", "supersede"})
"""The kinds of entries that nobody has asked for, and so nobody asks for again."""

LASTING: Final = _OF_TURNS | {"cancel", "cancel_all"}
"""The kinds of entries that must not be lost: they are appended again if the store has lost them."""


class Answers(NamedTuple):
    """The answers of several workers to one question."""

    of: dict[str, dict[str, Any]]
    """The last answer of each worker that has answered."""

    silent: list[str]
    """The workers that have not."""

    dead: list[str]
    """Those among the silent that the store does not know, or not any more."""


class _Question:
    def __init__(self, asked: Iterable[str]) -> None:
        self.waiting = set(asked)
        self.answers: dict[str, dict[str, Any]] = {}
        self.is_answered = anyio.Event()

    def take(self, worker: str, answer: dict[str, Any]) -> None:
        self.answers[worker] = answer
        if not answer.get("more"):
            self.waiting.discard(worker)
            if not self.waiting:
                self.is_answered.set()


class _Sent(NamedTuple):
    at: float
    data: bytes
    to: str | None
    """The worker whose mail it is; ``None`` if it is in the log."""


class Exchange:
    """One worker's part in the exchange.

    :param answering: functions by kind of entry. One returns the answer or an awaitable of it; ``None`` is no answer.
    :param on_beat: called with each successful sign of life, and whether the store may have lost something since the
        last one that this function has returned from.
    """

    def __init__(
        self,
        backend: OperationsBackend,
        identity: Identity,
        *,
        clock: Clock,
        memory: float,
        lease: float,
        answering: dict[str, Handler],
        on_beat: Callable[[Beat, bool], Awaitable[None]],
    ) -> None:
        self.backend = backend
        self.identity = identity
        self.alive: dict[str, Identity] = {identity.name: identity}
        self.is_broken = False
        self._may_have_lost = False
        self._trusts_after = 0.0
        """When the store knows again who is alive."""

        self._clock = clock
        self._memory = memory
        self._lease = lease
        self._answering = {
            "hello": self._welcome,
            "bye": self._take_leave,
            "answers": self._take_answers,
            **answering,
        }
        self._on_beat = on_beat
        self._questions: dict[str, _Question] = {}
        self._seen: OrderedDict[str, float] = OrderedDict()
        self._lasting: OrderedDict[str, _Sent] = OrderedDict()
        self._outbox = Outbox(self._send_answers)
        self._beats_in_a_row = 0
        self._missed = 0
        self._has_warned = False
        self._hello = new_entry_id()
        self._has_caught_up = anyio.Event()
        """Set when this worker has read all that was in the log when it came."""

        self._began = clock.now()
        self._has_beaten = False
        self.beaten_at = time.monotonic()
        """When the store has had the last sign of life of this worker, on the clock ``time.monotonic()``."""

    @property
    def others(self) -> list[str]:
        """The other workers that are alive."""
        return [name for name in self.alive if name != self.identity.name]

    @property
    def is_alone(self) -> bool:
        """Whether there is no other worker; one that has not reached the store yet does not know."""
        return self._has_beaten and len(self.alive) == 1

    async def run(self, tasks: TaskGroup) -> None:
        """Start reading, answering and giving signs of life; they end when ``tasks`` is cancelled."""
        self._tasks = tasks
        await self._beat()
        has_said_hello = await self._say("hello", {"identity": list(self.identity)}, self._hello)
        tasks.start_soon(self._keep_reading)
        tasks.start_soon(self._keep_beating)
        tasks.start_soon(self._outbox.run)
        if has_said_hello:
            # An operation that was cancelled before this worker came must not start in it. What is remembered for a
            # shorter time may be gone by then.
            with anyio.move_on_after(min(CALL_SECONDS, self._memory)):
                await self._has_caught_up.wait()

    async def leave(self) -> None:
        """Say goodbye, so that others do not wait for the answers of this worker."""
        await self._say("bye", {})

    async def _say(self, kind: str, data: dict[str, Any], id: str | None = None) -> bool:
        try:
            await self.broadcast(kind, data, id)
        except Unavailable:
            self._note_break()
            return False
        return True

    # Sending.

    async def broadcast(self, kind: str, data: dict[str, Any], id: str | None = None) -> str:
        """Append an entry to the log, and return its id.

        :raises Unavailable: if the store cannot be reached; the entry may be appended all the same.
        """
        entry = self._new(kind, data, id)
        await self.calling(self.backend.broadcast(entry.encoded(), entry.id))
        self._note(entry, None)
        return entry.id

    async def send(self, worker: str, kind: str, data: dict[str, Any], id: str | None = None) -> bool:
        """Append an entry to the mail of a worker; return ``False`` if no living worker has that name.

        :raises Unavailable: as `broadcast` does. What nobody else says is appended after the break, if that ends soon.
        """
        entry = self._new(kind, data, id)._replace(to=worker)
        try:
            is_there: bool = await self.calling(self.backend.send(worker, entry.encoded(), entry.id))
        except Unavailable:
            if kind in _OF_TURNS:
                self._note(entry, worker)
            raise
        if is_there:
            self._note(entry, worker)
        return is_there

    def _new(self, kind: str, data: dict[str, Any], id: str | None) -> Entry:
        return Entry(kind, id or new_entry_id(), self.identity.name, self._clock.now(), data)

    def _note(self, entry: Entry, to: str | None) -> None:
        now = self._seen[entry.id] = self._clock.now()
        if entry.kind in LASTING:
            self._lasting[entry.id] = _Sent(now, entry.encoded(), to)
        self._forget(now)

    async def ask(self, kind: str, data: dict[str, Any], *, to: list[str] | None, timeout: float) -> Answers:
        """Ask workers, all others by default, and return their answers when all have come or ``timeout`` is over.

        :param to: the workers to ask; one that is dead is counted as silent.
        :raises Unavailable: if the store cannot be reached.
        """
        if not self._has_beaten:
            # Nobody has told it who the others are.
            raise Unavailable("the store has not been reached yet")
        asked = self.others if to is None else to
        dead: list[str] = []
        id = new_entry_id()
        question = self._questions[id] = _Question(asked)
        try:
            if to is None:
                if asked or kind in LASTING:
                    await self.broadcast(kind, data, id)
            else:
                for worker in to:
                    if not await self.send(worker, kind, data, id):
                        dead.append(worker)
                        question.waiting.discard(worker)
            if question.waiting:
                with anyio.move_on_after(timeout):
                    await question.is_answered.wait()
        finally:
            del self._questions[id]
        return Answers(question.answers, [name for name in asked if name not in question.answers], dead)

    async def calling(self, call: Awaitable[Any]) -> Any:
        """Await a call of the store, for a second at most.

        :raises Unavailable: if it fails or takes longer; it may take effect all the same.
        """
        try:
            with anyio.fail_after(CALL_SECONDS):
                return await call
        except TimeoutError:
            self._note_break()
            raise Unavailable from None
        except Unavailable:
            self._note_break()
            raise

    # Reading.

    async def _keep_reading(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            try:
                if self.is_broken:
                    await self._repair()
                # Nothing may fail after this one: what it has returned is not read again.
                entries = await self.backend.receive()
                pause = _FIRST_PAUSE
            except Gap:
                logger.warning("this worker has been away for longer than the operations are remembered")
                self._note_break()
                continue
            except Unavailable:
                self._note_break()
                await anyio.sleep(pause * random.uniform(0.5, 1))
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            for _, data in entries:
                self._take(data)

    def _take(self, data: bytes) -> None:
        entry = decoded(data)
        if entry is None or entry.id in self._seen:
            if entry is not None and entry.id == self._hello:
                self._has_caught_up.set()
            return
        now = self._clock.now()
        if entry.at < now - self._memory - self._lease - _OLD:
            return  # Read once more after a loss, and forgotten: it has done what it had to do.
        self._seen[entry.id] = now
        if entry.kind in LASTING and entry.to is None:
            # Mail is sent again by its sender, who is the only one that is sure to have it.
            self._lasting[entry.id] = _Sent(now, data, None)
        self._forget(now)
        if entry.kind not in LASTING and entry.at < self._began - _OLD:
            return  # The log remembers questions whose askers have long given up.
        handler = self._answering.get(entry.kind)
        if handler is not None:
            self._handle(entry, handler)

    def _handle(self, entry: Entry, handler: Handler) -> None:
        try:
            answer = handler(entry)
        except Exception:
            logger.exception("an entry of the operations could not be handled: %r", entry.kind)
            return
        if inspect.isawaitable(answer):
            self._tasks.start_soon(self._answer_later, entry, answer)
        elif answer is not None:
            self.answer(entry, answer)

    async def _answer_later(self, entry: Entry, answer: Awaitable[Any]) -> None:
        try:
            given = await answer
        except Exception:
            logger.exception("an entry of the operations could not be handled: %r", entry.kind)
            return
        if given is not None:
            self.answer(entry, given)

    def answer(self, entry: Entry, answer: dict[str, Any]) -> None:
        """Answer a question. An answer with ``"more": True`` is not the last one; ``"no"`` may come some ms later."""
        if entry.sender != self.identity.name:
            self._outbox.put(entry.sender, {"re": entry.id, **answer}, is_urgent=not answer.get("no"))

    def tell(self, worker: str, kind: str, data: dict[str, Any]) -> None:
        """Send an entry to a worker soon, in order; it is lost if the store cannot be reached for some seconds."""
        self._outbox.put(worker, {"tell": kind, "data": data}, is_urgent=True)

    async def _send_answers(self, worker: str, answers: list[dict[str, Any]]) -> None:
        pause = _FIRST_PAUSE
        until = self._clock.now() + _ANSWER_SECONDS
        # One id for all tries: an earlier one may have arrived.
        id = new_entry_id()
        while True:
            try:
                await self.send(worker, "answers", {"answers": answers}, id)
                return
            except Unavailable:
                if self._clock.now() + pause > until:
                    return  # The one who asks has given up by now, and says so.
            await anyio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _take_answers(self, entry: Entry) -> None:
        for answer in entry.data.get("answers", ()):
            told = self._answering.get(answer.get("tell", ""))
            if told is not None:
                self._handle(entry._replace(kind=answer["tell"], data=answer["data"]), told)
                continue
            question = self._questions.get(answer.get("re", ""))
            if question is not None:
                question.take(entry.sender, answer)

    def _forget(self, now: float) -> None:
        oldest = now - self._memory
        while self._seen and (next(iter(self._seen.values())) <= oldest or len(self._seen) > _MOST_REMEMBERED):
            self._seen.popitem(last=False)
        lasting = self._lasting
        while lasting and (next(iter(lasting.values())).at <= oldest or len(lasting) > _MOST_REMEMBERED):
            lasting.popitem(last=False)

    # Signs of life.

    def _welcome(self, entry: Entry) -> None:
        name, host, pid, version, started = entry.data["identity"][:5]
        identity = type(self.identity)(str(name), str(host), int(pid), str(version), float(started))
        if self._clock.now() - entry.at < self._lease:
            self.alive[identity.name] = identity

    def _take_leave(self, entry: Entry) -> None:
        self.alive.pop(entry.sender, None)
        for question in list(self._questions.values()):
            if entry.sender in question.waiting:
                question.take(entry.sender, {"no": True})

    async def _keep_beating(self) -> None:
        while True:
            await anyio.sleep(self._lease / 3)
            await self._beat()

    async def _beat(self) -> None:
        self._forget(self._clock.now())
        try:
            beat = await self.calling(self.backend.beat(may_reap=self._beats_in_a_row > 3))
        except Unavailable:
            self._beats_in_a_row = 0
            self._missed += 1
            if self._missed == 2:
                self._has_warned = True
                logger.warning("the store of operations cannot be reached; requests go on, and local cancels work")
            return
        self.beaten_at = time.monotonic()
        self._has_beaten = True
        self._missed = 0
        self._beats_in_a_row += 1
        if self._has_warned:
            self._has_warned = False
            logger.info("the store of operations can be reached again")
        if beat.has_forgotten:
            # No call has failed, so that nobody else notices.
            self._note_break()
        now = self._clock.now()
        if self._may_have_lost:
            self._trusts_after = now + self._lease
        # After a break the others may live, and have given no sign of life yet: to leave them out would be to say that
        # nobody knows an operation without having asked its worker.
        former = self.alive if now < self._trusts_after else {}
        self.alive = {**former, **{identity.name: identity for identity in beat.alive}}
        self.alive.setdefault(self.identity.name, self.identity)
        if self.is_broken:
            with suppress(Unavailable):
                await self._repair()
        may_have_lost, self._may_have_lost = self._may_have_lost, False
        try:
            await self._on_beat(beat, may_have_lost)
        except Unavailable:
            # The next sign of life repeats it.
            self._may_have_lost = self._may_have_lost or may_have_lost

    def rename(self, identity: Identity) -> None:
        """Go on under a new name."""
        self.alive.pop(self.identity.name, None)
        self.identity = identity
        self.alive[identity.name] = identity
        self.backend.rename(identity)

    # Repair.

    def _note_break(self) -> None:
        self.is_broken = self._may_have_lost = True

    async def _repair(self) -> None:
        """Append again what the store has lost of the last ``memory`` seconds: those who know it do nothing twice."""
        self._forget(self._clock.now())
        self.is_broken = False
        logged = [id for id, sent in self._lasting.items() if sent.to is None]
        for begin in range(0, len(logged), _MOST_LOOKED_FOR):
            part = logged[begin : begin + _MOST_LOOKED_FOR]
            await together(self._append_again, await self.calling(self.backend.missing(part)))
        mail = [id for id, sent in self._lasting.items() if sent.to not in (None, self.identity.name)]
        await together(self._append_again, mail)

    async def _append_again(self, id: str) -> None:
        sent = self._lasting.get(id)
        if sent is None:
            return
        if sent.to is None:
            await self.calling(self.backend.broadcast(sent.data, id))
        else:
            await self.calling(self.backend.send(sent.to, sent.data, id))
