"""Long polls: a request that has no answer yet is held until there is one, so that nobody asks in a loop.

An ASGI application in front of Flower's own. It knows routes and whether an answer is empty, nothing else of Flower;
whoever is let in to what, Flower decides for every held request as for any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

HEADER = b"fedvfm-hold"
"""Of a request that may be held: for how many seconds."""
MOST_S = 30.0
MOST_BODY = 32 * 1024 * 1024

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Application = Callable[[Event, Receive, Send], Awaitable[None]]


class Bell:
    """Says that something happened, by key, to who waits for it: in a thread, or in an event loop."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal may come while its own thread holds it
        self._rung: Counter[str] = Counter()
        self._waiting: dict[str, list[Callable[[], object]]] = {}
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether nobody waits any more."""
        return self._ended

    def rung(self, key: str) -> int:
        """How often it rang."""
        with self._lock:
            return self._rung[key]

    def ring(self, *keys: str) -> None:
        """Wake who waits for any of these."""
        with self._lock:
            self._rung.update(keys)
            wakes = [wake for key in keys for wake in self._waiting.pop(key, ())]
        for wake in wakes:
            wake()

    def end(self) -> None:
        """Wake everybody; nobody waits any more."""
        with self._lock:
            self._ended = True
            keys = list(self._waiting)
        self.ring(*keys)

    def _expect(self, key: str, seen: int, wake: Callable[[], object]) -> bool:
        with self._lock:
            if self._ended or self._rung[key] != seen:
                return False
            self._waiting.setdefault(key, []).append(wake)
            return True

    def _forget(self, key: str, wake: Callable[[], object]) -> None:
        with self._lock, contextlib.suppress(KeyError, ValueError):
            self._waiting[key].remove(wake)
            if not self._waiting[key]:
                del self._waiting[key]

    def sleep(self, key: str, seen: int, seconds: float) -> int:
        """Wait in a thread until it rang more often than ``seen``, or the time is over; how often it rang."""
        event = threading.Event()
        if self._expect(key, seen, event.set):
            event.wait(max(0.0, seconds))
            self._forget(key, event.set)
        return self.rung(key)

    async def wait(self, key: str, seen: int, seconds: float) -> None:
        """As :meth:`sleep`, in an event loop."""
        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop ended meanwhile
                loop.call_soon_threadsafe(event.set)

        if self._expect(key, seen, wake):
            try:
                await asyncio.wait_for(event.wait(), max(0.0, seconds))
            except TimeoutError:
                pass
            finally:
                self._forget(key, wake)


@dataclass(frozen=True)
class Held:
    """A route whose requests may be held.

    Attributes:
        key: of a request's body, what it waits for.
        asks_once: a request is answered once alone (its signature counts once): it is held before it is passed on, and
            not where something rang since the last one that was answered.
    """

    key: Callable[[bytes], str]
    asks_once: bool = False


class LongPoll:
    """Holds requests of some routes; those of others ring when they went well.

    Args:
        application: answers.
        bell: what they wait for.
        held: by route.
        rings: by route, the keys to ring, from the request's body; a route with ``None`` rings ``always`` unread.
        always: keys that such a route rings.
    """

    def __init__(
        self,
        application: Application,
        bell: Bell,
        held: Mapping[str, Held],
        rings: Mapping[str, Callable[[bytes], Iterable[str]] | None],
        always: tuple[str, ...],
    ) -> None:
        self._application, self._bell, self._held, self._rings = application, bell, held, rings
        self._always = always
        self._answered: dict[str, int] = {}

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        """Answer one request."""
        route = scope.get("path", "")
        seconds = _seconds(scope.get("headers", ())) if route in self._held else 0.0
        if seconds > 0.0:
            await self._hold(self._held[route], seconds, scope, receive, send)
        elif route in self._rings:
            await self._ring(self._rings[route], scope, receive, send)
        else:
            await self._application(scope, receive, send)

    async def _ring(
        self, keys: Callable[[bytes], Iterable[str]] | None, scope: Event, receive: Receive, send: Send
    ) -> None:
        body, status = b"", 0
        if keys is not None:
            body = await _body(receive)
            receive = _again(body, receive)

        async def sent(event: Event) -> None:
            nonlocal status
            status = event.get("status", status)
            await send(event)

        await self._application(scope, receive, sent)
        if status == 200:
            self._bell.ring(*(self._always if keys is None else keys(body)))

    async def _hold(self, held: Held, seconds: float, scope: Event, receive: Receive, send: Send) -> None:
        body, until = await _body(receive), time.monotonic() + seconds
        key, gone = held.key(body), asyncio.ensure_future(_hang_up(receive))
        try:
            if held.asks_once and self._answered.get(key) is not None:
                await self._until(key, self._answered[key], until, gone)
            while not gone.done():
                seen = self._bell.rung(key)
                events = await self._answer(scope, body, gone)
                good, empty = _judged(events)
                if good and held.asks_once:
                    self._answered[key] = seen
                over = time.monotonic() >= until or gone.done() or self._bell.ended
                if held.asks_once or not (good and empty) or over:
                    for event in events:
                        await send(event)
                    return
                await self._until(key, seen, until, gone)
        finally:
            gone.cancel()

    async def _until(self, key: str, seen: int, until: float, gone: asyncio.Future[None]) -> None:
        waiting = asyncio.ensure_future(self._bell.wait(key, seen, until - time.monotonic()))
        await asyncio.wait([waiting, gone], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()

    async def _answer(self, scope: Event, body: bytes, gone: asyncio.Future[None]) -> list[Event]:
        events: list[Event] = []
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Event:
            if parts:
                return parts.pop()
            await asyncio.wait([gone])
            return {"type": "http.disconnect"}

        async def send(event: Event) -> None:
            events.append(event)

        # An application may write into what it gets.
        copied = {**scope, "state": dict(scope.get("state", {}))}
        await self._application(copied, receive, send)
        return events


def _seconds(headers: Iterable[tuple[bytes, bytes]]) -> float:
    for name, value in headers:
        if name == HEADER:
            with contextlib.suppress(ValueError):
                return min(MOST_S, max(0.0, float(value)))
    return 0.0


def _judged(events: Iterable[Event]) -> tuple[bool, bool]:
    """Whether an answer is one, and whether it is empty."""
    status, size = 0, 0
    for event in events:
        status = event.get("status", status)
        size += len(event.get("body", b""))
    return status == 200, size == 0


async def _body(receive: Receive) -> bytes:
    """All of a request's body; cut where it is too long, or the client hung up."""
    parts, size = [], 0
    while size <= MOST_BODY:
        event = await receive()
        if event["type"] != "http.request":
            break
        parts.append(event.get("body", b""))
        size += len(parts[-1])
        if not event.get("more_body"):
            break
    return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def first() -> Event:
        return parts.pop() if parts else await receive()

    return first


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Hold:
    """Asks for a long poll with every request of one of Flower's HTTP clients to a route that may be held."""

    def __init__(self, route: str, seconds: float) -> None:
        self._route, self._seconds = route, seconds

    def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
        """Add the header and go on."""
        if context.request.url.path == self._route:
            context.request.headers[HEADER.decode()] = f"{self._seconds:g}"
        return call_next(context)
